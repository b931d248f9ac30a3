"""One process and several devices: a batch is divided among them, and its loss put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from drivetrain_interfaces import UnsupportedError
from torch.func import functional_call

from drivetrain_toolkit.rows import count_rows, divided, some_rows, weighted_sum
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.steps import EagerTrainStep, make_train_step
from drivetrain_toolkit.strategies.eager import EagerStrategy, with_options
from drivetrain_toolkit.strategies.units import Root
from drivetrain_toolkit.trees import move

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from drivetrain_interfaces import ManualSpec, ManualStep, StepSpec, TrainStep
    from torch import Tensor, nn


@dataclass(frozen=True)
class _Options:
    devices: tuple[int, ...] | None


class DataParallelStrategy(EagerStrategy):
    """Rows of each batch go to several devices of one process; gradients come back to the first.

    The loss of a batch is the mean of its parts' losses by rows, so that losses that are means over
    samples are those of the whole batch. Parameters live on the first device, and are copied to the
    others in each forward. ``ddp`` is faster wherever several processes can be started.

    Args:
        devices: Indices of the devices; None means those that the trainer was given.
    """

    name = "dp"
    capabilities: ClassVar = CAPABILITIES["dp"]
    #: All devices belong to one process. The trainer reads it.
    one_process: ClassVar[bool] = True

    _devices: tuple[torch.device, ...] = ()

    def __init__(self, *, devices: Sequence[int] | None = None) -> None:
        self._options = _Options(None if devices is None else tuple(devices))

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert and move to the first device, in place."""
        module = super().prepare(module)
        accelerator, context = self.context.accelerator, self.context
        indices = self._options.devices or (context.device_index,)
        others = [accelerator.activate(index, 1) for index in indices[1:]]
        self._devices = (self.device, *others)
        if others:  # the first one stays the current one
            accelerator.activate(indices[0], 1)
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step."""
        self._refuse_closures(spec)
        self._optimizers = tuple(spec.optimizers)
        step: EagerTrainStep = make_train_step(
            spec, self.context.precision, forward=_Scattered(spec, self._devices, self.name)
        )
        return step

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def _configure(self, options: Mapping[str, Any]) -> None:
        mine = self._options.devices
        self._options = with_options(self.name, self._options, options)
        if mine is not None:  # what the user gave to this object counts
            self._options = _Options(mine)

    def _check(self) -> None:
        super()._check()
        self._refuse_other_devices()
        if self.context.world.size > 1:
            raise UnsupportedError(
                f"The strategy 'dp' was asked for in a world of {self.context.world.size}, and it "
                "drives all devices from one process.",
                "Use 'ddp', or start one process.",
            )


class _Scattered:
    """The loss of a batch whose rows are divided among devices."""

    def __init__(self, spec: StepSpec, devices: Sequence[torch.device], owner: str) -> None:
        self._root = Root(spec.module)
        self._loss = spec.loss
        self._devices = devices
        self._owner = owner

    def __call__(self, microbatch: Any) -> Tensor:
        if len(self._devices) == 1:
            return self._loss(self._root.module, microbatch)
        rows = count_rows(microbatch, self._owner)
        bounds = divided(rows, len(self._devices))
        losses = [
            self._on(device, some_rows(microbatch, first, last))
            for device, (first, last) in zip(self._devices, bounds, strict=False)
        ]
        return weighted_sum(losses, [(last - first) / rows for first, last in bounds])

    def _on(self, device: torch.device, part: Any) -> Tensor:
        if device == self._devices[0]:
            return self._loss(self._root.module, part)
        # Copies that backward goes through, so that gradients arrive at the first device.
        tensors = {
            name: tensor.to(device)
            for name, tensor in (*self._root.named_parameters(), *self._root.named_buffers())
        }
        made = functional_call(self._root, tensors, (self._loss, move(part, device)))
        return cast("Tensor", made)
