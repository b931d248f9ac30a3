"""What ranks do with a strategy in the tests of strategies. Runs in the processes of a crew."""

from __future__ import annotations

from typing import Any

import torch
from drivetrain_conformance.support.problems import whole
from drivetrain_interfaces import (
    Clip,
    DrivetrainError,
    EvalSpec,
    ManualSpec,
    ModelState,
    StepSpec,
    StrategyContext,
)
from drivetrain_toolkit import strategies
from torch import nn

STEPS = 20
ROWS = 4  # of a microbatch on one rank


class Block(nn.Module):
    """A residual layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    """Blocks between two layers. ``tied`` ones share a weight; nobody uses a ``spare``."""

    def __init__(
        self, width: int = 8, depth: int = 2, *, tied: bool = False, spare: bool = False
    ) -> None:
        super().__init__()
        self.first = nn.Linear(4, width, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 4, bias=False)
        if spare:
            self.spare = nn.Linear(3, 3)
        if tied:
            self.blocks[1].inner.weight = self.blocks[0].inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def model(seed: int = 0, **settings: Any) -> Model:
    """The same on every rank for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(**settings)


def loss_of(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    dtype = torch.promote_types(batch[1].dtype, torch.float32)
    return (module(batch[0]).to(dtype) - batch[1]).square().mean()


def batches(rank: int, count: int, rows: int = ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7 + rank)
    return [
        (torch.randn(rows, 4, generator=generator), torch.randn(rows, 4, generator=generator))
        for _ in range(count)
    ]


def joined(size: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What all ranks have, as batches of one process."""
    by_rank = [batches(rank, count) for rank in range(size)]
    return [
        tuple(torch.cat(parts) for parts in zip(*row, strict=True))
        for row in zip(*by_rank, strict=True)
    ]


OPTIMIZERS = {
    "adamw": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.01)],
    "plain": lambda m: [torch.optim.SGD(m.parameters(), lr=0.05)],
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5)],
    "two": lambda m: [
        torch.optim.AdamW(m.blocks.parameters(), lr=0.01),
        torch.optim.SGD([*m.first.parameters(), *m.last.parameters()], lr=0.05),
    ],
}


def bound(rank: Any, kind: str, options: dict[str, Any], precision: str = "32-true") -> Any:
    """A strategy bound to this rank until the case ends."""
    made = getattr(strategies, kind)(**options)(
        StrategyContext(
            accelerator=rank.accelerator,
            device_index=rank.device_index,
            world=rank.world,
            collectives=rank.collectives,
            precision=rank.precision(precision),
        )
    )
    rank.made.append(made)
    return made


def reference(size: int, *, optimizer: str = "adamw", clip: Clip | None = None, **made: Any) -> Any:
    """Parameters after training in one process on what all ranks have."""
    module = model(**made)
    optimizers = OPTIMIZERS[optimizer](module)
    for batch in joined(size, STEPS):
        loss_of(module, batch).backward()
        if clip is not None and clip.by == "norm":
            nn.utils.clip_grad_norm_(module.parameters(), clip.value)
        elif clip is not None:
            nn.utils.clip_grad_value_(module.parameters(), clip.value)
        for each in optimizers:
            each.step()
            each.zero_grad()
    return {name: p.detach() for name, p in module.named_parameters()}


def train(
    rank: Any,
    kind: str,
    options: dict[str, Any] | None = None,
    *,
    optimizer: str = "adamw",
    clip: Clip | None = None,
    precision: str = "32-true",
    made: dict[str, Any] | None = None,
    meta: bool = False,
    frozen: str = "",
) -> dict[str, Any]:
    """Twenty updates; what each rank holds at the end, and how much of it."""
    strategy = bound(rank, kind, options or {}, precision)
    with torch.device("meta" if meta else "cpu"):
        module = model(0 if meta else rank.world.rank, **(made or {}))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    if meta:
        torch.manual_seed(0)
    module = strategy.prepare(module)
    start = parameters(module)
    optimizers = OPTIMIZERS[optimizer](module)
    step = strategy.train_step(StepSpec(module, optimizers, loss_of, clip=clip))
    norms = []
    with step:
        norms.extend(
            step([strategy.feed(batch)]).grad_norm for batch in batches(rank.world.rank, STEPS)
        )
    return {
        "start": start,
        "end": parameters(module),
        "norms": [float(norm) for norm in norms if norm is not None],
        "held": sum(local(p).nbytes for p in module.parameters()),
        "state": sum(
            local(value).nbytes
            for each in optimizers
            for state in each.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
    }


def peak(rank: Any, kind: str, options: dict[str, Any], made: dict[str, Any]) -> dict[str, float]:
    """The most device memory of one step, and what is left after it, over that of all parameters.

    Where devices count what they hold. The first steps make optimizer state and buckets.
    """
    import gc

    gc.collect()
    device = rank.device
    before = rank.accelerator.memory_stats(device)["allocated"]
    strategy = bound(rank, kind, options)
    whole = sum(p.nbytes for p in model(0, **made).parameters())
    module = strategy.prepare(model(0, **made))
    step = strategy.train_step(StepSpec(module, OPTIMIZERS["adamw"](module), loss_of))
    drawn = batches(rank.world.rank, 4)
    with step:
        for batch in drawn[:3]:
            step([strategy.feed(batch)])
        torch.get_device_module(device).reset_peak_memory_stats(device)
        step([strategy.feed(drawn[3])])
    rank.accelerator.synchronize(device)
    stats = rank.accelerator.memory_stats(device)
    return {name: (stats[name] - before) / whole for name in ("peak", "allocated")}


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in module.named_parameters()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def refused(
    rank: Any, kind: str, options: dict[str, Any], doing: str = "bind", precision: str = "32-true"
) -> str:
    """The text of the refusal."""
    try:
        strategy = bound(rank, kind, options, precision)
        if doing == "bind":
            return "bound"
        module = model(tied=doing == "tied")
        early = OPTIMIZERS["adamw"](module)
        module = strategy.prepare(module)
        if doing == "manual":
            strategy.manual_step(ManualSpec(module, OPTIMIZERS["sgd"](module), loss_of))
        if doing == "closure":
            optimizer = torch.optim.LBFGS(module.parameters())
            strategy.train_step(StepSpec(module, [optimizer], loss_of))
        if doing == "early":
            strategy.train_step(StepSpec(module, early, loss_of))
        if doing == "kinds":
            module.first.double()
            strategy.train_step(StepSpec(module, OPTIMIZERS["adamw"](module), loss_of))
    except DrivetrainError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def hand_over(rank: Any, first: str, then: str) -> dict[str, Any]:
    """Train with one strategy, go on with another from its state; and on without a break."""
    answers = []
    for kinds in ((first, first), (first, then)):
        module, state = model(rank.world.rank), None
        drawn = iter(batches(rank.world.rank, 6))
        for kind in kinds:
            strategy = bound(rank, kind, {})
            module = strategy.prepare(module)
            optimizers = OPTIMIZERS["adamw"](module)
            step = strategy.train_step(StepSpec(module, optimizers, loss_of))
            if state is not None:
                state = rank.collectives.broadcast_object(
                    (dict(state.module), list(state.optimizers), dict(state.precision))
                )
                strategy.load(ModelState(*state))
            with step:
                for _ in range(3):
                    step([strategy.feed(next(drawn))])
            state = strategy.state()
            end = parameters(module)
            strategy.close()
        answers.append(end)
    return {"same": answers[0], "other": answers[1]}


def use_again(rank: Any, kind: str) -> dict[str, Any]:
    """Train, close, prepare the same module again, evaluate with another number of batches."""
    strategy = bound(rank, kind, {})
    module = strategy.prepare(model(0))
    step = strategy.train_step(StepSpec(module, OPTIMIZERS["adamw"](module), loss_of))
    with step:
        step([strategy.feed(batches(rank.world.rank, 1)[0])])
    before = parameters(module)
    strategy.close()
    again = bound(rank, kind, {})
    module = again.prepare(module)
    with again.eval_step(EvalSpec(module, loss_of)) as evaluate:
        losses = [float(evaluate(again.feed(batch))) for batch in batches(0, 1 + rank.world.rank)]
    step = again.train_step(StepSpec(module, OPTIMIZERS["adamw"](module), loss_of))
    after = parameters(module)
    with step:
        step([again.feed(batches(rank.world.rank, 1)[0])])
    return {"before": before, "after": after, "losses": losses, "end": parameters(module)}


class Pairs(nn.Module):
    """A loss that compares every row of a batch with every other, as contrastive ones do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = model(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def contrast(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    made, wanted = module(batch[0]), batch[1]
    return (made @ made.T - wanted @ wanted.T).square().mean()


def contrast_by_parts(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The same through a child of the module."""
    made, wanted = module.inner(batch[0]), batch[1]
    return (made @ made.T - wanted @ wanted.T).square().mean()


def train_on_nodes(
    rank: Any, node_size: int, loss: str, accumulate: int = 1, rows: int = ROWS
) -> dict[str, Any]:
    """Updates whose loss is over the batches of a node."""
    strategy = bound(rank, "DDP2Strategy", {"node_size": node_size})
    module = strategy.prepare(Pairs(rank.world.rank))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    spec = StepSpec(
        module, [optimizer], globals()[loss], accumulate=accumulate, weight=lambda b: len(b[0])
    )
    step = strategy.train_step(spec)
    with step:
        losses = [
            float(step(window).loss)
            for window in windows(batches(rank.world.rank, 6, rows + rank.world.rank), accumulate)
        ]
    return {"end": parameters(module), "losses": losses}


def windows(drawn: list[Any], accumulate: int) -> list[list[Any]]:
    return [drawn[n : n + accumulate] for n in range(0, len(drawn), accumulate)]


def nodes_by_hand(size: int, node_size: int, accumulate: int = 1, rows: int = ROWS) -> Any:
    """The same in one process: the mean over nodes of the loss of each node's batch."""
    module = Pairs(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    by_rank = [batches(rank, 6, rows + rank) for rank in range(size)]
    per_node = [
        [
            tuple(torch.cat(parts) for parts in zip(*row, strict=True))
            for row in zip(*by_rank[first : first + node_size], strict=True)
        ]
        for first in range(0, size, node_size)
    ]
    for window in zip(*(windows(node, accumulate) for node in per_node), strict=True):
        losses = []
        for node in window:
            total = sum(len(batch[0]) for batch in node)
            losses.append(sum(contrast(module, b) * (len(b[0]) / total) for b in node))
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(module.named_parameters())


def call_the_next(rank: Any) -> float:
    """Train, and ask the next rank to add two numbers meanwhile."""
    from torch.distributed import rpc

    strategy = bound(rank, "RPCStrategy", {"rpc_timeout_s": 50.0})
    module = strategy.prepare(model(rank.world.rank))
    step = strategy.train_step(StepSpec(module, OPTIMIZERS["sgd"](module), loss_of))
    with step:
        step([batches(rank.world.rank, 1)[0]])
    other = (rank.world.rank + 1) % rank.world.size
    made = rpc.rpc_sync(f"worker{other}", torch.add, args=(torch.tensor(2.0), rank.world.rank))
    strategy.close()
    return float(made)


class Deep(nn.Module):
    """A sequence inside a module that prepares its input."""

    def __init__(self, *, tied: bool = False, outside: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)), nn.Linear(4, 4)
        )
        if tied:
            self.layers[7][0].weight = self.layers[0][0].weight
        if outside:
            self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x * 2.0)


def deep(seed: int, **settings: Any) -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Deep(**settings)


def pipe(
    rank: Any,
    options: dict[str, Any],
    clip: Clip | None = None,
    accumulate: int = 1,
    steps: int = STEPS,
    kind: str = "deep",
) -> dict[str, Any]:
    """Updates in a pipeline, an evaluation of other lengths, the state, and going on with it."""
    strategy = bound(rank, "PipelineStrategy", options)
    module = strategy.prepare(globals()[kind](rank.world.rank))
    optimizers = OPTIMIZERS["adamw"](module)
    spec = StepSpec(module, optimizers, loss_of, clip=clip, accumulate=accumulate)
    step = strategy.train_step(spec)
    with step:
        results = [step(window) for window in windows(batches(rank.world.rank, steps), accumulate)]
    held = sum(p.untyped_storage().nbytes() for p in module.parameters())
    with strategy.eval_step(EvalSpec(module, loss_of)) as evaluate:
        if rank.world.rank == 0:
            value = float(evaluate(batches(0, 1)[0]))
        rank.collectives.barrier()
    state = strategy.state()
    strategy.close()
    alone = "used"
    try:
        module(torch.ones(1, 4))
    except DrivetrainError as error:
        alone = str(error)
    other = bound(rank, "DDPStrategy", {})
    whole = other.prepare(module)
    end = parameters(whole)
    go_on = other.train_step(StepSpec(whole, OPTIMIZERS["adamw"](whole), loss_of))
    kept = rank.collectives.broadcast_object(
        (dict(state.module), list(state.optimizers), dict(state.precision))
    )
    other.load(ModelState(*kept))
    go_on([batches(rank.world.rank, 1)[0]])
    return {
        "end": end,
        "losses": [float(result.loss) for result in results],
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
        "held": held,
        "evaluation": value if rank.world.rank == 0 else None,
        "state": kept[0],
        "states": len(kept[1][0]["state"]),
        "alone": alone,
        "after": parameters(whole),
    }


def pipe_by_hand(
    size: int, clip: Clip | None = None, accumulate: int = 1, kind: str = "deep"
) -> Any:
    module = globals()[kind](0)
    (optimizer,) = OPTIMIZERS["adamw"](module)
    for window in windows(joined(size, STEPS), accumulate):
        for batch in window:
            (loss_of(module, batch) / len(window)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip.value)
        optimizer.step()
        optimizer.zero_grad()
    return dict(module.named_parameters())


def normalized(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(4))
        return nn.Sequential(*blocks)


def pipe_from_the_first(rank: Any, schedule: str) -> dict[str, Any]:
    """Losses and buffers of a few updates, where memory that nobody has filled is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        strategy = bound(rank, "PipelineStrategy", {"schedule": schedule})
        module = strategy.prepare(normalized(0))
        seen = []

        def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            made = loss_of(module, batch)
            seen.append(float(made.detach()))
            return made

        spec = StepSpec(module, OPTIMIZERS["plain"](module), loss)
        with strategy.train_step(spec) as step:
            losses = [float(step([batch]).loss) for batch in batches(rank.world.rank, 3)]
        state = strategy.state()
        strategy.close()
    finally:
        torch.use_deterministic_algorithms(False)
    return {"losses": losses, "seen": seen, "state": dict(state.module)}


def pipe_from_the_first_by_hand(size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    module = normalized(0)
    (optimizer,) = OPTIMIZERS["plain"](module)
    losses = []
    for features, targets in joined(size, 3):
        parts = zip(features.chunk(4), targets.chunk(4), strict=True)
        each = [loss_of(module, part) / 4 for part in parts]
        sum(each).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(each).item())
    return losses, module.state_dict()


def skipping(seed: int) -> nn.Module:
    return model(seed, depth=3)


def choosing(seed: int) -> nn.Module:
    """Its code depends on values."""
    module = model(seed)
    inner = module.forward
    module.forward = lambda x: inner(x) if x.sum() > 0 else -inner(x)
    return module


def tied(seed: int) -> nn.Module:
    return model(seed, tied=True)


def pipe_refused(
    rank: Any, options: dict[str, Any], made: dict[str, Any], kind: str = "deep"
) -> str:
    try:
        bound(rank, "PipelineStrategy", options).prepare(globals()[kind](0, **made))
    except DrivetrainError as error:
        return str(error)
    return "done"


PERIOD, WARMUP = 4, 5


def part_and_meet(
    rank: Any, group: int | None, save_at: int = 0, optimizer: str = "sgd"
) -> dict[str, Any]:
    """Updates with averaged parameters, perhaps broken off once; and torch's own loop of it."""
    options = {
        "averaging_period": PERIOD,
        "averaging_start": WARMUP,
        "averaging_group": group,
    }
    module, state, answer = model(rank.world.rank), None, {}
    drawn = batches(rank.world.rank, STEPS)
    for some in filter(None, (drawn[:save_at], drawn[save_at:])):
        strategy = bound(rank, "DDPStrategy", options)
        module = strategy.prepare(module)
        step = strategy.train_step(StepSpec(module, OPTIMIZERS[optimizer](module), loss_of))
        if state is not None:
            strategy.load(ModelState(*state))
        for batch in some:
            step([batch])
        made = strategy.state()
        state = (dict(made.module), list(made.optimizers), dict(made.precision))
        answer |= {"end": parameters(module), "state": state[0]}
        with step:
            pass
        answer |= {"left": parameters(module)}
        strategy.close()
    return answer | {"by_hand": part_by_hand(rank, group or 1, optimizer)}


def part_by_hand(rank: Any, group: int, kind: str) -> dict[str, torch.Tensor]:
    from torch import distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    module = model(0)
    (optimizer,) = OPTIMIZERS[kind](module)
    wrapper = nn.parallel.DistributedDataParallel(module)
    subgroup = dist.new_subgroups(group)[0]
    held = local.PostLocalSGDState(None, subgroup, WARMUP)
    wrapper.register_comm_hook(held, local.post_localSGD_hook)
    averager = PeriodicModelAverager(PERIOD, WARMUP)
    for batch in batches(rank.world.rank, STEPS):
        optimizer.zero_grad()
        loss_of(wrapper, batch).backward()
        optimizer.step()
        averager.average_parameters(module.parameters())
    return parameters(module)


class Feed(nn.Module):
    """A normalized layer pair between two that no plan names, with dropout."""

    def __init__(self, dropout: float = 0.0, hidden: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.body = nn.Sequential()
        self.body.norm = nn.LayerNorm(6)
        self.body.up = nn.Linear(6, hidden)
        self.body.act = nn.Tanh()
        self.body.down = nn.Linear(hidden, 6)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.drop(x + self.body(x)))


def feed(seed: int, **settings: Any) -> Feed:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Feed(**settings)


def plans() -> dict[str, dict[str, Any]]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
    )

    return {
        "pair": {"body.up": "colwise", "body.down": "rowwise"},
        "pattern": {"bo*.up": ColwiseParallel(), "*.down": RowwiseParallel()},
        "sequence": {
            "body": PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True
            ),
            "body.norm": "sequence_of_rows",
            "body.up": ColwiseParallel(input_layouts=Shard(0)),
            "body.down": "rowwise",
        },
    }


def plan_of(name: str) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import SequenceParallel

    return {
        key: SequenceParallel(sequence_dim=0) if style == "sequence_of_rows" else style
        for key, style in plans()[name].items()
    }


def tensor_parallel(
    rank: Any,
    plan: str,
    clip: Clip | None = None,
    accumulate: int = 1,
    dropout: float = 0.0,
    precision: str = "32-true",
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """Updates by a plan, an evaluation of other lengths, the state, and going on with it."""
    strategy = bound(rank, "TensorParallelStrategy", {"plan": plan_of(plan)}, precision)
    module = strategy.prepare(feed(rank.world.rank, dropout=dropout))
    torch.manual_seed(rank.world.rank)
    optimizers = tp_optimizers(module, optimizer)
    step = strategy.train_step(
        StepSpec(module, optimizers, loss_of, clip=clip, accumulate=accumulate, weight=weight_of)
    )
    with step:
        results = [step(window) for window in windows(batches(rank.world.rank, STEPS), accumulate)]
    held = {name: local(p).numel() for name, p in module.named_parameters()}
    losses = []
    with strategy.eval_step(EvalSpec(module, loss_of)) as evaluate:
        losses = [float(evaluate(batch)) for batch in batches(0, 1 + rank.world.rank)]
    with step:
        again = step([batches(rank.world.rank, 1)[0]]).loss
    state = strategy.state()
    strategy.close()
    kept = rank.collectives.broadcast_object(
        (dict(state.module), list(state.optimizers), dict(state.precision))
    )
    end = parameters(module)
    answer = {}
    for kind, options in (
        ("DDPStrategy", {}),
        ("TensorParallelStrategy", {"plan": plan_of(plan)}),
    ):
        other = bound(rank, kind, options)
        whole_one = other.prepare(module)
        start = parameters(whole_one)
        go_on = other.train_step(StepSpec(whole_one, tp_optimizers(whole_one, optimizer), loss_of))
        other.load(ModelState(*kept))
        with go_on:
            go_on([batches(rank.world.rank, 1)[0]])
        answer[kind] = parameters(whole_one)
        answer["start"] = answer.get("start", start)
        other.close()
    return answer | {
        "end": end,
        "held": held,
        "losses": losses,
        "again": float(again),
        "state": kept[0],
        "states": [set(each["state"]) for each in kept[1]],
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
    }


def both_ways(
    rank: Any,
    clip: Clip | None = None,
    accumulate: int = 1,
    precision: str = "32-true",
    optimizer: str = "adamw",
    dropout: float = 0.0,
    wrap: list[str] | None = None,
) -> dict[str, Any]:
    """Updates by a plan under FSDP, an evaluation, the state, and going on with it."""
    options = {"plan": plan_of("pair"), "plan_ranks": 2, "wrap": wrap or ["body"]}
    strategy = bound(rank, "FSDPStrategy", options, precision)
    module = strategy.prepare(feed(rank.world.rank, dropout=dropout))
    torch.manual_seed(rank.world.rank)
    step = strategy.train_step(
        StepSpec(
            module, tp_optimizers(module, optimizer), loss_of, clip=clip, accumulate=accumulate
        )
    )
    with step:
        results = [step(window) for window in windows(batches(rank.world.rank, STEPS), accumulate)]
    held = sum(local(p).numel() for p in module.parameters())
    with strategy.eval_step(EvalSpec(module, loss_of)) as evaluate:
        losses = [float(evaluate(batch)) for batch in batches(0, 1 + rank.world.rank)]
    with step:
        step([batches(rank.world.rank, 1)[0]])
    state = strategy.state()
    strategy.close()
    kept = rank.collectives.broadcast_object(
        (dict(state.module), list(state.optimizers), dict(state.precision))
    )
    answer = {}
    for kind, given in (("DDPStrategy", {}), ("FSDPStrategy", options)):
        other = bound(rank, kind, given)
        again = other.prepare(module)
        go_on = other.train_step(StepSpec(again, tp_optimizers(again, optimizer), loss_of))
        other.load(ModelState(*kept))
        with go_on:
            go_on([batches(rank.world.rank, 1)[0]])
        made = other.state().module
        answer[kind] = {name: value.clone() for name, value in made.items()}
        other.close()
    return answer | {
        "end": kept[0],
        "held": held,
        "losses": losses,
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
    }


def weight_of(batch: Any) -> float:
    return float(len(batch[0]))


def tp_optimizers(module: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    if kind == "two":
        return [
            torch.optim.AdamW(module.body.parameters(), lr=0.01),
            torch.optim.SGD(
                [*module.first.parameters(), *module.last.parameters()], lr=0.05, momentum=0.5
            ),
        ]
    return OPTIMIZERS[kind](module)


def tensor_parallel_by_hand(
    size: int, clip: Clip | None = None, accumulate: int = 1, optimizer: str = "adamw"
) -> Any:
    """One process with all the data; the last update is that after the evaluation."""
    module = feed(0)
    optimizers = tp_optimizers(module, optimizer)
    for window in [*windows(joined(size, STEPS), accumulate), joined(size, 1)]:
        for batch in window:
            (loss_of(module, batch) / len(window)).backward()
        if clip is not None and clip.by == "norm":
            nn.utils.clip_grad_norm_(module.parameters(), clip.value)
        elif clip is not None:
            nn.utils.clip_grad_value_(module.parameters(), clip.value)
        for each in optimizers:
            each.step()
            each.zero_grad()
    return {name: p.detach() for name, p in module.named_parameters()}


def plan_refused(rank: Any, plan: Any, doing: str = "prepare") -> str:
    try:
        strategy = bound(rank, "TensorParallelStrategy", {"plan": plan})
        module = feed(0, hidden=9 if doing == "odd" else 8)
        if doing == "tied":
            module.last.weight = nn.Parameter(torch.ones(8, 6))
            module.body.up.weight = module.last.weight
        early = OPTIMIZERS["adamw"](module)
        module = strategy.prepare(module)
        if doing == "early":
            strategy.train_step(StepSpec(module, early, loss_of))
        if doing == "foreach":
            together = torch.optim.SGD(module.parameters(), lr=0.1, foreach=True)
            strategy.train_step(StepSpec(module, [together], loss_of))
    except DrivetrainError as error:
        return str(error)
    return "done"
