"""The vendor's library: imported when it is first used, and its refusals put into words."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


def load_sdk() -> Any:
    """The module ``poptorch``.

    Raises:
        UnavailableError: It does not import; the message is its own.
    """
    try:
        import poptorch  # type: ignore[import-not-found,unused-ignore]  # no registry has it
    except (ImportError, AssertionError, OSError) as error:
        # Another torch is an AssertionError there, and a library that is not found an OSError.
        raise UnavailableError(
            f"PopTorch was asked for, and importing it raised {type(error).__name__}: {error}.",
            "Activate the Poplar SDK (source its enable script) and install the torch that its "
            "PopTorch was built for.",
        ) from error
    return poptorch


def load_popdist() -> Any:
    """The module ``popdist.poptorch``, with options of one instance among several.

    Raises:
        UnavailableError: It does not import.
    """
    try:
        import popdist.poptorch  # type: ignore[import-not-found,unused-ignore]  # as above
    except (ImportError, AssertionError, OSError) as error:
        raise UnavailableError(
            f"poprun started this process, and importing popdist raised {type(error).__name__}: "
            f"{error}.",
            "Install the popdist wheel of the Poplar SDK.",
        ) from error
    return popdist.poptorch


@contextmanager
def acquiring() -> Iterator[None]:
    """Say which device is busy, where the SDK only says that it got none.

    Raises:
        UnavailableError: The SDK could not acquire IPUs.
    """
    try:
        yield
    except Exception as error:
        if "Failed to acquire" not in str(error):
            raise
        raise UnavailableError(
            f"IPUs were asked for and not had: {error}.",
            "Wait for whoever holds them (POPTORCH_WAIT_FOR_IPU=1 does), use fewer replicas, or a "
            "larger partition.",
        ) from error
