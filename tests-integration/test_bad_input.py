"""Every mistake is one clear error: which setting, what was found, what to do, and a code."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Callback, Module, Trainer
from drivetrain.callbacks import ModelCheckpoint
from drivetrain_cpu import spec as cpu
from drivetrain_interfaces import (
    BackendSpec,
    Capabilities,
    CheckpointError,
    ConfigurationError,
    DataError,
    DrivetrainError,
    Feature,
    NonFiniteLossError,
    NotFoundError,
    Probe,
    StepHook,
    StorageError,
    UnavailableError,
    UnsupportedError,
    UserCodeError,
)
from drivetrain_interfaces.devices import parse_devices
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Line(Module):
    """A line that counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return self.line(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _batches(count: int = 6, size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(count * size, 1)), size)


def _fit(model: Module, loader: Any = None, **settings: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "accelerator": "cpu", "max_epochs": 1, **settings})
    trainer.fit(model, _batches() if loader is None else loader)
    return trainer


def _refused(
    kind: type[DrivetrainError], code: str, *parts: str, act: Callable[[], object]
) -> DrivetrainError:
    """The error of an act that must fail; it names all ``parts``, has a code, and pickles."""
    with pytest.raises(kind) as caught:
        act()
    error = caught.value
    text = str(error)
    assert text.rstrip().endswith(f"[{code}]")
    for part in parts:
        assert part in text
    assert str(pickle.loads(pickle.dumps(error))) == text
    return error


# Settings


@pytest.mark.parametrize(
    ("settings", "kind", "code", "parts"),
    [
        ({"accelerator": "cpv"}, NotFoundError, "DT101", ("'cpv'", "'cpu', the nearest name")),
        ({"strategy": "ddpp"}, NotFoundError, "DT101", ("'ddpp'", "'ddp', the nearest name")),
        ({"precision": "fp7"}, NotFoundError, "DT101", ("'fp7'", "bf16-mixed", "64-true")),
        ({"precision": "bf16-mixd"}, NotFoundError, "DT101", ("'bf16-mixed', the nearest",)),
        ({"launcher": "scrpt"}, NotFoundError, "DT101", ("'scrpt'", "'script', the nearest")),
        ({"precision": "transformer-engine"}, UnsupportedError, "DT105", ("32-true", "'cpu'")),
        ({"devices": 0}, ConfigurationError, "DT201", ("devices=0", "positive number")),
        ({"devices": -3}, ConfigurationError, "DT201", ("devices=-3",)),
        ({"devices": "two"}, ConfigurationError, "DT201", ("devices='two'",)),
        ({"devices": [0, 1]}, ConfigurationError, "DT201", ("devices=[0, 1]", "no indices")),
        ({"plugins": [object()]}, ConfigurationError, "DT201", ("plugins=[object(...)]",)),
        ({"sync_batchnorm": True, "devices": 2}, UnsupportedError, "DT105", ("sync_batchnorm",)),
        ({"max_epochs": -1}, ConfigurationError, "DT201", ("max_epochs=-1",)),
        ({"max_steps": 1.5}, ConfigurationError, "DT201", ("max_steps=1.5",)),
        ({"max_time": "soon"}, ConfigurationError, "DT201", ("max_time", "'soon'")),
        ({"limit_train_batches": 1.5}, ConfigurationError, "DT201", ("limit_train_batches=1.5",)),
        ({"limit_val_batches": -1}, ConfigurationError, "DT201", ("limit_val_batches=-1",)),
        ({"val_check_interval": 0}, ConfigurationError, "DT201", ("val_check_interval=0",)),
        (
            {"accumulate_grad_batches": 0},
            ConfigurationError,
            "DT201",
            ("accumulate_grad_batches=0", "at least 1"),
        ),
        ({"gradient_clip_val": -1.0}, ConfigurationError, "DT201", ("gradient_clip_val=-1.0",)),
        ({"gradient_clip_algorithm": "l1"}, ConfigurationError, "DT201", ("'l1'", "'norm'")),
        ({"nan_loss": "hope"}, ConfigurationError, "DT201", ("nan_loss='hope'", "'warn'")),
        ({"log_every_n_steps": 0}, ConfigurationError, "DT201", ("log_every_n_steps=0",)),
        ({"callbacks": [print]}, ConfigurationError, "DT201", ("Subclass drivetrain.Callback",)),
        ({"logger": "csv"}, ConfigurationError, "DT201", ("logger contains a str",)),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_met_is_refused_at_construction(
    settings: dict[str, Any], kind: type[DrivetrainError], code: str, parts: tuple[str, ...]
) -> None:
    _refused(kind, code, *parts, act=lambda: Trainer(**{"accelerator": "cpu", **settings}))


def test_several_conflicts_are_listed_at_once() -> None:
    def act() -> None:
        Trainer(accelerator="cpu", devices=0, precision="fp7", launcher="scrpt", strategy="dpp")

    error = _refused(DrivetrainError, "DT201", act=act)
    for wrong in ("devices=0", "'fp7'", "'scrpt'", "'dpp'"):
        assert wrong in str(error)


def test_several_wrong_loop_settings_are_listed_at_once() -> None:
    def act() -> None:
        Trainer(max_epochs=-2, val_check_interval=-1, gradient_clip_algorithm="l1", nan_loss="x")

    error = _refused(ConfigurationError, "DT201", act=act)
    for wrong in ("max_epochs=-2", "val_check_interval=-1", "'l1'", "nan_loss='x'"):
        assert wrong in str(error)


def test_gpus_that_are_not_there_are_refused_with_what_is() -> None:
    error = _refused(UnavailableError, "DT102", act=lambda: Trainer(gpus=4, precision=16))
    assert "gpus=4" in str(error)
    assert "cpu" in str(error)


def test_an_accelerator_without_devices_gives_the_reason_of_its_probe() -> None:
    absent = dataclasses.replace(
        cpu, name="npu", probe=lambda: Probe(0, reason="the driver is not loaded: modprobe npu")
    )
    _refused(
        UnavailableError,
        "DT102",
        "npu",
        "modprobe npu",
        act=lambda: Trainer(accelerator=absent),
    )


def test_more_devices_than_there_are_is_refused() -> None:
    two = dataclasses.replace(cpu, name="npu", probe=lambda: Probe(2), parse_devices=parse_devices)
    _refused(
        ConfigurationError,
        "DT201",
        "devices=3",
        "found 2",
        act=lambda: Trainer(accelerator=two, devices=3),
    )


def test_a_fit_without_any_limit_is_refused() -> None:
    _refused(ConfigurationError, "DT201", "max_epochs", act=lambda: _fit(Line(), max_epochs=None))


# What a backend cannot do


class Lacks(Line):
    """Overrides a moment inside the step."""

    def on_after_backward(self) -> None:
        pass


class Watches(Callback):
    """The same as a callback."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        pass


def _backend(**less: Any) -> BackendSpec:
    """The CPU under another name, with fewer abilities."""
    capabilities = dataclasses.replace(cpu.capabilities, **less)
    assert isinstance(capabilities, Capabilities)
    return dataclasses.replace(cpu, name="compiled", capabilities=capabilities)


def test_a_hook_that_the_backend_cannot_call_is_refused_with_the_users_override() -> None:
    fewer = _backend(hooks=frozenset({StepHook.BEFORE_BACKWARD}))
    model = Lacks()
    _refused(
        UnsupportedError,
        "DT105",
        "Lacks.on_after_backward",
        "'compiled'",
        act=lambda: _fit(model, accelerator=fewer),
    )
    assert model.steps == 0
    both = _refused(
        DrivetrainError,
        "DT201",
        act=lambda: _fit(Lacks(), accelerator=fewer, callbacks=[Watches()]),
    )
    assert "Lacks.on_after_backward" in str(both)
    assert "Watches.on_before_optimizer_step" in str(both)
    assert _fit(Line(), accelerator=fewer).global_step == 6


@pytest.mark.parametrize(
    ("feature", "settings", "named"),
    [
        (Feature.ACCUMULATION, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (Feature.CLIP_NORM, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        (
            Feature.CLIP_VALUE,
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            "gradient_clip_val=1.0",
        ),
        (Feature.DETERMINISTIC, {"deterministic": True}, "deterministic=True"),
        (Feature.SEVERAL_PROCESSES, {"devices": 2}, "2 processes"),
    ],
)
def test_an_ability_that_the_backend_lacks_is_refused_at_construction(
    feature: Feature, settings: dict[str, Any], named: str
) -> None:
    fewer = _backend(features=cpu.capabilities.features - {feature})
    _refused(UnsupportedError, "DT105", named, act=lambda: Trainer(accelerator=fewer, **settings))


def test_manual_optimization_is_refused_where_the_engine_owns_the_step() -> None:
    class Manual(Line):
        automatic_optimization = False

    fewer = _backend(features=cpu.capabilities.features - {Feature.MANUAL_STEP})
    _refused(
        UnsupportedError,
        "DT105",
        "Manual.automatic_optimization = False",
        act=lambda: _fit(Manual(), accelerator=fewer),
    )


# The user's module


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        (lambda _loss: None, ("returned None",)),
        (lambda loss: loss.item(), ("returned a float",)),
        (lambda _loss: {"los": 1}, ("['los']", "'loss'")),
        (lambda loss: {"loss": loss.expand(3)}, ("shape (3,)", "scalar")),
        (lambda loss: loss.expand(2), ("shape (2,)", "scalar")),
        (lambda loss: loss.detach(), ("does not require a gradient",)),
    ],
    ids=["none", "number", "no-loss", "dictionary-of-a-vector", "vector", "detached"],
)
def test_a_training_step_that_returns_no_loss_is_refused(
    returned: Callable[[torch.Tensor], Any], parts: tuple[str, ...]
) -> None:
    class Wrong(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return returned(super().training_step(batch, batch_idx))

    _refused(UserCodeError, "DT204", *parts, act=lambda: _fit(Wrong()))


class NanAt(Line):
    """The loss of one batch is not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 3 else loss


def test_a_loss_that_is_not_finite_says_at_which_step() -> None:
    model = NanAt()
    error = _refused(NonFiniteLossError, "DT301", "nan", act=lambda: _fit(model))
    assert "at step 3 (epoch 0)" in str(error)
    # Noticed at the next log point at the latest.
    early = NanAt()
    _refused(NonFiniteLossError, "DT301", "at step 3", act=lambda: _fit(early, log_every_n_steps=2))
    assert early.steps == 4


def test_a_loss_that_is_not_finite_can_be_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="drivetrain")
    assert _fit(NanAt(), nan_loss="warn").global_step == 6
    assert "became nan at step 3 (epoch 0)" in caplog.text
    caplog.clear()
    assert _fit(NanAt(), nan_loss="ignore").global_step == 6
    assert "nan" not in caplog.text


def test_a_checkpoint_is_not_saved_from_a_broken_loss(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    with pytest.raises(NonFiniteLossError, match="at step 3"):
        _fit(NanAt(), callbacks=[saver])
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_is_none_is_refused_with_the_way_out() -> None:
    _refused(
        UserCodeError, "DT204", "Linear", "FunctionalModule", act=lambda: _fit(nn.Linear(1, 1))
    )


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        (None, ("returned no optimizer",)),
        ("adam", ("a str",)),
        ({"lr_scheduler": None}, ("a dict",)),
    ],
    ids=["none", "name", "no-optimizer"],
)
def test_optimizers_of_no_known_shape_are_refused(returned: Any, parts: tuple[str, ...]) -> None:
    class Wrong(Line):
        def configure_optimizers(self) -> Any:
            return returned

    _refused(UserCodeError, "DT204", *parts, act=lambda: _fit(Wrong()))


def test_a_monitor_that_nobody_logs_lists_what_is_logged(tmp_path: Path) -> None:
    class Logs(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    saver = ModelCheckpoint(tmp_path, monitor="val_los", every_n_epochs=1)
    _refused(
        ConfigurationError,
        "DT201",
        "val_los",
        "loss",
        act=lambda: _fit(Logs(), callbacks=[saver], log_every_n_steps=1),
    )


# Data


def test_a_loader_without_batches_is_refused() -> None:
    empty = DataLoader(TensorDataset(torch.ones(0, 1)), 2)
    _refused(DataError, "DT203", "train loader", "empty", act=lambda: _fit(Line(), empty))
    few = DataLoader(TensorDataset(torch.ones(4, 1)), 5, drop_last=True)
    _refused(DataError, "DT203", "train loader", "empty", act=lambda: _fit(Line(), few))


def test_a_loader_that_yields_nothing_is_refused() -> None:
    """One without a length only shows that it is empty when it is iterated."""

    class Nothing:
        def __iter__(self) -> Any:
            return iter(())

    _refused(DataError, "DT203", "train loader", act=lambda: _fit(Line(), Nothing(), max_steps=3))


def test_what_cannot_be_iterated_is_no_loader() -> None:
    _refused(DataError, "DT203", "int", act=lambda: _fit(Line(), 5))


def test_a_fit_without_a_loader_is_refused() -> None:
    trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=1)
    _refused(ConfigurationError, "DT201", "train_dataloader", act=lambda: trainer.fit(Line()))


def test_a_loader_shorter_than_the_window_trains_on_what_there_is() -> None:
    by_window, by_batch = Line(), Line()
    by_batch.load_state_dict(by_window.state_dict())
    trainer = _fit(by_window, _batches(3), accumulate_grad_batches=8)
    assert trainer.global_step == 1
    _fit(by_batch, _batches(1, size=6))
    torch.testing.assert_close(by_window.line.weight, by_batch.line.weight)


def test_a_fraction_of_less_than_a_batch_is_refused() -> None:
    _refused(
        ConfigurationError,
        "DT201",
        "limit_train_batches=0.1",
        act=lambda: _fit(Line(), limit_train_batches=0.1),
    )


def test_a_validation_interval_beyond_the_epoch_is_refused() -> None:
    class Validates(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def val_dataloader(self) -> Any:
            return _batches(1)

    _refused(
        ConfigurationError,
        "DT201",
        "val_check_interval=7",
        "6 batches",
        act=lambda: _fit(Validates(), val_check_interval=7),
    )


# Files


def test_a_run_directory_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    """A file stands where a directory would have to be made; that stops root as well."""
    (tmp_path / "file").touch()
    where = tmp_path / "file" / "run"
    model = Line()
    _refused(StorageError, "DT402", str(where), act=lambda: _fit(model, default_root_dir=where))
    saver = ModelCheckpoint(where)
    _refused(StorageError, "DT402", str(where), act=lambda: _fit(model, callbacks=[saver]))
    assert model.steps == 0


def _saved(folder: Path) -> Path:
    trainer = _fit(Line(), default_root_dir=folder)
    return Path(trainer.callbacks[-1].last_model_path)


def test_a_checkpoint_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    tensors = max(path.iterdir(), key=lambda each: each.suffix == ".safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(bytes(content))
    model = Line()
    _refused(
        CheckpointError,
        "DT401",
        str(path),
        act=lambda: Trainer(**QUIET, accelerator="cpu", max_epochs=2).fit(
            model, _batches(), ckpt_path=path
        ),
    )
    assert model.steps == 0


def test_a_checkpoint_that_is_missing_or_foreign_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=1)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    nothing, empty = tmp_path / "nothing.ckpt", tmp_path / "empty.ckpt"
    empty.mkdir()
    for path in (foreign, nothing, empty):
        _refused(
            CheckpointError,
            "DT401",
            str(path),
            act=lambda path=path: trainer.fit(Line(), _batches(), ckpt_path=path),
        )


def test_weights_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    _fit(Line(), callbacks=[saver])
    trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=2)
    _refused(
        CheckpointError,
        "DT401",
        "optimizers",
        act=lambda: trainer.fit(Line(), _batches(), ckpt_path=saver.last_model_path),
    )


def test_a_state_that_cannot_be_written_is_refused_with_its_key(tmp_path: Path) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"handle": object()}

    _refused(
        CheckpointError,
        "DT401",
        "handle",
        act=lambda: _fit(Line(), callbacks=[Odd()], default_root_dir=tmp_path),
    )
    io = DirectoryCheckpointIO()
    assert not any(io.exists(str(path)) for path in tmp_path.rglob("*.ckpt"))


def test_the_last_checkpoint_of_a_trainer_that_has_none_is_refused() -> None:
    trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=1)
    _refused(
        DrivetrainError,
        "DT402",
        "ckpt_path='last'",
        act=lambda: trainer.fit(Line(), _batches(), ckpt_path="last"),
    )


def test_saving_while_nothing_runs_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=1)
    _refused(
        UserCodeError,
        "DT204",
        "save_checkpoint",
        act=lambda: trainer.save_checkpoint(tmp_path / "now.ckpt"),
    )
