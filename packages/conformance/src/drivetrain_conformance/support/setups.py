"""A module, its optimizers and a train step, made as a trainer makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import StepSpec

from drivetrain_conformance.reference import Trained, distance, way
from drivetrain_conformance.support.problems import (
    mean_square,
    parameters_of,
    perceptron,
    sgd,
)
from drivetrain_conformance.support.tolerances import Tolerance, tolerance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_interfaces import Precision, StepResult, Strategy, TrainStep
    from torch import Tensor, nn
    from torch.optim import Optimizer

#: Updates that a loss scale may need to find itself, starting from whatever a backend starts with.
PATIENCE = 40


@dataclass(slots=True, repr=False)
class Setup:
    """A strategy with everything around it.

    Attributes:
        strategy: Bound to this process.
        precision: What it was bound with.
        module: What ``prepare`` returned.
        optimizers: Built from that.
        step: Built from all of it.
        start: Copies of the parameters before the first step, on the host.
    """

    strategy: Strategy
    precision: Precision
    module: nn.Module
    optimizers: list[Optimizer]
    step: TrainStep
    start: dict[str, Tensor]

    @property
    def tolerance(self) -> Tolerance:
        """How far results may be from the reference."""
        return tolerance(self.precision.policy)

    def train(self, windows: Sequence[Sequence[Any]]) -> list[StepResult]:
        """Take a step for each window. One that a loss scale prevented is taken again."""
        results = []
        with self.step:
            for window in windows:
                fed = [self.strategy.feed(microbatch) for microbatch in window]
                result = self.step(fed)
                for _ in range(PATIENCE if self.precision.policy.loss_scaling else 0):
                    if result.applied:
                        break
                    result = self.step(fed)
                results.append(result)
        return results

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters on the host, read from the module itself."""
        return parameters_of(self.module)

    def check(
        self,
        results: Sequence[StepResult],
        wanted: Trained,
        rule: str,
        *,
        at_least: float = 0.0,
    ) -> None:
        """Compare losses and the way that parameters went with training by hand.

        ``at_least`` widens a tolerance that is tighter.
        """
        tolerated = max(self.tolerance.loss, at_least)
        for number, (result, loss) in enumerate(zip(results, wanted.losses, strict=True)):
            assert result.applied, f"{rule}; update {number} was not applied"
            found = float(result.loss)
            assert abs(found - loss) <= tolerated * max(abs(loss), 1e-3), (
                f"{rule}; the loss of window {number} is {found:.9g} and should be {loss:.9g}, to "
                f"a relative {tolerated:g} in {self.precision.name}"
            )
        self.check_way(wanted, rule, at_least=at_least)

    def check_way(self, wanted: Trained, rule: str, *, at_least: float = 0.0) -> None:
        """Compare the way that parameters went with training by hand."""
        tolerated = max(self.tolerance.update, at_least)
        apart = distance(way(self.start, self.parameters()), way(wanted.start, wanted.end))
        assert apart <= tolerated, (
            f"{rule}; parameters went another way than in float64 by hand: the difference is "
            f"{apart:.3g} of its length, and {tolerated:g} is tolerated in "
            f"{self.precision.name}"
        )

    def check_still(self, rule: str) -> None:
        """Nothing has moved, not by one bit."""
        moved = [name for name, p in self.parameters().items() if not p.equal(self.start[name])]
        assert not moved, f"{rule}; these parameters moved: {moved}"


def make_setup(
    strategy: Strategy,
    precision: Precision,
    *,
    module: nn.Module | None = None,
    optimizers: Callable[[nn.Module], Sequence[Optimizer]] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] = mean_square,
    **settings: Any,
) -> Setup:
    """Prepare a module, build optimizers from what came out, and a step from all.

    Args:
        strategy: Bound to this process.
        precision: What it was bound with.
        module: By default the perceptron.
        optimizers: Makes them from the prepared module; by default gradient descent.
        loss: By default the mean square.
        settings: Further fields of ``StepSpec``.
    """
    prepared = strategy.prepare(perceptron() if module is None else module)
    made: list[Optimizer] = [*(optimizers(prepared) if optimizers else [sgd(prepared)])]
    step = strategy.train_step(StepSpec(prepared, made, loss, **settings))
    return Setup(strategy, precision, prepared, made, step, parameters_of(prepared))
