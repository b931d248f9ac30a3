"""Strategies in worlds of 2 and 4: what ranks do together is one large batch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import Clip, Feature, ModelState, StepHook

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.reference import (
    Trained,
    as_double,
    distance,
    norm,
    train_by_hand,
    way,
)
from drivetrain_conformance.support.problems import (
    joined,
    mean_square,
    parameters_of,
    perceptron,
    samples,
)
from drivetrain_conformance.support.strategy_cases import (
    LR,
    WithSpare,
    WithStatistics,
    momentum,
    spare_loss,
    uneven_windows_of,
    windows_of,
)
from drivetrain_conformance.support.tolerances import Tolerance, tolerance

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend

    from drivetrain_conformance.fixtures import Bind, Build, Crews
    from drivetrain_conformance.support.crew import Crew, LonelyCrew
    from drivetrain_conformance.target import Target

    AnyCrew = Crew | LonelyCrew

pytestmark = pytest.mark.needs(Feature.SEVERAL_PROCESSES)

CASES = "drivetrain_conformance.support.strategy_cases"
#: Torch divides by the norm plus 1e-6 when it clips.
CLIPPED = 2e-5
LARGE_BATCH = "S4, S9: what ranks do together is what one process does with one large batch"


def joined_windows(size: int, accumulate: int) -> list[list[Any]]:
    """The windows of all ranks as windows of one process."""
    by_rank = [windows_of(rank, accumulate) for rank in range(size)]
    return [
        [joined(items) for items in zip(*windows, strict=True)]
        for windows in zip(*by_rank, strict=True)
    ]


def tolerated(backend: Backend, answer: Any) -> Tolerance:
    """How far answers in that precision may be off."""
    return tolerance(backend.precision(answer["precision"]).policy)


def check(answers: list[Any], wanted: Trained, allowed: Tolerance, rule: str) -> None:
    """All ranks hold the same parameters, and they are where they should be."""
    first = answers[0]["end"]
    for rank, answer in enumerate(answers):
        assert all(answer["applied"]), f"{rule}; rank {rank} did not apply: {answer['applied']}"
        differing = [name for name, value in first.items() if not value.equal(answer["end"][name])]
        assert not differing, f"{rule}; ranks 0 and {rank} hold other parameters: {differing}"
    apart = distance(way(answers[0]["start"], first), way(wanted.start, wanted.end))
    assert apart <= allowed.update, (
        f"{rule}; parameters went another way: the difference is {apart:.3g} of its length, and "
        f"{allowed.update:g} is tolerated"
    )


def test_ranks_train_as_one_large_batch(
    several: AnyCrew, backend: Backend, strategy_name: str, declared_precision: str
) -> None:
    """In every precision.

    R: S4, S9, S32
    """
    answers = several.run(
        f"{CASES}:train", LARGE_BATCH, name=strategy_name, precision=declared_precision
    )
    wanted = train_by_hand(perceptron(), joined_windows(several.size, 1), mean_square, lr=LR)
    check(answers, wanted, tolerated(backend, answers[0]), LARGE_BATCH)


@pytest.mark.needs(Feature.ACCUMULATION)
def test_ranks_accumulate_as_one_large_batch(
    several: AnyCrew, backend: Backend, strategy_name: str
) -> None:
    """Windows of three microbatches, and a tail of two.

    R: S17
    """
    rule = "S17: windows over ranks update as one large batch does"
    answers = several.run(f"{CASES}:train", rule, name=strategy_name, accumulate=3)
    wanted = train_by_hand(perceptron(), joined_windows(several.size, 3), mean_square, lr=LR)
    check(answers, wanted, tolerated(backend, answers[0]), rule)


def test_the_loss_of_a_result_is_that_of_the_rank(
    several: AnyCrew, backend: Backend, strategy_name: str
) -> None:
    """Averaging it would cost a collective that nobody asked for.

    R: S15
    """
    rule = "S15: the loss of a result is the mean over this rank's window"
    answers = several.run(f"{CASES}:train", rule, name=strategy_name)
    for rank, answer in enumerate(answers):
        wanted = train_by_hand(perceptron(), windows_of(rank, 1)[:1], mean_square, lr=LR)
        assert answer["losses"][0] == pytest.approx(
            wanted.losses[0], rel=tolerated(backend, answer).loss
        ), f"{rule}; rank {rank} should have {wanted.losses[0]:.6g} and has {answer['losses'][0]}"


@pytest.mark.needs(Feature.CLIP_NORM)
@pytest.mark.parametrize(
    "accumulate", [1, pytest.param(3, marks=pytest.mark.needs(Feature.ACCUMULATION))]
)
def test_ranks_clip_by_the_norm_of_the_whole(
    several: AnyCrew, backend: Backend, strategy_name: str, accumulate: int
) -> None:
    """After averaging, so that all take the same step; and the norm is the same on all.

    R: S20, S10
    """
    clip = Clip(0.125)
    rule = "S20: clipping by norm limits the norm of the averaged gradients"
    answers = several.run(
        f"{CASES}:train", rule, name=strategy_name, accumulate=accumulate, clip=clip
    )
    windows = joined_windows(several.size, accumulate)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR, clip=clip)
    allowed = tolerated(backend, answers[0])
    check(answers, wanted, Tolerance(allowed.loss, max(allowed.update, CLIPPED)), rule)
    for answer in answers:
        assert answer["norms"] == pytest.approx(wanted.norms, rel=max(allowed.update, CLIPPED)), (
            "S20: grad_norm is the norm of the averaged gradients before clipping, on every rank"
        )


@pytest.mark.needs(Feature.CLIP_VALUE)
def test_ranks_clip_values_of_the_whole(
    several: AnyCrew, backend: Backend, strategy_name: str
) -> None:
    """After averaging.

    R: S21, S10
    """
    clip = Clip(0.125, "value")
    rule = "S21: clipping by value limits every element of the averaged gradients"
    answers = several.run(f"{CASES}:train", rule, name=strategy_name, clip=clip)
    windows = joined_windows(several.size, 1)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR, clip=clip)
    check(answers, wanted, tolerated(backend, answers[0]), rule)


@pytest.mark.needs(Feature.ACCUMULATION)
def test_weights_count_over_all_ranks(
    several: AnyCrew, backend: Backend, strategy_name: str
) -> None:
    """Each sample counts alike, whichever rank it is on.

    R: S18
    """
    rule = "S18: with weight_over_ranks, a microbatch counts for its share of all ranks' total"
    answers = several.run(f"{CASES}:train_weighted", rule, name=strategy_name)
    whole = [item for rank in range(several.size) for item in uneven_windows_of(rank)[0]]
    wanted = train_by_hand(perceptron(), [whole], mean_square, lr=LR, weight=samples)
    check(answers, wanted, tolerated(backend, answers[0]), rule)


@pytest.mark.needs(Feature.ACCUMULATION)
def test_weights_over_ranks_count_in_windows_of_one(
    several: AnyCrew, backend: Backend, strategy_name: str
) -> None:
    """Because another rank may have more.

    R: S18
    """
    rule = "S18: with weight_over_ranks, a window of one is weighted too"
    answers = several.run(f"{CASES}:train_weighted_ones", rule, name=strategy_name)
    windows = [
        [uneven_windows_of(rank)[0][number] for rank in range(several.size)] for number in range(3)
    ]
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR, weight=samples)
    check(answers, wanted, tolerated(backend, answers[0]), rule)


@pytest.mark.needs(StepHook.BEFORE_OPTIMIZER_STEP)
def test_a_hook_sees_gradients_that_are_averaged(
    several: AnyCrew, backend: Backend, target: Target, strategy_name: str
) -> None:
    """The same on every rank.

    R: S10
    """
    from drivetrain_conformance.fixtures import usual_precision

    rule = "S10: before_optimizer_step sees gradients that are averaged over ranks"
    answers = several.run(f"{CASES}:see_gradients", rule, name=strategy_name)
    windows = joined_windows(several.size, 1)[:1]
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR).gradients[0]
    allowed = tolerance(backend.precision(usual_precision(target)).policy)
    for rank, seen in enumerate(answers):
        apart = distance(seen, wanted)
        assert apart <= allowed.update, f"{rule}; on rank {rank} they are off by {apart:.3g}"


@pytest.mark.needs(Feature.CLOSURE)
def test_ranks_with_a_closure_take_the_same_decisions(
    several: AnyCrew, backend: Backend, strategy_name: str
) -> None:
    """They see the mean of their losses.

    R: S19
    """
    rule = "S19: ranks with a closure see the mean of their losses"
    answers = several.run(f"{CASES}:train_with_closure", rule, name=strategy_name)
    twin = perceptron().double()
    wanted = Trained(parameters_of(twin))
    optimizer = torch.optim.LBFGS(twin.parameters(), lr=0.5, max_iter=3, max_eval=4)
    for (batch,) in joined_windows(several.size, 1)[:2]:

        def closure(batch: Any = as_double(batch)) -> torch.Tensor:  # noqa: B008 - bound on purpose
            optimizer.zero_grad()
            loss = mean_square(twin, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    wanted.end = parameters_of(twin)
    check(answers, wanted, tolerated(backend, answers[0]), rule)


def test_all_ranks_apply_or_none(
    several: AnyCrew, strategy_name: str, scaled_precision: str
) -> None:
    """A gradient that is not finite on one rank stops all.

    R: P10, S23
    """
    rule = "P10: an update that is not finite on one rank moves nothing on any"
    answers = several.run(
        f"{CASES}:train_until_one_is_not_finite",
        rule,
        name=strategy_name,
        precision=scaled_precision,
    )
    for rank, answer in enumerate(answers):
        assert answer["applied"] is False, f"{rule}; rank {rank} applied it"
        assert not answer["moved"], f"{rule}; rank {rank} moved {answer['moved']}"
        assert answer["again"], f"{rule}; rank {rank} did not apply the next one"
        assert all(v.equal(answers[0]["end"][k]) for k, v in answer["end"].items()), (
            f"{rule}; ranks 0 and {rank} are not equal any more"
        )


def test_all_ranks_start_with_what_rank_0_has(several: AnyCrew, strategy_name: str) -> None:
    """Parameters and buffers.

    R: S4
    """
    rule = "S4: after prepare, all ranks hold the parameters and buffers of rank 0"
    for rank, answer in enumerate(several.run(f"{CASES}:prepare", rule, name=strategy_name)):
        wanted = {f"inner.{n}": p for n, p in parameters_of(perceptron(0)).items()}
        for name, value in {**wanted, "memory": torch.zeros(2)}.items():
            assert torch.equal(answer[name].float(), value), f"{rule}; {name!r} on rank {rank}"


def test_evaluation_waits_for_nobody(several: AnyCrew, strategy_name: str) -> None:
    """One rank may have one batch more.

    R: S24
    """
    rule = "S24: a call of an evaluation step never waits for another rank"
    answers = several.run(f"{CASES}:evaluate_alone", rule, name=strategy_name)
    assert answers[0] is not None, rule


@pytest.mark.needs(Feature.MANUAL_STEP)
def test_a_manual_update_averages_over_ranks(
    several: AnyCrew, backend: Backend, target: Target, strategy_name: str
) -> None:
    """What one rank lacks counts as zero; what all lack stays away.

    R: S26
    """
    from drivetrain_conformance.fixtures import usual_precision

    rule = "S26: update averages gradients over ranks"
    answers = several.run(f"{CASES}:train_by_code", rule, name=strategy_name)
    twin = WithSpare(0).double()
    losses = [
        spare_loss(twin, as_double(windows_of(rank, 1)[0][0]), rank == several.size - 1)
        for rank in range(several.size)
    ]
    torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
    wanted = {n: -LR * p.grad for n, p in twin.named_parameters() if p.grad is not None}
    allowed = tolerance(backend.precision(usual_precision(target)).policy).update
    for rank, answer in enumerate(answers):
        went = way(answer["start"], answer["end"])
        apart = distance({name: went[name] for name in wanted}, wanted)
        assert apart <= allowed, f"{rule}; rank {rank} went {apart:.3g} of its way off"
        assert norm({"nobody": went["nobody"]}) == 0, "S26: what no rank uses does not move"
        assert answer["present"]["some"], (
            f"S26: a gradient that rank {rank} lacks and another has counts as zero"
        )
        assert not answer["present"]["nobody"], "S26: a gradient that no rank has stays away"


def test_a_state_of_several_ranks_goes_on_in_one(
    several: AnyCrew, build: Build, strategy_name: str
) -> None:
    """With one large batch.

    R: S32, S28
    """
    rule = "S32: any world size loads what any other saved"
    answers = several.run(f"{CASES}:save_and_go_on", rule, name=strategy_name)
    setup = build(optimizers=momentum)
    setup.strategy.load(ModelState(*answers[0]["state"]))
    start = setup.parameters()
    setup.train(joined_windows(several.size, 1)[2:])
    apart = distance(way(start, setup.parameters()), way(start, answers[0]["end"]))
    assert apart <= 2 * setup.tolerance.update, (
        f"{rule}; one process went {apart:.3g} of the way off from {several.size} ranks"
    )


def test_a_state_of_one_goes_on_in_several(crews: Crews, build: Build, strategy_name: str) -> None:
    """As if it had always been there.

    R: S32, S28
    """
    rule = "S32: any world size loads what any other saved"
    pair = crews.of(2)
    whole = joined_windows(2, 1)
    setup = build(optimizers=momentum)
    setup.train(whole[:2])
    saved = setup.strategy.state()
    state = (dict(saved.module), list(saved.optimizers), dict(saved.precision))
    start = setup.parameters()
    setup.train(whole[2:])
    answers = pair.run(f"{CASES}:load_and_go_on", rule, name=strategy_name, state=state)
    for rank, end in enumerate(answers):
        apart = distance(way(start, end), way(start, setup.parameters()))
        assert apart <= 2 * setup.tolerance.update, (
            f"{rule}; rank {rank} of 2 went {apart:.3g} of the way off from one process"
        )


def test_a_state_of_two_goes_on_in_the_same_world(crews: Crews, strategy_name: str) -> None:
    """Bit for bit.

    R: S28
    """
    rule = "S28: what state returns and load takes is enough to go on bit for bit"
    pair = crews.of(2)
    first = pair.run(f"{CASES}:save_and_go_on", rule, name=strategy_name)
    second = pair.run(f"{CASES}:load_and_go_on", rule, name=strategy_name, state=first[0]["state"])
    for rank in range(2):
        differing = [k for k, v in first[rank]["end"].items() if not v.equal(second[rank][k])]
        assert not differing, f"{rule}; on rank {rank} these differ: {differing}"


def test_a_second_step_replaces_the_first_and_closing_leaves_nothing(
    crews: Crews, backend: Backend, strategy_name: str
) -> None:
    """After close, the module is the user's again, on each rank alone.

    R: S35
    """
    rule = "S35: close drops the wrapper and its hooks and may be repeated"
    answers = crews.of(2).run(f"{CASES}:build_twice_and_close", rule, name=strategy_name)
    wanted = train_by_hand(perceptron(), joined_windows(2, 1), mean_square, lr=LR)
    check(answers, wanted, tolerated(backend, answers[0]), rule)


def test_the_strategy_for_one_device_refuses_a_larger_world(crews: Crews, target: Target) -> None:
    """It would not keep the models equal.

    R: S3
    """
    name = target.spec.facts.one_device_strategy
    if name in target.several_devices_strategies or target.strategy_name:
        pytest.skip(f"{BY_DECLARATION}it is the strategy for several devices too")
    rule = f"S3: the strategy {name!r} refuses a world of 2 with an UnsupportedError"
    for text in crews.of(2).run(f"{CASES}:bound_in_this_world", rule, name=name):
        assert text != "bound", f"{rule}; it was bound"
        assert re.search("world|process|rank", text), f"{rule}; its text is: {text}"


@pytest.mark.needs(Feature.SYNC_BATCHNORM)
def test_batch_statistics_are_over_all_ranks(
    several: AnyCrew, backend: Backend, strategy_name: str
) -> None:
    """As one large batch has them.

    R: S5
    """
    rule = "S5: batch statistics are over all processes if that is asked"
    answers = several.run(f"{CASES}:train_with_statistics", rule, name=strategy_name)
    windows = joined_windows(several.size, 1)
    wanted = train_by_hand(WithStatistics(0), windows, mean_square, lr=LR)
    check(answers, wanted, tolerated(backend, answers[0]), rule)


@pytest.mark.needs(Feature.DETERMINISTIC)
def test_two_runs_of_ranks_are_equal_bit_for_bit(several: AnyCrew, strategy_name: str) -> None:
    """With the same data in the same world.

    R: B4
    """
    rule = "B4: a backend that declares it repeats a run bit for bit"
    one, other = (several.run(f"{CASES}:repeat", rule, name=strategy_name) for _ in range(2))
    for rank, (first, second) in enumerate(zip(one, other, strict=True)):
        differing = [name for name, value in first.items() if not value.equal(second[name])]
        assert not differing, f"{rule}; on rank {rank} these differ: {differing}"


def test_ranks_are_in_step_after_training(several: AnyCrew, strategy_name: str) -> None:
    """No collective was left unmatched.

    R: L1, S34
    """
    rule = "L1: every rank calls the same operations in the same order"
    several.run(f"{CASES}:train", rule, name=strategy_name)
    collective = "drivetrain_conformance.support.collective_cases"
    wanted = several.size * (several.size + 1) / 2
    for found in several.run(f"{collective}:still_in_step", rule):
        assert found == wanted, f"{rule}; the sum of ranks is {wanted} and came out as {found}"


def test_a_strategy_in_a_world_of_one_is_one_process(
    bind: Bind, build: Build, backend: Backend, strategy_name: str
) -> None:
    """Nothing is wrapped, and nothing is sent.

    R: S36, S9
    """
    from drivetrain_conformance.support.setups import make_setup

    made = backend.precision(build().precision.name)
    setup = make_setup(bind(made, name=strategy_name), made)
    windows = joined_windows(2, 1)
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, f"S36: {strategy_name!r} in a world of one is one process")
