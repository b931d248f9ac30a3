"""What ranks do together with a strategy. Tests compare it with one process and a large batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import (
    Clip,
    EvalSpec,
    ManualSpec,
    ModelState,
    StepHooks,
    SupportsManualStep,
    UnsupportedError,
    UserCodeError,
)
from torch import Tensor, nn

from drivetrain_conformance.support.problems import (
    exact,
    fill,
    mean_square,
    microbatches,
    parameters_of,
    perceptron,
    samples,
    whole,
)
from drivetrain_conformance.support.setups import Setup, make_setup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain_conformance.support.ranks import Rank

LR = 0.5
#: Microbatches in each window; the last is a tail.
WINDOWS = (3, 3, 2)
#: Samples of the microbatches of one window, by rank.
UNEVEN = ((1, 5, 2), (7, 3, 4), (2, 2, 2), (1, 1, 6))


def windows_of(rank: int, accumulate: int) -> list[list[Any]]:
    """The windows that one rank trains on."""
    if accumulate == 1:
        return [[batch] for batch in microbatches(3, seed=10 + rank)]
    drawn = iter(microbatches(sum(WINDOWS), seed=10 + rank))
    return [[next(drawn) for _ in range(count)] for count in WINDOWS]


def uneven_windows_of(rank: int) -> list[list[Any]]:
    """One window whose microbatches differ in size, other ones on each rank."""
    return [microbatches(3, rows=UNEVEN[rank], seed=20 + rank)]


def answer_of(setup: Setup, results: Sequence[Any]) -> dict[str, Any]:
    """What a test looks at, on the host."""
    return {
        "start": setup.start,
        "end": setup.parameters(),
        "losses": [float(result.loss) for result in results],
        "applied": [result.applied for result in results],
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
        "precision": setup.precision.name,
    }


def set_up(rank: Rank, name: str, precision: str | None = None, **settings: Any) -> Setup:
    """A setup whose parameters differ between ranks before ``prepare``."""
    made = rank.precision(precision)
    settings.setdefault("module", perceptron(rank.world.rank))
    return make_setup(rank.bind(name, made), made, **settings)


def train(
    rank: Rank,
    name: str,
    precision: str | None = None,
    accumulate: int = 1,
    clip: Clip | None = None,
) -> dict[str, Any]:
    """Some updates on this rank's own data."""
    setup = set_up(rank, name, precision, accumulate=accumulate, clip=clip)
    return answer_of(setup, setup.train(windows_of(rank.world.rank, accumulate)))


def train_weighted(rank: Rank, name: str) -> dict[str, Any]:
    """A window that counts by samples, of which each rank has another number."""
    setup = set_up(rank, name, accumulate=3, weight=samples, weight_over_ranks=True)
    return answer_of(setup, setup.train(uneven_windows_of(rank.world.rank)))


def train_weighted_ones(rank: Rank, name: str) -> dict[str, Any]:
    """Windows of one microbatch that count by samples over ranks."""
    setup = set_up(rank, name, accumulate=3, weight=samples, weight_over_ranks=True)
    windows = [[batch] for batch in uneven_windows_of(rank.world.rank)[0]]
    return answer_of(setup, setup.train(windows))


def train_with_closure(rank: Rank, name: str) -> dict[str, Any]:
    """L-BFGS on this rank's own data."""
    setup = set_up(
        rank,
        name,
        optimizers=lambda m: [torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=3, max_eval=4)],
    )
    return answer_of(setup, setup.train(windows_of(rank.world.rank, 1)[:2]))


def see_gradients(rank: Rank, name: str) -> dict[str, Tensor]:
    """What ``before_optimizer_step`` sees."""
    seen: dict[str, Tensor] = {}

    def look(_: Any) -> None:
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                seen[key] = whole(parameter.grad.detach()).to("cpu", copy=True)

    setup = set_up(rank, name, hooks=StepHooks(before_optimizer_step=look), clip=None)
    module = setup.module
    setup.train(windows_of(rank.world.rank, 1)[:1])
    return seen


def train_until_one_is_not_finite(rank: Rank, name: str, precision: str) -> dict[str, Any]:
    """A good update, and one that is not finite on the last rank alone."""

    def steep(module: nn.Module, item: Any) -> Tensor:
        loss: Tensor = mean_square(module, item[:2]) * item[2]
        return loss

    batch = windows_of(rank.world.rank, 1)[0][0]
    setup = set_up(
        rank,
        name,
        precision,
        loss=steep,
        optimizers=lambda m: [torch.optim.SGD(m.parameters(), lr=LR, momentum=0.5)],
    )
    setup.train([[(*batch, torch.tensor(1.0))]])
    before = setup.parameters()
    last = rank.world.rank == rank.world.size - 1
    with setup.step:
        result = setup.step([setup.strategy.feed((*batch, torch.tensor(1e30 if last else 1.0)))])
    after = setup.parameters()
    (again,) = setup.train([[(*batch, torch.tensor(1.0))]])
    return {
        "applied": result.applied,
        "moved": [key for key, value in after.items() if not value.equal(before[key])],
        "again": again.applied,
        "end": setup.parameters(),
    }


class WithBuffer(nn.Module):
    """A perceptron with a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = perceptron(seed)
        self.register_buffer("memory", torch.full((2,), float(seed)))

    def forward(self, features: Tensor) -> Tensor:
        """Through the perceptron."""
        result: Tensor = self.inner(features)
        return result


def prepare(rank: Rank, name: str) -> dict[str, Tensor]:
    """What each rank holds after ``prepare`` of a module that was another on each."""
    module = rank.bind(name).prepare(WithBuffer(rank.world.rank))
    return {**parameters_of(module), "memory": next(iter(module.buffers())).cpu()}


def evaluate_alone(rank: Rank, name: str) -> float | None:
    """All enter an evaluation, and the first rank alone has a batch."""
    setup = set_up(rank, name)
    setup.train(windows_of(rank.world.rank, 1)[:1])
    answer = None
    spec = EvalSpec(setup.module, mean_square, inference_mode=False)
    with setup.strategy.eval_step(spec) as step:
        if rank.world.rank == 0:
            answer = float(step(setup.strategy.feed(microbatches(1)[0])))
        rank.collectives.barrier()
    return answer


def train_by_code(rank: Rank, name: str) -> dict[str, Any]:
    """A manual step, in which one parameter has a gradient on the last rank alone."""
    strategy = rank.bind(name)
    assert isinstance(strategy, SupportsManualStep), "S25: the strategy has manual_step"
    module = strategy.prepare(WithSpare(rank.world.rank))
    start = parameters_of(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    last = rank.world.rank == rank.world.size - 1
    with strategy.manual_step(ManualSpec(module, [optimizer], spare_loss)) as step:
        loss = step(strategy.feed(windows_of(rank.world.rank, 1)[0][0]), last)
        step.backward(loss)
        step.update(optimizer)
    present = {key: p.grad is not None for key, p in module.named_parameters()}
    return {"start": start, "end": parameters_of(module), "present": present}


class WithSpare(nn.Module):
    """A perceptron, a parameter that some rank may use, and one that nobody uses."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = perceptron(seed)
        self.some = nn.Parameter(torch.ones(2))
        self.nobody = nn.Parameter(torch.ones(2))

    def forward(self, features: Tensor, use: bool) -> Tensor:  # noqa: FBT001 - a batch's flag
        """Through the perceptron, and times the spare parameter if it is used."""
        made: Tensor = self.inner(features)
        return made * self.some if use else made


def spare_loss(module: nn.Module, item: Any, use: bool) -> Tensor:  # noqa: FBT001 - as above
    """The mean square, with or without the spare parameter."""
    loss: Tensor = (module(item[0], use) - item[1]).square().mean()
    return loss


def momentum(module: nn.Module) -> list[torch.optim.Optimizer]:
    """An optimizer with state."""
    return [torch.optim.SGD(module.parameters(), lr=LR, momentum=0.5)]


def save_and_go_on(rank: Rank, name: str) -> dict[str, Any]:
    """The state after some updates, and where further ones lead. Rank 0's state is the whole."""
    setup = set_up(rank, name, optimizers=momentum)
    windows = windows_of(rank.world.rank, 1)
    setup.train(windows[:2])
    state = setup.strategy.state()
    setup.train(windows[2:])
    whole = None
    if rank.world.rank == 0:
        whole = (dict(state.module), list(state.optimizers), dict(state.precision))
    return {"state": whole, "end": setup.parameters()}


def load_and_go_on(rank: Rank, name: str, state: Any) -> dict[str, Tensor]:
    """Where further updates lead from a state of any world."""
    setup = set_up(rank, name, optimizers=momentum)
    setup.strategy.load(ModelState(*state))
    setup.train(windows_of(rank.world.rank, 1)[2:])
    return setup.parameters()


def build_twice_and_close(rank: Rank, name: str) -> dict[str, Any]:
    """Build a second step, train, close twice, and train again without any strategy."""
    setup = set_up(rank, name)
    again = make_setup(setup.strategy, setup.precision, module=setup.module)
    results = again.train(windows_of(rank.world.rank, 1))
    answer = answer_of(again, results)
    answer["start"] = setup.start
    setup.strategy.close()
    setup.strategy.close()
    alone = rank.world.rank == 0
    if alone:  # a hook that was left behind would wait for the others
        use_alone(setup.module, rank.device)
    rank.collectives.barrier()
    return answer


def use_alone(module: nn.Module, device: torch.device) -> None:
    """Forward and backward on one rank; of a module that is not whole, an error at once."""
    features, targets = (t.to(device) for t in microbatches(1)[0])
    parts = [p for p in module.parameters() if hasattr(p, "full_tensor")]
    try:
        made = module(features.to(next(iter(module.parameters())).dtype))
        (made - targets).square().mean().backward()
    except (RuntimeError, UserCodeError):
        if not parts:
            raise


def bound_in_this_world(rank: Rank, name: str) -> str:
    """Whether the strategy serves this world: ``bound``, or the text of its refusal."""
    try:
        rank.bind(name)
    except UnsupportedError as error:
        return str(error)
    return "bound"


class WithStatistics(nn.Module):
    """A linear layer, batch statistics, a linear layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        fill(self, seed)

    def forward(self, features: Tensor) -> Tensor:
        """Through all three."""
        made: Tensor = self.last(torch.tanh(self.norm(self.first(features))))
        return made


def train_with_statistics(rank: Rank, name: str) -> dict[str, Any]:
    """Batch statistics over all ranks."""
    made = rank.precision()
    strategy = rank.bind(name, made, sync_batchnorm=True)
    setup = make_setup(strategy, made, module=WithStatistics(rank.world.rank))
    answer = answer_of(setup, setup.train(windows_of(rank.world.rank, 1)))
    state = strategy.state().module  # ranks may have to help, and need not have it
    answer["mean"] = state.get("norm.running_mean") if rank.world.rank == 0 else None
    return answer


def repeat(rank: Rank, name: str) -> dict[str, Tensor]:
    """A larger model, so that the order of additions has a chance to differ."""
    module = fill(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), seed=1, below=0.25)
    setup = set_up(
        rank, name, module=module, loss=lambda m, x: m(x).square().mean(), optimizers=momentum
    )
    setup.train([[exact((32, 64), 100 * rank.world.rank + n)] for n in range(5)])
    return setup.parameters()
