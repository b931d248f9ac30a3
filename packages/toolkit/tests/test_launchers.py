"""Plans, places and results of launchers. Rules N1 to N5 and N13 of docs/contracts/launcher.md."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import discovery
from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.errors import ClusterError, UserCodeError
from drivetrain_interfaces.launcher import Launcher, LaunchRequest, RunsInPlace

from drivetrain_toolkit import launchers
from drivetrain_toolkit.environments import LOCAL
from drivetrain_toolkit.launchers import plans, scripts
from drivetrain_toolkit.processes import PortReservation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
OURS = (*PLACE, "MASTER_ADDR", "MASTER_PORT", "DRIVETRAIN_LAUNCHED", "DRIVETRAIN_CLUSTER")
LOCAL_ONES = ("attach", "fork", "forkserver", "notebook", "script", "spawn")
ALL = (*LOCAL_ONES, "kubeflow", "mpi", "ray", "slurm")
TWO = LaunchRequest(local_size=2)


@pytest.fixture(autouse=True)
def nobody_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OURS, "TORCHELASTIC_RUN_ID", "DRIVETRAIN_FAILURES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def from_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "this_script", lambda: scripts.Script(("python", "x.py"), "/"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def start(body: str, *command: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        (tmp_path / "train.py").write_text(body)
        done = subprocess.run(
            [sys.executable, *(command or ("train.py",))],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    return start


@pytest.mark.parametrize("name", ALL)
def test_each_is_registered_and_satisfies_the_contract(name: str) -> None:
    """N1"""
    (claim,) = discovery.registrations(discovery.LAUNCHERS)[name]
    launcher = claim.load()()
    assert isinstance(launcher, Launcher)
    assert isinstance(launcher, RunsInPlace)


def test_importing_launchers_loads_no_torch() -> None:
    """N1"""
    code = "import sys, drivetrain_toolkit.launchers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_where_rank_0_runs_and_what_works_at_a_prompt() -> None:
    """N1"""
    table = {
        name: (getattr(launchers, name)().in_place, getattr(launchers, name)().interactive)
        for name in ALL
    }
    assert table == {
        "attach": (True, True),
        "fork": (False, True),
        "forkserver": (False, True),
        "kubeflow": (False, False),
        "mpi": (False, True),
        "notebook": (False, True),
        "ray": (False, True),
        "script": (True, False),
        "slurm": (False, True),
        "spawn": (False, True),
    }


@pytest.mark.usefixtures("from_a_script")
@pytest.mark.parametrize("name", [name for name in LOCAL_ONES if name != "attach"])
def test_a_plan_gives_each_process_the_world_that_it_will_read(name: str) -> None:
    """N2"""
    request = LaunchRequest(local_size=2, num_nodes=3, node_rank=1, address="10.0.0.1", port=4000)
    plan = getattr(launchers, name)().plan(request)
    assert plan.launcher == name
    assert [(w.rank, w.size, w.local_rank, w.local_size, w.node_rank) for w in plan.worlds] == [
        (2, 6, 0, 2, 1),
        (3, 6, 1, 2, 1),
    ]
    assert {(w.address, w.port) for w in plan.worlds} == {("10.0.0.1", 4000)}
    for world in plan.worlds:
        assert LOCAL.world(plans.place(world, name)) == world


@pytest.mark.usefixtures("from_a_script")
@pytest.mark.parametrize("name", ["fork", "script", "spawn"])
def test_one_machine_meets_at_a_free_port_of_its_own(name: str) -> None:
    """N3"""
    first, second = getattr(launchers, name)(), getattr(launchers, name)()
    (world, other), (elsewhere, _) = first.plan(TWO).worlds, second.plan(TWO).worlds
    assert (world.address, world.port) == (other.address, other.port)
    assert world.address == "127.0.0.1"
    assert world.port != elsewhere.port


def test_a_planned_port_is_kept_until_rank_0_listens_on_it() -> None:
    """N3"""
    reservation = PortReservation()
    store = torch.distributed.TCPStore("127.0.0.1", reservation.port, 1, is_master=True)
    store.set("key", "value")
    assert store.get("key") == b"value"
    del store
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", reservation.port))
    reservation.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", reservation.port))


@pytest.mark.parametrize("name", ["fork", "script", "spawn"])
@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (LaunchRequest(local_size=0), "at least one process"),
        (LaunchRequest(num_nodes=0), "at least one process"),
        (LaunchRequest(num_nodes=2, node_rank=2, address="a", port=1), "from 0 to 1"),
        (LaunchRequest(num_nodes=2), "MASTER_ADDR"),
        (LaunchRequest(num_nodes=2, address="a"), "MASTER_PORT"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    name: str, request_: LaunchRequest, what: str
) -> None:
    """N2"""
    with pytest.raises(ClusterError, match=what):
        getattr(launchers, name)().plan(request_)


@pytest.mark.parametrize("name", ["fork", "script", "spawn"])
def test_a_rank_starts_no_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """N4"""
    for key, value in plans.place(World(0, 2, 0, 2, 0, "h", 1), "spawn").items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ClusterError, match="one of several already"):
        getattr(launchers, name)().plan(TWO)


def test_attach_runs_one_process_in_place() -> None:
    """N5"""
    launcher = launchers.attach()
    plan = launcher.plan(LaunchRequest())
    value = object()
    assert plan.worlds == (World(),)
    assert launcher.launch(lambda world: (world, value), plan) == (World(), value)


def test_attach_lets_errors_pass() -> None:
    """N5"""

    def main(world: World) -> None:
        raise KeyError("x")

    launcher = launchers.attach()
    with pytest.raises(KeyError):
        launcher.launch(main, launcher.plan(LaunchRequest()))


def test_attach_reads_the_environment_when_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    """N5"""
    world = World(1, 2, 1, 2, 0, "127.0.0.1", 29500)
    launcher = launchers.attach()
    for key, value in plans.place(world, "x").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "id")
    monkeypatch.delenv("DRIVETRAIN_LAUNCHED")
    monkeypatch.delenv("DRIVETRAIN_CLUSTER")
    (found,) = launcher.plan(TWO).worlds
    assert (found.rank, found.environment) == (1, "torchrun")
    assert launcher.launch(lambda world: world.rank, launcher.plan(TWO)) == 1


@pytest.mark.parametrize(
    "request_",
    [LaunchRequest(), LaunchRequest(local_size=4), LaunchRequest(local_size=2, num_nodes=2)],
)
def test_attach_refuses_a_world_of_another_shape(request_: LaunchRequest) -> None:
    """N5"""
    world = World(1, 2, 1, 2, 0, "127.0.0.1", 29500, evidence=("RANK=1",))
    with pytest.raises(ClusterError, match=r"2 of 2 processes were started.*RANK=1"):
        launchers.AttachLauncher(world).plan(request_)
    assert launchers.AttachLauncher(world).plan(TWO).worlds == (world,)


def test_attach_refuses_ranks_that_nobody_started() -> None:
    """N5"""
    with pytest.raises(ClusterError, match=r"2 processes.*torchrun"):
        launchers.attach().plan(TWO)


def test_fork_takes_any_function_and_returns_what_rank_0_returned() -> None:
    """N1, N3"""
    launcher = launchers.fork()
    here = os.getpid()

    def main(world: World) -> Any:
        read = LOCAL.world(os.environ)
        return world.rank, read == world, os.getppid() == here, torch.arange(3)

    rank, same, child, tensor = launcher.launch(main, launcher.plan(TWO))
    assert (rank, same, child) == (0, True, True)
    assert torch.equal(tensor, torch.arange(3))
    assert "RANK" not in os.environ


def test_a_large_result_passes_the_pipe() -> None:
    launcher = launchers.fork()
    plan = launcher.plan(TWO)
    assert launcher.launch(lambda world: bytes(3_000_000), plan) == bytes(3_000_000)


def test_forks_compute_with_one_thread_unless_the_user_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """N13: the parent has used its pool of threads, which a copy does not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.ones(600, 600)
        large @ large

        def main(world: World) -> Any:
            return torch.get_num_threads(), float((large @ large).sum())

        launcher = launchers.fork()
        plan = launcher.plan(TWO)
        assert plan.environment == (("OMP_NUM_THREADS", "1"),)
        assert launcher.launch(main, plan) == (1, 600.0**3)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        plan = launcher.plan(TWO)
        assert plan.environment == ()
        assert launcher.launch(lambda world: torch.get_num_threads(), plan) == 2
    finally:
        torch.set_num_threads(before)


def test_signal_handlers_are_put_back_here_and_in_the_forks() -> None:
    import signal

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    launcher = launchers.fork()

    def main(world: World) -> Any:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    plan = launcher.plan(TWO)
    # The functions of this process and of its copy have one address.
    assert launcher.launch(lambda world: list(map(repr, main(world))), plan) == [*map(repr, before)]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_spawn_refuses_what_cannot_be_pickled_before_it_starts_anything() -> None:
    launcher = launchers.spawn()
    with pytest.raises(UserCodeError, match=r"cannot be pickled.*launcher='fork'"):
        launcher.launch(lambda world: None, launcher.plan(TWO))


def test_spawn_refuses_what_was_defined_at_a_prompt(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = """
import functools
from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import launchers
class Net: pass
def main(world, net=Net()): pass
launcher = launchers.spawn()
try:
    launcher.launch(functools.partial(main, net=Net()), launcher.plan(LaunchRequest(2)))
except Exception as error:
    print(error)
"""
    out = run("", "-c", code).stdout
    assert "cannot import Net, main, defined at a prompt" in out


def test_an_unguarded_script_under_spawn_is_told_what_to_do(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """N4: the new process imports the script, and would start processes again."""
    done = run(
        """
from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import launchers
def main(world): pass
launcher = launchers.spawn()
plan = launcher.plan(LaunchRequest(2))
try:
    launcher.launch(main, plan)
except RuntimeError as error:
    print(error)
"""
    )
    assert "if __name__ == '__main__'" in done.stderr
    assert "ended with exit code 1 before it finished" in done.stdout


SCRIPT = """
import os, sys
from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import launchers

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

state = []

def main(world):
    state.append(world.rank)
    say("main", world.rank, os.environ["RANK"], world.environment, sys.argv[1:], *FACTS)
    return state

FACTS = (sys.flags.optimize, "dev" in sys._xoptions, os.getcwd())
launcher = launchers.script()
if launcher.launch(main, launcher.plan(LaunchRequest(2))) is not state:
    raise SystemExit("not the same object")
"""


def ranks(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What ranks print, without a word of gloo's in some versions of torch (2.9)."""
    return sorted(each for each in done.stdout.splitlines() if not each.startswith("[Gloo]"))


@pytest.mark.parametrize("options", [("-O", "-X", "dev"), ("-OXdev", "-W", "default")])
def test_script_runs_the_same_command_for_each_rank(
    run: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    """N5: interpreter options, arguments and folder are those of rank 0, which runs in place."""
    done = run(SCRIPT, *options, "train.py", "--lr", "a b")
    tail = f"['--lr', 'a b'] 1 True {tmp_path}"
    assert ranks(done) == [f"main {rank} {rank} local {tail}" for rank in (0, 1)]


def test_script_runs_a_module_again_as_a_module(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """N5"""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(
        "from package.names import WHO\nprint(WHO, __package__, flush=True)\n" + SCRIPT
    )
    (tmp_path / "package" / "names.py").write_text("WHO = 'me'")
    done = run("", "-m", "package", "-m")
    assert ranks(done)[2:] == ["me package"] * 2
    assert "['-m']" in ranks(done)[1]


def test_script_starts_ranks_where_the_script_was_started(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """N5: it has changed its folder since, and its name is relative to the old one."""
    (tmp_path / "sub").mkdir()
    done = run("import os\nos.chdir('sub')\n" + SCRIPT)
    assert [line.rsplit(" ", 1)[1] for line in ranks(done)] == [str(tmp_path / "sub")] * 2


@pytest.mark.parametrize("second", ["launchers.script()", "launchers.attach()"])
def test_a_second_launch_in_a_script_joins_the_ranks_of_the_first(
    run: Callable[..., subprocess.CompletedProcess[str]], second: str
) -> None:
    """N5"""
    done = run(
        SCRIPT
        + f"""
again = {second}
again.launch(lambda world: say("again", world.rank), again.plan(LaunchRequest(2)))
try:
    again.plan(LaunchRequest(1))
except Exception as error:
    say(type(error).__name__)
"""
    )
    assert ranks(done)[:4] == ["ClusterError"] * 2 + ["again 0", "again 1"]


def test_a_script_with_one_process_starts_none(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    body = SCRIPT.replace("LaunchRequest(2)", "LaunchRequest(1)").replace('os.environ["RANK"]', "0")
    assert len(ranks(run(body))) == 1


@pytest.mark.parametrize(
    ("command", "what"),
    [(("-c",), "python -c"), (("-Bc",), "python -c"), (("-",), "standard input")],
)
def test_script_refuses_where_there_is_no_script(
    tmp_path: Path, command: tuple[str, ...], what: str
) -> None:
    """N5"""
    code = """
from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import launchers
launchers.script().plan(LaunchRequest(2))
"""
    done = subprocess.run(
        [sys.executable, *command, *([] if command == ("-",) else [code])],
        input=code,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "ClusterError: The 'script' launcher" in done.stderr
    assert what in done.stderr


def test_script_refuses_at_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """N5"""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ClusterError, match="a prompt or a notebook"):
        launchers.script().plan(TWO)


@pytest.mark.parametrize(
    ("given", "kind", "index"),
    [
        (["python", "a.py", "-c"], "file", 1),
        (["python", "-W", "error", "a.py"], "file", 3),
        (["python", "-Werror", "-X", "dev", "a.py"], "file", 4),
        (["python", "-BWerror", "a.py"], "file", 2),
        (["python", "-Bm", "pkg"], "m", 1),
        (["python", "-mpkg"], "m", 1),
        (["python", "-I", "-c", "x"], "c", 2),
        (["python", "--check-hash-based-pycs", "always", "a.py"], "file", 3),
        (["python", "-"], "-", 1),
        (["python"], "", 1),
        (["python", "-i"], "", 2),
    ],
)
def test_the_interpreters_command_line_is_understood(
    given: list[str], kind: str, index: int
) -> None:
    assert scripts._what_runs(given) == (kind, index)


def test_two_ranks_of_a_script_meet_over_gloo(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """N3: rank 0's store listens on the planned port, twice in one script."""
    done = run(
        """
import os
import torch
import torch.distributed as dist
from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import launchers

def main(world):
    store = dist.TCPStore(world.address, world.port, world.size, world.is_main)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    total = torch.tensor([world.rank + 1.0])
    dist.all_reduce(total)
    dist.destroy_process_group()
    os.write(1, f"sum {total.item()}\\n".encode())

launcher = launchers.script()
launcher.launch(main, launcher.plan(LaunchRequest(2)))
"""
    )
    # Some versions of gloo print a line of their own, in pieces that others come between.
    assert re.findall(r"sum (\S+)\n", done.stdout) == ["3.0", "3.0"]
