"""Every strategy with every precision, clipping and accumulation, against one process by hand.

    python tests-integration/scripts/strategy_matrix.py [--write] [NAME ...]

Each combination trains for twenty updates on two ranks (``dp``: on two devices). Either its
parameters equal those of a loop over all the data in float64 on one process, within the kit's
tolerance for the precision, or it is refused by name. What came out is kept in
``docs/strategy-matrix.json``; without ``--write`` it is compared with that.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from drivetrain_conformance.support.tolerances import tolerance
from drivetrain_interfaces import (
    Clip,
    DrivetrainError,
    StepSpec,
    StrategyContext,
    UnsupportedError,
)
from torch import nn

RECORD = Path(__file__).parents[2] / "docs/strategy-matrix.json"
UPDATES = 20
ROWS = 4  # of a microbatch on one rank

#: How each strategy is made: class, options, ranks.
STRATEGIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "single_device": ("SingleDeviceStrategy", {}, 1),
    "ddp": ("DDPStrategy", {}, 2),
    "ddp2": ("DDP2Strategy", {}, 2),
    "dp": ("DataParallelStrategy", {}, 1),
    "fsdp": ("FSDPStrategy", {"wrap": ["layers.2"]}, 2),
    "pipeline": ("PipelineStrategy", {"microbatches": 2}, 2),
    "rpc": ("RPCStrategy", {}, 2),
    "tp": ("TensorParallelStrategy", {"plan": {"layers.0": "colwise", "layers.2": "rowwise"}}, 2),
    "zero1": ("Zero1Strategy", {}, 2),
    "zero2": ("Zero2Strategy", {"wrap": ["layers.2"]}, 2),
}
PRECISIONS = ("64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "fp8")
CLIPS = {"none": None, "norm": Clip(0.2), "value": Clip(0.03, "value")}
WAYS = tuple(product((1, 3), CLIPS))

#: Outputs of the first two layers, where they are not the usual ones: fewer than there are ranks.
WIDTHS = {"narrow": (1, 1)}

Cell = tuple[str, int, str]


class Net(nn.Module):
    """Three layers in a sequence."""

    def __init__(self, first: int = 8, second: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, first),
            nn.Tanh(),
            nn.Linear(first, second),
            nn.Tanh(),
            nn.Linear(second, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def net(seed: int, *widths: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(*widths)


def loss_of(module: nn.Module, batch: Any) -> torch.Tensor:
    made = module(batch[0])
    wide = torch.promote_types(made.dtype, torch.float32)
    return (made.to(wide) - batch[1].to(wide)).square().mean()


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.5)


def windows(rank: int, accumulate: int, ranks: int = 2) -> list[list[Any]]:
    """What one rank draws; the last window is a tail, if there are several batches in one."""
    generator = torch.Generator().manual_seed(100)
    count = UPDATES * accumulate - (accumulate > 1)
    whole = [
        (
            torch.randn(2 * ROWS, 4, generator=generator),
            torch.randn(2 * ROWS, 3, generator=generator),
        )
        for _ in range(count)
    ]
    size = 2 * ROWS // ranks
    mine = [tuple(part[rank * size : (rank + 1) * size] for part in batch) for batch in whole]
    return [mine[n : n + accumulate] for n in range(0, count, accumulate)]


def all_cells() -> list[Cell]:
    """All combinations of one strategy."""
    return [(precision, *way) for precision in PRECISIONS for way in WAYS]


def diagonal(name: str) -> list[Cell]:
    """Those in which each precision and each way meet once; other ones for each strategy."""
    turn = list(STRATEGIES).index(name)
    return [
        (precision, *WAYS[(number + turn) % len(WAYS)])
        for number, precision in enumerate(PRECISIONS)
    ]


def run_cells(rank: Any, name: str, cells: list[Cell]) -> list[dict[str, Any]]:
    """Train with each combination, in the process of one rank."""
    return [_try(rank, name, cell) for cell in cells]


def _try(rank: Any, name: str, cell: Cell) -> dict[str, Any]:
    try:
        return _run(rank, name, *cell)
    except DrivetrainError as error:
        return {"refused": error.message, "kind": type(error).__name__}
    finally:
        rank.tidy()


def _run(rank: Any, name: str, precision: str, accumulate: int, clip: str) -> dict[str, Any]:
    ranks = STRATEGIES[name][2]
    made = rank.precision(precision)
    strategy = _bound(rank, name, made)
    module = strategy.prepare(net(rank.world.rank))
    start = _whole(module, strategy)
    step = strategy.train_step(
        StepSpec(module, [momentum(module)], loss_of, accumulate=accumulate, clip=CLIPS[clip])
    )
    norms = []
    with step:
        for window in windows(rank.world.rank, accumulate, ranks):
            for _ in range(UPDATES):  # a loss scale that is too large is found in some tries
                result = step([strategy.feed(batch) for batch in window])
                if result.applied:
                    break
            norms.append(None if result.grad_norm is None else float(result.grad_norm))
    return {
        "start": start,
        "end": _whole(module, strategy),
        "norms": norms,
        "tolerance": tolerance(made.policy).update,
    }


def _bound(rank: Any, name: str, precision: Any) -> Any:
    from drivetrain_toolkit import strategies

    kind, options, _ = STRATEGIES[name]
    strategy = getattr(strategies, kind)(**options)(
        StrategyContext(
            accelerator=rank.accelerator,
            device_index=rank.device_index,
            world=rank.world,
            collectives=rank.collectives,
            precision=precision,
            devices=(0, 1) if name == "dp" else (),
        )
    )
    rank.made.append(strategy)
    return strategy


def _whole(module: nn.Module, strategy: Any) -> dict[str, torch.Tensor]:
    """Parameters as float64, whole: on every rank, or on rank 0."""
    return {name: value.double().clone() for name, value in strategy.state().module.items()}


def odd(rank: Any, name: str, what: str, rows: int = ROWS) -> dict[str, Any]:
    """Train with something that not every strategy can do; the text of the refusal, or the end."""
    ranks = STRATEGIES[name][2]
    module = net(rank.world.rank, *WIDTHS.get(what, ()))
    if what == "unused":
        module.spare = nn.Linear(2, 2)
    if what == "frozen":
        module.layers[2].requires_grad_(False)
    drawn = [
        [tuple(part[:rows] for part in batch) for batch in window]
        for window in windows(rank.world.rank, 1, ranks)
    ]
    try:
        strategy = _bound(rank, name, rank.precision("64-true"))
        early = momentum(module)
        module = strategy.prepare(module)
        start = _whole(module, strategy)
        optimizer = early if what == "early" else momentum(module)
        step = strategy.train_step(StepSpec(module, [optimizer], loss_of))
        with step:
            for window in drawn:
                step([strategy.feed(batch) for batch in window])
    except DrivetrainError as error:
        return {"refused": error.message}
    return {"start": start, "end": _whole(module, strategy)}


def odd_by_hand(start: dict[str, torch.Tensor], what: str, ranks: int, rows: int = ROWS) -> Any:
    """The same in one process."""
    module = Net(*WIDTHS.get(what, ())).double()
    module.load_state_dict({n: v for n, v in start.items() if not n.startswith("spare")})
    module.layers[2].requires_grad_(what != "frozen")
    optimizer = momentum(module)
    for window in zip(*(windows(rank, 1, ranks) for rank in range(ranks)), strict=True):
        parts = [tuple(part[:rows].double() for part in batch) for (batch,) in window]
        loss_of(module, [torch.cat(some) for some in zip(*parts, strict=True)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in module.named_parameters()}


def by_hand(start: dict[str, torch.Tensor], accumulate: int, clip: str) -> Any:
    """The same from the same start, in float64 in one process with all the data."""
    module = Net().double()
    module.load_state_dict(start)
    optimizer = momentum(module)
    limit = CLIPS[clip]
    for window in windows(0, accumulate, ranks=1):
        for features, targets in window:
            (loss_of(module, (features.double(), targets.double())) / len(window)).backward()
        if limit is not None and limit.by == "norm":
            norm = nn.utils.clip_grad_norm_(module.parameters(), limit.value)
            assert norm > limit.value, "clipping by norm is not seen"
        elif limit is not None:
            assert max(p.grad.abs().max() for p in module.parameters()) > limit.value
            nn.utils.clip_grad_value_(module.parameters(), limit.value)
        optimizer.step()
        optimizer.zero_grad()
    return dict(module.named_parameters())


def judge(cell: Cell, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What came out of one combination, from the answers of all ranks.

    Raises:
        AssertionError: It is neither equal to the reference nor refused alike on all ranks.
    """
    if "refused" in answers[0]:
        texts = {answer.get("refused") for answer in answers}
        assert len(texts) == 1, (cell, texts)
        assert answers[0]["kind"] == UnsupportedError.__name__, (cell, answers[0])
        return {"refused": answers[0]["refused"]}
    _, accumulate, clip = cell
    start, end = answers[0]["start"], answers[0]["end"]
    wanted = by_hand(start, accumulate, clip)
    off = sum(float((end[n] - p.detach()).square().sum()) for n, p in wanted.items()) ** 0.5
    way = sum(float((start[n] - p.detach()).square().sum()) for n, p in wanted.items()) ** 0.5
    assert off <= answers[0]["tolerance"] * way, (cell, off / way, answers[0]["tolerance"])
    for answer in answers[1:]:
        assert answer["norms"] == answers[0]["norms"], cell
        assert all(value.equal(end[name]) for name, value in answer["end"].items()), cell
    return {"equal": off / way}


def declared(name: str, precision: str) -> bool:
    """Whether a strategy, and the CPU backend, say that they do a precision."""
    from drivetrain_toolkit import specs

    can = specs.CAPABILITIES.get(name)
    return precision in (specs.PRECISIONS if can is None else can.precisions)


def record(outcomes: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the outcomes of one strategy."""
    return {
        "equal": sum("equal" in each for each in outcomes.values()),
        "refused": [
            {
                "precision": cell[0],
                "accumulation": cell[1],
                "clipping": cell[2],
                "why": each["refused"],
            }
            for cell, each in outcomes.items()
            if "refused" in each
        ],
    }


def main() -> None:
    from drivetrain_conformance.support.crew import Crew

    names = [word for word in sys.argv[1:] if word != "--write"] or list(STRATEGIES)
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    crews: dict[int, Crew] = {}
    wrong = []
    for name in names:
        ranks = STRATEGIES[name][2]
        if ranks not in crews:
            crews[ranks] = Crew("cpu", None, tuple(range(ranks)))
        cells = all_cells()
        answers = crews[ranks].run(
            "strategy_matrix:run_cells", "S9", seconds=600, name=name, cells=cells
        )
        outcomes = {cell: judge(cell, list(each)) for cell, each in zip(cells, zip(*answers))}  # noqa: B905 - as many
        found = record(outcomes)
        worst = {
            precision: max(
                each.get("equal", 0.0) for cell, each in outcomes.items() if cell[0] == precision
            )
            for precision in PRECISIONS
        }
        shown = ", ".join(f"{precision} {off:.1e}" for precision, off in worst.items() if off)
        print(
            f"{name}: {found['equal']} equal, {len(found['refused'])} refused; off by {shown}",
            flush=True,
        )
        if kept.get(name) != found:
            wrong.append(name)
        kept[name] = found
    for crew in crews.values():
        crew.stop()
    if "--write" in sys.argv:
        text = json.dumps(dict(sorted(kept.items())), indent=1) + "\n"
        RECORD.write_text(text, encoding="utf-8")
    elif wrong:
        raise SystemExit(f"{RECORD} says something else of {', '.join(wrong)}: --write it")


if __name__ == "__main__":
    main()
