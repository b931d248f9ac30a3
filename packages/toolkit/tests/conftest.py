"""Fixtures that several test modules share."""

from __future__ import annotations

import runpy
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="session")
def lab():
    """Models, data and a way to bind a strategy; the same as the two ranks use."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Run all cases of ``two_ranks.py`` in two processes; gives a case's results by rank."""
    folder = tmp_path_factory.mktemp("two_ranks")
    # The server is ours, as torchrun's agent's would be, so its port is certainly free.
    server = torch.distributed.TCPStore(
        "127.0.0.1",
        0,
        None,
        is_master=True,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
    )
    children = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "error", str(SCRIPT)),
                *(str(rank), str(server.port), str(folder / f"{rank}.pt")),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=100)[1] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, error in zip(children, errors, strict=True):
        assert child.returncode == 0, error
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

    def case(name):
        for rank, result in enumerate(results):
            outcome, value = result[name]
            assert outcome == "ok", f"rank {rank}:\n{value}"
        return tuple(result[name][1] for result in results)

    return case
