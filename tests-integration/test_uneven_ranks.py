"""Ranks that run out of batches stand by until the last one has ended (DDP's ``uneven_inputs``)."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ((2, 5), {}),
        ((0, 3), {}),
        ((3, 3), {}),
        ((1, 4), {"find_unused_parameters": True}),
        ((4, 1), {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001}),
    ],
)
def test_a_rank_without_batches_changes_nothing(worlds, counts, options):
    """Updates are the mean over the ranks that still train, and all end with the same state."""
    answers = worlds(2).run("uneven_worlds:train", "S4", counts=counts, options=options)
    wanted = worlds(2).run("uneven_worlds:expected", "S4", counts=counts)[0]
    for answer in answers:
        assert len(answer["losses"]) == sum(counts)
        assert "with step" in answer["outside"]
        for name, value in answer["end"].items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
            assert value.equal(answers[0]["end"][name])
    one, other = (answer["state"][0]["state"] for answer in answers)
    assert all(one[name][key].equal(other[name][key]) for name in one for key in one[name])


@pytest.mark.parametrize(
    ("kind", "options", "spec", "naming"),
    [
        ("DDPStrategy", {"static_graph": True}, {}, "static_graph"),
        ("DDPStrategy", {"averaging_period": 2}, {}, "averaging_period"),
        ("DDPStrategy", {"comm_hook": print}, {}, "comm_hook"),
        ("Zero1Strategy", {}, {}, "'zero1'"),
        ("DDPStrategy", {}, {"accumulate": 2}, "2 microbatches"),
        ("DDPStrategy", {}, {"weight_over_ranks": True}, "weights over ranks"),
        ("DDPStrategy", {}, {"optimizer": "lbfgs"}, "evaluates the loss"),
        ("DDPStrategy", {}, {"norm": True}, "batch normalization"),
    ],
)
def test_what_a_rank_without_batches_cannot_take_part_in_is_refused(
    worlds, kind, options, spec, naming
):
    for text in worlds(2).run(
        "uneven_worlds:refused", "S22", kind=kind, options=options, spec=spec
    ):
        assert "uneven_inputs" in text, text
        assert naming in text, text
