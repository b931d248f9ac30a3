"""ZeRO and FSDP in worlds of 2 and 4 processes over gloo, against one process with all the data."""

from __future__ import annotations

import pytest
import strategy_worlds as here
import torch
from drivetrain_interfaces import Clip

SHARDED = ("Zero1Strategy", "Zero2Strategy", "FSDPStrategy")


def close(one, other, **tolerance):
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def equal(one, other):
    close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Zero1Strategy", {}),
        ("Zero1Strategy", {"parameters_as_bucket_view": True}),
        ("Zero2Strategy", {}),
        ("FSDPStrategy", {}),
        ("FSDPStrategy", {"wrap": ["blocks.0", "last"]}),
        ("FSDPStrategy", {"shards": 2}),
        ("FSDPStrategy", {"activation_checkpointing": True}),
    ],
    ids=lambda value: str(value).replace("Strategy", ""),
)
def test_twenty_updates_equal_one_process_with_all_the_data(worlds, size, kind, options):
    answers = worlds(size).run("strategy_worlds:train", "S9", kind=kind, options=options)
    wanted = here.reference(size)
    for answer in answers:
        equal(answer["end"], answers[0]["end"])
        close(answer["end"], wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("clip", [Clip(0.05), Clip(0.01, "value")], ids=["norm", "value"])
def test_clipping_limits_the_whole_and_not_a_part(worlds, kind, clip):
    answers = worlds(2).run("strategy_worlds:train", "S20", kind=kind, optimizer="sgd", clip=clip)
    wanted = here.reference(2, optimizer="sgd", clip=clip)
    for answer in answers:
        close(answer["end"], wanted, rtol=2e-4, atol=2e-5)
        assert answer["norms"] == answers[0]["norms"]


@pytest.mark.parametrize("kind", SHARDED)
def test_several_optimizers_share_a_step(worlds, kind):
    answers = worlds(2).run("strategy_worlds:train", "S23", kind=kind, optimizer="two")
    close(answers[0]["end"], here.reference(2, optimizer="two"), rtol=2e-4, atol=2e-5)


def test_sharded_parameters_in_half_precision_are_clipped(worlds):
    answers = worlds(2).run(
        "strategy_worlds:train",
        "S20",
        kind="FSDPStrategy",
        precision="16-true",
        optimizer="sgd",
        clip=Clip(0.05),
    )
    wanted = here.reference(2, optimizer="sgd", clip=Clip(0.05))
    assert answers[0]["end"]["first.weight"].dtype is torch.float16
    close({n: p.float() for n, p in answers[0]["end"].items()}, wanted, rtol=0.02, atol=0.01)


def test_gathered_parameters_may_have_another_format_than_stored_ones(worlds):
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    answers = worlds(2).run(
        "strategy_worlds:train",
        "P7",
        kind="FSDPStrategy",
        options={"mixed_precision": policy},
        optimizer="sgd",
    )
    end = answers[0]["end"]
    assert end["first.weight"].dtype is torch.float32
    close(end, here.reference(2, optimizer="sgd"), rtol=0.05, atol=0.05)


def test_a_module_on_the_meta_device_starts_as_rank_0_draws_it(worlds):
    answers = worlds(2).run("strategy_worlds:train", "S4", kind="FSDPStrategy", meta=True)
    torch.manual_seed(0)
    order = here.Model()
    wanted = dict(order.named_parameters())
    for answer in answers:
        equal(answer["start"], answers[0]["start"])
        assert all(value.abs().sum() > 0 for value in answer["start"].values())
        assert answer["start"].keys() == wanted.keys()


@pytest.mark.parametrize("kind", SHARDED)
def test_frozen_parameters_stay_where_they_are(worlds, kind):
    answers = worlds(2).run("strategy_worlds:train", "S9", kind=kind, frozen="blocks.0")
    for answer in answers:
        moved = {n for n, p in answer["end"].items() if not p.equal(answer["start"][n])}
        assert not any(name.startswith("blocks.0") for name in moved)
        assert "first.weight" in moved


@pytest.mark.parametrize("spare", [False, True])
def test_a_module_smaller_than_the_mesh_is_trained(worlds, spare):
    made = {"width": 2, "depth": 1, "spare": spare}
    answers = worlds(4).run("strategy_worlds:train", "S9", kind="FSDPStrategy", made=made)
    close(answers[0]["end"], here.reference(4, **made), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_rank_holds_its_share(worlds, size):
    """Bytes of parameters and optimizer state, over those of DDP. Padding is a few rows."""
    made = {"width": 64, "depth": 8}
    held = {
        kind: worlds(size).run("strategy_worlds:train", "memory", kind=kind, made=made)
        for kind in ("DDPStrategy", *SHARDED)
    }
    for rank in range(size):
        whole = held["DDPStrategy"][rank]
        share = 1 / size
        assert held["Zero1Strategy"][rank]["held"] == whole["held"]
        assert held["Zero1Strategy"][rank]["state"] / whole["state"] == pytest.approx(
            share, rel=0.1
        )
        for kind in ("Zero2Strategy", "FSDPStrategy"):
            for part in ("held", "state"):
                found = held[kind][rank][part] / whole[part]
                assert found == pytest.approx(share, rel=0.1), (kind, part)


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize(
    "then", ["DDPStrategy", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SHARDED)]
)
def test_a_state_goes_on_in_any_other_strategy(worlds, kind, then):
    for answer in worlds(2).run("strategy_worlds:hand_over", "S32", first=kind, then=then):
        close(answer["other"], answer["same"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SHARDED)
def test_a_module_is_prepared_again_and_evaluated_unevenly(worlds, kind):
    answers = worlds(2).run("strategy_worlds:use_again", "S35", kind=kind)
    assert [len(answer["losses"]) for answer in answers] == [1, 2]
    for answer in answers:
        equal(answer["before"], answer["after"])
        equal(answer["end"], answers[0]["end"])
        assert answer["losses"][0] == answers[0]["losses"][0]


@pytest.mark.parametrize(
    ("kind", "options", "doing", "naming"),
    [
        ("FSDPStrategy", {"shards": 3}, "bind", ("shards=3", "world of 2")),
        ("FSDPStrategy", {"cpu_offload": True}, "bind", ("cpu_offload", "host")),
        ("FSDPStrategy", {"plan_ranks": 2}, "bind", ("plan_ranks=2", "together")),
        (
            "FSDPStrategy",
            {"plan": {"first": "colwise"}, "plan_ranks": 2},
            "bind",
            ("divisor of 2",),
        ),
        ("FSDPStrategy", {"wrap": ["blocks.9"]}, "prepare", ("blocks.9", "Model")),
        ("FSDPStrategy", {}, "tied", ("blocks.0.inner.weight", "blocks.1.inner.weight")),
        ("FSDPStrategy", {}, "early", ("AdamW", "before", "prepare")),
        ("Zero1Strategy", {}, "kinds", ("float32", "float64")),
    ],
)
def test_what_cannot_be_is_refused_by_name_on_every_rank(worlds, kind, options, doing, naming):
    for text in worlds(2).run(
        "strategy_worlds:refused", "S22", kind=kind, options=options, doing=doing
    ):
        assert all(name in text for name in naming), text
