"""Every ability that is not declared is refused when it is asked for, and never ignored."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces import (
    Clip,
    EvalSpec,
    Feature,
    ManualSpec,
    StepHook,
    StepHooks,
    StepSpec,
    SupportsManualStep,
    UnsupportedError,
    World,
)

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support.messages import KNOWN_PRECISIONS, refused

if TYPE_CHECKING:
    from drivetrain_conformance.fixtures import Bind
    from drivetrain_conformance.target import Target

RULE = "B4: what is not declared is refused with an UnsupportedError and never ignored ({})"


def prepared(bind: Bind) -> tuple[Any, Any, Any]:
    """A bound strategy, a module that it prepared, and an optimizer for it."""
    from drivetrain_conformance.support import problems

    strategy = bind()
    module = strategy.prepare(problems.perceptron())
    return strategy, module, problems.sgd(module)


def build(bind: Bind, **settings: Any) -> None:
    """Build a train step with these settings besides the usual ones."""
    from drivetrain_conformance.support import problems

    strategy, module, optimizer = prepared(bind)
    strategy.train_step(StepSpec(module, [optimizer], problems.mean_square, **settings))


@pytest.mark.refuses(Feature.ACCUMULATION)
def test_accumulation_is_refused_if_not_declared(bind: Bind) -> None:
    """Updating once per microbatch instead would be another training.

    R: B4, S22
    """
    with refused(UnsupportedError, naming="accumulat", rule=RULE.format("accumulate=2")):
        build(bind, accumulate=2)


@pytest.mark.refuses(Feature.CLIP_NORM)
def test_clipping_by_norm_is_refused_if_not_declared(bind: Bind) -> None:
    """Gradients that are not clipped would explode later.

    R: B4, S22
    """
    with refused(UnsupportedError, naming="clip", rule=RULE.format("clip=Clip(1.0)")):
        build(bind, clip=Clip(1.0))


@pytest.mark.refuses(Feature.CLIP_VALUE)
def test_clipping_by_value_is_refused_if_not_declared(bind: Bind) -> None:
    """Gradients that are not clipped would explode later.

    R: B4, S22
    """
    with refused(UnsupportedError, naming="clip", rule=RULE.format("clip=Clip(1.0, 'value')")):
        build(bind, clip=Clip(1.0, "value"))


@pytest.mark.refuses(Feature.CLOSURE)
def test_an_optimizer_with_a_closure_is_refused_if_not_declared(bind: Bind) -> None:
    """It would evaluate the loss only once.

    R: B4, S19, S22
    """
    import torch

    from drivetrain_conformance.support import problems

    strategy, module, _ = prepared(bind)
    optimizer = torch.optim.LBFGS(module.parameters())
    with refused(UnsupportedError, naming="LBFGS|closure", rule=RULE.format("L-BFGS")):
        strategy.train_step(StepSpec(module, [optimizer], problems.mean_square))


@pytest.mark.refuses(Feature.SEVERAL_OPTIMIZERS)
def test_several_optimizers_are_refused_if_not_declared(bind: Bind) -> None:
    """One of them would never update.

    R: B4, S22, S23
    """
    from drivetrain_conformance.support import problems

    strategy, module, optimizer = prepared(bind)
    other = problems.sgd(module, 0.25)
    with refused(UnsupportedError, naming="optimizers", rule=RULE.format("two optimizers")):
        strategy.train_step(StepSpec(module, [optimizer, other], problems.mean_square))


@pytest.mark.refuses(Feature.MANUAL_STEP)
def test_a_manual_step_is_refused_if_not_declared(bind: Bind) -> None:
    """A strategy without it lacks the method, or refuses.

    R: B4
    """
    from drivetrain_conformance.support import problems

    strategy, module, optimizer = prepared(bind)
    if not isinstance(strategy, SupportsManualStep):
        return
    with refused(UnsupportedError, naming="manual", rule=RULE.format("a manual step")):
        strategy.manual_step(ManualSpec(module, [optimizer], problems.mean_square))


@pytest.mark.refuses(Feature.SYNC_BATCHNORM)
def test_synchronized_statistics_are_refused_if_not_declared(bind: Bind) -> None:
    """Statistics of one process alone would be another model.

    R: B4, S5
    """
    from drivetrain_conformance.support import problems

    with refused(UnsupportedError, naming="batch", rule=RULE.format("sync_batchnorm=True")):
        bind(sync_batchnorm=True).prepare(problems.perceptron())


@pytest.mark.refuses(Feature.INFERENCE_MODE)
def test_inference_mode_is_refused_if_not_declared(bind: Bind) -> None:
    """The user asked for it, and may rely on it.

    R: B4
    """
    strategy, module, _ = prepared(bind)
    with refused(UnsupportedError, naming="inference", rule=RULE.format("inference_mode=True")):
        strategy.eval_step(EvalSpec(module, lambda m, x: m(x), inference_mode=True))


class NoCollectives:
    """Collectives of a world that is never reached."""

    def __getattr__(self, name: str) -> Any:
        pytest.fail(f"B4: a world that cannot be served is refused before anything; used {name}")


@pytest.mark.refuses(Feature.SEVERAL_PROCESSES)
def test_several_processes_are_refused_if_not_declared(bind: Bind, target: Target) -> None:
    """Models that drift apart look like training.

    R: B4, S3
    """
    world = World(0, 2, 0, 2, address="127.0.0.1", port=1)
    names = [target.strategy_name] if target.strategy_name else target.spec.strategies
    for name in names:
        rule = RULE.format(f"strategy {name!r} in a world of 2")
        with refused(UnsupportedError, naming="world|process|rank", rule=rule):
            bind(name=name, world=world, collectives=NoCollectives())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.refuses(n)) for n in KNOWN_PRECISIONS]
)
def test_a_precision_is_refused_if_the_strategy_does_not_declare_it(
    bind: Bind, target: Target, name: str
) -> None:
    """A strategy of another package may do less than the backend.

    R: B4, B18
    """
    if name not in target.spec.capabilities.precisions:
        pytest.skip(f"{BY_DECLARATION}the backend does not declare {name} either")
    with refused(UnsupportedError, naming=re.escape(name), rule=RULE.format(f"precision {name!r}")):
        bind(name)


@pytest.mark.parametrize(
    "hook",
    [pytest.param(hook, marks=pytest.mark.refuses(hook), id=hook.value) for hook in StepHook],
)
def test_a_hook_is_refused_if_not_declared(bind: Bind, hook: StepHook) -> None:
    """An override that is never called is a bug that nobody sees.

    R: B4, S22
    """
    with refused(UnsupportedError, naming=hook.value, rule=RULE.format(f"the hook {hook.value}")):
        build(bind, hooks=StepHooks(**{hook.value: lambda *_: None}))
