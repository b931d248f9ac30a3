"""What two ranks are asked to do with Horovod. Run in the processes of a crew."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import contextmanager

import horovod.torch.optimizer as optimizer_module
import torch
from drivetrain_interfaces import (
    Clip,
    ClusterError,
    ConfigurationError,
    ModelState,
    ReduceOp,
    StepSpec,
    UnsupportedError,
    UserCodeError,
    World,
)
from drivetrain_toolkit.strategies import DDPStrategy
from horovod.torch import mpi_ops
from torch import nn

from drivetrain_horovod import HorovodStrategy
from drivetrain_horovod.starting import start


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 31), nn.Tanh(), nn.Linear(31, 3))


def loss(module, batch):
    features, targets = batch
    return (module(features) - targets).square().mean()


def windows(rank, steps=20, accumulate=1, start=0):
    made = []
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(1000 * rank + number)
        count = accumulate if number % 3 else max(1, accumulate - 1)
        made.append(
            [
                (torch.randn(8, 16, generator=generator), torch.randn(8, 3, generator=generator))
                for _ in range(count)
            ]
        )
    return made


class Run:
    """A strategy, its module, optimizer, scheduler and step."""

    def __init__(self, rank, strategy, precision="32-true", **settings):
        self.rank = rank
        self.strategy = rank.bind_object(strategy, precision)
        self.module = self.strategy.prepare(network(rank.world.rank))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.5)
        settings.setdefault("accumulate", 1)
        self.accumulate = settings["accumulate"]
        self.step = self.strategy.train_step(
            StepSpec(self.module, [self.optimizer], loss, **settings)
        )

    def train(self, steps=20, start=0):
        results = []
        with self.step:
            for window in windows(self.rank.world.rank, steps, self.accumulate, start):
                results.append(self.step(window))
                self.scheduler.step()
        return results

    def state(self):
        state = self.strategy.state()
        return dict(state.module), list(state.optimizers), dict(state.precision)


def trained(rank, strategy, precision="32-true", **settings):
    run = Run(rank, strategy, precision, **settings)
    results = run.train()
    answer = {
        "state": run.state(),
        "losses": [float(r.loss) for r in results],
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
        "lr": run.optimizer.param_groups[0]["lr"],
    }
    run.strategy.close()
    return answer


def as_ddp(rank):
    """The same training by DDP and by Horovod."""
    answers = {}
    for name, precision, settings in (
        ("plain", "32-true", {}),
        ("clipped", "32-true", {"clip": Clip(0.1)}),
        ("accumulated", "32-true", {"accumulate": 3, "clip": Clip(0.1)}),
        ("mixed", "bf16-mixed", {}),
    ):
        answers[name] = {
            "ddp": trained(rank, DDPStrategy(), precision, **settings),
            "horovod": trained(rank, HorovodStrategy(), precision, **settings),
        }
    answers["compressed"] = {
        "ddp": answers["plain"]["ddp"],
        "horovod": trained(rank, HorovodStrategy(compression="fp16")),
    }
    return answers


def resumed(rank):
    """Ten steps, a state, and ten more from there by Horovod and by DDP."""
    run = Run(rank, HorovodStrategy())
    run.train(10)
    state, schedule = run.state(), run.scheduler.state_dict()
    run.train(10, start=10)
    answer = {"state": state, "end": run.state()}
    run.strategy.close()
    for name, strategy in (("horovod", HorovodStrategy()), ("ddp", DDPStrategy())):
        run = Run(rank, strategy)
        run.strategy.load(ModelState(*state))
        run.scheduler.load_state_dict(schedule)
        run.train(10, start=10)
        answer[name] = run.state()
        run.strategy.close()
    return answer


def leaves_nothing(rank):
    """User code raises in the middle of a window; after close, a rank trains alone."""
    run = Run(rank, HorovodStrategy(), accumulate=3)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    window = windows(0, 1, 3, start=1)[0]
    text = ""
    try:
        run.step([window[0], ("not", "a batch"), window[2]])
    except TypeError as error:
        text = type(error).__name__
    still = all(torch.equal(before[n], p) for n, p in run.module.named_parameters())
    run.train(2)
    run.strategy.close()
    if rank.world.rank == 0:
        loss(run.module, window[0]).backward()
    called = ""
    try:
        run.step(window)
    except UserCodeError as error:
        called = error.code
    rank.collectives.barrier()
    return {"text": text, "still": still, "called": called}


def other_world(rank):
    """A world of another size than Horovod has, as under a launcher that it does not know."""
    try:
        start(World(), rank.collectives)
    except ClusterError as error:
        return error.message
    return ""


def versions(rank):
    """Ranks with different versions of Horovod, and what each says to it."""
    import horovod

    kept = horovod.__version__
    horovod.__version__ = f"0.28.{rank.world.rank}"
    try:
        rank.bind_object(HorovodStrategy())
    except ClusterError as error:
        return error.message
    finally:
        horovod.__version__ = kept
    return ""


def scaled(rank):
    """Learning rates that are multiplied, as asked, and the same given by hand."""
    asked = Run(rank, HorovodStrategy(scale_learning_rate=True))
    asked.train()
    by_hand = Run(rank, HorovodStrategy())
    by_hand.optimizer.param_groups[0]["lr"] *= 2
    by_hand.scheduler.base_lrs = [2 * rate for rate in by_hand.scheduler.base_lrs]
    by_hand.train()
    answer = {
        "asked": asked.state(),
        "by hand": by_hand.state(),
        "lr": asked.optimizer.param_groups[0]["lr"],
    }
    asked.strategy.close()
    by_hand.strategy.close()
    return answer


def joined(rank):
    """Rank 0 has five steps and rank 1 three; then both have what rank 0 has."""
    run = Run(rank, HorovodStrategy())
    mine = 5 - 2 * rank.world.rank
    run.train(mine)
    last = run.strategy.join()
    state = run.state()
    parts = rank.collectives.all_gather(torch.cat([v.reshape(-1) for v in state[0].values()]))
    run.train(2, start=5)
    ends = torch.cat([v.reshape(-1) for v in run.state()[0].values()])
    after = rank.collectives.all_gather(ends)
    answer = {"last": last, "state": state, "equal": torch.equal(*parts)}
    answer["equal after"] = torch.equal(*after)
    run.strategy.close()
    return answer


def join_with_weights(rank):
    """Weights over ranks, which a rank that joined would not answer."""
    run = Run(rank, HorovodStrategy(), weight=lambda batch: len(batch[0]), weight_over_ranks=True)
    run.train(1)
    try:
        run.strategy.join()
    except UnsupportedError as error:
        return error.message
    finally:
        run.strategy.close()
    return ""


def subgroups(rank):
    """Collectives among all ranks, and among one of them."""
    strategy = rank.bind_object(HorovodStrategy())
    everyone, first = strategy.subgroup([0, 1]), strategy.subgroup([0])
    again = strategy.subgroup([0])
    mine = torch.full((2,), float(rank.world.rank + 1))
    answer = {
        "ranks": [None if each is None else each.ranks for each in (everyone, first, again)],
        "sum": everyone.all_reduce(mine),
        "mean": everyone.all_reduce(mine, ReduceOp.MEAN),
        "max": everyone.all_reduce(mine, ReduceOp.MAX),
        "rows": everyone.all_gather(torch.ones(rank.world.rank + 1, 2)),
        "scalars": everyone.all_gather(torch.tensor(rank.world.rank)),
        "sent": everyone.broadcast(mine, 1),
        "object": everyone.broadcast_object({"rank": rank.world.rank}, 1),
    }
    if first is not None:
        answer["alone"] = first.all_reduce(mine)
    everyone.barrier()
    answer["refused"] = [ranks for ranks in ([], [2], [0, 0]) if is_refused(strategy, ranks)]
    try:
        everyone.all_reduce(mine.bfloat16())
    except UnsupportedError as error:
        answer["bfloat16"] = error.message
    return answer


def is_refused(strategy, ranks):
    try:
        strategy.subgroup(ranks)
    except ConfigurationError:
        return True
    return False


def collectives_of_a_step(rank):
    """How many messages a step of ours sends, and one by hand."""
    counts = []
    for by_hand in (False, True):
        run = Run(rank, HorovodStrategy())
        if by_hand:
            run.strategy.close()
            hvd = start(rank.world, rank.collectives)
            wrapped = hvd.DistributedOptimizer(
                run.optimizer, named_parameters=run.module.named_parameters()
            )
        window = windows(rank.world.rank, 1)[0]
        with counted_messages() as seen:
            for _ in range(3):
                if by_hand:
                    loss(run.module, window[0]).backward()
                    wrapped.step()
                    wrapped.zero_grad()
                else:
                    run.step(window)
        counts.append(dict(seen))
        run.strategy.close()
    return counts


@contextmanager
def counted_messages():
    """Count calls of Horovod's operations and of torch's collectives."""
    seen = Counter()

    def counting(function, name):
        @functools.wraps(function)
        def counted(*args, **settings):
            seen[name] += 1
            return function(*args, **settings)

        return counted

    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier")
    places = [(torch.distributed, name) for name in names]
    places += [(optimizer_module, "allreduce_async_"), (mpi_ops, "allgather"), (mpi_ops, "barrier")]
    kept = [(where, name, getattr(where, name)) for where, name in places]
    for where, name, function in kept:
        setattr(where, name, counting(function, name))
    try:
        yield seen
    finally:
        for where, name, function in kept:
            setattr(where, name, function)
