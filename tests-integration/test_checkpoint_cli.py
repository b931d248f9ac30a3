"""``drivetrain checkpoint``: what each action prints and writes, and its exit code."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Trainer, checkpoints, cli, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from drivetrain_interfaces import CheckpointError, UnsupportedError
from training_parts import Regression, loader

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with checkpoints of steps 4, 8 and 12, and a link to the last."""
    seed_everything(1)
    folder = tmp_path / "saved"
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[saver],
    )
    trainer.fit(Regression(), loader())
    return folder


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cli(*words: object) -> int:
    return cli.main(["checkpoint", *map(str, words)])


def test_verify_says_what_is_damaged(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli("verify", saved) == 0
    assert capsys.readouterr().out.count("complete and unchanged") == 4
    _flip(saved / "step=8.ckpt" / "tensors.safetensors")
    (saved / "step=4.ckpt" / "state.json").unlink()
    assert _cli("verify", saved / "step=12.ckpt", saved / "step=8.ckpt", saved / "step=4.ckpt") == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("complete and unchanged")
    assert "tensors.safetensors" in second
    assert "state.json" in third


def test_verify_follows_a_name_that_stands_for_another(saved: Path) -> None:
    io = checkpoints.default_io(str(saved))
    pointer = saved / "pointer.ckpt"
    io.save({"same_as": "step=8.ckpt"}, str(pointer))
    assert checkpoints.verify(pointer) == []
    _flip(saved / "step=8.ckpt" / "tensors.safetensors")
    assert "tensors.safetensors" in checkpoints.verify(pointer)[0]


def test_inspect_shows_tensors_and_values(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli("inspect", saved / "step=8.ckpt", "--all") == 0
    out = capsys.readouterr().out
    assert "module/net.0.weight" in out
    assert "16 × 8" in out
    assert "loop/global_step" in out
    assert _cli("inspect", saved / "step=8.ckpt", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["values"]["loop/global_step"] == 8
    assert facts["tensors"]["module/net.0.weight"]["dtype"] == "float32"


def test_diff_shows_places(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli("diff", saved / "step=12.ckpt", saved / "last.ckpt") == 0
    assert "the same" in capsys.readouterr().out
    assert _cli("diff", saved / "step=8.ckpt", saved / "step=12.ckpt") == 1
    assert "loop/global_step" in capsys.readouterr().out
    assert _cli("diff", saved / "step=8.ckpt", saved / "step=12.ckpt", "--json") == 1
    places = [each["place"] for each in json.loads(capsys.readouterr().out)]
    assert "module/net.0.weight" in places


def test_convert_writes_single_files_and_reads_them(saved: Path, tmp_path: Path) -> None:
    source = saved / "step=8.ckpt"
    weights = Regression.load_from_checkpoint(str(source)).state_dict()
    single, plain, back = (tmp_path / name for name in ("one.pt", "one.safetensors", "back.ckpt"))
    assert _cli("convert", source, single) == 0
    read = torch.load(single, weights_only=True)
    assert all(torch.equal(read["module"][name], weights[name]) for name in weights)
    assert _cli("convert", source, plain) == 0
    assert plain.is_file()
    assert _cli("convert", single, back) == 0
    assert _cli("diff", source, back) == 0
    assert _cli("consolidate", source, tmp_path / "whole.ckpt") == 0
    assert _cli("diff", source, tmp_path / "whole.ckpt") == 0


def test_prune_keeps_the_newest_and_what_a_link_leads_to(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli("prune", saved, "--keep", "1") == 0
    assert "step=4.ckpt" in capsys.readouterr().out
    assert sorted(os.listdir(saved)) == ["last.ckpt", "step=12.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["mend"], 2, "no action 'mend'"),
        (["inspect", "nowhere.ckpt"], 2, "DT401"),
        (["verify", "nowhere.ckpt"], 1, "nowhere.ckpt"),
        (["convert", "nowhere.ckpt", "out.pt"], 2, "DT401"),
        (["prune", ".", "--keep", "0"], 2, "Keep one"),
        (["--help"], 0, "consolidate"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_a_code(
    words: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _cli(*words) == code
    told = capsys.readouterr()
    assert says in told.out + told.err
    assert "Traceback" not in told.err


def test_nothing_is_written_over(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli("convert", saved / "step=8.ckpt", saved / "step=4.ckpt") == 2
    assert "DT401" in capsys.readouterr().err


def test_a_checkpoint_io_without_an_ability_is_refused_by_name(saved: Path) -> None:
    class Plain:
        def save(self, tree: Any, path: str) -> None: ...

        def load(self, path: str) -> dict[str, Any]:
            raise CheckpointError("Nothing is there.", "Save first.")

        exists = remove = load

    assert checkpoints.verify(saved, Plain()) == ["Nothing is there."]
    with pytest.raises(UnsupportedError, match=r"Plain.*SupportsInspect"):
        checkpoints.inspect(saved, Plain())
    with pytest.raises(UnsupportedError, match=r"Plain.*SupportsPrune"):
        checkpoints.prune(saved, 1, Plain())
