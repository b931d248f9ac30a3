"""Compiling the simulated device: once for each version of torch, whoever asks first."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain_interfaces import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Where the compiled library is kept; ``~/.cache/drivetrain/simulated`` where it is not set.
CACHE_VARIABLE = "DRIVETRAIN_SIMULATED_CACHE"

#: The compiler and the oldest torch that the sources are for.
_COMPILERS = ("c++", "g++", "clang++")
_OLDEST_TORCH = (2, 6)

#: Seconds for one source, and for another process that compiles all of them.
_SECONDS_A_SOURCE = 600.0
_SECONDS_TO_WAIT = 1800.0

_SOURCES = Path(__file__).parent / "sources"

log = logging.getLogger(__name__)


def unavailable(env: Mapping[str, str] | None = None) -> str:
    """Why the simulated device cannot be used here, and what to install. Empty where it can.

    Loads no torch and compiles nothing.
    """
    env = os.environ if env is None else env
    if os.name != "posix":
        return f"The simulated device needs Linux or macOS, and this is {platform.system()}."
    found = torch_version()
    if found is None:
        return "The simulated device needs torch, which is not installed. Install torch."
    if _numbers(found) < _OLDEST_TORCH:
        return f"The simulated device needs torch 2.6, and {found} is installed. Upgrade torch."
    if compiler(env) is None and not library(env).exists():
        return (
            "The simulated device has to be compiled once, and there is no C++ compiler "
            f"({', '.join(_COMPILERS)}). Install g++ (apt-get install build-essential, "
            "or xcode-select --install)."
        )
    return ""


def torch_version() -> str | None:
    """The version of torch that is installed, without loading it; None where there is none."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def compiler(env: Mapping[str, str]) -> str | None:
    """The path of the C++ compiler: the one in ``CXX``, or one of the usual names on ``PATH``."""
    names = (env["CXX"],) if env.get("CXX") else _COMPILERS
    found = (shutil.which(name, path=env.get("PATH")) for name in names)
    return next((path for path in found if path), None)


def library(env: Mapping[str, str], named: str = "") -> Path:
    """Where a compiled library is, or will be: a name for each torch, source and flag.

    Args:
        env: Variables, for the folder.
        named: One of torch's own device types, for its hooks; empty for the library itself.
    """
    digest = hashlib.sha256()
    version = torch_version() or ""
    for part in (version, sys.platform, platform.machine(), *_flags(version), named):
        digest.update(f"{part}\0".encode())
    for source in sorted(path for path in _SOURCES.rglob("*") if path.is_file()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return _cache(env) / f"{version}-{digest.hexdigest()[:16]}.so"


def build(env: Mapping[str, str] | None = None, named: str = "") -> Path:
    """Compile the library if it is not there yet; returns where it is.

    With ``named``, that of the hooks of one of torch's own device types, which needs the other.

    Processes that ask at the same time wait for the first. One that is killed leaves nothing that
    another would wait for: the lock goes with its process, and the library appears when complete.

    Raises:
        UnavailableError: There is no compiler or no torch, it failed, or the cache is read-only.
    """
    env = os.environ if env is None else env
    if reason := unavailable(env):
        what, _, hint = reason.partition(". ")
        raise UnavailableError(f"{what.removesuffix('.')}.", hint)
    target = library(env, named)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _compile(target, env, named)
    except OSError as error:
        if isinstance(error, UnavailableError):
            raise
        raise UnavailableError(
            f"The simulated device could not be kept in {str(target.parent)!r} ({error}).",
            f"Set {CACHE_VARIABLE} to a directory that can be written.",
        ) from error
    return target


def _cache(env: Mapping[str, str]) -> Path:
    if given := env.get(CACHE_VARIABLE):
        return Path(given)
    home = env.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "drivetrain" / "simulated"


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _flags(version: str) -> list[str]:
    major, minor = _numbers(version) if version else (0, 0)
    standard = "c++20" if (major, minor) >= (2, 10) else "c++17"
    # The headers of single operators: all of torch's at once take minutes.
    return [
        f"-std={standard}",
        "-O1",
        "-fPIC",
        "-w",
        "-DAT_PER_OPERATOR_HEADERS",
        f"-DDRIVETRAIN_TORCH={major * 100 + minor}",
    ]


def _compile(target: Path, env: Mapping[str, str], named: str) -> None:
    # Only the holder of the lock gets here, so these are of processes that were killed.
    for leftover in target.parent.glob(f"{target.stem}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    log.warning("Compiling the simulated device into %s; this is done once.", target)
    program = compiler(env)
    assert program is not None, "unavailable() says so first"
    prefix = f"{target.stem}."
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix, suffix=".partial") as folder:
        import torch

        home = Path(torch.__file__).parent
        flags = [
            *_flags(torch_version() or ""),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{home / 'include' / part}" for part in ("", "torch/csrc/api/include")),
        ]
        if named:
            interface = f"ATen/detail/{named}HooksInterface.h"
            flags += [f"-DDRIVETRAIN_TYPE={named}", "-include", interface]
        objects = []
        for source in sorted((_SOURCES / "named" if named else _SOURCES).glob("*.cpp")):
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            _run([program, *flags, "-c", str(source), "-o", objects[-1]], env)
        made = Path(folder) / target.name
        found_at = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"]
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
        if named and sys.platform == "darwin":  # what the other library brings is found later
            libraries += ["-undefined", "dynamic_lookup"]
        _run([program, "-shared", *objects, "-o", str(made), *found_at, *libraries], env)
        made.replace(target)


def _run(command: list[str], env: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - the system's compiler, on our own sources
            command,
            env=dict(env),
            capture_output=True,
            text=True,
            timeout=_SECONDS_A_SOURCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"{command[0]} took more than {_SECONDS_A_SOURCE:.0f} s for one source of the "
            "simulated device.",
            "Try again on a machine that is less busy.",
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        told = next((line for line in lines if "error" in line), lines[-1])
        raise UnavailableError(
            f"{command[0]} could not compile the simulated device for torch {torch_version()}: "
            f"{told}",
            "Use a compiler that knows the C++ standard of this torch: g++ 11 or newer.",
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that the system takes back when its process ends, however it ends."""
    import fcntl

    deadline = time.monotonic() + _SECONDS_TO_WAIT
    with path.open("w", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"Another process has been compiling the simulated device for "
                        f"{_SECONDS_TO_WAIT:.0f} s; it holds {str(path)!r}.",
                        "End that process, and try again.",
                    ) from error
            time.sleep(0.1)
        yield
