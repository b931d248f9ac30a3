"""CUDA devices: which one is current, its memory, streams and random numbers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import ConfigurationError, UnavailableError, UnsupportedError
from drivetrain_toolkit.threads import share_of_threads

from drivetrain_cuda import FACTS, nvml
from drivetrain_cuda.affinity import cores_near

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import DeviceFacts, Precision, StrategyFactory
    from torch import Tensor

#: The first compute capability with TF32.
_HAS_TF32 = (8, 0)


class CudaAccelerator:
    """The NVIDIA GPUs that this process sees.

    Args:
        precision_plugin: The precision for runs on this accelerator, when it is given to a trainer
            as an object. None leaves the choice to the trainer.
        training_type_plugin: The same for the strategy.
        tf32: Whether float32 matrix products and convolutions may round their inputs to TF32 (10
            bits of mantissa). None leaves torch's own settings as they are.
        bind_cores: Whether this process runs on the cores nearest to its device only.
        memory_fraction: The most that this process may allocate, as a part of the device's memory
            from 0 to 1; None is all of it.

    Raises:
        ConfigurationError: ``memory_fraction`` is outside its range.
    """

    def __init__(
        self,
        precision_plugin: Precision | None = None,
        training_type_plugin: StrategyFactory | None = None,
        *,
        tf32: bool | None = None,
        bind_cores: bool = False,
        memory_fraction: float | None = None,
    ) -> None:
        if memory_fraction is not None and not 0.0 < memory_fraction <= 1.0:
            raise ConfigurationError(
                f"CudaAccelerator(memory_fraction={memory_fraction!r}) was asked for.",
                "Give a number above 0 and up to 1, or leave it out.",
            )
        self.precision_plugin = precision_plugin
        self.training_type_plugin = training_type_plugin
        self.tf32 = tf32
        self.bind_cores = bind_cores
        self.memory_fraction = memory_fraction
        self._before = _Before()
        self._copying: dict[torch.device, torch.Stream] = {}

    def __getstate__(self) -> dict[str, object]:
        """The settings: streams and what was changed belong to a process."""
        return {**self.__dict__, "_before": _Before(), "_copying": {}}

    @property
    def facts(self) -> DeviceFacts:
        """What CUDA devices are like; the same object as in the spec."""
        return FACTS

    @property
    def device_type(self) -> str:
        """Always ``"cuda"``."""
        return FACTS.device_type

    def device_count(self) -> int:
        """Devices that this process sees. Opens none of them."""
        from drivetrain_cuda.probing import probe

        return probe().devices

    def activate(self, index: int, local_size: int) -> torch.device:
        """Make device ``index`` current, and apply the settings of this accelerator.

        Raises:
            UnavailableError: There is no such device, or torch cannot use it.
            UnsupportedError: TF32 was asked for, and the device has none.
            ConfigurationError: TF32 was asked for, and the program sets it otherwise.
        """
        device = torch.device(FACTS.device_type, index)
        there = _initialized()
        if not 0 <= index < there:
            raise UnavailableError(
                f"CUDA device {index} was asked for, and this process sees {there}.",
                f"Use one from 0 to {there - 1}, or change CUDA_VISIBLE_DEVICES.",
            )
        if self._before.device is None:
            self._before.device = torch.cuda.current_device()
        torch.cuda.set_device(device)
        self._share_threads(local_size)
        self._set_tf32(device)
        if self.bind_cores:
            self._bind(device)
        if self.memory_fraction is not None:
            torch.cuda.set_per_process_memory_fraction(self.memory_fraction, device)
            self._before.limited = device
        return device

    def synchronize(self, device: torch.device) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(device)

    def close(self) -> None:
        """Set back what ``activate`` changed. Safe to call twice."""
        before, self._before = self._before, _Before()
        self._copying.clear()
        if before.device is not None:
            torch.cuda.set_device(before.device)
        if before.limited is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, before.limited)
        if before.threads is not None:
            torch.set_num_threads(before.threads)
        if before.tf32 is not None:
            write_tf32(*before.tf32)
        if before.cores is not None:
            os.sched_setaffinity(0, before.cores)

    def memory_stats(self, device: torch.device) -> Mapping[str, float]:
        """Bytes: in tensors (``allocated``), the most of it (``peak``), and held for more."""
        found = torch.cuda.memory_stats(device)
        return {
            "allocated": float(found.get("allocated_bytes.all.current", 0)),
            "peak": float(found.get("allocated_bytes.all.peak", 0)),
            "reserved": float(found.get("reserved_bytes.all.current", 0)),
            "reserved_peak": float(found.get("reserved_bytes.all.peak", 0)),
            "total": float(torch.cuda.get_device_properties(device).total_memory),
        }

    def rng_state(self, device: torch.device) -> Tensor:
        """The state of the device's generator, on the host."""
        return torch.cuda.get_rng_state(device)

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        """Restore a state."""
        torch.cuda.set_rng_state(state, device)

    def copy_stream(self, device: torch.device) -> torch.Stream:
        """A stream for copies beside the work; the same one each time."""
        if device not in self._copying:
            self._copying[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._copying[device]

    def capability(self, device: torch.device) -> tuple[int, int]:
        """The compute capability, such as ``(9, 0)``."""
        return torch.cuda.get_device_capability(device)

    def _share_threads(self, local_size: int) -> None:
        """Processes of one machine share its cores, but for the user's own word."""
        now = torch.get_num_threads()
        share = share_of_threads(local_size, now, os.environ, os.cpu_count() or 1)
        if share == now:
            return
        if self._before.threads is None:
            self._before.threads = now
        torch.set_num_threads(share)

    def _set_tf32(self, device: torch.device) -> None:
        if self.tf32 is None:
            return
        major, minor = self.capability(device)
        if self.tf32 and (major, minor) < _HAS_TF32:
            raise UnsupportedError(
                f"CudaAccelerator(tf32=True) was asked for, and {device} has compute capability "
                f"{major}.{minor}; TF32 came with 8.0.",
                "Leave tf32 out.",
            )
        if self._before.tf32 is None:
            self._before.tf32 = read_tf32()
        write_tf32(self.tf32, self.tf32)

    def _bind(self, device: torch.device) -> None:
        allowed = os.sched_getaffinity(0)
        near = allowed & cores_near(_bus(device))
        if not near:
            raise UnsupportedError(
                "CudaAccelerator(bind_cores=True) was asked for, and this machine does not say "
                f"which of the {len(allowed)} allowed cores are near {device}.",
                "Leave bind_cores out.",
            )
        if self._before.cores is None:
            self._before.cores = allowed
        os.sched_setaffinity(0, near)


class _Before:
    """What was set before ``activate`` changed it; None for what it did not change."""

    def __init__(self) -> None:
        self.device: int | None = None
        self.limited: torch.device | None = None
        self.threads: int | None = None
        self.tf32: tuple[bool, bool] | None = None
        self.cores: set[int] | None = None


def _initialized() -> int:
    """The number of devices, once a context can be made. Raises ``UnavailableError`` if not."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the latter from builds without CUDA
        raise UnavailableError(
            f"A CUDA device was asked for, and torch {torch.__version__} cannot use any: {error}.",
            "Run 'drivetrain doctor' to see what the machine has. If this process was forked, use "
            "no GPU before forking, not even torch.cuda.is_available().",
        ) from error
    return torch.cuda.device_count()


def _bus(device: torch.device) -> str:
    """The PCI address of a device, found by its UUID; empty if NVML does not know it."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        cards = nvml.ask().cards
    except nvml.NoAnswer:
        return ""
    return next((card.bus for card in cards if card.uuid == uuid), "")


def read_tf32() -> tuple[bool, bool]:
    """Whether products and convolutions may use TF32.

    Raises:
        ConfigurationError: The program uses torch's finer settings, which have no such answer.
    """
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32), bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError as error:  # the program has set fp32_precision of some operations
        raise ConfigurationError(
            "CudaAccelerator(tf32=...) was asked for, and this program has set "
            "torch.backends...fp32_precision itself.",
            "Keep one of them.",
        ) from error


def write_tf32(products: bool, convolutions: bool) -> None:  # noqa: FBT001 - a pair of switches
    """Set what ``read_tf32`` reads.

    The older names of torch's settings: the finer ones make reading these an error, and libraries
    read them.
    """
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions
