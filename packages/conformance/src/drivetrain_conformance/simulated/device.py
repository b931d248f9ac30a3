"""Installing the simulated device into torch, changing what it is like, and reading what it did."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError, UnavailableError

from drivetrain_conformance.simulated.building import build
from drivetrain_conformance.simulated.native import Native
from drivetrain_conformance.simulated.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

#: The name of the ``torch.distributed`` backend of the simulated devices.
COLLECTIVE_BACKEND = "simccl"

#: What torch calls the device type that others may use, until somebody renames it.
_UNNAMED = "privateuseone"


@dataclass(frozen=True, slots=True)
class Counters:
    """What devices were asked to do. The difference of two is what happened in between.

    Attributes:
        launches: Kernels. Looking at the same memory in another way is none.
        uploads: Copies from the host.
        uploaded_bytes: Bytes in them.
        blocking_uploads: Those of them that the host waited for: not ``non_blocking``.
        downloads: Copies to the host, numbers read by ``item()`` included.
        downloaded_bytes: Bytes in them.
        device_copies: Copies from another device.
        synchronizations: How often the host waited for a device to finish: numbers and tensors
            that it read, shapes that depend on data, and ``synchronize()``.
        out_of_memory: Allocations that were refused.
        collectives: Operations of process groups, of this process as a whole.
    """

    launches: int = 0
    uploads: int = 0
    uploaded_bytes: int = 0
    blocking_uploads: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    device_copies: int = 0
    synchronizations: int = 0
    out_of_memory: int = 0
    collectives: int = 0

    def __sub__(self, earlier: Counters) -> Counters:
        names = [item.name for item in fields(self)]
        return Counters(**{n: getattr(self, n) - getattr(earlier, n) for n in names})


@dataclass(slots=True)
class _Installed:
    """What was installed in this process. There is at most one."""

    name: str
    native: Native
    module: ModuleType
    options: Options
    collectives: int = 0
    fault_base: int = 0

    def apply(self, options: Options) -> None:
        native = self.native
        native.set("latency_ns", round(options.latency_us * 1000))
        for name in ("fp16", "inference_mode", "inplace"):
            native.set(name, int(getattr(options, name)))
        fails = (options.fail_at_launch or 0) if _concerns(options, _rank()) else 0
        for device in range(options.devices):
            native.set("memory_limit", options.memory_limit or 0, device)
            native.set("launches_until_failure", fails, device)
            native.set("failed", 0, device)
        self.options = options
        self.fault_base = self.collectives


_state: list[_Installed] = []


def install(
    name: str = "sim",
    options: Options | None = None,
    *,
    module: Callable[[ModuleType], ModuleType] | None = None,
) -> ModuleType:
    """Register the device type ``name`` with torch, compiling it where that was never done.

    Also its module ``torch.<name>``, ``Tensor.<name>()`` and the like, and the process group. Where
    torch has a type of that name and no kernels for it, because a vendor brings them, the simulated
    device takes that place.

    Args:
        name: What ``torch.device`` is to call it. Fixed for the life of the process.
        options: What the devices are like; None takes those of the environment.
        module: Makes what is to be ``torch.<name>`` from the usual module, such as one that is as
            strict as a vendor's.

    Returns:
        The module ``torch.<name>``.

    Raises:
        UnavailableError: It cannot be compiled here, or another package has taken torch's place
            for device types of others.
        ConfigurationError: It is installed already, under another name or with fewer or more
            devices.
    """
    if _state:
        return _again(_state[0], name, options)
    options = Options.from_environment() if options is None else options
    path = build()
    import torch
    from torch.utils import backend_registration

    from drivetrain_conformance.simulated import device_module, process_group

    own = _is_torchs_own(name)
    taken = torch._C._get_privateuse1_backend_name()  # noqa: SLF001 - torch has no public way
    if (taken != _UNNAMED and not own) or hasattr(torch, name):
        raise UnavailableError(
            f"The simulated device was to be called {name!r}; torch's device type for others is "
            f"called {taken!r} already, or torch has something of that name.",
            "Install it in a process of its own, or under another name.",
        )
    native = Native(path)
    if options.devices > native.most_devices:
        raise ConfigurationError(
            f"{options.devices} simulated devices were asked for; there may be "
            f"{native.most_devices}.",
            "Ask for fewer.",
        )
    native.set("devices", options.devices)
    if not own:
        backend_registration.rename_privateuse1_backend(name)
    if own:
        native.register(name, name.upper(), build(named=name.upper()))
    else:
        native.register(name)
    made_module = device_module.make(name, native)
    made_module = made_module if module is None else module(made_module)
    # What torch documents for device types of others, underscore or not.
    torch._register_device_module(name, made_module)  # type: ignore[no-untyped-call]  # noqa: SLF001
    if not own:
        backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
    made = _Installed(name, native, made_module, options)
    made.apply(options)
    _state.append(made)
    if torch.distributed.is_available():
        process_group.register(COLLECTIVE_BACKEND, name)
    return made_module


def installed() -> str | None:
    """The name that it is installed under in this process; None where it is not."""
    return _state[0].name if _state else None


def current_options() -> Options:
    """What the devices are like now."""
    return _here().options


def configure(**changes: Any) -> Options:
    """Change options, and start counting anew towards every fault. A failed device works again.

    Returns:
        The options from now on.

    Raises:
        ConfigurationError: There is no such option, or the number of devices was to change.
    """
    here = _here()
    try:
        wanted = replace(here.options, **changes)
    except TypeError as error:
        raise ConfigurationError(
            f"The simulated device was given {sorted(changes)}; it has the options "
            f"{sorted(asdict(here.options))}.",
            "Leave out the others.",
        ) from error
    if wanted.devices != here.options.devices:
        raise ConfigurationError(
            f"{wanted.devices} simulated devices were asked for, and {here.options.devices} are "
            "installed.",
            "Give the number when they are installed.",
        )
    here.apply(wanted)
    return wanted


@contextmanager
def configured(**changes: Any) -> Iterator[Options]:
    """Other options for the length of a ``with`` block; afterwards those that were there before."""
    here = _here()
    before = here.options
    try:
        yield configure(**changes)
    finally:
        here.apply(before)


def counters(device: int | None = None) -> Counters:
    """What one device was asked to do since it was installed; None is all of them together."""
    here = _here()
    devices = range(here.options.devices) if device is None else (device,)
    names = [item.name for item in fields(Counters) if item.name != "collectives"]
    totals = {name: sum(here.native.get(name, each) for each in devices) for name in names}
    return Counters(**totals, collectives=here.collectives)


def memory(device: int = 0) -> tuple[int, int]:
    """Bytes that are allocated on a device, and the most that ever were."""
    native = _here().native
    return native.get("allocated", device), native.get("peak", device)


def next_collective(rank: int) -> str | None:
    """Count a collective; returns the fault that is to happen in it, if any.

    Args:
        rank: The rank of this process in its group.
    """
    here = _here()
    here.collectives += 1
    number = here.collectives - here.fault_base
    if not _concerns(here.options, rank):
        return None
    if number == here.options.hang_at_collective:
        return "hang"
    return "drop" if number == here.options.drop_at_collective else None


def _again(here: _Installed, name: str, options: Options | None) -> ModuleType:
    if name != here.name:
        raise ConfigurationError(
            f"The simulated device was to be installed as {name!r}, and it is installed as "
            f"{here.name!r}.",
            "Use one name in a process.",
        )
    if options is not None:
        configure(**asdict(options))
    return here.module


def _is_torchs_own(name: str) -> bool:
    """Whether torch knows a device type of that name by itself."""
    import torch

    try:
        return torch.device(name).type == name
    except RuntimeError:
        return False


def _here() -> _Installed:
    if not _state:
        raise ConfigurationError(
            "The simulated device was used before it was installed.", "Call install() first."
        )
    return _state[0]


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _concerns(options: Options, rank: int) -> bool:
    return options.fault_rank is None or options.fault_rank == rank
