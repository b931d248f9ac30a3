"""The trainer on XLA devices: the README's model, losses of the CPU, and what it compiles."""

from __future__ import annotations

import drivetrain
import pytest
import torch
from drivetrain import Module, Trainer
from drivetrain.callbacks import Callback
from drivetrain_interfaces import ConfigurationError, UnavailableError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from drivetrain_xla import monitor


class Classifier(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("accuracy", (self.net(inputs).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Losses(Callback):
    """Keeps the loss of every step on its device, and what had been counted by then."""

    def __init__(self):
        self.losses = []
        self.counts = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"])
        self.counts.append(monitor.counts())


class Saves(Callback):
    """Saves what training ended with."""

    def __init__(self, path):
        self.path = str(path)

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(self.path)


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), 16, shuffle=True)


def fit(tmp_path, accelerator, epochs=3, callbacks=(), **settings):
    drivetrain.seed_everything(7)
    seen = Losses()
    trainer = Trainer(
        accelerator=accelerator,
        max_epochs=epochs,
        enable_progress_bar=False,
        default_root_dir=tmp_path / accelerator,
        callbacks=[seen, *callbacks],
        log_every_n_steps=settings.pop("log_every_n_steps", 8),
        **settings,
    )
    module = Classifier()
    trainer.fit(module, loader(), loader())
    return trainer, module, seen


def test_losses_and_accuracy_are_those_of_the_cpu(tmp_path):
    _, _, cpu = fit(tmp_path, "cpu")
    trainer, _, xla = fit(tmp_path, "xla")
    assert len(xla.losses) == len(cpu.losses) == 96
    assert [float(x) for x in xla.losses] == pytest.approx([float(x) for x in cpu.losses], abs=1e-5)
    assert trainer.callback_metrics["accuracy"] > 0.9
    assert trainer.plan.backend == "xla"


def test_training_compiles_twice_and_never_after(tmp_path):
    """Whatever is logged: a log point reads values back and compiles nothing of the step."""

    class Wider(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))

    drivetrain.seed_everything(7)
    seen = Losses()
    trainer = Trainer(
        accelerator="xla",
        max_epochs=1,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[seen],
        log_every_n_steps=1000,
        num_sanity_val_steps=0,
    )
    before = monitor.counts()
    trainer.fit(Wider(), loader())
    assert (seen.counts[-1] - before).compiled <= 3, "the step twice, and moving the module"
    steps = seen.counts[-1] - seen.counts[1]
    assert steps.compiled == 0
    assert steps.syncs == 30
    assert steps.read_back == 0


def test_logging_every_step_syncs_no_more(tmp_path):
    _, _, often = fit(tmp_path / "often", "xla", epochs=1, log_every_n_steps=1)
    _, _, never = fit(tmp_path / "never", "xla", epochs=1, log_every_n_steps=1000)
    syncs = [(seen.counts[-1] - seen.counts[1]).syncs for seen in (often, never)]
    assert syncs[0] == syncs[1] == 30


def test_a_run_goes_on_from_a_checkpoint_of_another_backend(tmp_path):
    """Half on one, half on the other, both ways; the end is that of one run, to rounding."""
    _, whole, _ = fit(tmp_path / "whole", "cpu", epochs=2)
    for first, second in (("cpu", "xla"), ("xla", "cpu")):
        home = tmp_path / f"{first}-{second}"
        fit(home, first, epochs=1, callbacks=[Saves(home / "half")])
        drivetrain.seed_everything(1)
        again = Trainer(
            accelerator=second,
            max_epochs=2,
            enable_progress_bar=False,
            default_root_dir=home,
        )
        module = Classifier()
        again.fit(module, loader(), loader(), ckpt_path=str(home / "half"))
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name].cpu(), value, atol=2e-5, rtol=1e-4)


def test_a_cpu_that_nobody_asked_for_is_no_device(monkeypatch, tmp_path):
    monkeypatch.delenv("PJRT_DEVICE")
    with pytest.raises(UnavailableError, match="PJRT_DEVICE=CPU"):
        Trainer(accelerator="xla", default_root_dir=tmp_path)


def test_more_devices_than_there_are_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="found 1"):
        Trainer(accelerator="xla", devices=2, default_root_dir=tmp_path)


def test_auto_prefers_a_real_backend(tmp_path):
    assert Trainer(default_root_dir=tmp_path).plan.backend == "cpu"
