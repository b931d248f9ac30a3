"""When a fit stops, validates, logs and changes the learning rate; and what evaluation returns."""

from __future__ import annotations

import csv
import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Callback, DataModule, Module, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Noted(Module):
    """Writes down every batch: ``t`` for training, ``v`` for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.seen = ""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += "t"
        return self.line(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen += "v"

    def on_train_epoch_end(self) -> None:
        self.seen += " "

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _batches(count: int = 6, size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(count * size, 1)), size)


class Endless(IterableDataset):
    """A stream without a length."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        while True:
            yield (torch.ones(1),)


def _seen(model: Module | None = None, train: Any = None, **settings: Any) -> str:
    model = model or Noted()
    trainer = Trainer(**{**QUIET, "logger": False, **settings})
    trainer.fit(model, _batches() if train is None else train, _batches(1))
    return model.seen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 2}, "ttttttv ttttttv "),
        ({"max_epochs": 0}, ""),
        ({"max_steps": 8}, "ttttttv tt"),
        # the last step of the last epoch still owes its validation and its hooks
        ({"max_steps": 6}, "ttttttv "),
        ({"max_steps": 3, "accumulate_grad_batches": 4}, "ttttttv tttt"),
        ({"max_epochs": 2, "max_steps": 2}, "tt"),
        ({"max_epochs": 1, "limit_train_batches": 2}, "ttv "),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, "tttv "),
        ({"max_epochs": 1, "limit_train_batches": 100}, "ttttttv "),
        ({"max_epochs": 1, "limit_val_batches": 0}, "tttttt "),
        ({"max_epochs": 1, "num_sanity_val_steps": 1}, "vttttttv "),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, "tttttt ttttttv tttttt "),
        ({"max_epochs": 2, "val_check_interval": 0.5}, "tttvtttv tttvtttv "),
        ({"max_epochs": 2, "val_check_interval": 1.0}, "ttttttv ttttttv "),
        ({"max_epochs": 1, "val_check_interval": 4}, "ttttvtt "),
        ({"max_epochs": 1, "val_check_interval": 2}, "ttvttvttv "),
        # validation waits for the end of the accumulation window
        (
            {"max_epochs": 1, "val_check_interval": 2, "accumulate_grad_batches": 3},
            "tttvtttv ",
        ),
        (
            {"max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": 2},
            "tttttt tttvtttv ",
        ),
        ({"fast_dev_run": True}, "tv "),
        ({"fast_dev_run": 3, "max_epochs": 9, "val_check_interval": 1}, "tttv "),
    ],
    ids=str,
)
def test_how_long_and_when(settings: dict[str, Any], expected: str) -> None:
    assert _seen(**settings) == expected


def test_a_loader_without_a_length_ends_by_steps() -> None:
    stream = DataLoader(Endless(), 2)
    assert _seen(train=stream, max_steps=5) == "ttttt"
    assert _seen(train=stream, max_epochs=2, limit_train_batches=2) == "ttv ttv "
    found = _seen(train=stream, max_steps=5, val_check_interval=2)
    assert found == "ttvttvt"


def test_any_iterable_of_batches_is_a_loader() -> None:
    assert _seen(train=[(torch.ones(2, 1),)] * 3, max_epochs=2) == "tttv tttv "


def test_time_runs_out_at_a_step_boundary() -> None:
    """Of an endless stream; whole windows only."""
    model = Noted()
    settings = {**QUIET, "logger": False, "max_time": timedelta(seconds=0.2)}
    trainer = Trainer(**settings, accumulate_grad_batches=3)
    trainer.fit(model, DataLoader(Endless(), 2))
    assert trainer.global_step > 0
    assert model.seen == "ttt" * trainer.global_step
    assert 0.2 <= trainer.elapsed < 60


def test_time_runs_out_for_all_ranks_at_once(tmp_path: Path) -> None:
    class Keeps(Callback):
        def on_fit_end(self, trainer: Any, module: Any) -> None:
            (tmp_path / f"{trainer.world.rank}").write_text(str(trainer.global_step))

    settings = {**QUIET, "logger": False, "devices": 2, "launcher": "fork"}
    trainer = Trainer(**settings, max_time={"seconds": 1}, callbacks=[Keeps()])
    trainer.fit(Noted(), DataLoader(Endless(), 2))
    steps = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert steps == [trainer.global_step] * 2
    assert steps[0] > 0


def test_a_hook_that_returns_minus_one_ends_the_epoch() -> None:
    class Short(Noted):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    assert _seen(Short(), max_epochs=2) == "ttv ttv "
    assert _seen(Short(), max_epochs=1, accumulate_grad_batches=4) == "ttv "


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(**QUIET, fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(Noted(), _batches(), _batches(1))
    assert list(tmp_path.iterdir()) == []


# Learning rates


class Scheduled(Noted):
    """Notes the learning rate that each step trains with."""

    def __init__(self, make: Any, **settings: Any) -> None:
        super().__init__()
        self.make = make
        self.settings = settings
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("constant", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [{"scheduler": self.make(optimizer), **self.settings}]


def _halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def _plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        (Scheduled(_halved), {}, [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]),
        (Scheduled(_halved, interval="step"), {}, [2.0**-n for n in range(12)]),
        (
            Scheduled(_halved, interval="step", frequency=4),
            {},
            [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25],
        ),
        (
            Scheduled(_halved, interval="step"),
            {"accumulate_grad_batches": 3},
            [1, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.125, 0.0625, 0.0625, 0.0625, 0.03125],
        ),
        (Scheduled(_halved, frequency=2), {}, [1] * 8 + [0.5] * 4),
        # a value that never improves: after the first epoch it is the best, then it is not
        (Scheduled(_plateau, monitor="constant"), {}, [1] * 8 + [0.5] * 4),
    ],
    ids=["epoch", "step", "every-4-steps", "windows", "every-2-epochs", "plateau"],
)
def test_schedulers_step_when_they_should(
    model: Scheduled, settings: dict[str, Any], expected: list[float]
) -> None:
    trainer = Trainer(**QUIET, logger=False, max_epochs=3, **settings)
    trainer.fit(model, _batches(4), _batches(1))
    assert model.rates == expected


def test_a_resume_that_owes_the_end_of_an_epoch_steps_its_scheduler_in_silence(
    tmp_path: Path,
) -> None:
    """Warnings are errors here: torch has one for a scheduler that steps before its optimizer."""
    settings = {**QUIET, "logger": False, "enable_checkpointing": True}
    rates = []
    for epochs, resume in ((1, None), (2, "last")):
        model = Scheduled(_halved)
        trainer = Trainer(**settings, max_epochs=epochs, default_root_dir=str(tmp_path))
        trainer.fit(model, _batches(4), _batches(1), ckpt_path=resume)
        rates += model.rates
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]


def test_a_scheduler_by_step_can_watch_a_training_metric() -> None:
    class Watches(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("flat", 1.0)
            return super().training_step(batch, batch_idx)

    model = Watches(_plateau, monitor="flat", interval="step", frequency=2)
    Trainer(**QUIET, logger=False, max_epochs=1, log_every_n_steps=1).fit(model, _batches(6))
    assert model.rates == [1, 1, 1, 1, 0.5, 0.5]


# What is logged


class Logs(Noted):
    """Logs the sample numbers, so that means can be told by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        value = batch[0].mean()
        self.log("both", value, on_step=True, on_epoch=True)
        self.log("newest", value, prog_bar=True)
        self.log("mean", value, on_step=False, on_epoch=True)
        self.log("largest", value, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("hidden", value, logger=False)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch[0].mean())


def test_the_csv_file_holds_every_log_point(tmp_path: Path) -> None:
    """Numbers 0 to 9 in batches of 4, 4 and 2: their means are 1.5, 5.5 and 8.5."""
    numbers = DataLoader(TensorDataset(torch.arange(10.0).reshape(-1, 1)), 4)
    trainer = Trainer(**QUIET, max_epochs=2, log_every_n_steps=2, default_root_dir=tmp_path)
    model = Logs()
    model.save_hyperparameters()
    trainer.fit(model, numbers, numbers)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    epoch = {"both_epoch": 4.5, "mean": 4.5, "largest": 8.5, "val": 4.5}
    assert rows == [
        {"step": 2, "both_step": 5.5, "newest": 5.5},
        {"step": 3, **epoch},
        {"step": 4, "both_step": 1.5, "newest": 1.5},
        {"step": 6, "both_step": 8.5, "newest": 8.5, **epoch},
    ]
    assert trainer.callback_metrics["hidden"] == 8.5
    assert trainer.progress_bar_metrics == {"newest": 8.5}
    assert "hidden" not in trainer.logged_metrics
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "epoch=1-step=6.ckpt"
    ]


def test_gradient_norms_are_logged_when_they_are_clipped(tmp_path: Path) -> None:
    trainer = Trainer(
        **QUIET,
        max_epochs=1,
        log_every_n_steps=1,
        gradient_clip_val=1e-3,
        default_root_dir=tmp_path,
    )
    trainer.fit(Noted(), _batches(2))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        norms = [float(row["grad_norm"]) for row in csv.DictReader(file)]
    assert len(norms) == 2
    assert min(norms) > 1e-3


# Evaluation


class Evaluated(Noted):
    """Metrics of several loaders, a test step and predictions."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", batch[0].mean() + dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.log("total", batch[0].sum(), reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return batch[0] * 2


def _numbers(count: int = 10) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(count)).reshape(-1, 1)), 4)


def test_validate_test_and_predict_return_what_they_found() -> None:
    trainer = Trainer(**QUIET, logger=False)
    model = Evaluated()
    assert trainer.validate(model, _numbers()) == {"val": 4.5}
    several = trainer.validate(model, [_numbers(), _numbers(4)])
    assert several == {"val/dataloader_idx_0": 4.5, "val/dataloader_idx_1": 2.5}
    assert trainer.test(model, _numbers()) == {"total": 45.0}
    predicted = trainer.predict(model, _numbers())
    assert torch.cat(predicted).flatten().tolist() == [2.0 * n for n in range(10)]
    assert [len(each) for each in trainer.predict(model, [_numbers(), _numbers(4)])] == [3, 1]
    assert model.training


def test_limits_apply_to_evaluation() -> None:
    limits = {"limit_val_batches": 1, "limit_test_batches": 0.5, "limit_predict_batches": 2}
    trainer = Trainer(**QUIET, logger=False, **limits)
    model = Evaluated()
    assert trainer.validate(model, _numbers()) == {"val": 1.5}
    assert trainer.test(model, _numbers()) == {"total": 6.0}
    assert len(trainer.predict(model, _numbers())) == 2


def test_evaluation_takes_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    class Weighs(Noted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("weight", self.line.weight.sum())

    trainer = Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)
    model = Weighs()
    trainer.fit(model, _batches(), _batches(1))
    weight = model.line.weight.item()
    nn.init.zeros_(model.line.weight)
    assert trainer.validate(model, _batches(1)) == {"weight": 0.0}
    assert trainer.validate(model, _batches(1), ckpt_path="last") == {"weight": weight}
    fresh = Weighs.load_from_checkpoint(trainer.callbacks[-1].last_model_path)
    assert fresh.line.weight.item() == weight


def test_a_data_module_serves_every_stage() -> None:
    class Data(DataModule):
        stages: list[str]

        def setup(self, stage: str) -> None:
            self.stages = [*getattr(self, "stages", []), stage]

        def train_dataloader(self) -> Any:
            return _batches()

        def val_dataloader(self) -> Any:
            return _batches(1)

        def test_dataloader(self) -> Any:
            return _numbers()

        def predict_dataloader(self) -> Any:
            return _numbers()

    data, model = Data(), Evaluated()
    trainer = Trainer(**QUIET, logger=False, max_epochs=1)
    trainer.fit(model, data)
    assert model.seen == "tttttt "
    assert trainer.validate(model, datamodule=data) == {"val": 1.0}
    assert trainer.test(model, data) == {"total": 45.0}
    assert len(trainer.predict(model, data)) == 3
    assert data.stages == ["fit", "validate", "test", "predict"]


def test_loaders_of_the_module_are_used_if_none_is_given() -> None:
    class Complete(Noted):
        def train_dataloader(self) -> Any:
            return _batches(2)

        def val_dataloader(self) -> Any:
            return _batches(1)

    model = Complete()
    Trainer(**QUIET, logger=False, max_epochs=1).fit(model)
    assert model.seen == "ttv "


def test_random_numbers_of_the_sanity_check_change_nothing() -> None:
    class Draws(Noted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * torch.rand(())

    weights = []
    for steps in (0, 2):
        torch.manual_seed(6)
        model = Draws()
        settings = {**QUIET, "num_sanity_val_steps": steps, "logger": False}
        trainer = Trainer(**settings, max_epochs=1)
        trainer.fit(model, _batches(), _batches(2))
        weights.append(model.line.weight.item())
    assert weights[0] == weights[1]
    assert math.isfinite(weights[0])
