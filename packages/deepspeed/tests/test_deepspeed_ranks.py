"""Two real ranks: every stage trains as DDP does."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.timeout(900)
STAGES = (0, 1, 2, 3)
#: Sums are made in another order than DDP's.
TOLERATED = 1e-6


def test_ranks_with_other_versions_are_refused_on_both(two_ranks):
    refused = two_ranks.run("deepspeed_cases:versions", "versions", seconds=600.0)
    for rank, text in enumerate(refused):
        assert "different versions of DeepSpeed: 0.19.7 and 0.19.8" in text
        assert f"this one has 0.19.{7 + rank}" in text


@pytest.fixture(scope="module")
def answers(on_two_ranks):
    return on_two_ranks("every_stage")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["plain", "clipped", "accumulated"])
def test_twenty_steps_end_where_those_of_ddp_do(answers, how, stage):
    wanted, found = answers["every_stage"][how]["ddp"], answers["every_stage"][how][stage]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    module, optimizers, _ = wanted["state"]
    assert list(found["state"][0]) == list(module)
    for name, value in module.items():
        assert torch.allclose(found["state"][0][name], value, atol=TOLERATED, rtol=0), name
    state = found["state"][1][0]["state"]
    assert state.keys() == optimizers[0]["state"].keys()
    for name, entry in optimizers[0]["state"].items():
        assert state[name].keys() == entry.keys()
        for key, value in entry.items():
            assert torch.allclose(state[name][key], value, atol=TOLERATED, rtol=0), (name, key)


@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_before_clipping_is_reported(answers, stage):
    by_stage = answers["every_stage"]["clipped"]
    assert by_stage[stage]["norms"] == pytest.approx(by_stage["ddp"]["norms"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_groups_keep_their_parameters_and_settings(answers, stage):
    by_stage = answers["every_stage"]["plain"]
    found = by_stage[stage]["state"][1][0]["groups"]
    wanted = by_stage["ddp"]["state"][1][0]["groups"]
    assert [group["parameters"] for group in found] == [group["parameters"] for group in wanted]
    assert [group["lr"] for group in found] == [2e-2, 1e-2]
