"""Compiling the simulated device: what it needs, when it happens, and who waits for whom.

Most of it with a compiler that is a shell script, so that it takes no time.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from drivetrain_interfaces import ConfigurationError, UnavailableError

from drivetrain_conformance import simulated
from drivetrain_conformance.simulated import building

if building.torch_version() is None:
    pytest.skip("the simulated device needs torch", allow_module_level=True)

COMPILES = """#!/bin/sh
echo called >> "$LOG"
while [ "$1" != "-o" ]; do shift; done
echo compiled > "$2"
"""
FAILS = """#!/bin/sh
echo "device.cpp:1:2: error: no such standard" >&2
exit 1
"""
NEVER_ENDS = """#!/bin/sh
echo started > "$STARTED"
exec sleep 300
"""


class Place:
    """A cache, and a compiler that is a script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.env = {
            "PATH": os.environ["PATH"],
            "LOG": str(self.log),
            building.CACHE_VARIABLE: str(folder / "cache"),
        }

    def compiler(self, text: str, name: str = "c++") -> None:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.env["CXX"] = str(path)

    @property
    def calls(self) -> int:
        return len(self.log.read_text(encoding="utf-8").splitlines()) if self.log.exists() else 0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.compiler(COMPILES)
    return made


def sources() -> int:
    return len(list((Path(building.__file__).parent / "sources").glob("*.cpp")))


def test_asking_whether_it_can_be_used_loads_no_torch_and_compiles_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from drivetrain_conformance import simulated; simulated.unavailable();"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    env = {**os.environ, building.CACHE_VARIABLE: str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())


def test_it_is_compiled_once_and_found_again(place: Place) -> None:
    path = building.build(place.env)
    assert path.read_text(encoding="utf-8") == "compiled\n"
    assert place.calls == sources() + 1  # and once to link
    assert building.build(place.env) == path
    assert place.calls == sources() + 1
    assert sorted(each.suffix for each in path.parent.iterdir()) == [".lock", ".so"]


def test_a_command_compiles_it_ahead_and_says_where_or_why_not(place: Place) -> None:
    command = [sys.executable, "-m", "drivetrain_conformance.simulated"]
    env = {**os.environ, **place.env}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=True)
    assert Path(done.stdout.strip()) == building.library(place.env)
    place.compiler(FAILS)
    env |= {building.CACHE_VARIABLE: str(place.folder / "another"), "CXX": place.env["CXX"]}
    failed = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert failed.returncode == 1
    assert "no such standard" in failed.stderr.splitlines()[-1]


def test_every_module_of_it_can_be_imported_where_there_is_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys; sys.modules['torch'] = None\n"
        "from drivetrain_conformance import simulated\n"
        "names = [m.name for m in pkgutil.iter_modules(simulated.__path__)]\n"
        "[importlib.import_module(f'{simulated.__name__}.{n}') for n in names]; print(len(names))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert int(done.stdout or "0") >= 7, done.stderr


def test_several_that_ask_at_once_wait_for_one_of_them(place: Place) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: building.build(place.env), range(4)))
    assert len(paths) == 1
    assert place.calls == sources() + 1


def test_one_that_is_killed_while_compiling_stops_nobody(place: Place, tmp_path: Path) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    place.env["STARTED"] = str(started)
    place.compiler(NEVER_ENDS, "slow")
    code = f"from drivetrain_conformance.simulated import building; building.build({place.env!r})"
    first = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        assert started.read_text(encoding="utf-8") == "started\n"
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=30)
        place.compiler(COMPILES)  # its compiler is still running
        path = building.build(place.env)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    assert path.exists()
    assert not list(path.parent.glob("*.partial"))


def test_a_new_torch_another_source_or_flag_means_another_library(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {building.library(place.env).name}
    with monkeypatch.context() as patch:
        patch.setattr(building, "torch_version", lambda: "2.9.1")
        names.add(building.library(place.env).name)
    with monkeypatch.context() as patch:
        patch.setattr(building, "_flags", lambda version: ["-O3"])
        names.add(building.library(place.env).name)
    shutil.copytree(Path(building.__file__).parent / "sources", tmp_path / "sources")
    (tmp_path / "sources" / "runtime.h").write_text("// changed", encoding="utf-8")
    monkeypatch.setattr(building, "_SOURCES", tmp_path / "sources")
    names.add(building.library(place.env).name)
    assert len(names) == 4


def test_without_a_compiler_the_package_to_install_is_named(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), building.CACHE_VARIABLE: str(tmp_path / "cache")}
    assert "build-essential" in simulated.unavailable(env)
    with pytest.raises(UnavailableError, match=r"no C\+\+ compiler .*Install g\+\+ .*DT102"):
        building.build(env)


def test_what_was_compiled_before_needs_no_compiler(place: Place, tmp_path: Path) -> None:
    building.build(place.env)
    env = {**place.env, "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    assert building.compiler(env) is None
    assert not simulated.unavailable(env)
    assert building.build(env).exists()


@pytest.mark.parametrize(
    ("version", "told"),
    [(None, "Install torch"), ("2.5.1", "2.5.1 is installed"), ("1.13", "Upgrade torch")],
)
def test_a_torch_that_is_missing_or_too_old_is_said(
    version: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "torch_version", lambda: version)
    assert told in simulated.unavailable()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(place: Place) -> None:
    place.compiler(FAILS)
    with pytest.raises(UnavailableError, match=r"error: no such standard.*g\+\+ 11"):
        building.build(place.env)
    cache = Path(place.env[building.CACHE_VARIABLE])
    assert [each.suffix for each in cache.iterdir()] == [".lock"]
    place.compiler(COMPILES)
    assert building.build(place.env).exists()


def test_a_cache_that_cannot_be_written_names_the_variable(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    place.env[building.CACHE_VARIABLE] = str(tmp_path / "file" / "below")
    with pytest.raises(UnavailableError, match=building.CACHE_VARIABLE):
        building.build(place.env)


def test_the_cache_is_in_the_users_cache_directory() -> None:
    assert building.library({"XDG_CACHE_HOME": "/x"}).parent == Path("/x/drivetrain/simulated")
    home = Path("~/.cache/drivetrain/simulated").expanduser()
    assert building.library({}).parent == home


def test_options_travel_by_the_environment() -> None:
    given = simulated.Options(devices=4, memory_limit=1000, fp16=False, latency_us=1.5)
    assert simulated.Options.from_environment(given.to_environment()) == given
    assert simulated.Options.from_environment({}) == simulated.Options()


@pytest.mark.parametrize("text", ["{", "3", '{"device": 2}', '{"devices": 0}', '{"fp16": 1}'])
def test_options_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        simulated.Options.from_environment({simulated.VARIABLE: text})


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": 0},
        {"devices": True},
        {"devices": 1.5},
        {"memory_limit": -1},
        {"fp16": None},
        {"latency_us": -0.1},
        {"fail_at_launch": 0},
        {"fault_rank": -1},
        {"inplace": "no"},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        simulated.Options(**wrong)
