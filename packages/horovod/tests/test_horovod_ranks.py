"""Two real ranks over gloo: Horovod trains as DDP does."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def answers(on_two_ranks):
    return on_two_ranks(
        "as_ddp", "resumed", "leaves_nothing", "other_world", "scaled", "joined",
        "join_with_weights", "subgroups", "collectives_of_a_step",
    )  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "clipped", "accumulated", "mixed", "compressed"])
def test_twenty_steps_end_where_those_of_ddp_do(answers, how):
    wanted, found = answers["as_ddp"][how]["ddp"], answers["as_ddp"][how]["horovod"]
    tolerated = 2e-2 if how == "compressed" else 1e-6
    assert found["losses"] == pytest.approx(wanted["losses"], rel=max(tolerated, 1e-5))
    for name, value in wanted["state"][0].items():
        assert torch.allclose(found["state"][0][name], value, atol=tolerated, rtol=0), name


def test_the_norm_before_clipping_is_reported(answers):
    found = answers["as_ddp"]["clipped"]
    assert found["horovod"]["norms"] == pytest.approx(found["ddp"]["norms"], rel=1e-4)


def test_a_learning_rate_is_what_the_user_and_the_schedule_say(answers):
    found = answers["as_ddp"]["plain"]
    assert found["horovod"]["lr"] == found["ddp"]["lr"] == pytest.approx(1e-2 * 0.5**4)


@pytest.mark.parametrize("name", ["horovod", "ddp"])
def test_a_state_is_resumed_by_horovod_and_by_ddp(answers, name):
    for key, value in answers["resumed"]["end"][0].items():
        assert torch.allclose(answers["resumed"][name][0][key], value, atol=1e-6, rtol=0), key


def test_half_a_window_and_a_closed_strategy_leave_nothing(answers):
    assert answers["leaves_nothing"] == {"text": "TypeError", "still": True, "called": "DT204"}


def test_a_world_that_horovod_does_not_have_is_refused_with_both_sizes(answers):
    assert answers["other_world"] == ("This is rank 0 of 1, and Horovod has rank 0 of 2.")


def test_ranks_with_other_versions_are_refused_on_both(two_ranks):
    refused = two_ranks.run("horovod_cases:versions", "versions", seconds=600.0)
    for rank, text in enumerate(refused):
        assert "different versions of Horovod: 0.28.0 and 0.28.1" in text
        assert f"this one has 0.28.{rank}" in text


def test_learning_rates_are_multiplied_by_who_asks_for_it(answers):
    found = answers["scaled"]
    assert found["lr"] == pytest.approx(1e-2 * 0.5**4)
    for name, value in found["by hand"][0].items():
        assert torch.equal(found["asked"][0][name], value), name


def test_ranks_that_join_at_the_end_of_uneven_data_are_equal_again(answers):
    found = answers["joined"]
    assert (found["last"], found["equal"], found["equal after"]) == (0, True, True)
    steps = {float(entry["step"]) for entry in found["state"][1][0]["state"].values()}
    assert steps == {5.0}


def test_joining_with_weights_over_ranks_is_refused(answers):
    assert answers["join_with_weights"].startswith("join was called with weights over all ranks")


def test_a_subgroup_communicates_among_its_ranks_alone(answers):
    found = answers["subgroups"]
    assert found["ranks"] == [(0, 1), (0,), (0,)]
    assert found["sum"].tolist() == [3.0, 3.0]
    assert found["mean"].tolist() == [1.5, 1.5]
    assert found["max"].tolist() == [2.0, 2.0]
    assert [rows.shape[0] for rows in found["rows"]] == [1, 2]
    assert [int(one) for one in found["scalars"]] == [0, 1]
    assert found["sent"].tolist() == [2.0, 2.0]
    assert found["object"] == {"rank": 1}
    assert found["alone"].tolist() == [1.0, 1.0]
    assert found["refused"] == [[], [2], [0, 0]]
    assert "torch.bfloat16" in found["bfloat16"]


def test_a_step_sends_what_one_by_hand_does(answers):
    ours, by_hand = answers["collectives_of_a_step"]
    assert ours == by_hand == {"allreduce_async_": 3 * 4}
