"""Have submitit queue a job of four tasks on two nodes that train; what rank 0 printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import submitit

EQUAL = str(Path(__file__).parent / "ddp_equal.py")


def train() -> str:
    """In a task, which submitit has started with srun."""
    done = subprocess.run([sys.executable, EQUAL], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


if __name__ == "__main__":
    executor = submitit.SlurmExecutor(folder=sys.argv[1])
    executor.update_parameters(nodes=2, ntasks_per_node=2, mem_per_cpu="0", time=5)
    job = executor.submit(train)
    print("".join(job.results()))
