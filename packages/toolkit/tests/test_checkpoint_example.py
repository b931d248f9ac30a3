"""The format is specified well enough for a program that knows nothing of this project."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from drivetrain_interfaces.checkpoint import SaveGroup, Shard

from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

EXAMPLE = Path(__file__).parents[3] / "examples" / "read_checkpoint.py"
WATCH = """
import runpy, sys, torch
from pathlib import Path
space = runpy.run_path(sys.argv[1])
tree = space["read_checkpoint"](Path(sys.argv[2]))
assert torch.equal(tree["w"], torch.arange(12.0).reshape(4, 3)), tree
assert tree["list"][0].dtype == torch.float8_e4m3fn and tree["list"][1].shape == (), tree
assert tree["n"] == 7 and tree["t"] == {"$": "tuple", "value": [1, 2]}
assert not [name for name in sys.modules if name.startswith("drivetrain")]
"""


@pytest.mark.skipif(not EXAMPLE.exists(), reason="only in the repository")
def test_another_program_reads_what_several_processes_wrote(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)

    def save(rank: int) -> None:
        tree = {
            "w": Shard(whole[2 * rank : 2 * rank + 2], (2 * rank, 0), (4, 3)),
            "list": [torch.ones(3).to(torch.float8_e4m3fn), torch.tensor(2)],
            "n": 7,
            "t": (1, 2),
        }
        group = SaveGroup(rank, 2, "t0", 30)
        DirectoryCheckpointIO().save_sharded(tree, str(tmp_path / "x"), group)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, range(2)))
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(EXAMPLE), str(tmp_path / "x")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert not [
        line for line in lines if "import" in line and "drivetrain" in line.split("import")[1]
    ]
