"""Hosts and managers for the tests of this folder, all real, all on this machine.

A host is a network namespace with a name of its own; a bridge joins them. SLURM is one controller
and two node daemons in three of them. Everything is ended and removed by process id and by name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "scripts"
#: How long any command of a test may take, in seconds. Generous: a loaded machine is no failure.
PATIENCE = 250
SLURM = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "salloc", "scontrol")
_MANAGED = ("SLURM_", "OMPI_", "PMI", "DRIVETRAIN", "TORCHELASTIC_", "PET_")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SLURM_CONF = """\
ClusterName=ci
SlurmctldHost=ctl(10.77.9.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits this many seconds and one more before it runs again; 120 by default.
AuthInfo=socket={run}/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={run}/state
SlurmctldPidFile={run}/slurmctld.pid
SlurmctldLogFile={run}/log/slurmctld.log
SlurmdSpoolDir={run}/spool/%n
SlurmdPidFile={run}/slurmd-%n.pid
SlurmdLogFile={run}/log/slurmd-%n.log
# This machine may have no control groups, and fewer cores than are told here.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=pmi2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=20
JobRequeue=1
LaunchParameters=use_interactive_step
ReturnToService=2
GresTypes=gpu
NodeName=node[1-2] NodeAddr=10.77.9.[1-2] CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=ci Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def clean() -> dict[str, str]:
    """The variables of this process, without what a manager of the tests may have set."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_MANAGED) and name not in _PLACE
    }


def command(
    words: list[str], folder: Path, env: dict[str, str] | None = None, *, good: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``good`` says that its exit code must be 0."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**clean(), "PYTHONPATH": str(SCRIPTS), **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert not good or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


class Hosts:
    """Network namespaces with names, joined by a bridge in the first of them.

    Args:
        run: A folder for the file of host names.
        names: The hosts; the first gets the last address, the others count from 1.
        six: Addresses and names of IPv6, and no others.
        apart: Each host's own name leads to a second interface, which reaches nobody.
    """

    def __init__(self, run: Path, *names: str, six: bool = False, apart: bool = False) -> None:
        self.names = names
        mark = f"dt{os.getpid()}{'six' * six}{'apart' * apart}"
        self._spaces = {name: f"{mark}-{name}" for name in names}
        network, self._bits = ("fd77::", 64) if six else ("10.77.9.", 24)
        self.addresses = {name: f"{network}{number or 254}" for number, name in enumerate(names)}
        self._second = (
            {name: f"10.88.{number}.1" for number, name in enumerate(names)} if apart else {}
        )
        self._file = run / "hosts"
        named = self._second or self.addresses
        lines = [f"{address} {name}" for name, address in named.items()]
        self._file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        first, *others = self.names
        bridge = self._spaces[first]
        for space in self._spaces.values():
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        self._address(first, "br0")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for name in others:
            space, port = self._spaces[name], f"v{name}"
            _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port,
                "netns", bridge)  # fmt: skip
            self._address(name, "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", bridge, "link", "set", port, "master", "br0", "up")
        for name, address in self._second.items():
            space = self._spaces[name]
            _ip("-n", space, "link", "add", "own0", "type", "veth", "peer", "name", "own1")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "own0")
            for each in ("own0", "own1"):
                _ip("-n", space, "link", "set", each, "up")

    def _address(self, name: str, device: str) -> None:
        address = f"{self.addresses[name]}/{self._bits}"
        # Addresses of IPv6 are usable only after a while, unless nobody asks who else has them.
        once = ["nodad"] if ":" in address else []
        _ip("-n", self._spaces[name], "addr", "add", address, "dev", device, *once)

    def on(self, host: str, *words: str) -> list[str]:
        """The command that runs ``words`` on a host, as the process that is started."""
        inside = f'hostname "$0" && mount --bind {self._file} /etc/hosts && exec "$@"'
        enter = ["nsenter", f"--net=/var/run/netns/{self._spaces[host]}"]
        return [*enter, "unshare", "--uts", "--mount", "sh", "-c", inside, host, *words]

    def close(self) -> None:
        """Remove them."""
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def need_hosts() -> None:
    """Skip where this machine makes no network namespaces."""
    missing = [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"hosts are network namespaces, which need root and {', '.join(missing)}")
    tried = subprocess.run(
        ["ip", "netns", "add", f"dt{os.getpid()}-try"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip()}")
    _ip("netns", "del", f"dt{os.getpid()}-try")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """``hosta`` and ``hostb``."""
    need_hosts()
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), "hosta", "hostb")
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def hosts_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``hosts_of(six=True)`` or ``hosts_of(apart=True)``: other pairs of hosts."""
    need_hosts()
    made: dict[str, Hosts] = {}

    def make(**kind: bool) -> Hosts:
        name = "-".join(kind)
        if name not in made:
            made[name] = Hosts(tmp_path_factory.mktemp(name), "hosta", "hostb", **kind)
        return made[name]

    yield make
    for hosts in made.values():
        hosts.close()


class Slurm:
    """A controller and two nodes, and their commands.

    Attributes:
        folder: Where commands run.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "work"
        self._hosts = Hosts(run, "ctl", "node1", "node2")
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("munge", "state", "log", "spool/node1", "spool/node2", "dev", "work"):
            (run / name).mkdir(parents=True)
        # Other users' daemons must reach the socket; pytest's folders are for one user.
        for folder in (run, *run.parents[:2]):
            folder.chmod(0o755)
        (run / "munge").chmod(0o711)
        key = run / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (run / "slurm.conf").write_text(SLURM_CONF.format(run=run))
        for number in range(2):  # devices that do nothing, so that a node can have some to give
            os.mknod(run / f"dev/gpu{number}", 0o20666, os.makedev(1, 3))
        (run / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={run}/dev/gpu[0-1]\n")
        self.env = {"SLURM_CONF": str(run / "slurm.conf")}
        munge = [f"--{name}={run}/munge/munge{end}" for name, end in (
            ("key-file", ".key"), ("socket", ".socket"), ("pid-file", "d.pid"),
            ("log-file", "d.log"), ("seed-file", "d.seed"),
        )]  # fmt: skip
        self._start(["munged", "--foreground", "--force", *munge])
        _until((run / "munge/munge.socket").exists, "munged")
        self._start(self._hosts.on("ctl", "slurmctld", "-D", "-c"))
        for node in ("node1", "node2"):
            self._start(self._hosts.on(node, "slurmd", "-D", "-N", node, "-c"))
        idle = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
        _until(lambda: len(self(*idle, good=False).stdout.split()) == 2, "two idle nodes")

    def _start(self, words: list[str]) -> None:
        self._daemons.append(
            subprocess.Popen(
                words,
                env={**clean(), **self.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def __call__(
        self, *words: str, env: dict[str, str] | None = None, good: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller's host."""
        given = {**self.env, **(env or {})}
        return command(self._hosts.on("ctl", *words), self.folder, given, good=good)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command on the controller's host; the process is the command itself."""
        return subprocess.Popen(
            self._hosts.on("ctl", *words),
            cwd=self.folder,
            env={**clean(), "PYTHONPATH": str(SCRIPTS), **self.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def batch(self, *words: str) -> str:
        """Queue a job and wait until it has run well; its number."""
        job = self("sbatch", "--parsable", *words).stdout.strip()
        # The command's own way of waiting looks every ten seconds.
        done = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        _until(lambda: set(self.states(job)) <= set(done), f"the end of job {job}", PATIENCE)
        assert set(self.states(job)) == {"COMPLETED"}, self.states(job)
        return job

    def states(self, job: str) -> list[str]:
        """What the controller says about a job or the parts of one, such as ``RUNNING``."""
        lines = self("scontrol", "show", "job", job, "-o").stdout.splitlines()
        parts = [dict(part.partition("=")[::2] for part in line.split()) for line in lines]
        return [part["JobState"] for part in parts if "JobState" in part]

    def in_a_terminal(self, *words: str) -> None:
        """Run a command on the controller's host with a terminal; it ends with exit code 0."""
        ours, theirs = os.openpty()
        try:
            done = subprocess.run(
                self._hosts.on("ctl", *words),
                cwd=self.folder,
                env={**clean(), "TERM": "dumb", **self.env},
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                timeout=PATIENCE,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        finally:
            os.close(ours)
            os.close(theirs)

    def close(self) -> None:
        """End all jobs and daemons, and remove the hosts."""
        with suppress(Exception):
            self("scancel", "--quiet", "--user=root", good=False)
            _until(lambda: not self("squeue", "-h").stdout.strip(), "an empty queue", 40)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=20)
            daemon.kill()
            daemon.wait()
        self._hosts.close()


def _until(true: Any, what: str, patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, f"{what} did not come within {patience} seconds"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A real SLURM with two nodes of four cores."""
    missing = [name for name in SLURM if not shutil.which(name)]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client "
            "munge, or nox -s clusters as root"
        )
    need_hosts()
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture
def until() -> Any:
    """Wait for something, at most a minute."""
    return _until


@pytest.fixture
def run() -> Any:
    """Run a command to its end: ``run(words, folder, env, good=True)``."""
    return command


def found(text: str) -> list[Any]:
    """What ``whoami.py`` or ``ddp_equal.py`` printed, one value for each process."""
    # Managers may put what two processes write at the same time into one line.
    return [json.JSONDecoder().raw_decode(part)[0] for part in text.split("FOUND ")[1:]]


@pytest.fixture
def values() -> Any:
    """Reads what scripts have found out of their output."""
    return found


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The weights that one process ends with."""
    folder = tmp_path_factory.mktemp("alone")
    (value,) = found(command([sys.executable, str(HERE / "ddp_equal.py")], folder).stdout)
    assert value["size"] == 1
    return value["weights"]


@pytest.fixture
def clean_variables() -> dict[str, str]:
    """The variables for a process that no manager has started."""
    return {**clean(), "PYTHONPATH": str(SCRIPTS)}
