"""Files of Lightning 2.x become checkpoints, and a run goes on from them.

Most tests read a file that has the structure of one that Lightning 2.6 wrote, and is made here with
``torch.save``. The last one reads files that Lightning itself has just written, where it is
installed: ``nox -s lightning``.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Callback, Module, Trainer, checkpoints, cli
from drivetrain_interfaces import CheckpointError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from conftest import Starter

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


class Ours(Module):
    """What was trained with Lightning, here."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


class Losses(Callback):
    """Notes losses by step, and when validations and epochs end."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.ends: list[str] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.rows.append([trainer.global_step, float(outputs["loss"]).hex()])

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.ends.append(f"validation {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.ends.append(f"epoch {trainer.current_epoch}")


def _counter(count: int) -> dict[str, int]:
    return {"ready": count, "started": count, "processed": count, "completed": count}


def _file(path: Path, **more: Any) -> Ours:
    """A file as Lightning 2.6 saves it after the second of six batches of the second epoch."""
    module = Ours()
    parts = module.configure_optimizers()
    optimizer, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    for x, y in [*_batches(), *list(_batches())[:2]]:
        nn.functional.mse_loss(module.net(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    epoch, batch = _counter(1), _counter(2)
    held = {
        "epoch": 1,
        "global_step": 8,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": module.state_dict(),
        "loops": {
            "fit_loop": {
                "state_dict": {},
                "epoch_loop.state_dict": {"_batches_that_stepped": 7},
                "epoch_loop.batch_progress": {
                    "total": _counter(8),
                    "current": {**batch, "completed": 1},
                    "is_last_batch": False,
                },
                "epoch_progress": {
                    "total": {**epoch, "ready": 2, "started": 2},
                    "current": {**epoch, "ready": 2, "started": 2},
                },
            },
        },
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"dirpath": "/somewhere"}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 6},
        **more,
    }
    torch.save(held, path)
    return module


def test_a_run_goes_on_from_a_file_of_lightning(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    _file(old, mine={"words": 3})
    refused = checkpoints.import_lightning(old, new, Ours())
    assert refused == [
        "the order of samples: the rest of epoch 1, from batch 2 on, is of a new order",
        "random numbers: Lightning saves none",
        "callbacks: ModelCheckpoint{'monitor': None}",
        "mine: saved by code of your own",
    ]
    assert checkpoints.verify(new) == []
    whole, rest = Losses(), Losses()
    Trainer(**QUIET, max_epochs=3, callbacks=[whole]).fit(Ours(), _batches())
    Trainer(**QUIET, max_epochs=3, callbacks=[rest]).fit(Ours(), _batches(), ckpt_path=new)
    assert rest.rows == whole.rows[8:]


def test_without_the_module_there_are_weights_and_hyperparameters(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    module = _file(old)
    refused = checkpoints.import_lightning(old, new)
    assert "optimizer_states, lr_schedulers, loops: they need the module" in refused
    mine = Ours.load_from_checkpoint(str(new))
    assert mine.hparams == {"width": 6}
    for name, value in module.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value)


def test_names_that_do_not_fit_are_told(tmp_path: Path) -> None:
    class Renamed(Ours):
        def __init__(self) -> None:
            super().__init__()
            self.head = self.net[3]
            self.net = self.net[:3]

    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    _file(old)
    with pytest.raises(CheckpointError, match=r"head\.bias, head\.weight; .*net\.3\.bias, net\.3"):
        checkpoints.import_lightning(old, new, Renamed())
    assert not new.exists()
    refused = checkpoints.import_lightning(old, new, Renamed(), strict=False)
    assert "state_dict.net.3.bias: Renamed has no such name" in refused
    assert "state_dict.head.bias: not in the file, as the module has it" in refused


def test_shapes_and_groups_that_do_not_fit_are_told(tmp_path: Path) -> None:
    class Fewer(Ours):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net[0].parameters())

    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    _file(old, lr_schedulers=[])
    with pytest.raises(CheckpointError, match=r"net\.0\.weight \(\(6, 8\) in the file, \(5, 8\)"):
        checkpoints.import_lightning(old, new, Ours(5))
    with pytest.raises(CheckpointError, match=r"groups of \[6\] parameters.*\[2\]"):
        checkpoints.import_lightning(old, new, Fewer())


def test_what_only_its_own_code_could_make_is_listed_and_never_made(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    _file(old, hyper_parameters={"width": 6, "where": Path("data"), "who": Bomb()})
    refused = checkpoints.import_lightning(old, new)
    assert any("hyper_parameters.who" in each for each in refused)
    assert Ours.load_from_checkpoint(str(new)).hparams == {"width": 6}


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return _goes_off, ()


def _goes_off() -> None:
    raise AssertionError("code of the file was run")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"pytorch-lightning_version": "1.9.5"}, "saved by Lightning 1.9.5"),
        ({"state_dict": None}, "expected"),
        ({"optimizer_states": []}, "0 optimizers"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, more: Any, says: str) -> None:
    _file(tmp_path / "old.ckpt", **more)
    with pytest.raises(CheckpointError, match=says):
        checkpoints.import_lightning(tmp_path / "old.ckpt", tmp_path / "new.ckpt", Ours())


def test_the_command_line_imports_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project.py").write_text(
        "import torch\nfrom drivetrain import Module\n\n\n"
        "class Ours(Module):\n"
        "    def __init__(self, width=1):\n"
        "        super().__init__()\n"
        "        nn = torch.nn\n"
        "        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(),"
        " nn.Linear(width, 1))\n\n"
        "    def configure_optimizers(self):\n"
        "        optimizer = torch.optim.AdamW(self.parameters())\n"
        "        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4)]\n"
    )
    monkeypatch.chdir(tmp_path)
    _file(tmp_path / "old.ckpt")
    words = ["checkpoint", "convert", "old.ckpt", "new.ckpt", "--model", "project.Ours"]
    assert cli.main(words) == 0
    assert "left out: random numbers" in capsys.readouterr().out
    assert checkpoints.inspect("new.ckpt").values["loop/global_step"] == 8
    assert cli.main([*words[:4], "--model", "project.Nobody"]) == 2


@pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")
def test_runs_of_lightning_itself_go_on_bit_for_bit(start: Starter) -> None:
    start.run("lightning_run.py", str(start.folder))
    expected = json.loads((start.folder / "losses.json").read_text())
    files = [
        (start.folder / "steps" / "step=2.ckpt", 2, ["validation 0", "epoch 0"]),
        (start.folder / "steps" / "step=6.ckpt", 6, ["validation 0", "epoch 0"]),
        (start.folder / "epochs" / "epoch=0.ckpt", 6, ["validation 1", "epoch 1"]),
        (start.folder / "validations" / "epoch=1.ckpt", 12, ["epoch 1", "validation 2"]),
        (start.folder / "steps" / "step=9.ckpt", 9, ["validation 1", "epoch 1"]),
    ]
    for number, (path, step, ends) in enumerate(files):
        new, seen = start.folder / f"{number}.ckpt", Losses()
        checkpoints.import_lightning(path, new, Ours())
        trainer = Trainer(**QUIET, max_epochs=3, callbacks=[seen])
        trainer.fit(Ours(), _batches(), _batches(), ckpt_path=new)
        assert seen.rows == expected[step:], path
        assert seen.ends[:2] == ends, path
