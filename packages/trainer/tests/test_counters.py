"""Where a run stands."""

from __future__ import annotations

import json

from drivetrain.counters import Progress


def test_counters_travel_as_json():
    progress = Progress(3, 17, 120, 2, 16, epoch_open=True, elapsed=1.5)
    other = Progress()
    other.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    assert other == progress


def test_a_new_epoch_keeps_what_belongs_to_the_run():
    progress = Progress(3, 17, 120, 2, 16, epoch_open=True, elapsed=1.5)
    progress.next_epoch()
    assert progress == Progress(4, 0, 120, 2, -1, epoch_open=False, elapsed=1.5)
