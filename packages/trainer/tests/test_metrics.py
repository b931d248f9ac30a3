"""Logged values: naming, weighting, reductions, state, and what they cost in collectives."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch
from drivetrain_interfaces import ConfigurationError, DataError, ReduceOp, UserCodeError, World

from drivetrain.metrics import Metrics, Options

FOLD = 64  # values are added up whenever so many wait


class Exchange:
    """Collectives of one rank among threads; all of a run share ``meeting`` and ``table``."""

    def __init__(self, rank, size, meeting, table):
        self.rank = rank
        self.size = size
        self.calls = []
        self._meeting = meeting
        self._table = table

    def _everyone(self, kind, tensor):
        self.calls.append(kind)
        self._table[self.rank] = (kind, tensor.clone())
        self._meeting.wait(timeout=20)
        said = [self._table[rank] for rank in range(self.size)]
        self._meeting.wait(timeout=20)
        assert {other for other, _ in said} == {kind}, "ranks called different collectives"
        return [theirs for _, theirs in said]

    def all_reduce(self, tensor, op=ReduceOp.SUM):
        assert op is ReduceOp.SUM
        return torch.stack(self._everyone("all_reduce", tensor)).sum(0)

    def all_gather(self, tensor):
        return self._everyone("all_gather", tensor)


def place(rank, size):
    several = size > 1
    return World(
        rank, size, rank, size, address="localhost" if several else "", port=1 if several else 0
    )


def alone(*, training=True, device="cpu"):
    return Metrics(None, World(), torch.device(device), training=training)


def together(size, main, *, training=True):
    """Run ``main(rank, metrics)`` on ranks that are threads; returns results and calls by rank."""
    meeting, table = threading.Barrier(size), {}
    ranks = [Exchange(rank, size, meeting, table) for rank in range(size)]
    results, errors = [None] * size, []

    def work(rank):
        metrics = Metrics(ranks[rank], place(rank, size), torch.device("cpu"), training=training)
        try:
            results[rank] = main(rank, metrics)
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's thread
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results, [rank.calls for rank in ranks]


def options(**asked):
    return Options(**asked)


# Names
def test_training_reports_the_newest_value_of_a_step_by_default():
    metrics = alone()
    for value in (1.0, 2.0, 3.0):
        metrics.log("loss", value, options())
    assert metrics.step_values().everything == {"loss": 3.0}
    assert metrics.epoch_values().everything == {}


def test_a_log_point_reports_only_what_is_new():
    metrics = alone()
    metrics.log("loss", 1.0, options())
    metrics.log("rare", 5.0, options())
    metrics.step_values()
    metrics.log("loss", 2.0, options())
    assert metrics.step_values().everything == {"loss": 2.0}
    assert metrics.step_values().everything == {}


def test_evaluation_reports_the_epoch_by_default():
    metrics = alone(training=False)
    for value in (1.0, 3.0):
        metrics.log("val_loss", value, options())
    assert metrics.step_values().everything == {}
    assert metrics.epoch_values().everything == {"val_loss": 2.0}


def test_epoch_end_hooks_of_training_report_the_epoch_by_default():
    metrics = alone()
    metrics.between_batches = True
    metrics.log("summary", 4.0, options())
    assert metrics.step_values().everything == {}
    assert metrics.epoch_values().everything == {"summary": 4.0}


def test_a_value_for_step_and_epoch_gets_two_names_for_loggers_and_three_for_callbacks():
    metrics = alone()
    asked = options(on_step=True, on_epoch=True)
    for value in (1.0, 2.0):
        metrics.log("loss", value, asked)
    step, epoch = metrics.step_values(), metrics.epoch_values()
    assert step.logger == {"loss_step": 2.0}
    assert epoch.logger == {"loss_epoch": 1.5}
    assert epoch.everything == {"loss_epoch": 1.5, "loss": 1.5}


def test_values_go_only_where_they_were_asked_to_go():
    metrics = alone()
    metrics.log("shown", 1.0, options(prog_bar=True, logger=False))
    metrics.log("written", 2.0, options())
    logged = metrics.step_values()
    assert logged.everything == {"shown": 1.0, "written": 2.0}
    assert logged.prog_bar == {"shown": 1.0}
    assert logged.logger == {"written": 2.0}


def test_a_suffix_keeps_the_values_of_several_loaders_apart():
    metrics = alone(training=False)
    for number in range(2):
        metrics.suffix = f"/dataloader_idx_{number}"
        metrics.log("acc", float(number), options())
    metrics.suffix = ""
    metrics.log("acc", 7.0, options())
    assert metrics.epoch_values().everything == {
        "acc/dataloader_idx_0": 0.0,
        "acc/dataloader_idx_1": 1.0,
        "acc": 7.0,
    }


# Weights and reductions
def test_an_epoch_mean_is_weighted_by_the_samples_of_each_batch():
    metrics = alone(training=False)
    for value, size in ((1.0, 8), (4.0, 2)):
        metrics.batch = [torch.zeros(size, 3), torch.zeros(size)]
        metrics.log("val_loss", torch.tensor(value), options())
    assert metrics.epoch_values().everything["val_loss"] == pytest.approx((8 + 8) / 10)


def test_a_batch_size_that_is_given_wins():
    metrics = alone(training=False)
    metrics.batch = torch.zeros(100, 1)
    metrics.log("x", 1.0, options(), batch_size=3)
    metrics.log("x", 5.0, options(), batch_size=1)
    assert metrics.epoch_values().everything["x"] == 2.0


def test_a_batch_without_a_size_is_refused_only_where_it_matters():
    metrics = alone()
    metrics.batch = object()
    metrics.log("step", 1.0, options())
    metrics.log("given", 1.0, options(on_epoch=True), batch_size=1)
    with pytest.raises(DataError, match="Pass batch_size to log"):
        metrics.log("epoch", 1.0, options(on_epoch=True))


def test_epoch_end_hooks_do_not_take_the_weight_of_the_last_batch():
    metrics = alone(training=False)
    metrics.batch = torch.zeros(9, 1)
    metrics.between_batches = True
    metrics.log("x", 1.0, options(), batch_size=3)
    metrics.log("x", 5.0, options())
    assert metrics.epoch_values().everything["x"] == 2.0


@pytest.mark.parametrize("count", [1, FOLD - 1, FOLD, FOLD + 1, 3 * FOLD, 3 * FOLD + 5])
@pytest.mark.parametrize("on_device", [True, False], ids=["tensors", "numbers"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max"])
def test_every_reduction_is_right_over_any_number_of_values(count, on_device, reduction):
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(-50, 50, (count,), generator=generator).tolist()
    weights = torch.randint(1, 9, (count,), generator=generator).tolist()
    metrics = alone(training=False)
    for value, weight in zip(values, weights, strict=True):
        logged = torch.tensor(float(value)) if on_device else value
        metrics.log("x", logged, options(reduce_fx=reduction), batch_size=weight)
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    right = {"mean": mean, "sum": sum(values), "min": min(values), "max": max(values)}
    assert metrics.epoch_values().everything["x"] == pytest.approx(right[reduction], rel=1e-6)


def test_tensors_and_numbers_may_take_turns():
    metrics = alone(training=False)
    for value in (torch.tensor(1.0), 2.0, torch.tensor([[3]]), True):
        metrics.log("x", value, options())
    assert metrics.epoch_values().everything["x"] == 1.75


@pytest.mark.parametrize("function", [torch.mean, torch.sum, torch.min, torch.max, sum, min, max])
def test_functions_that_name_a_reduction_are_taken_for_it(function):
    metrics = alone(training=False)
    for value in (1.0, 2.0, 6.0):
        metrics.log("x", value, options(reduce_fx=function))
    right = {"mean": 3.0, "sum": 9.0, "min": 1.0, "max": 6.0}
    assert metrics.epoch_values().everything["x"] == right[function.__name__]


def test_an_epoch_that_is_reported_starts_anew():
    metrics = alone(training=False)
    metrics.log("x", 1.0, options())
    metrics.epoch_values()
    metrics.log("x", 5.0, options())
    assert metrics.epoch_values().everything == {"x": 5.0}
    assert metrics.epoch_values().everything == {}


def test_a_logged_tensor_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    metrics = alone()
    metrics.log("loss", weight * 2, options(on_step=True, on_epoch=True))
    state = metrics.state_dict()
    assert state["loss"]["values"] == [2.0]
    slot = metrics._slots["loss"]
    assert not slot.last.requires_grad
    assert not slot.values[0].requires_grad


# Refusals
@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(0), "3", None, [1.0], {"a": 1}])
def test_a_value_that_is_not_one_number_is_refused(value):
    with pytest.raises(UserCodeError, match=r"log\('x'\) was called with a .*Log a number"):
        alone().log("x", value, options())


@pytest.mark.parametrize("value", [torch.zeros(2), "3", None])
def test_a_later_value_that_is_not_one_number_is_refused_at_the_log_point(value):
    metrics = alone()
    metrics.log("x", torch.tensor(1.0), options())
    metrics.log("x", value, options())
    with pytest.raises(UserCodeError, match=r"log\('x'\) was called with a "):
        metrics.step_values()


@pytest.mark.parametrize("first", [torch.tensor(1.0), 1.0], ids=["tensor", "number"])
@pytest.mark.parametrize("value", [torch.zeros(2), "3", None])
def test_a_later_value_that_is_not_one_number_is_refused_when_the_epoch_is_added_up(first, value):
    metrics = alone(training=False)
    metrics.log("x", first, options())
    metrics.log("x", value, options())
    with pytest.raises(UserCodeError, match=r"log\('x'\) was called with a "):
        metrics.epoch_values()


def test_other_options_for_the_same_name_are_refused_with_both():
    metrics = alone()
    metrics.log("x", 1.0, options())
    with pytest.raises(UserCodeError, match=r"prog_bar=True.* after .*prog_bar=False"):
        metrics.log("x", 1.0, options(prog_bar=True))


@pytest.mark.parametrize("reduction", ["median", torch.median, None])
def test_an_unknown_reduction_is_refused_with_those_there_are(reduction):
    with pytest.raises(ConfigurationError, match="Use one of max, mean, min, sum"):
        alone().log("x", 1.0, options(reduce_fx=reduction))


# Objects with compute() and reset()
class Accuracy:
    """Like the metrics of torchmetrics: adds up by itself."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.right = self.all = 0

    def update(self, right, count):
        self.right += right
        self.all += count
        return self

    def compute(self):
        return torch.tensor(self.right / self.all)


def test_a_metric_object_is_computed_at_the_end_of_the_epoch_and_reset():
    metrics, accuracy = alone(training=False), Accuracy()
    for right, count in ((1, 4), (3, 4)):
        metrics.log("acc", accuracy.update(right, count), options())
    assert metrics.epoch_values().everything == {"acc": 0.5}
    assert accuracy.all == 0
    assert metrics.epoch_values().everything == {}


def test_a_metric_object_follows_the_names_of_other_values():
    metrics, accuracy = alone(), Accuracy()
    metrics.log("acc", accuracy.update(1, 4), options(on_step=True, on_epoch=True))
    assert metrics.step_values().logger == {"acc_step": 0.25}
    metrics.log("acc", accuracy.update(3, 4), options(on_step=True, on_epoch=True))
    epoch = metrics.epoch_values()
    assert epoch.logger == {"acc_epoch": 0.5}
    assert epoch.everything == {"acc_epoch": 0.5, "acc": 0.5}


def test_a_number_under_the_name_of_a_metric_object_is_refused():
    metrics = alone(training=False)
    metrics.log("acc", Accuracy().update(1, 2), options())
    with pytest.raises(UserCodeError, match=r"Log an object with compute\(\) and reset\(\)"):
        metrics.log("acc", torch.tensor(0.5), options())


# The device
def test_nothing_is_read_back_before_a_log_point():
    """Tensors of the meta device hold no data: reading one raises."""
    metrics = alone(device="meta")
    for n in range(2 * FOLD + 3):
        metrics.batch = [torch.zeros(2 + n % 3, device="meta")]
        metrics.log("loss", torch.ones((), device="meta"), options(on_step=True, on_epoch=True))
    with pytest.raises((RuntimeError, NotImplementedError)):
        metrics.step_values()
    with pytest.raises((RuntimeError, NotImplementedError)):
        metrics.epoch_values()


def test_a_log_point_reads_all_values_back_at_once(monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    metrics = alone()
    for _ in range(FOLD + 1):
        for n in range(5):
            metrics.log(f"m{n}", torch.tensor(float(n)), options())
    assert reads == []
    assert metrics.step_values().everything == {f"m{n}": float(n) for n in range(5)}
    assert reads == ["tolist"]


# State
def fill(metrics, values):
    generator = torch.Generator().manual_seed(3)
    for n in values:
        size = 1 + int(torch.randint(9, (), generator=generator.manual_seed(n)))
        value = torch.rand((), generator=generator)
        metrics.batch = [torch.zeros(size, 2)]
        metrics.log("loss", value, options(on_step=True, on_epoch=True))
        metrics.log("host", float(value), options(on_epoch=True, reduce_fx="sum"))
        metrics.log("best", value, options(on_epoch=True, reduce_fx=torch.max, prog_bar=True))


@pytest.mark.parametrize("cut", [0, 1, FOLD - 1, FOLD, FOLD + 7, 2 * FOLD])
def test_a_saved_epoch_continues_bit_for_bit(cut):
    total = 2 * FOLD + 9
    whole = alone()
    fill(whole, range(total))

    first, second = alone(), alone()
    fill(first, range(cut))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    fill(first, range(cut, total))  # saving changes nothing for the run that goes on
    fill(second, range(cut, total))
    right = whole.epoch_values()
    assert set(right.everything) >= {"loss", "loss_epoch", "host", "best"}
    for other in (first.epoch_values(), second.epoch_values()):
        assert other == right


def test_a_name_that_is_not_logged_again_after_a_resume_is_still_reported():
    first, second = alone(training=False), alone(training=False)
    first.log("x", 2.0, options(prog_bar=True, logger=False))
    second.load_state_dict(first.state_dict())
    logged = second.epoch_values()
    assert (logged.everything, logged.prog_bar, logged.logger) == ({"x": 2.0}, {"x": 2.0}, {})


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max"])
def test_what_lost_ranks_had_logged_goes_on_with_those_that_are_left(reduction):
    whole, parts = alone(training=False), [alone(training=False) for _ in range(3)]
    for number in range(3 * FOLD):
        value, rank = float(number % 17), number % 3
        for metrics in (whole, parts[rank]):
            metrics.log("x", value, options(reduce_fx=reduction), batch_size=1 + rank)
        if rank == 2:
            parts[2].log("theirs", value, options(reduce_fx=reduction), batch_size=3)
    left = alone(training=False)
    left.load_state_dict(*(json.loads(json.dumps(part.state_dict())) for part in parts))
    found = left.epoch_values().everything
    assert found["x"] == pytest.approx(whole.epoch_values().everything["x"])
    assert found["theirs"] == pytest.approx(parts[2].epoch_values().everything["theirs"])


def test_options_are_fixed_again_by_the_first_call_after_a_resume():
    first, second = alone(), alone()
    first.log("x", 2.0, options(on_epoch=True))
    second.load_state_dict(first.state_dict())
    second.log("x", 4.0, options(on_epoch=True, prog_bar=True))
    with pytest.raises(UserCodeError, match="same options"):
        second.log("x", 4.0, options(on_epoch=True))
    assert second.epoch_values().prog_bar == {"x_epoch": 3.0}


# Several ranks
def test_an_epoch_is_reduced_over_ranks_with_the_weights_of_all():
    def main(rank, metrics):
        for reduction in ("mean", "sum", "min", "max"):
            for value in range(1 + rank):
                metrics.log(
                    reduction,
                    torch.tensor(float(10 * rank + value)),
                    options(on_step=False, on_epoch=True, reduce_fx=reduction),
                    batch_size=1 + rank,
                )
        return metrics.epoch_values().everything

    results, calls = together(2, main)
    # Rank 0 logged 0 with weight 1; rank 1 logged 10 and 11 with weight 2 each.
    right = {"mean": (0 + 20 + 22) / 5, "sum": 21.0, "min": 0.0, "max": 11.0}
    assert results == [right, right]
    assert calls == [["all_reduce"], ["all_reduce"]]


def test_all_metrics_of_a_log_point_travel_in_one_collective():
    def main(rank, metrics):
        for n in range(40):
            metrics.log(f"m{n}", float(rank + n), options(on_epoch=True, sync_dist=True))
        step = metrics.step_values().everything
        return step, metrics.epoch_values().everything

    results, calls = together(3, main)
    assert calls == [["all_reduce", "all_reduce"]] * 3
    assert results[0] == results[1] == results[2]
    step, epoch = results[0]
    assert step == {f"m{n}_step": 1.0 + n for n in range(40)}
    assert {name: epoch[name] for name in epoch if "_" not in name} == {
        f"m{n}": 1.0 + n for n in range(40)
    }


def test_step_values_of_a_rank_are_its_own_and_cost_no_collective():
    def main(rank, metrics):
        metrics.log("loss", float(rank), options())
        return metrics.step_values().everything

    results, calls = together(2, main)
    assert results == [{"loss": 0.0}, {"loss": 1.0}]
    assert calls == [[], []]


def test_epoch_values_that_are_not_to_be_reduced_stay_the_rank_s_own():
    def main(rank, metrics):
        metrics.log("own", float(rank), options(sync_dist=False))
        metrics.log("shared", float(rank), options())
        return metrics.epoch_values().everything

    results, calls = together(2, main, training=False)
    assert results == [{"own": 0.0, "shared": 0.5}, {"own": 1.0, "shared": 0.5}]
    assert calls == [["all_reduce"]] * 2


def test_ranks_that_logged_different_names_all_report_all_of_them():
    def main(rank, metrics):
        metrics.log("both", float(rank), options())
        metrics.log(f"only{rank}", 5.0 + rank, options(prog_bar=True))
        logged = metrics.epoch_values()
        return logged.everything, set(logged.prog_bar)

    results, calls = together(2, main, training=False)
    right = {"both": 0.5, "only0": 5.0, "only1": 6.0}
    assert results == [(right, {"only0", "only1"})] * 2
    assert calls == [["all_reduce", "all_gather"]] * 2


def test_ranks_may_log_in_different_order():
    def main(rank, metrics):
        for name in ("a", "b") if rank else ("b", "a"):
            metrics.log(name, {"a": 1.0, "b": 2.0}[name] + rank, options())
        return metrics.epoch_values().everything

    results, _ = together(2, main, training=False)
    assert results == [{"a": 1.5, "b": 2.5}] * 2


def test_a_rank_without_any_batch_takes_part_and_reports_the_others_values():
    def main(rank, metrics):
        if rank != 1:
            metrics.log("val_loss", float(rank), options(), batch_size=1 + rank)
            metrics.log("count", 1, options(reduce_fx="sum"))
        return metrics.epoch_values().everything

    results, _ = together(3, main, training=False)
    assert results == [{"val_loss": 1.5, "count": 2.0}] * 3


def test_nobody_logging_anything_is_no_disagreement():
    results, calls = together(2, lambda _rank, metrics: metrics.epoch_values().everything)
    assert results == [{}, {}]
    assert calls == [["all_reduce"]] * 2


def test_a_rank_may_log_later_what_only_others_logged_before():
    """An epoch-end hook that logs only sometimes, with options of its own."""
    asked = options(on_step=False, on_epoch=True, prog_bar=True, reduce_fx=torch.mean)

    def main(rank, metrics):
        found = []
        for epoch in range(3):
            if rank == 0 or epoch == 1:
                metrics.log("x", float(10 * epoch + rank), asked)
            found.append(metrics.epoch_values().everything)
        return found

    results, _ = together(2, main)
    right = [{"x": 0.0}, {"x": 10.5}, {"x": 20.0}]
    assert results == [right, right]


def test_a_rank_that_leaves_a_name_out_for_an_epoch_keeps_its_options():
    def main(rank, metrics):
        metrics.log("x", 1.0, options(on_step=False, on_epoch=True, prog_bar=True))
        metrics.epoch_values()
        if rank == 0:
            metrics.log("x", 3.0, options(on_step=False, on_epoch=True, prog_bar=True))
        second = metrics.epoch_values().prog_bar
        with pytest.raises(UserCodeError, match="same options"):
            metrics.log("x", 1.0, options())
        return second

    results, _ = together(2, main)
    assert results == [{"x": 3.0}] * 2


def test_a_rank_that_has_nothing_new_takes_part_in_the_exchange_of_step_values():
    asked = options(sync_dist=True)

    def main(rank, metrics):
        metrics.log("x", float(rank), asked)
        first = metrics.step_values().everything
        if rank == 1:
            metrics.log("x", 7.0, asked)
        second = metrics.step_values().everything
        metrics.log("x", float(rank), asked)
        return first, second, metrics.step_values().everything

    results, _ = together(2, main)
    assert results[0] == ({"x": 0.5}, {}, {"x": 0.5})
    assert results[1] == ({"x": 0.5}, {"x": 7.0}, {"x": 0.5})


def test_more_metrics_than_one_message_holds_are_exchanged_too():
    def main(rank, metrics):
        for n in range(400):
            metrics.log(f"m{n}", float(n + rank), options())
        return metrics.epoch_values().everything

    results, _ = together(2, main, training=False)
    assert results == [{f"m{n}": n + 0.5 for n in range(400)}] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_reach_every_rank_and_no_other_metric(value):
    def main(rank, metrics):
        metrics.log("bad", value if rank == 0 else 1.0, options())
        metrics.log("good", 1.0, options())
        return metrics.epoch_values().everything

    results, _ = together(2, main, training=False)
    for found in results:
        assert found["good"] == 1.0
        assert found["bad"] == value or math.isnan(found["bad"])
        assert not math.isfinite(found["bad"])
