"""Two real processes over gloo that run cases of ``ranks/cases.py``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CREW = Path(__file__).parent / "ranks/crew.py"


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory):
    """Runs named cases on two ranks in one group, and returns what rank 0 answered."""

    def run(*names: str, seconds: int = 300):
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = (sys.executable, str(CREW))
        arguments = (str(port), ",".join(names), str(folder / "answers.pt"))
        processes = [
            subprocess.Popen(
                [*command, str(rank), *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=folder,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            texts = [process.communicate(timeout=seconds)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
        return torch.load(folder / "answers.pt", weights_only=False)

    return run
