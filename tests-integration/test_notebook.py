"""The notebook launcher in a real Jupyter kernel, started and read by nbclient."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

CELLS = (
    """
import torch
from drivetrain import Callback, Module, Trainer, seed_everything

class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Telling(Callback):
    seen = 0
    def on_train_end(self, trainer, module):
        self.seen = trainer.global_step
        print("told by", trainer.world.rank, "of", trainer.world.size, flush=True)
    def state_dict(self):
        return {"seen": self.seen}
    def load_state_dict(self, state):
        self.seen = state["seen"]

seed_everything(1)
net, telling = Net(), Telling()
trainer = Trainer(
    accelerator="cpu", devices=2, launcher="notebook", max_steps=2, callbacks=[telling],
    enable_progress_bar=False, enable_model_summary=False, logger=False,
)
batches = [torch.randn(4, 4) for _ in range(4)]
""",
    """
before = net.layer.weight.detach().clone()
trainer.fit(net, batches)
once = net.layer.weight.detach().clone()
trainer.fit(net, batches)
print("steps", trainer.global_step, "seen", telling.seen)
print("moved", not torch.equal(before, once), not torch.equal(once, net.layer.weight))
""",
)

RUN = f"""
import nbformat
from nbclient import NotebookClient

notebook = nbformat.v4.new_notebook()
notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in {CELLS!r}]
NotebookClient(notebook, timeout=90, kernel_name="python3").execute()
for output in notebook.cells[-1].outputs:
    print(output.get("text", output), end="")
"""


def test_a_notebook_fits_twice_and_shows_what_its_ranks_print(tmp_path: Path) -> None:
    for module in ("nbclient", "ipykernel"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("told by 0 of 2") == 2, done.stdout
    assert lines.count("[rank 1] told by 1 of 2") == 2, done.stdout
    assert "steps 2 seen 2" in lines
    assert "moved True True" in lines
