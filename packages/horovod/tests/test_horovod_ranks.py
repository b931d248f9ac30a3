"""Two real ranks over gloo: Horovod trains as DDP does."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def answers(on_two_ranks):
    return on_two_ranks("as_ddp", "resumed", "leaves_nothing", "other_world")


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
