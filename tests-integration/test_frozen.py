"""Backends of past contracts still train. If one fails here, the change is a breaking one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drivetrain import Callback, Module, Trainer
from drivetrain.callbacks.base import Moment
from drivetrain_conformance.selection import functions
from drivetrain_interfaces import CONTRACT, BackendSpec
from torch.utils.data import DataLoader, TensorDataset

FROZEN = sorted((Path(__file__).parent / "frozen").glob("contract_*/backend.py"))
#: The beginning of the SHA-256 of each file. An entry is added with its file and never changed.
UNTOUCHED = {"contract_0_1": "ebbf4ee08e7a83aa"}


def _spec(path: Path) -> BackendSpec:
    found = importlib.util.spec_from_file_location(f"frozen_{path.parent.name}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.spec


@pytest.fixture(params=FROZEN, ids=[path.parent.name for path in FROZEN])
def backend(request: pytest.FixtureRequest) -> BackendSpec:
    return _spec(request.param)


class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        assert not torch.is_grad_enabled()
        self.log("val_loss", torch.nn.functional.mse_loss(self.line(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


class SaveTo(Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_save_opportunity(self, trainer, module, moment):
        if moment is Moment.END:
            trainer.save_checkpoint(self.path)


def _loader() -> DataLoader:
    x = torch.linspace(-1, 1, 96).reshape(32, 3)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def _trainer(backend: BackendSpec, folder: Path, **settings) -> Trainer:
    return Trainer(
        accelerator=backend,
        default_root_dir=str(folder),
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def test_there_is_a_frozen_backend_of_the_contract_of_today() -> None:
    assert f"contract_{CONTRACT.major}_{CONTRACT.minor}" in [path.parent.name for path in FROZEN]


def test_nobody_has_edited_one() -> None:
    found = {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in FROZEN}
    assert found == UNTOUCHED


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.parent.name)
def test_it_keeps_the_rules_of_one_device_but_for_the_layout_of_checkpoints(path: Path) -> None:
    modules = {f.path for f in functions().values() if f.level <= 1}
    names = [f"{m.parent.name}.{m.stem}" for m in sorted(modules) if "checkpoint" not in m.stem]
    done = subprocess.run(
        [
            *(sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--drivetrain-backend=backend:spec", "--pyargs"),
            *(f"drivetrain_conformance.suite.{name}" for name in names),
        ],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert len(names) > 10


def test_its_contract_is_the_one_of_its_folder(backend: BackendSpec, request) -> None:
    assert f"contract_{backend.contract.major}_{backend.contract.minor}" in request.node.name


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.parent.name)
def test_it_needs_the_interfaces_and_torch_alone(path: Path) -> None:
    code = (
        "import runpy, sys; names = runpy.run_path(sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
        "names['spec'].load().strategy\n"
        "found = {name.split('.')[0] for name in sys.modules if name.startswith('drivetrain')}\n"
        "assert found == {'drivetrain_interfaces'}, found"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_the_trainer_trains_with_it_and_the_loss_falls(
    backend: BackendSpec, tmp_path: Path
) -> None:
    losses = Losses()
    trainer = _trainer(backend, tmp_path, max_epochs=5, callbacks=[losses])
    trainer.fit(Line(), _loader(), _loader())
    assert trainer.global_step == len(losses.seen) == 20
    assert losses.seen[-1] < 0.2 * losses.seen[0]
    assert float(trainer.callback_metrics["val_loss"]) < 0.2 * losses.seen[0]


def test_it_resumes_from_what_it_saved(backend: BackendSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    straight = Line()
    halves = Line()
    halves.load_state_dict(straight.state_dict())
    _trainer(backend, tmp_path, max_epochs=4).fit(straight, _loader())

    path = str(tmp_path / "half.ckpt")
    _trainer(backend, tmp_path, max_epochs=2, callbacks=[SaveTo(path)]).fit(halves, _loader())
    resumed = Line()
    _trainer(backend, tmp_path, max_epochs=4).fit(resumed, _loader(), ckpt_path=path)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_what_it_does_not_declare_is_refused_before_it_starts(
    backend: BackendSpec, tmp_path: Path
) -> None:
    from drivetrain_interfaces import UnsupportedError

    with pytest.raises(UnsupportedError, match="accumulat"):
        _trainer(backend, tmp_path, accumulate_grad_batches=2)
