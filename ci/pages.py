"""A pytest plugin that runs the Python blocks of Markdown pages, each page in an empty folder.

A page with the line ``<!-- tested as a session -->`` is followed as a reader would: in order, its
console blocks run in a shell, a block whose first line is a comment with a path is written there,
and other Python blocks are scripts. All of it happens in an environment of its own, above the one
of the tests, so that the page may install things.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sybil import Document, Example, Region

ROOT = Path(__file__).parents[1]
SESSION = "<!-- tested as a session -->"
PATH = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")
SECONDS = 300


def _python(document: Document) -> Iterator[Region]:
    if SESSION not in document.text:
        yield from PythonCodeBlockParser()(document)


def _session(document: Document) -> Iterator[Region]:
    if SESSION in document.text:
        for language in ("console", "python", "toml"):
            yield from CodeBlockParser(language, _follow)(document)


def _follow(example: Example) -> None:
    """Do what a block of a session says."""
    names, text = example.namespace, str(example.parsed)
    here: Path = names.setdefault("_here", Path.cwd())
    if named := PATH.match(text):
        (here / named[1]).write_text(text, encoding="utf-8")
    elif example.region.lexemes["arguments"] == "python":
        _run(["python", "-c", text], names)
    elif example.region.lexemes["arguments"] == "console":
        for line in text.splitlines():
            command = line.removeprefix("$ ")
            if command.startswith("cd "):
                names["_here"] /= command.removeprefix("cd ")
            elif command != line:
                _run(["bash", "-euc", command], names)


def _run(command: list[str], names: dict[str, Any]) -> None:
    if "_environment" not in names:
        names["_environment"] = _environment(Path(names["_folder"].name))
    done = subprocess.run(
        command,
        cwd=names["_here"],
        env=names["_environment"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\nended with {done.returncode}:\n{done.stdout}"


def _environment(folder: Path) -> dict[str, str]:
    """Variables with which ``python`` is that of a new environment above this one."""
    home = folder / ".environment"
    venv.create(home, symlinks=os.name != "nt")
    layout = {"base": str(home), "platbase": str(home)}
    below = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    lines = [f"import site; site.addsitedir({path!r})\n" for path in below]
    Path(sysconfig.get_path("purelib", vars=layout), "below.pth").write_text("".join(lines))
    scripts = [sysconfig.get_path("scripts", vars=layout), sysconfig.get_path("scripts")]
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": os.pathsep.join([*scripts, os.environ.get("PATH", "")]),
        "PIP_CONSTRAINT": str(ROOT / "ci/constraints.txt"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def _enter(namespace: dict[str, Any]) -> None:
    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_before"] = os.getcwd()
    os.chdir(namespace["_folder"].name)


def _leave(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[_python, _session, SkipParser()],
    path=str(ROOT),
    patterns=["*.md"],
    setup=_enter,
    teardown=_leave,
).pytest()
