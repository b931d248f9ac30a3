"""Torchrun with a changing number of agents: a lost one costs steps, and no sample.

The agents of these tests share a machine; ``nox -s network`` gives each a network of its own.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from seen import survived

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Running, Starter

#: See docs/processes.md: without the switch workers of a restart may meet the dead ones.
SETTINGS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def _agent(start: Starter, folder: Path, port: int, *, hosts: bool) -> Running:
    conf = (
        f"is_host={int(hosts)},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    )
    torchrun = (
        "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test",
        "--local-addr=127.0.0.1", "--monitor-interval=0.1", f"--rdzv-conf={conf}",
    )  # fmt: skip
    return start("elastic.py", str(folder), "2", by=torchrun, env=SETTINGS)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_a_lost_agent_costs_steps_and_no_sample(start: Starter) -> None:
    port = _free_port()
    first = _agent(start, start.folder, port, hosts=True)
    second = _agent(start, start.folder, port, hosts=False)
    ((_, _, _, worker, _),) = second.wait_for("begun")
    second.wait_for("step", 2)
    for pid in (second.process.pid, int(worker)):  # workers have sessions of their own
        os.kill(pid, signal.SIGKILL)
    second.sweep()
    assert first.finish(within=100) == 0, first.output
    assert first.left_behind() == []
    generations, counts = survived(start.folder)
    sizes = [size for _, size in generations]
    assert sizes[-1] == 1, generations
    assert 2 in sizes
    assert generations[-1][0] > 0, "it went on from a checkpoint"
    assert {epoch: set(found.values()) for epoch, found in counts.items()} == {0: {1}, 1: {1}}
    assert {len(found) for found in counts.values()} == {480}
