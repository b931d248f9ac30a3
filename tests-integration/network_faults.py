"""Torchrun on two hosts, each a network namespace with a name of its own, joined by a veth pair.

``nox -s network`` runs this; it needs root and iproute2, and takes minutes. A worker dies, a whole
host dies, and the link is cut and healed. Every sample counts once in what survives.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from seen import survived

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

SCRIPT = Path(__file__).parent / "scripts/elastic.py"
SETTINGS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
TOOLS = ("ip", "nsenter", "unshare")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
PORT = 29400  # in a namespace of its own
#: How long anything may take on a loaded machine, in seconds.
PATIENCE = 200.0
#: What is promised from the moment that a rank notices, in seconds.
PROMISED = 10.0
#: What ranks say when they notice.
NOTICED = re.compile(r"is cut off: nothing moves|No rank made progress")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.timeout(600),
]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """A namespace, and the processes in it.

    Attributes:
        lines: What they printed.
    """

    def __init__(self, name: str, space: str, folder: Path) -> None:
        self.name, self.space, self.folder = name, space, folder
        self.lines: list[str] = []
        self.agent: subprocess.Popen[str] | None = None

    def torchrun(self, *, hosts: bool, epochs: int = 2) -> None:
        """Start an agent with two workers; one of the agents hosts the store."""
        conf = (
            f"is_host={int(hosts)},last_call_timeout=3,keep_alive_interval=1,"
            "keep_alive_max_attempt=3"
        )
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2",
            "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=hosta:{PORT}",
            "--rdzv-id=test", "--monitor-interval=0.1", f"--rdzv-conf={conf}",
            str(SCRIPT), str(self.folder), str(epochs),
        ]  # fmt: skip
        enter = f"hostname {self.name} && mount --bind {self.folder}/hosts /etc/hosts && exec $@"
        wrapped = [
            "nsenter", f"--net=/var/run/netns/{self.space}", "unshare", "--uts", "--mount",
            "sh", "-c", enter.replace("$@", '"$@"'), "sh", *command,
        ]  # fmt: skip
        errors = (self.folder / f"{self.name}-{time.monotonic_ns()}.txt").open("w")
        with errors:
            self.agent = subprocess.Popen(
                wrapped, env={**os.environ, **SETTINGS}, stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, args=(self.agent,), daemon=True).start()

    def _read(self, agent: subprocess.Popen[str]) -> None:
        assert agent.stdout is not None
        with agent.stdout as lines:
            for line in lines:
                self.lines.append(line.strip())

    def wait_for(self, beginning: str, count: int, since: int = 0) -> list[list[str]]:
        """Words of so many lines with this beginning, from a line number on."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = [line.split() for line in self.lines[since:] if line.startswith(beginning)]
            if len(found) >= count:
                return found
            time.sleep(0.05)
        pytest.fail(f"{self.name}: no {count} lines {beginning!r}: {self.said()}")

    def said(self) -> str:
        """Everything that was printed here."""
        texts = [path.read_text() for path in sorted(self.folder.glob(f"{self.name}-*.txt"))]
        return "\n".join([*self.lines, *texts])

    def processes(self) -> list[int]:
        found = subprocess.run(
            ["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False
        )
        return [int(word) for word in found.stdout.split()]

    def kill(self) -> None:
        """All of it at once, as a power cut does."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait()

    def finish(self) -> int:
        assert self.agent is not None
        return self.agent.wait(PATIENCE)

    def link(self, state: str) -> None:
        """``up`` or ``down``."""
        _ip("-n", self.space, "link", "set", f"v{self.name[-1]}{os.getpid()}", state)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other, and nothing else."""
    mark = str(os.getpid())
    made = tuple(Host(f"host{x}", f"dt{x}{mark}", tmp_path) for x in "ab")
    addresses = {"hosta": "10.77.1.1", "hostb": "10.77.1.2"}
    names = "".join(f"{address} {name}\n" for name, address in addresses.items())
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    try:
        for host in made:
            _ip("netns", "add", host.space)
        first, second = made
        _ip(
            "link", "add", f"va{mark}", "netns", first.space, "type", "veth",
            "peer", "name", f"vb{mark}", "netns", second.space,
        )  # fmt: skip
        for host in made:
            device = f"v{host.name[-1]}{mark}"
            _ip("-n", host.space, "addr", "add", f"{addresses[host.name]}/24", "dev", device)
            for name in ("lo", device):
                _ip("-n", host.space, "link", "set", name, "up")
        yield first, second
    finally:
        for host in made:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.space], check=False, capture_output=True)


def _check_every_sample_counts_once(folder: Path) -> list[tuple[int, int]]:
    generations, counts = survived(folder)
    found: dict[int, Counter[int]] = counts
    assert {epoch: set(each.values()) for epoch, each in found.items()} == {0: {1}, 1: {1}}
    assert {len(each) for each in found.values()} == {480}
    print("generations (first step, world size):", generations)
    return generations


def test_a_killed_worker_restarts_both_hosts_from_the_checkpoint(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    first, second = hosts
    first.torchrun(hosts=True)
    second.torchrun(hosts=False)
    (begun, *_) = second.wait_for("begun", 2)
    second.wait_for("step", 2)
    os.kill(int(begun[3]), signal.SIGKILL)
    codes = [first.finish(), second.finish()]
    assert codes == [0, 0], first.said() + second.said()
    generations = _check_every_sample_counts_once(tmp_path)
    assert [size for _, size in generations] == [4] * len(generations)
    assert generations[-1][0] > 0


def test_a_host_that_dies_leaves_the_rest_to_go_on_with_half_the_world(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    first, second = hosts
    first.torchrun(hosts=True)
    second.torchrun(hosts=False)
    second.wait_for("step", 2)
    second.kill()
    assert first.finish() == 0, first.said()
    generations = _check_every_sample_counts_once(tmp_path)
    assert generations[0][1] == 4
    assert generations[-1][1] == 2
    assert generations[-1][0] > 0


def test_a_cut_link_ends_both_sides_and_a_healed_one_lets_the_host_join_again(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """The workers of the side that is cut off end; the other goes on; the host joins later."""
    first, second = hosts
    first.torchrun(hosts=True)
    second.torchrun(hosts=False)
    begun = [int(words[3]) for words in second.wait_for("begun", 2)]
    second.wait_for("step", 2)
    alive = [int(words[3]) for words in first.wait_for("begun", 2)]
    so_far = len(first.lines)
    second.link("down")
    cut = time.monotonic()
    noticed = _noticed_and_ended({first: alive, second: begun}, cut)
    for host, (seen, ended) in noticed.items():
        print(f"{host.name}: noticed {seen:.1f} s after the cut, ended {ended - seen:.1f} s later")
        assert ended - seen <= PROMISED, host.said()
    first.wait_for("begun", 2, so_far)
    second.kill()  # its agent may wait for ever: the store that it talks to was on the other side
    second.link("up")
    second.torchrun(hosts=False)
    assert first.finish() == 0, first.said()
    second.finish()
    generations = _check_every_sample_counts_once(tmp_path)
    assert 2 in [size for _, size in generations]


def _noticed_and_ended(
    ranks: dict[Host, list[int]], since: float
) -> dict[Host, tuple[float, float]]:
    """When each host's ranks said that something is wrong, and when all of them had ended."""
    seen: dict[Host, float] = {}
    ended: dict[Host, float] = {}
    while len(ended) < len(ranks):
        now = time.monotonic() - since
        for host, pids in ranks.items():
            if host not in seen and NOTICED.search(host.said()):
                seen[host] = now
            if host not in ended and not any(_lives(pid) for pid in pids):
                ended[host] = now
        assert now < PATIENCE, "\n".join(host.said() for host in ranks)
        time.sleep(0.05)
    assert len(seen) == len(ranks), "\n".join(host.said() for host in ranks)
    return {host: (seen[host], ended[host]) for host in ranks}


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
