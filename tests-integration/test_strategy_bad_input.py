"""What strategies make of unusual modules and batches: a correct run, or a refusal by name."""

from __future__ import annotations

import pytest
import strategy_matrix as here
import torch

#: What is refused, and how. Everything else must be equal to one process.
REFUSED = {
    ("fsdp", "early"): ("SGD was built before",),
    ("zero2", "early"): ("SGD was built before",),
    ("tp", "early"): ("SGD was built before",),
    ("tp", "narrow"): ("layers.0",),
    ("pipeline", "unused"): ("spare.weight", "not in it"),
    ("ddp", "unused"): ("spare.weight", "did not depend on"),
    ("ddp2", "unused"): ("spare.weight", "did not depend on"),
    ("rpc", "unused"): ("spare.weight", "did not depend on"),
    ("zero1", "unused"): ("spare.weight", "did not depend on"),
}


@pytest.mark.parametrize("what", ["frozen", "unused", "early", "one row", "narrow"])
@pytest.mark.parametrize("name", here.STRATEGIES)
def test_odd_modules_and_batches_are_trained_or_refused_by_name(worlds, name, what):
    ranks = here.STRATEGIES[name][2]
    rows = 1 if what == "one row" else here.ROWS
    answers = worlds(ranks).run("strategy_matrix:odd", "S22", name=name, what=what, rows=rows)
    if (name, what) in REFUSED:
        for answer in answers:
            assert any(part in answer["refused"] for part in REFUSED[name, what]), answer
        return
    for answer in answers:
        assert "refused" not in answer, answer
    start, end = answers[0]["start"], answers[0]["end"]
    wanted = here.odd_by_hand(start, what, ranks, rows)
    for key, value in wanted.items():
        torch.testing.assert_close(end[key], value, rtol=1e-9, atol=1e-12)
    assert not (what == "frozen" and not end["layers.2.weight"].equal(start["layers.2.weight"]))
