"""Ranks that hold parts write and read their parts; nothing is gathered on rank 0."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Callback, Module, Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from drivetrain_interfaces import ProcessFailedError
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from torch import nn
from training_parts import Regression, loader

if TYPE_CHECKING:
    from pathlib import Path

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
TWO: dict[str, Any] = {**QUIET, "devices": 2, "launcher": "fork"}


def fitted(
    folder: Path, strategy: str, resume: Path | str | None = None, **saver: Any
) -> Regression:
    seed_everything(3)
    module = Regression()
    callbacks = [ModelCheckpoint(folder, "{step}", save_top_k=-1, **saver)]
    Trainer(max_epochs=2, strategy=strategy, callbacks=callbacks, **TWO).fit(
        module, loader(), ckpt_path=resume
    )
    return module


class DyingIO(DirectoryCheckpointIO):
    """Kills the process of one rank when it is to write its part of one save."""

    def __init__(self, rank: int, save: int) -> None:
        super().__init__()
        self.rank, self.save_number, self.saves = rank, save, 0

    def save_sharded(self, tree: Any, path: str, group: Any) -> None:
        self.saves += 1
        if group.rank == self.rank and self.saves == self.save_number:
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_sharded(tree, path, group)


def test_a_rank_that_is_killed_while_all_save_leaves_what_was_saved_before(tmp_path: Path) -> None:
    """The others end soon, and the run goes on from the last one that is whole."""
    straight = fitted(tmp_path / "straight", "fsdp", every_n_train_steps=2)
    for rank in range(2):
        folder = tmp_path / str(rank)
        seed_everything(3)
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=2)
        trainer = Trainer(
            max_epochs=2, strategy="fsdp", callbacks=[saver], plugins=[DyingIO(rank, 3)], **TWO
        )
        begin = time.monotonic()
        with pytest.raises(ProcessFailedError, match=f"rank {rank}"):
            trainer.fit(Regression(), loader())
        assert time.monotonic() - begin < 300  # a save waits 600 s for who is silent
        assert {path.name for path in folder.glob("*.ckpt")} == {"step=2.ckpt", "step=4.ckpt"}
        io = DirectoryCheckpointIO()
        assert all(io.verify(str(path)) == [] for path in folder.glob("*.ckpt"))
        resumed = fitted(folder, "fsdp", resume="last", every_n_train_steps=2)
        for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def files(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fit_of_fsdp_writes_a_file_per_rank_and_goes_on_from_them(
    tmp_path: Path, asynchronous: bool
) -> None:
    straight = fitted(tmp_path, "fsdp", every_n_train_steps=3, asynchronous=asynchronous)
    saved = sorted(tmp_path.iterdir())
    assert {"tensors-00000.safetensors", "tensors-00001.safetensors"} < files(saved[0])
    io = DirectoryCheckpointIO()
    assert all(io.verify(str(path)) == [] for path in saved)
    resumed = fitted(tmp_path / "again", "fsdp", resume=tmp_path / "step=3.ckpt")
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ranks_of_a_pipeline_write_and_read_their_own_layers(tmp_path: Path) -> None:
    """One layer with parameters on each; one process goes on from what both have written."""
    straight = fitted(tmp_path, "pipeline", every_n_train_steps=3)
    saved = tmp_path / "step=3.ckpt"
    facts = DirectoryCheckpointIO().inspect(str(saved))
    homes = {name: each.files for name, each in facts.tensors.items() if name.startswith("module/")}
    first, second = ("tensors-00000.safetensors",), ("tensors-00001.safetensors",)
    assert homes == {
        "module/net.0.weight": first,
        "module/net.0.bias": first,
        "module/net.3.weight": second,
        "module/net.3.bias": second,
    }
    assert DirectoryCheckpointIO().verify(str(saved)) == []
    resumed = fitted(tmp_path / "again", "pipeline", resume=saved)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    alone = Regression()
    alone.load_state_dict(DirectoryCheckpointIO().load(str(saved))["module"])
    Trainer(max_epochs=2, **QUIET).fit(Regression(), loader(), ckpt_path=saved)


@pytest.mark.parametrize("strategy", ["zero1", "ddp"])
def test_the_same_tree_whoever_writes_it(tmp_path: Path, strategy: str) -> None:
    """What was saved by parts holds what one process would have written."""
    fitted(tmp_path, strategy, every_n_train_steps=3)
    tree = DirectoryCheckpointIO().load(str(tmp_path / "step=3.ckpt"))
    assert tree["ranks"].keys() == {"0", "1"}
    (optimizer,) = tree["optimizers"]
    names = {name for group in optimizer["groups"] for name in group["parameters"]}
    assert names == optimizer["state"].keys()
    assert names <= tree["module"].keys()


class Wide(Module):
    """64 MiB of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), foreach=False)


def resident(which: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(which))


class Measured(Callback):
    """How much more memory a save takes at its peak than there was before."""

    saves_checkpoints = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Any) -> None:
        if moment.value != "step" or trainer.global_step != 2:
            return
        trainer.save_checkpoint(self.folder / "warm.ckpt", weights_only=True)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        before = resident("VmRSS")
        trainer.save_checkpoint(self.folder / "x.ckpt")
        grown = resident("VmHWM") - before
        (self.folder / f"grown-{trainer.world.rank}").write_text(str(grown))


@pytest.mark.parametrize("strategy", ["fsdp", "pipeline"])
def test_a_rank_takes_no_more_memory_than_its_own_state(tmp_path: Path, strategy: str) -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak")
    seed_everything(3)
    batches = torch.utils.data.DataLoader(torch.randn(8, 2048), batch_size=2)
    Trainer(max_steps=2, strategy=strategy, callbacks=[Measured(tmp_path)], **TWO).fit(
        Wide(), batches
    )
    own = 3 * (64 << 20) // 2  # parameters and two moments, on two ranks
    for rank in range(2):
        grown = int((tmp_path / f"grown-{rank}").read_text())
        assert grown < 1.25 * own, f"rank {rank} took {grown / own:.2f} of its state"  # buffers too
