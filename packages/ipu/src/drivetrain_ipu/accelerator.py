"""IPUs as an accelerator. Programs acquire them; here is what there is besides."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_ipu import FACTS
from drivetrain_ipu.probing import look

if TYPE_CHECKING:
    from drivetrain_interfaces import DeviceFacts, Precision, StrategyFactory

_WORD = 8


class IpuAccelerator:
    """The IPUs of one process.

    Args:
        precision_plugin: The precision for runs on this accelerator, when it is given to a trainer
            as an object. None leaves the choice to the trainer.
        training_type_plugin: The same for the strategy.
    """

    def __init__(
        self,
        precision_plugin: Precision | None = None,
        training_type_plugin: StrategyFactory | None = None,
    ) -> None:
        self.precision_plugin = precision_plugin
        self.training_type_plugin = training_type_plugin
        self._executor: Any = None
        self._waiting: list[int] | None = None

    @property
    def facts(self) -> DeviceFacts:
        """What IPUs are like; the same object as in the spec."""
        return FACTS

    @property
    def device_type(self) -> str:
        """Always ``"cpu"``, where the tensors of a program's user are."""
        return FACTS.device_type

    def device_count(self) -> int:
        """What the probe found."""
        return look(os.environ).devices

    def activate(self, index: int, local_size: int) -> torch.device:
        """The host, where batches go; programs acquire IPUs when they are compiled."""
        return torch.device(FACTS.device_type)

    def synchronize(self, device: torch.device) -> None:
        """Return at once: a call of a program is over when it returns."""

    def close(self) -> None:
        """Forget the program whose random numbers were followed. Safe to call twice."""
        self._executor = self._waiting = None

    # Random numbers: those of the host, and those of the program that trains
    def follow(self, executor: Any) -> None:
        """Take this executor's random numbers for the device's."""
        self._executor = weakref.ref(executor)
        if self._waiting is not None:
            executor.rng_state = self._waiting
            self._waiting = None

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """The states of torch's generator and, once there is a program, of the device, as bytes."""
        host = torch.get_rng_state()
        executor = self._compiled()
        words = [] if executor is None else executor.rng_state
        raw = host.numel().to_bytes(_WORD, "little") + bytes(host.tolist())
        raw += b"".join(int(word).to_bytes(_WORD, "little") for word in words)
        return torch.tensor(list(raw), dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore a state; the device's when a program is compiled, if there is none yet."""
        raw = bytes(state.tolist())
        end = _WORD + int.from_bytes(raw[:_WORD], "little")
        torch.set_rng_state(torch.tensor(list(raw[_WORD:end]), dtype=torch.uint8))
        words = [
            int.from_bytes(raw[place : place + _WORD], "little")
            for place in range(end, len(raw), _WORD)
        ]
        executor = self._compiled()
        if executor is not None and words:
            executor.rng_state = words
        elif words:
            self._waiting = words

    def _compiled(self) -> Any:
        executor = None if self._executor is None else self._executor()
        return executor if executor is not None and executor.isCompiled() else None
