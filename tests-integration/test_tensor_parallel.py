"""Layers divided by a plan, over gloo, against one process with all the data."""

from __future__ import annotations

import pytest
import strategy_worlds as here
import torch
from drivetrain import FunctionalModule, Trainer
from drivetrain_interfaces import Clip
from drivetrain_toolkit.strategies import TensorParallelStrategy

PLAN = {"body.up": "colwise", "body.down": "rowwise"}


def close(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 2e-4, "atol": 2e-5}
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance)


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ("pair", {}),
        ("pattern", {"accumulate": 3}),
        ("sequence", {"clip": Clip(0.05), "optimizer": "sgd"}),
        ("sequence", {"clip": Clip(0.01, "value"), "optimizer": "sgd"}),
        ("pair", {"clip": Clip(0.05), "optimizer": "two"}),
    ],
    ids=["pair", "accumulated", "norm", "value", "two-optimizers"],
)
def test_twenty_updates_equal_one_process_with_all_the_data(worlds, plan, settings):
    answers = worlds(2).run("strategy_worlds:tensor_parallel", "S9", plan=plan, **settings)
    wanted = here.tensor_parallel_by_hand(2, **settings)
    for rank, answer in enumerate(answers):
        close(answer["end"], wanted)
        close(answer["state"], wanted)
        close(answer["start"], wanted)
        assert set.union(*answer["states"]) == set(wanted)
        assert answer["again"] == answers[0]["again"]
        assert answer["norms"] == answers[0]["norms"]
        assert answer["held"]["body.up.weight"] == 4 * 6
        assert len(answer["losses"]) == 1 + rank
        assert answer["losses"][0] == answers[0]["losses"][0]
        close(answer["DDPStrategy"], answers[0]["TensorParallelStrategy"])


def test_layers_that_are_whole_draw_the_same_on_all_ranks(worlds):
    answers = worlds(2).run("strategy_worlds:tensor_parallel", "S9", plan="pair", dropout=0.5)
    close(answers[1]["end"], answers[0]["end"], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_parts_are_trained_in_other_precisions(worlds, precision):
    answers = worlds(2).run(
        "strategy_worlds:tensor_parallel", "S20", plan="pair", precision=precision, optimizer="sgd"
    )
    wanted = here.tensor_parallel_by_hand(2, optimizer="sgd")
    for answer in answers:
        ends = {name: value.float() for name, value in answer["end"].items()}
        close(ends, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("plan", "doing", "naming"),
    [
        (None, "prepare", ("without a plan",)),
        ({"body.nowhere": "colwise"}, "prepare", ("'body.nowhere'", "Feed")),
        ({"body.up": "sideways"}, "prepare", ("'sideways'", "colwise")),
        ({"body.norm": "colwise"}, "prepare", ("'body.norm'", "LayerNorm")),
        (PLAN, "tied", ("body.up.weight", "last.weight")),
        (PLAN, "odd", ("body.up", "9", "2 ranks")),
        (PLAN, "early", ("AdamW", "before")),
        (PLAN, "foreach", ("SGD", "foreach=True")),
    ],
)
def test_what_does_not_fit_is_refused_by_name(worlds, plan, doing, naming):
    for text in worlds(2).run("strategy_worlds:plan_refused", "S22", plan=plan, doing=doing):
        assert all(name in text for name in naming), text


def test_a_checkpoint_goes_from_one_device_to_two_by_a_plan_and_back(tmp_path):
    parted = TensorParallelStrategy(plan={"model.body.up": "colwise", "model.body.down": "rowwise"})
    path = None
    for epochs, strategy in enumerate(("single_device", parted, "single_device"), 1):
        net = here.feed(epochs)
        path = _fit(tmp_path, epochs, strategy, net, path)
    alone = here.feed(1)
    _fit(tmp_path / "alone", 3, "single_device", alone, None)
    close(dict(net.named_parameters()), dict(alone.named_parameters()))


def _fit(folder, epochs, strategy, net, path):
    devices = 1 if strategy == "single_device" else 2
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        launcher=None if devices == 1 else "fork",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder / str(epochs),
    )
    module = FunctionalModule(
        net,
        training_step=here.loss_of,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    data = list(
        zip(*(torch.cat(part) for part in zip(*here.batches(0, 4), strict=True)), strict=True)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=4 // devices)
    trainer.fit(module, loader, **({} if path is None else {"ckpt_path": path}))
    assert trainer.global_step == 4 * epochs
    (saved,) = (folder / str(epochs) / "checkpoints").glob("*.ckpt")
    return saved


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip": Clip(0.1), "accumulate": 3},
        {"optimizer": "two", "wrap": ["body.up", "body.down"]},
    ],
    ids=["plain", "clipped", "units-are-layers"],
)
def test_a_plan_under_fsdp_trains_as_one_process(worlds, settings):
    answers = worlds(4).run("strategy_worlds:both_ways", "S9", **settings)
    wanted = here.tensor_parallel_by_hand(
        4, **{name: value for name, value in settings.items() if name != "wrap"}
    )
    whole = sum(value.numel() for value in wanted.values())
    for answer in answers:
        close(answer["end"], wanted)
        assert answer["norms"] == answers[0]["norms"]
        assert answer["losses"][0] == answers[0]["losses"][0]
        assert answer["held"] < 0.6 * whole
    for kind in ("DDPStrategy", "FSDPStrategy"):
        close(answers[0][kind], answers[0]["DDPStrategy"])
