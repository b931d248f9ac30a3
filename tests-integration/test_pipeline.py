"""Layers on several ranks, over gloo, against one process with all the data."""

from __future__ import annotations

import pytest
import strategy_worlds as here
import torch
from drivetrain_interfaces import Clip


def close(one, other):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "options", "clip", "accumulate"),
    [
        (2, {}, None, 1),
        (2, {"schedule": "1f1b", "balance": [4, 5]}, Clip(0.1), 1),
        (2, {"split": ["3"], "activation_checkpointing": True}, None, 3),
        (2, {"schedule": "interleaved"}, None, 1),
        pytest.param(4, {"microbatches": 3}, Clip(0.1), 1, marks=pytest.mark.slow),
        pytest.param(4, {"copies": 2}, Clip(0.1), 3, marks=pytest.mark.slow),
    ],
    ids=["gpipe", "1f1b", "split", "interleaved", "four", "copies"],
)
def test_a_pipeline_trains_as_one_process(worlds, size, options, clip, accumulate):
    answers = worlds(size).run(
        "strategy_worlds:pipe", "S9", options=options, clip=clip, accumulate=accumulate
    )
    wanted = here.pipe_by_hand(size, clip, accumulate)
    whole = sum(p.nbytes for p in wanted.values())
    for answer in answers:
        close(answer["end"], wanted)
        close(answer["state"], wanted)
        if options.get("copies", 1) == 1:
            assert answer["losses"] == answers[0]["losses"]
        assert answer["norms"] == answers[0]["norms"]
        assert answer["states"] == len(wanted)
        assert answer["held"] < 1.7 * whole / (size // options.get("copies", 1))
        assert "some layers only" in answer["alone"]
        close(answer["after"], answers[0]["after"])
    assert answers[0]["evaluation"] > 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_the_first_loss_and_what_layers_count_are_of_the_data_alone(worlds, schedule):
    losses, state = here.pipe_from_the_first_by_hand(2)
    answers = worlds(2).run("strategy_worlds:pipe_from_the_first", "S9", schedule=schedule)
    for answer in answers:
        assert answer["losses"] == pytest.approx(losses, rel=1e-5)
    close(answers[0]["state"], state)
    assert len(answers[1]["seen"]) == 3 * 4


@pytest.mark.parametrize(
    ("size", "options", "clip", "accumulate"),
    [
        (2, {"split": ["blocks.1"]}, Clip(0.1), 3),
        (2, {"split": ["blocks.0", "blocks.1", "last"], "schedule": "interleaved"}, None, 1),
        pytest.param(4, {"split": ["blocks.2"], "copies": 2}, Clip(0.1), 1, marks=pytest.mark.slow),
    ],
    ids=["gpipe", "interleaved", "copies"],
)
def test_a_module_that_is_no_sequence_trains_as_one_process(
    worlds, size, options, clip, accumulate
):
    answers = worlds(size).run(
        "strategy_worlds:pipe",
        "S9",
        options={**options, "example": torch.zeros(1, 4)},
        clip=clip,
        accumulate=accumulate,
        kind="skipping",
    )
    wanted = here.pipe_by_hand(size, clip, accumulate, kind="skipping")
    for answer in answers:
        close(answer["end"], wanted)
        close(answer["state"], wanted)
        assert answer["norms"] == answers[0]["norms"]
        assert "some layers only" in answer["alone"]


@pytest.mark.parametrize(
    ("kind", "options", "naming"),
    [
        ("tied", {"split": ["blocks.1"]}, ("blocks.0.inner.weight", "blocks.1.inner.weight")),
        ("choosing", {"split": ["blocks.1"]}, ("cannot trace", "Model")),
        ("skipping", {"split": ["blocks.7"]}, ("blocks.7", "Model")),
        ("skipping", {}, ("split=[]", "2 processes")),
        ("skipping", {"balance": [1, 1]}, ("balance", "example")),
    ],
)
def test_a_module_that_cannot_be_divided_is_refused_by_name(worlds, kind, options, naming):
    for text in worlds(2).run(
        "strategy_worlds:pipe_refused",
        "S22",
        options={**options, "example": torch.zeros(1, 4)},
        made={},
        kind=kind,
    ):
        assert all(name in text for name in naming), text


@pytest.mark.parametrize(
    ("options", "made", "naming"),
    [
        ({}, {"tied": True}, ("0.0.weight", "7.0.weight")),
        ({}, {"outside": True}, ("scale", "not in it")),
        ({"balance": [9]}, {}, ("[9]", "2 processes")),
        ({"balance": [4, 4]}, {}, ("9 layers", "[4, 4]")),
        ({"split": ["nine"]}, {}, ("nine",)),
        ({"module": "elsewhere"}, {}, ("elsewhere", "Deep")),
        ({"schedule": "zigzag"}, {}, ("zigzag", "gpipe")),
        ({"microbatches": 0}, {}, ("microbatches=0",)),
        ({"copies": 2}, {}, ("copies=2", "world of 2")),
    ],
)
def test_what_does_not_fit_is_refused_by_name(worlds, options, made, naming):
    for text in worlds(2).run("strategy_worlds:pipe_refused", "S22", options=options, made=made):
        assert all(name in text for name in naming), text


def test_the_older_class_takes_the_older_arguments():
    from drivetrain.plugins import RPCSequentialPlugin
    from drivetrain_interfaces import ConfigurationError

    made = RPCSequentialPlugin(balance=[2, 1], microbatches=2)
    assert made.name == "pipeline"
    with pytest.raises(ConfigurationError, match="balance_by_time"):
        RPCSequentialPlugin(balance_mode="balance_by_time")
