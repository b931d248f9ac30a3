"""What two real processes do together. Run as a script, once per rank; tests read the results.

One pair of processes runs all cases, since starting one costs more than all of them. A case returns
what its tests look at. The tests also load the first part, to build the same models and data.
"""

from __future__ import annotations

import sys
import traceback

import torch
from drivetrain_interfaces import (
    Clip,
    DrivetrainError,
    EvalSpec,
    ManualSpec,
    ReduceOp,
    StepSpec,
    StrategyContext,
    World,
)
from torch import nn

ROWS = 4  # in a microbatch


def make_model(seed: int = 0, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A perceptron; float64, so that a comparison with a reference can be tight."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def make_data(rank: int, count: int, *, rows: int = ROWS) -> list[tuple]:
    """``count`` microbatches of one rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (
            torch.randn(rows, 3, generator=generator, dtype=torch.float64),
            torch.randn(rows, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def loss_of(module: nn.Module, microbatch: tuple) -> torch.Tensor:
    features, targets = microbatch
    return (module(features) - targets).square().mean()


#: Microbatches of each window; the last is a tail.
WINDOWS = (3, 3, 2)
CLIP = Clip(0.5)


def uneven(rank: int) -> list[tuple]:
    """Microbatches of different sizes, other ones on each rank."""
    return [make_data(rank, 1, rows=rows)[0] for rows in ((1, 5, 2), (7, 3, 4))[rank]]


class Accelerator:
    """The least that a strategy needs of one."""

    closed = 0

    def activate(self, index: int, local_size: int) -> torch.device:
        return torch.device("cpu")

    def close(self) -> None:
        self.closed += 1


def bind(strategy, precision=None, *, collectives=None, world=None, **kwargs):
    from drivetrain_toolkit.collectives import LocalCollectives
    from drivetrain_toolkit.precision import FullPrecision

    return strategy(
        StrategyContext(
            Accelerator(),
            0,
            world or World(),
            collectives or LocalCollectives(),
            precision or FullPrecision(),
            **kwargs,
        )
    )


# From here on only in the children.


def counting_hook(counts: list[int], bucket):
    """A communication hook that averages as torch does, and counts."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    counts.append(1)
    return allreduce_hook(None, bucket)


class Cases:
    def __init__(self, rank: int, port: int) -> None:
        from drivetrain_toolkit.collectives import AGENT_STORE, TorchCollectives

        self.world = World(
            rank=rank, size=2, local_rank=rank, local_size=2, address="127.0.0.1", port=port
        )
        self.rank = rank
        self.collectives = TorchCollectives(
            self.world, "gloo", timeout_s=30, rendezvous_s=60, env={AGENT_STORE: "True"}
        )

    def ddp(self, precision=None, *, strategy=None, **options):
        from drivetrain_toolkit.strategies import DDPStrategy

        return bind(
            strategy or DDPStrategy(**options),
            precision,
            collectives=self.collectives,
            world=self.world,
        )

    def case_reductions(self):
        mine = torch.tensor([1.0, 5.0]) + self.rank
        kept = mine.clone()
        results = {op.value: self.collectives.all_reduce(mine, op) for op in ReduceOp}
        results["untouched"] = torch.equal(mine, kept)
        results["int"] = self.collectives.all_reduce(torch.tensor([self.rank + 1]))
        results["bool"] = self.collectives.all_reduce(
            torch.tensor([self.rank == 1, False]), ReduceOp.MAX
        )
        transposed = torch.arange(6.0).reshape(2, 3).t() * (self.rank + 1)
        results["transposed"] = self.collectives.all_reduce(transposed)
        return results

    def case_gathering(self):
        rows = torch.full((self.rank * 2, 3), self.rank, dtype=torch.int16)
        return {
            "uneven": self.collectives.all_gather(rows),
            "scalar": self.collectives.all_gather(torch.tensor(self.rank)),
            "even": self.collectives.all_gather(torch.tensor([self.rank, 7])),
        }

    def case_gathering_misfits(self):
        try:
            self.collectives.all_gather(torch.zeros(2, 3 + self.rank))
        except DrivetrainError as error:
            return type(error).__name__, str(error)

    def case_broadcast(self):
        mine = torch.tensor([self.rank])
        return self.collectives.broadcast(mine, source=1), mine

    def case_objects(self):
        value = {"path": "a", "numbers": [1, (2, 3)], "none": None} if self.rank == 1 else None
        return self.collectives.broadcast_object(value, source=1)

    def case_unpicklable_object(self):
        try:
            self.collectives.broadcast_object((lambda: 0) if self.rank == 0 else None)
        except DrivetrainError as error:
            return type(error).__name__, str(error), type(error.__cause__).__name__

    def case_barrier(self):
        self.collectives.barrier()
        return True

    def case_side_channel(self):
        import threading

        channel = self.collectives.side_channel()
        seen = []
        if self.rank == 0:

            def watch() -> None:
                while not seen:
                    found = channel.peek("failed")
                    if found is not None:
                        seen.append(found)

            before = channel.peek("failed")
            thread = threading.Thread(target=watch)
            thread.start()
            self.collectives.barrier()
            self.collectives.barrier()  # the other rank posts between the two
            thread.join(timeout=20)
        else:
            before = None
            self.collectives.barrier()
            channel.post("failed", b"rank 1: \x00\xff")
            self.collectives.barrier()
        self.collectives.barrier()  # rank 0 has seen the first post
        if self.rank == 1:
            channel.post("failed", b"later")
        self.collectives.barrier()
        after = channel.peek("failed")
        channel.close()
        channel.close()
        return before, seen, after

    def case_reused_group(self):
        """A second object in one process joins what is there, and does not end it."""
        from drivetrain_toolkit.collectives import TorchCollectives

        second = TorchCollectives(self.world, "gloo")
        total = second.all_reduce(torch.ones(1))
        second.close()
        second.close()
        try:
            second.barrier()
        except DrivetrainError as error:
            closed = str(error)
        self.collectives.barrier()
        return total, closed

    def case_training(self):
        counts: list[int] = []
        strategy = self.ddp(comm_hook=counting_hook, comm_state=counts)
        module = strategy.prepare(make_model(seed=self.rank))
        start = {name: value.clone() for name, value in module.state_dict().items()}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        step = strategy.train_step(
            StepSpec(module, [optimizer], loss_of, accumulate=max(WINDOWS), clip=CLIP)
        )
        stream = iter(make_data(self.rank, sum(WINDOWS)))
        results = []
        for count in WINDOWS:
            before = len(counts)
            result = step([next(stream) for _ in range(count)])
            results.append((result.loss, result.grad_norm, result.applied, len(counts) - before))
        state = strategy.state()
        strategy.close()
        return {
            "start": start,
            "windows": results,
            "module": dict(state.module),
            "optimizer": state.optimizers[0],
        }

    def case_variants(self):
        """Options of the wrapper give the same result, accumulating and not."""
        results = {}
        for options in (
            {},
            {"find_unused_parameters": True},
            {"static_graph": True},
            {"gradient_as_bucket_view": True},
            {"bucket_cap_mb": 0.0001, "broadcast_buffers": False},
        ):
            strategy = self.ddp(**options)
            module = strategy.prepare(make_model())
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            step = strategy.train_step(StepSpec(module, [optimizer], loss_of, accumulate=2))
            data = make_data(self.rank, 5)
            for window in (data[:2], data[2:4], data[4:]):
                step(window)
            results[str(options)] = dict(strategy.state().module)
            strategy.close()
        return results

    def case_weights_over_ranks(self):
        strategy = self.ddp()
        module = strategy.prepare(make_model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        step = strategy.train_step(
            StepSpec(
                module,
                [optimizer],
                loss_of,
                accumulate=3,
                weight=lambda microbatch: len(microbatch[0]),
                weight_over_ranks=True,
            )
        )
        data = uneven(self.rank)
        step(data)
        step(data[:1])
        result = dict(strategy.state().module)
        strategy.close()
        return result

    def case_closure(self):
        strategy = self.ddp()
        module = strategy.prepare(make_model())
        optimizer = torch.optim.LBFGS(
            module.parameters(), max_iter=4, line_search_fn="strong_wolfe"
        )
        step = strategy.train_step(StepSpec(module, [optimizer], loss_of, accumulate=2))
        data = make_data(self.rank, 4)
        losses = [step(data[:2]).loss, step(data[2:]).loss]
        result = dict(strategy.state().module)
        strategy.close()
        return losses, result

    def case_manual(self):
        """Two optimizers; rank 1 does not reach the second layer's bias."""
        strategy = self.ddp()
        module = strategy.prepare(make_model())
        extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
        module.register_parameter("never", extra)
        first = torch.optim.SGD(module[0].parameters(), lr=0.1)
        second = torch.optim.SGD([*module[2].parameters(), extra], lr=0.1, weight_decay=0.1)

        def body(module, microbatch):
            features, targets = microbatch
            hidden = module[1](module[0](features))
            last = module[2]
            out = last(hidden) if self.rank == 0 else hidden @ last.weight.t()
            step.backward((out - targets).square().mean())
            one = step.update(first, CLIP)
            two = step.update(second)
            first.zero_grad()
            second.zero_grad()
            return one, two

        step = strategy.manual_step(ManualSpec(module, [first, second], body))
        with step:
            results = [step(microbatch) for microbatch in make_data(self.rank, 2)]
        state = dict(strategy.state().module)
        strategy.close()
        return {"norms": [one.grad_norm for one, _ in results], "state": state}

    def case_custom_wrapper(self):
        from torch.nn.parallel import DistributedDataParallel

        from drivetrain_toolkit.strategies import DDPStrategy

        class Mine(DistributedDataParallel):
            calls = 0

            def forward(self, *args, **kwargs):
                Mine.calls += 1
                return super().forward(*args, **kwargs)

        class CustomDDP(DDPStrategy):
            def configure_ddp(self):
                self._model = Mine(self.model, device_ids=self.device_ids, **self.ddp_kwargs)

        class Broken(DDPStrategy):
            def configure_ddp(self):
                pass

        strategy = self.ddp(strategy=CustomDDP())
        module = strategy.prepare(make_model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        spec = StepSpec(module, [optimizer], loss_of)
        strategy.train_step(spec)(make_data(self.rank, 1))
        state = dict(strategy.state().module)
        strategy.close()
        broken = self.ddp(strategy=Broken())
        broken.prepare(module)
        try:
            broken.train_step(spec)
        except DrivetrainError as error:
            return Mine.calls, state, str(error)

    def case_closing(self):
        """After close, one rank alone may use the module: nothing waits for the other."""
        strategy = self.ddp()
        module = strategy.prepare(make_model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        spec = StepSpec(module, [optimizer], loss_of)
        old = strategy.train_step(spec)
        new = strategy.train_step(spec)
        microbatch = make_data(self.rank, 1)
        new(microbatch)
        errors = []
        for step in (old, new):
            try:
                step(microbatch)
            except DrivetrainError as error:
                errors.append(str(error))
            if step is old:
                strategy.close()
                strategy.close()
        if self.rank == 0:
            loss_of(module, microbatch[0]).backward()
        alone = next(module.parameters()).grad is not None
        self.collectives.barrier()
        return errors, alone, strategy.context.accelerator.closed

    def case_evaluation(self):
        """Only one rank evaluates; through the wrapper it would wait for the other's buffers."""
        strategy = self.ddp()
        module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        module = strategy.prepare(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        strategy.train_step(StepSpec(module, [optimizer], loss_of))
        step = strategy.eval_step(EvalSpec(module, lambda module, x: module(x)))
        shape = None
        if self.rank == 0:
            shape = tuple(step(torch.ones(4, 3)).shape)
        self.collectives.barrier()
        strategy.close()
        return shape

    def case_found_inf(self):
        """Rank 1 overflows: no rank updates, and the scales stay equal."""
        from drivetrain_toolkit.precision import ScaledAutocastPrecision

        precision = ScaledAutocastPrecision("cpu", init_scale=1024.0)
        strategy = self.ddp(precision)
        module = strategy.prepare(make_model(dtype=torch.float32))
        optimizer = torch.optim.Adam(module.parameters())
        step = strategy.train_step(StepSpec(module, [optimizer], loss_of))
        features, targets = (part.float() for part in make_data(self.rank, 1)[0])
        good = step([(features, targets)])
        before = strategy.state()
        if self.rank == 1:
            features = features * torch.inf
        bad = step([(features, targets)])
        after = strategy.state()
        strategy.close()
        return {
            "applied": (good.applied, bad.applied),
            "before": (dict(before.module), before.optimizers[0]),
            "after": (dict(after.module), after.optimizers[0]),
            "scale": after.precision["scale"],
        }

    def case_state_moves_to_one_process(self):
        strategy = self.ddp()
        module = strategy.prepare(make_model())
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        step = strategy.train_step(StepSpec(module, [optimizer], loss_of))
        data = make_data(0, 2)  # the same on both ranks, so that one process can go on alone
        step(data[:1])
        saved = strategy.state()
        step(data[1:])
        final = strategy.state()
        strategy.load(saved)
        step(data[1:])
        again = strategy.state()
        strategy.close()
        return {
            "saved": (dict(saved.module), saved.optimizers[0]),
            "final": dict(final.module),
            "again": dict(again.module),
        }


def main(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    cases = Cases(rank, port)
    results = {}
    for name in dir(cases):
        if name.startswith("case_"):
            try:
                results[name.removeprefix("case_")] = ("ok", getattr(cases, name)())
            except Exception:  # noqa: BLE001 - the test that reads the case shows it
                results[name.removeprefix("case_")] = ("failed", traceback.format_exc())
    cases.collectives.close()
    torch.save(results, path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
