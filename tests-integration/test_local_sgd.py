"""Ranks that average parameters now and then, against torch's own loop, over gloo."""

from __future__ import annotations

import pytest
import torch


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-7)


def mean(answers, key):
    every = [answer[key] for answer in answers]
    return {name: torch.stack([each[name] for each in every]).mean(0) for name in every[0]}


@pytest.mark.parametrize(("size", "group"), [(2, None), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_averaged_parameters_are_those_of_torchs_loop(worlds, size, group):
    answers = worlds(size).run("strategy_worlds:part_and_meet", "S9", group=group)
    for answer in answers:
        equal(answer["end"], answer["by_hand"])
        equal(answer["state"], mean(answers, "end"))
        equal(answer["left"], answer["state"])
    weights = [answer["end"]["first.weight"] for answer in answers]
    assert not torch.allclose(weights[0], weights[-1])
    assert all(one.equal(weights[0]) for one in weights[: group or 1])


@pytest.mark.parametrize("save_at", [3, 10])
def test_a_run_goes_on_where_its_period_was(worlds, save_at):
    """At both points ranks are equal: in the warm-up, and after an average."""
    answers = worlds(2).run(
        "strategy_worlds:part_and_meet", "S32", group=1, save_at=save_at, optimizer="plain"
    )
    for answer in answers:
        equal(answer["end"], answer["by_hand"])


@pytest.mark.parametrize(
    ("kind", "options", "doing", "precision", "naming"),
    [
        ("DDPStrategy", {"averaging_period": 1}, "bind", "32-true", ("averaging_period=1",)),
        ("DDPStrategy", {"averaging_start": 3}, "bind", "32-true", ("averaging_start=3",)),
        (
            "DDPStrategy",
            {"averaging_period": 2, "averaging_group": 2},
            "bind",
            "32-true",
            ("averaging_group=2", "world of 2"),
        ),
        (
            "DDPStrategy",
            {"averaging_period": 2, "comm_hook": print},
            "bind",
            "32-true",
            ("comm_hook",),
        ),
        ("DDPStrategy", {"averaging_period": 2}, "bind", "16-mixed", ("'16-mixed'",)),
        ("DDPStrategy", {"averaging_period": 2}, "manual", "32-true", ("manual step",)),
        ("DDPStrategy", {"averaging_period": 2}, "closure", "32-true", ("LBFGS",)),
        ("Zero1Strategy", {"averaging_period": 2}, "bind", "32-true", ("'zero1'", "'ddp'")),
        ("DDP2Strategy", {"averaging_period": 2}, "bind", "32-true", ("'ddp2'",)),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name(
    worlds, kind, options, doing, precision, naming
):
    for text in worlds(2).run(
        "strategy_worlds:refused",
        "S22",
        kind=kind,
        options=options,
        doing=doing,
        precision=precision,
    ):
        assert all(name in text for name in naming), text
