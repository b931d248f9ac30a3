"""The code samples of the older plugin documentation, with nothing but their imports changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Trainer, seed_everything

# changed import
from drivetrain.plugins import CPUAccelerator, DDPPlugin, PrecisionPlugin
from torch.nn.parallel import DistributedDataParallel
from training_parts import Regression, loader

if TYPE_CHECKING:
    from conftest import Starter

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
FAKES = Path(__file__).parent / "fakes"


# What the samples leave to their reader


class MyCustomDistributedDataParallel(DistributedDataParallel):
    """Counts its forwards. ``device_ids=...`` is what the sample says."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None) -> None:
        super().__init__(module, device_ids=None if device_ids is ... else device_ids)
        self.forwards = 0

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self.forwards += 1
        return super().forward(*inputs, **kwargs)


class CustomPrecisionPlugin(PrecisionPlugin):
    """Counts what it is asked to do."""

    def __init__(self) -> None:
        self.calls = {"backward": 0, "step": 0}

    def backward(self, loss: torch.Tensor) -> None:
        self.calls["backward"] += 1
        super().backward(loss)

    def step(self, optimizers: Any, prepare: Any) -> bool:
        self.calls["step"] += 1
        return super().step(optimizers, prepare)


class MyAccelerator(CPUAccelerator):
    """Counts how often it was activated."""

    activated = 0

    def activate(self, index: int, local_size: int) -> torch.device:
        self.activated += 1
        return super().activate(index, local_size)


# The second sample


class CustomDDPPlugin(DDPPlugin):
    def configure_ddp(self):
        self._model = MyCustomDistributedDataParallel(
            self.model,
            device_ids=...,
        )


def _custom_accelerator() -> MyAccelerator:
    return MyAccelerator(
        precision_plugin=CustomPrecisionPlugin(),
        training_type_plugin=CustomDDPPlugin(),
    )


class Witness(Regression):
    """Writes down which parts it was trained by."""

    def __init__(self, folder: Path) -> None:
        super().__init__("sgd", dropout=0.0)
        self.folder = str(folder)

    def on_train_end(self) -> None:
        stack = self.trainer.runtime.stack
        strategy, precision = stack.strategy, stack.precision
        found = {
            "strategy": type(strategy).__name__,
            "wrapper": type(strategy._model).__name__,
            "forwards": strategy._model.forwards,
            "precision": type(precision).__name__,
            "calls": precision.calls,
            "accelerator": type(stack.accelerator).__name__,
            "activated": getattr(stack.accelerator, "activated", 0) > 0,
        }
        path = Path(self.folder, f"parts-{self.trainer.world.rank}.json")
        path.write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.parametrize("by", ["plugins", "accelerator"])
def test_training_goes_through_the_users_own_classes(tmp_path: Path, by: str) -> None:
    seed_everything(4)
    model, reference = Witness(tmp_path), Regression("sgd", dropout=0.0)
    reference.load_state_dict(model.state_dict())
    settings: dict[str, Any] = {**QUIET, "devices": 2, "launcher": "fork", "max_epochs": 2}
    if by == "plugins":
        trainer = Trainer(plugins=[CustomDDPPlugin(), CustomPrecisionPlugin()], **settings)
    else:
        accelerator = _custom_accelerator()
        trainer = Trainer(accelerator=accelerator, **settings)
    trainer.fit(model, loader())
    assert trainer.global_step == 12
    for rank in (0, 1):
        found = json.loads((tmp_path / f"parts-{rank}.json").read_text())
        assert found == {
            "strategy": "CustomDDPPlugin",
            "wrapper": "MyCustomDistributedDataParallel",
            "forwards": 12,
            "precision": "CustomPrecisionPlugin",
            "calls": {"backward": 12, "step": 12},
            "accelerator": "CpuAccelerator" if by == "plugins" else "MyAccelerator",
            "activated": by == "accelerator",
        }
    # And it is still the same training.
    Trainer(**settings, accelerator="cpu").fit(reference, loader())
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_the_constructions_work_as_they_are_written() -> None:
    trainer = Trainer(plugins=[CustomDDPPlugin(), CustomPrecisionPlugin()])
    assert "CustomDDPPlugin(...)" in trainer.plan.explain()
    assert "CustomPrecisionPlugin(...)" in trainer.plan.explain()

    accelerator = MyAccelerator(
        precision_plugin=CustomPrecisionPlugin(),
        training_type_plugin=CustomDDPPlugin(),
    )
    trainer = Trainer(accelerator=accelerator)
    assert "MyAccelerator(precision_plugin=" in trainer.plan.explain()
    metrics = trainer.validate(Regression(), loader(16, shuffle=False))
    assert set(metrics) == {"val_loss"}


def test_four_devices_in_half_precision_train(start: Starter) -> None:
    """``Trainer(gpus=4, precision=16)`` where a package brings four devices."""
    done = start.run("seed_gpus.py", env={"PYTHONPATH": str(FAKES / "quad")})
    found = json.loads(done.lines[-1])
    assert 0 < found.pop("step") <= 6  # the first scales may overflow
    assert found == {
        "accelerator": "quad",
        "devices": [0, 1, 2, 3],
        "strategy": "ddp",
        "precision": "16-mixed",
        "world": 4,
        "trained": True,
    }
