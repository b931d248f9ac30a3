"""The number of samples in a batch, whatever it is made of."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from drivetrain_interfaces import DataError

from drivetrain.batches import size_of


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Sample:
    name: str
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 3), 5),
        (torch.zeros(0, 3), 0),
        ([torch.zeros(4, 2), torch.zeros(4)], 4),
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        (Pair(torch.zeros(3, 1), torch.zeros(3)), 3),
        ({"x": torch.zeros(6), "y": torch.zeros(6, 9)}, 6),
        (OrderedDict(x=torch.zeros(2)), 2),
        (Sample("a", torch.zeros(7, 1)), 7),
        ({"inner": [{"x": torch.zeros(8)}]}, 8),
        ((np.zeros((5, 2)), np.zeros(5)), 5),
        (["a", "b", "c"], 3),
        ([1.0, 2.0], 2),
        ({"text": ["a", "b"], "label": [0, 1]}, 2),
        ([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)], 3),
    ],
)
def test_it_is_the_first_dimension_of_what_is_found_first(batch, size):
    assert size_of(batch) == size


@pytest.mark.parametrize(
    "batch",
    [
        ({"step": 3, "x": torch.zeros(9, 2)}),
        ([torch.tensor(0.5), torch.zeros(9)]),
        ({"meta": {"name": "a"}, "x": torch.zeros(9)}),
        (Sample("a", torch.zeros(9))),
    ],
)
def test_what_has_no_dimension_is_passed_over(batch):
    assert size_of(batch) == 9


@pytest.mark.parametrize(
    "batch",
    [
        None,
        3,
        "text",
        b"bytes",
        [],
        {},
        torch.tensor(1.0),
        object(),
        SimpleNamespace(x=1),
        {"name": "a", "step": 3},
        {"x": torch.tensor(1.0), "y": torch.tensor(2.0)},
        Sample("a", torch.tensor(1.0)),
    ],
)
def test_a_batch_whose_size_cannot_be_told_is_refused(batch):
    with pytest.raises(DataError, match=rf"batch of type {type(batch).__name__} cannot be told"):
        size_of(batch)
