"""What the driver says about its devices, through NVML, which opens none of them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from drivetrain_cuda.visible import Card

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Driver:
    """The answers of one machine.

    Attributes:
        version: Of the driver, such as ``"550.54.15"``.
        cuda: The newest CUDA that it serves, such as ``(12, 4)``.
        cards: The boards, in the order of the PCI bus.
    """

    version: str
    cuda: tuple[int, int]
    cards: tuple[Card, ...]


class NoAnswer(Exception):  # noqa: N818 - internal, and not an error of the user's
    """NVML could not be asked. ``absent`` says that the reason is that there is no driver."""

    def __init__(self, reason: str, *, absent: bool = False) -> None:
        super().__init__(reason)
        self.absent = absent


def ask() -> Driver:
    """What NVML says.

    Raises:
        NoAnswer: The package is not installed, there is no driver, or it does not answer.
    """
    try:
        pynvml = import_module("pynvml")
    except ImportError as error:
        raise NoAnswer(f"nvidia-ml-py is not installed ({error})") from error
    with _translated(pynvml), _initialized(pynvml):
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        cards = tuple(_card(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
        return Driver(
            _text(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10), cards
        )


@contextmanager
def _initialized(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def _translated(pynvml: Any) -> Iterator[None]:
    absent = (
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    )
    try:
        yield
    except pynvml.NVMLError as error:
        raise NoAnswer(f"NVML says: {error}", absent=error.value in absent) from error


def _card(pynvml: Any, index: int) -> Card:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    partitioned = _partitioned(pynvml, handle)
    return Card(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        capability=_optional(pynvml, pynvml.nvmlDeviceGetCudaComputeCapability, handle),
        bus=_text(pynvml.nvmlDeviceGetPciInfo(handle).busId),
        memory=_memory(pynvml, handle),
        partitioned=partitioned,
        instances=_instances(pynvml, handle) if partitioned else (),
    )


def _partitioned(pynvml: Any, handle: Any) -> bool:
    mode = _optional(pynvml, pynvml.nvmlDeviceGetMigMode, handle)
    return mode is not None and bool(mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE)


def _instances(pynvml: Any, handle: Any) -> tuple[str, ...]:
    found = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError_NotFound:  # numbers have gaps where none was made
            continue
        found.append(_text(pynvml.nvmlDeviceGetUUID(instance)))
    return tuple(found)


def _memory(pynvml: Any, handle: Any) -> int:
    memory = _optional(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle)
    return 0 if memory is None else int(memory.total)


def _optional(pynvml: Any, question: Any, handle: Any) -> Any:
    """The answer, or None where the board or the driver does not know the question."""
    try:
        answer = question(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None
    return tuple(answer) if isinstance(answer, list) else answer


def _text(value: str | bytes) -> str:
    """Older releases of the package answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value
