"""What several processes do together, each time with one rule broken."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import DataError, ModelState, ProcessFailedError, ReduceOp, StepSpec
from drivetrain_toolkit.collectives import TorchCollectives
from drivetrain_toolkit.launchers import ForkLauncher
from drivetrain_toolkit.strategies import DDPStrategy, EagerStrategy
from mutant_parts import Good, strategies

if TYPE_CHECKING:
    from torch import Tensor

# Collectives


class MeanIsSum(TorchCollectives):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        if op is ReduceOp.MEAN and tensor.is_floating_point():
            op = ReduceOp.SUM
        return super().all_reduce(tensor, op)


class mean_is_a_sum(Good):
    collectives_type = MeanIsSum


class MinIsMax(TorchCollectives):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        return super().all_reduce(tensor, ReduceOp.MAX if op is ReduceOp.MIN else op)


class min_is_max(Good):
    collectives_type = MinIsMax


class InPlace(TorchCollectives):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        result = super().all_reduce(tensor, op)
        with torch.no_grad():
            tensor.copy_(result)
        return result


class reduces_in_place(Good):
    collectives_type = InPlace


class Widens(TorchCollectives):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        result = super().all_reduce(tensor, op)
        return result.float() if result.dtype in {torch.float16, torch.bfloat16} else result


class reduces_into_another_dtype(Good):
    collectives_type = Widens


class Truncates(TorchCollectives):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        if op is ReduceOp.MEAN and not tensor.is_floating_point():
            return super().all_reduce(tensor.double(), op).to(tensor.dtype)
        return super().all_reduce(tensor, op)


class means_integers(Good):
    collectives_type = Truncates


class Reversed(TorchCollectives):
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return super().all_gather(tensor)[::-1]


class gathers_in_another_order(Good):
    collectives_type = Reversed


class Pads(TorchCollectives):
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = super().all_gather(tensor)
        if not tensor.dim():
            return parts
        longest = max(part.shape[0] for part in parts)
        return [
            torch.cat([part, part.new_zeros((longest - part.shape[0], *part.shape[1:]))])
            for part in parts
        ]


class gathers_with_padding(Good):
    collectives_type = Pads


class Lonely(TorchCollectives):
    """Only the rank whose tensor is wider says that they do not fit."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        try:
            return super().all_gather(tensor)
        except DataError:
            if self._world.rank:
                return [tensor] * self._world.size
            raise


class refuses_misfits_on_one_rank(Good):
    collectives_type = Lonely


class FromZero(TorchCollectives):
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        super().broadcast(tensor, source)
        return super().broadcast(tensor, 0)


class broadcasts_from_zero(Good):
    collectives_type = FromZero


class OwnObject(TorchCollectives):
    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        super().broadcast_object(value, source)
        return value


class keeps_its_own_object(Good):
    collectives_type = OwnObject


class NoBarrier(TorchCollectives):
    def barrier(self) -> None:
        if self._closed:
            super().barrier()


class barrier_does_not_wait(Good):
    collectives_type = NoBarrier


class RawErrors(TorchCollectives):
    def _explained(self, operation: str) -> Any:
        from contextlib import nullcontext

        return super()._explained(operation) if self._closed else nullcontext()


class raw_errors_of_collectives(Good):
    collectives_type = RawErrors


class Zombie(TorchCollectives):
    def close(self) -> None:
        """Closed, and working on."""


class closing_collectives_does_nothing(Good):
    collectives_type = Zombie


class Owner(TorchCollectives):
    """Ends a group that somebody else made."""

    def close(self) -> None:
        self._owns_group = True
        super().close()


class ends_a_group_of_others(Good):
    collectives_type = Owner


class FirstPost:
    """A side channel in which what was posted first stays."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def post(self, key: str, value: bytes) -> None:
        if self._channel.peek(key) is None:
            self._channel.post(key, value)

    def peek(self, key: str) -> bytes | None:
        return self._channel.peek(key)

    def close(self) -> None:
        self._channel.close()


class Stubborn(TorchCollectives):
    def side_channel(self) -> Any:
        return FirstPost(super().side_channel())


class side_channel_keeps_the_first_post(Good):
    collectives_type = Stubborn


# Data parallel


def together(strategy: Any) -> dict[str, Any]:
    """Strategies of which the one for several devices is another."""
    return strategies(several=strategy)


class Apart(DDPStrategy):
    def train_step(self, spec: StepSpec) -> Any:
        return EagerStrategy.train_step(self, spec)


class ranks_train_apart(Good):
    strategies = together(Apart)


class Unequal(DDPStrategy):
    def prepare(self, module: Any) -> Any:
        self._release()
        return EagerStrategy.prepare(self, module)


class ranks_start_apart(Good):
    strategies = together(Unequal)


class OwnWeights(DDPStrategy):
    def train_step(self, spec: StepSpec) -> Any:
        return super().train_step(replace(spec, weight_over_ranks=False))


class weights_of_each_rank_alone(Good):
    strategies = together(OwnWeights)


class Wrapped(DDPStrategy):
    def state(self) -> ModelState:
        state = super().state()
        return replace(state, module={f"module.{k}": v for k, v in state.module.items()})

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        names = {k.removeprefix("module."): v for k, v in state.module.items()}
        super().load(replace(state, module=names), strict=strict)


class ranks_save_names_of_a_wrapper(Good):
    strategies = together(Wrapped)


class ManualApart(DDPStrategy):
    def manual_step(self, spec: Any) -> Any:
        built: Any = super().manual_step(spec)
        built._collectives = None
        return built


class manual_ranks_train_apart(Good):
    strategies = together(ManualApart)


class Hooked(DDPStrategy):
    """Shows gradients to hooks before they are averaged."""

    def train_step(self, spec: StepSpec) -> Any:
        from drivetrain_toolkit.averaging import average_gradients

        user = spec.hooks.before_optimizer_step
        owned = [p for o in spec.optimizers for g in o.param_groups for p in g["params"]]

        def ready(optimizers: Any) -> None:
            if user:
                user(optimizers)
            average_gradients(owned, self.context.collectives)

        hooks = replace(spec.hooks, before_optimizer_step=ready)
        return EagerStrategy.train_step(self, replace(spec, hooks=hooks))


class hooks_see_gradients_of_one_rank(Good):
    strategies = together(Hooked)


class ranks_lose_their_norms(Good):
    class Unclipped(DDPStrategy):
        def train_step(self, spec: StepSpec) -> Any:
            first = self.context.world.rank == 0
            return super().train_step(spec if first else replace(spec, clip=None))

    strategies = together(Unclipped)


# Launchers of its own


def launching(launcher: Any) -> Any:
    """A backend that brings this launcher as ``fork``."""

    class Launching(Good):
        def launcher(self, name: str) -> Any:
            return launcher() if name == "fork" else None

    return Launching


class _NoRank:
    """Runs what each rank runs, without one of its variables."""

    def __init__(self, main: Any) -> None:
        self.main = main

    def __call__(self, world: Any) -> Any:
        os.environ.pop("LOCAL_RANK")
        return self.main(world)


class HidesRank(ForkLauncher):
    def launch(self, main: Any, plan: Any) -> Any:
        return super().launch(_NoRank(main), plan)


class launcher_hides_a_variable(launching(HidesRank)):  # type: ignore[misc]
    pass


class PlansMore(ForkLauncher):
    """Says that the machine runs fewer processes than it does."""

    def plan(self, request: Any) -> Any:
        plan = super().plan(request)
        self.real = plan
        return replace(plan, worlds=plan.worlds[:1])

    def launch(self, main: Any, plan: Any) -> Any:
        return super().launch(main, self.real)


class launcher_plans_too_little(launching(PlansMore)):  # type: ignore[misc]
    pass


class Vague(ForkLauncher):
    """Says that something failed, and not what."""

    def launch(self, main: Any, plan: Any) -> Any:
        try:
            return super().launch(main, plan)
        except ProcessFailedError as error:
            raise ProcessFailedError("A rank failed.", "Look for it.") from error


class launcher_does_not_say_what_failed(launching(Vague)):  # type: ignore[misc]
    pass


class LastResult(ForkLauncher):
    def launch(self, main: Any, plan: Any) -> Any:
        return str(super().launch(main, plan)).replace("0", "1")


class launcher_returns_another_result(launching(LastResult)):  # type: ignore[misc]
    pass
