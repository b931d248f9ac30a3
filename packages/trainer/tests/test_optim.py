"""Every shape that ``configure_optimizers`` may return."""

from __future__ import annotations

import pytest
import torch
from drivetrain_interfaces import UserCodeError
from torch.optim.lr_scheduler import ConstantLR, ReduceLROnPlateau

from drivetrain.optim import configured


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


FIRST, SECOND = sgd(), sgd()
OF_FIRST, OF_SECOND = ConstantLR(FIRST), ConstantLR(SECOND)
PLATEAU = ReduceLROnPlateau(FIRST)


@pytest.mark.parametrize(
    ("returned", "optimizers", "schedulers"),
    [
        (None, [], []),
        ([], [], []),
        (FIRST, [FIRST], []),
        ([FIRST, SECOND], [FIRST, SECOND], []),
        ((FIRST, SECOND), [FIRST, SECOND], []),
        (([FIRST], [OF_FIRST]), [FIRST], [OF_FIRST]),
        ([[FIRST, SECOND], [OF_SECOND]], [FIRST, SECOND], [OF_SECOND]),
        (([FIRST], []), [FIRST], []),
        (([FIRST], [{"scheduler": OF_FIRST}]), [FIRST], [OF_FIRST]),
        ({"optimizer": FIRST}, [FIRST], []),
        ({"optimizer": FIRST, "lr_scheduler": None}, [FIRST], []),
        ({"optimizer": FIRST, "lr_scheduler": OF_FIRST}, [FIRST], [OF_FIRST]),
        ({"optimizer": FIRST, "lr_scheduler": {"scheduler": OF_FIRST}}, [FIRST], [OF_FIRST]),
        (
            [{"optimizer": FIRST, "lr_scheduler": OF_FIRST}, {"optimizer": SECOND}],
            [FIRST, SECOND],
            [OF_FIRST],
        ),
    ],
)
def test_every_known_shape_is_understood(returned, optimizers, schedulers):
    found, scheduled = configured(returned, "Net")
    assert found == optimizers
    assert [each.scheduler for each in scheduled] == schedulers


def test_a_scheduler_steps_once_per_epoch_unless_it_says_otherwise():
    scheduled = configured(([FIRST], [OF_FIRST]), "Net")[1][0]
    assert (scheduled.interval, scheduled.frequency, scheduled.monitor) == ("epoch", 1, None)
    assert not scheduled.needs_metric


def test_all_that_a_scheduler_says_is_kept():
    said = {"interval": "step", "frequency": 3, "monitor": "val_loss", "name": "rate"}
    returned = {"optimizer": FIRST, "lr_scheduler": {"scheduler": PLATEAU, "strict": True, **said}}
    scheduled = configured(returned, "Net")[1][0]
    assert {key: getattr(scheduled, key) for key in said} == said
    assert scheduled.needs_metric


def test_each_scheduler_knows_its_optimizer():
    scheduled = configured(([FIRST, SECOND], [OF_SECOND, OF_FIRST]), "Net")[1]
    assert [each.optimizer_index for each in scheduled] == [1, 0]


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (3, "int"),
        ("sgd", "str"),
        (torch.optim.SGD, "type"),
        ([FIRST, 3], "int"),
        ([FIRST, OF_FIRST], "ConstantLR"),
        ([[FIRST], OF_FIRST], "list"),
        ({"lr_scheduler": OF_FIRST}, "dict"),
        ({"optimizer": "sgd"}, "dict"),
        ((parameter for parameter in ()), "generator"),
    ],
)
def test_anything_else_is_refused_with_the_shapes_there_are(returned, named):
    said = rf"Net.configure_optimizers returned a {named} where an optimizer.*Return an optimizer,"
    with pytest.raises(UserCodeError, match=said):
        configured(returned, "Net")


@pytest.mark.parametrize("key", ["scheduler", "lr_schedulers", "monitor", "frequency"])
def test_a_key_beside_the_optimizer_is_never_ignored(key):
    with pytest.raises(UserCodeError, match=f"an optimizer with the keys .*{key}"):
        configured({"optimizer": FIRST, key: OF_FIRST}, "Net")


@pytest.mark.parametrize("value", [{"interval": "step"}, {"scheduler": OF_FIRST, "every": 2}, {}])
def test_a_scheduler_with_other_keys_is_refused(value):
    with pytest.raises(UserCodeError, match="returned a scheduler with the keys"):
        configured({"optimizer": FIRST, "lr_scheduler": value}, "Net")


@pytest.mark.parametrize("value", [[OF_FIRST, OF_FIRST], 3, {"scheduler": None}])
def test_what_cannot_step_is_refused(value):
    with pytest.raises(UserCodeError, match="where a scheduler belongs"):
        configured({"optimizer": FIRST, "lr_scheduler": value}, "Net")


@pytest.mark.parametrize(
    "said", [{"interval": "batch"}, {"frequency": 0}, {"frequency": None}, {"frequency": 0.5}]
)
def test_an_interval_or_frequency_that_means_nothing_is_refused(said):
    with pytest.raises(UserCodeError, match="'step' or 'epoch' and a frequency of at least 1"):
        configured(([FIRST], [{"scheduler": OF_FIRST, **said}]), "Net")


def test_a_plateau_without_a_metric_is_refused():
    with pytest.raises(UserCodeError, match="without a metric to watch"):
        configured(([FIRST], [PLATEAU]), "Net")
