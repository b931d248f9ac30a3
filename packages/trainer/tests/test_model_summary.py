from __future__ import annotations

import io
import warnings

import pytest
import torch
from drivetrain_interfaces import ConfigurationError
from torch import nn

from drivetrain.callbacks import ModelSummary
from drivetrain.callbacks.model_summary import as_text, count, summarize


class Terminal(io.StringIO):
    def isatty(self):
        return True


def network():
    net = nn.Sequential()
    net.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    net.head = nn.Linear(8, 2)
    net.head.bias.requires_grad_(False)
    return net


def test_the_table_counts_parameters_and_bytes():
    layers = {layer.name: layer for layer in summarize(network())}
    assert list(layers) == ["body", "head", ""]
    assert (layers["body"].parameters, layers["body"].trainable) == (56, 56)
    assert (layers["head"].parameters, layers["head"].trainable) == (18, 16)
    assert layers["head"].size == 72
    assert layers["body"].size == 56 * 4 + 2 * 8 * 4 + 8  # running mean, variance and a counter
    assert layers[""].parameters == 74
    assert layers[""].kind == "Sequential"


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (0, [""]),
        (1, ["body", "head", ""]),
        (2, ["body", "body.0", "body.1", "head", ""]),
        (-1, ["body", "body.0", "body.1", "head", ""]),
    ],
)
def test_depth_limits_the_rows(depth, names):
    assert [layer.name for layer in summarize(network(), depth)] == names


def test_shared_parameters_count_once_in_the_total():
    net = nn.Module()
    net.one = nn.Linear(3, 3, bias=False)
    net.two = nn.Linear(3, 3, bias=False)
    net.two.weight = net.one.weight
    assert [layer.parameters for layer in summarize(net)] == [9, 9, 9]


def test_half_precision_takes_half_the_bytes():
    assert summarize(nn.Linear(8, 8, bias=False).to(torch.bfloat16), 0)[0].size == 128


def test_parameters_without_a_shape_are_marked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch say that lazy modules are new
        net = nn.Sequential(nn.LazyLinear(4))
    assert summarize(net)[0].cells() == ("0", "LazyLinear", "0+", "0+", "0 B")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 "),
        (999, "999 "),
        (1000, "1.0 K"),
        (1234, "1.2 K"),
        (45_600_000, "45.6 M"),
        (7_000_000_000, "7.0 G"),
        (3_000_000_000_000_000, "3000.0 T"),
    ],
)
def test_numbers_are_short(number, text):
    assert count(number) == text


def test_plain_text_is_aligned():
    assert as_text(summarize(network())).splitlines() == [
        "Name   Type        Parameters  Trainable   Size",
        "-----------------------------------------------",
        "body   Sequential          56         56  296 B",
        "head   Linear              18         16   72 B",
        "-----------------------------------------------",
        "total  Sequential          74         72  368 B",
    ]


def test_it_prints_once_on_rank_0(ranks):
    stream = io.StringIO()
    for trainer in ranks:
        ModelSummary(stream=stream).on_fit_start(trainer, network())
    assert stream.getvalue() == as_text(summarize(network()))


def test_a_terminal_gets_a_drawn_table(trainer):
    stream = Terminal()
    ModelSummary(stream=stream).on_fit_start(trainer, network())
    text = stream.getvalue()
    assert "body" in text
    assert "368 B" in text
    assert "─" in text


def test_a_depth_that_means_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="max_depth=-2"):
        ModelSummary(-2)
