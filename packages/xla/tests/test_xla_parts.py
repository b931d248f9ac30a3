"""Compiled steps, prefetching, counters, checkpoints, and the older names."""

from __future__ import annotations

import threading

import pytest
import torch
import torch_xla
from drivetrain_interfaces import (
    CheckpointIO,
    ConfigurationError,
    Precision,
    UnsupportedError,
    UserCodeError,
)
from torch import nn

from drivetrain_xla import monitor, seeds
from drivetrain_xla.loader import PrefetchLoader

# A compiled step.


def test_a_compiled_step_trains_alike(lab, by_hand):
    batches = lab.batches(8)
    losses, _ = lab.train(lab.bind(compile_step=True), batches)
    assert losses == pytest.approx(by_hand(lab.model(), batches)[0], abs=1e-5)


def test_a_compiled_step_that_reads_a_value_back_is_refused(lab):
    def loss(module, batch):
        value = lab.loss(module, batch)
        return value if value.item() > 0 else -value

    strategy = lab.bind(compile_step=True)
    _, _, step = lab.build(strategy, loss=loss)
    batch = strategy.feed(lab.batches(1)[0])
    with pytest.raises(UserCodeError, match="before its end"):
        step([batch])


def test_a_compiled_step_has_a_bounded_number_of_graphs(lab):
    strategy = lab.bind(compile_step=True, max_graphs=3)
    _, _, step = lab.build(strategy)

    def train():
        for rows in range(2, 9):
            step([strategy.feed(lab.batches(1, rows=rows)[0])])

    with pytest.raises(UserCodeError, match="max_graphs"):
        train()


def test_a_compiled_step_takes_no_loss_scale(lab):
    with pytest.raises(UnsupportedError, match="16-mixed"):
        lab.build(lab.bind(precision="16-mixed", compile_step=True))


def test_a_bound_of_no_graph_is_refused(lab):
    with pytest.raises(ConfigurationError, match="max_graphs=0"):
        lab.bind(compile_step=True, max_graphs=0)


# Prefetching.


def test_batches_come_in_order_and_on_the_device(lab):
    strategy = lab.bind()
    batches = lab.batches(5)
    loader = PrefetchLoader(batches, strategy.feed, ahead=3)
    assert len(loader) == 5
    for _ in range(2):
        found = list(loader)
        assert all(one.device.type == "xla" for one, _ in found)
        assert all(torch.equal(a[0].cpu(), b[0]) for a, b in zip(found, batches, strict=True))


def test_an_exception_of_the_data_set_comes_where_the_batch_would(lab):
    def broken():
        yield from lab.batches(2)
        raise OSError("the disk is gone")

    stream = iter(PrefetchLoader(broken(), lab.bind().feed))
    next(stream)
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_leaving_early_ends_the_thread(lab):
    before = threading.active_count()
    stream = iter(PrefetchLoader(lab.batches(50), lab.bind().feed))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_reading_nothing_ahead_is_refused():
    with pytest.raises(ConfigurationError, match="ahead=0"):
        PrefetchLoader([], lambda batch: batch, ahead=0)


# Counters.


def test_what_happens_is_counted(lab, tmp_path):
    before = monitor.counts()
    value = torch.ones(3, device="xla") * 3
    torch_xla.sync()
    assert value.sum().item() == 9
    found = monitor.counts() - before
    assert found.syncs == 1
    assert found.read_back == 1
    assert found.compiled + found.reused == 2
    assert "Counter" in monitor.report()


# Checkpoints.


def test_tensors_of_the_device_are_saved_from_the_host(lab, tmp_path):
    checkpoint_io = lab.backend.checkpoint_io()
    recorded = torch.arange(4, device="xla") * 2
    checkpoint_io.save({"mine": recorded}, str(tmp_path / "one"))
    assert checkpoint_io.load(str(tmp_path / "one"))["mine"].tolist() == [0, 2, 4, 6]


# The older names.


def test_the_older_names_are_what_they_say(lab):
    assert isinstance(seeds.XLACheckpointIO(), CheckpointIO)
    for kind, name in (
        (seeds.TPUPrecisionPlugin, "32-true"),
        (seeds.TPUBf16PrecisionPlugin, "bf16-true"),
        (seeds.TPUHalfPrecisionPlugin, "bf16-true"),
    ):
        assert isinstance(kind(), Precision)
        assert kind().name == name


@pytest.mark.parametrize(
    "plugin",
    [seeds.SingleTPUPlugin(), seeds.SingleTPUPlugin(device=0), seeds.TPUSpawnPlugin()],
    ids=["single", "device", "spawn"],
)
def test_the_older_strategies_train(lab, by_hand, plugin):
    batches = lab.batches(3)
    losses, _ = lab.train(plugin(lab.context()), batches)
    assert losses == pytest.approx(by_hand(lab.model(), batches)[0], abs=1e-5)


def test_another_device_than_the_expected_one_is_refused(lab):
    with pytest.raises(ConfigurationError, match="xla:1"):
        seeds.SingleTPUPlugin(device=1)(lab.context())


def test_the_older_precision_trains(lab):
    losses, module = lab.train(
        lab.bind(precision=seeds.TPUBf16PrecisionPlugin()), lab.batches(3), model=nn.Linear(4, 2)
    )
    assert module.weight.dtype is torch.bfloat16
    assert len(losses) == 3
