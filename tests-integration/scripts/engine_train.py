"""Steps of two ranks with a strategy and a launcher of choice, that may be killed and resumed.

Tests of packages that bring an engine start it. It leaves ``end.pt`` (weights), ``losses.txt``
(rank 0's, by step), ``loaded.pt`` and ``left.pt`` (the whole state at the beginning and the end),
and ``environment.txt`` (where the ranks read their places).
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from drivetrain import Module, Trainer
from drivetrain.callbacks import Callback, ModelCheckpoint


class Model(Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layers(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Witness(Callback):
    """Writes down what happens; rank 1 raises, or rank 0 is killed, before a step."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._keep(trainer, "loaded.pt")
        if trainer.world.is_main:
            print(f"begins at {trainer.global_step}", flush=True)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.asked.fail_at and trainer.world.rank == 1:
            raise LookupError("lost")
        if trainer.global_step == self.asked.kill_at and trainer.world.is_main:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world.is_main:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            with Path("losses.txt").open("a") as lines:
                lines.write(f"{trainer.global_step} {float(loss)!r}\n")

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._keep(trainer, "left.pt")

    def _keep(self, trainer: Any, name: str) -> None:
        state = trainer.runtime.stack.strategy.state()  # every rank asks for it
        if trainer.world.is_main:
            torch.save({"module": dict(state.module), "optimizers": list(state.optimizers)}, name)


def strategy_of(asked: argparse.Namespace) -> Any:
    """A name, or DeepSpeed's strategy with nothing kept whole because it is small."""
    if asked.strategy != "all-divided":
        return asked.strategy
    from drivetrain_deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(
        3, config={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    )


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--launcher", default="script")
    parser.add_argument("--strategy", required=True)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--fail-at", type=int, default=-1)
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--resume")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = Model()
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(48, 8, generator=generator), torch.randn(48, 1, generator=generator)
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=asked.devices,
        strategy=strategy_of(asked),
        launcher=asked.launcher if asked.devices > 1 else None,
        max_steps=asked.steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(dirpath="checkpoints", every_n_train_steps=2, save_last=True),
            Witness(asked),
        ],
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=asked.resume)
    if trainer.world.is_main:
        torch.save(model.state_dict(), "end.pt")
        Path("environment.txt").write_text(trainer.world.environment, encoding="utf-8")


if __name__ == "__main__":
    main()
