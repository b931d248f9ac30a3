"""What a trainer is asked for that the engine cannot do: refused by name before a step is made."""

from __future__ import annotations

import sys

import pytest
import torch
from drivetrain import Module, Trainer
from drivetrain_interfaces import DrivetrainError, UnavailableError

from drivetrain_deepspeed import DeepSpeedStrategy

pytestmark = pytest.mark.timeout(400)  # its first engine takes long on a busy machine


class Line(Module):
    """One layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TwoOptimizers(Line):
    def configure_optimizers(self):
        weight, bias = self.parameters()
        return [torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([bias], lr=0.1)]


class ByHand(Line):
    automatic_optimization = False


class LooksAtGradients(Line):
    def on_before_optimizer_step(self, optimizer):
        raise AssertionError("never called")


def fit(module, **settings):
    settings = {
        "accelerator": "cpu",
        "strategy": "deepspeed_stage_2",
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        **settings,
    }
    Trainer(**settings).fit(module, torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4))


CLIPPED = {"gradient_clipping": 0.5}


@pytest.mark.parametrize(
    ("module", "settings", "texts"),
    [
        (TwoOptimizers, {}, ["2 optimizers", "several-optimizers"]),
        (ByHand, {}, ["manual"]),
        (LooksAtGradients, {}, ["on_before_optimizer_step"]),
        (Line, {"precision": "16-mixed"}, ["16-mixed"]),
        (Line, {"precision": "16-true"}, ["16-true"]),
        (
            Line,
            {
                "strategy": DeepSpeedStrategy(2, config=CLIPPED),
                "gradient_clip_val": 1.0,
            },
            ["is 1.0, and config has gradient_clipping=0.5"],
        ),
        (
            Line,
            {
                "strategy": DeepSpeedStrategy(config={"gradient_accumulation_steps": 4}),
                "accumulate_grad_batches": 2,
            },
            ["is 2, and config has gradient_accumulation_steps=4"],
        ),
        (
            Line,
            {"strategy": DeepSpeedStrategy(config={"bf16": {"enabled": True}})},
            ["stores parameters in float32, and config has bf16.enabled=True"],
        ),
    ],
    ids=["optimizers", "manual", "hook", "16-mixed", "16-true", "clip", "accumulation", "bf16"],
)
def test_what_the_engine_cannot_do_is_refused_by_name(module, settings, texts):
    with pytest.raises(DrivetrainError) as caught:
        fit(module(), **settings)
    assert any(text in str(caught.value) for text in texts), caught.value


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UnavailableError, match="DeepSpeed is not installed"):
        fit(Line())
