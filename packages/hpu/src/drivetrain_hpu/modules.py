"""Which Gaudi modules a process may use, and the variables that say so. Loads nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Modules that a process tree may use, as numbers with commas.
VISIBLE: Final = "HABANA_VISIBLE_MODULES"
#: The module that this process opens; the driver chooses where it is not set.
MODULE: Final = "HLS_MODULE_ID"
#: Where device logs of this process go. Both are inherited by children, for whom they are wrong.
LOG_ID: Final = "ID"
STALE: Final = (MODULE, LOG_ID)


def visible_modules(env: Mapping[str, str], there: int) -> tuple[str, ...]:
    """The modules that a process with these variables may use, in their order.

    Args:
        env: Its variables.
        there: Modules of the machine.

    Raises:
        ConfigurationError: The variable does not hold numbers.
    """
    text = env.get(VISIBLE, "").strip()
    if not text:
        return tuple(str(index) for index in range(there))
    named = tuple(part.strip() for part in text.split(","))
    if not all(part.isascii() and part.isdigit() for part in named) or len(set(named)) < len(named):
        raise ConfigurationError(
            f"{VISIBLE}={text!r} is set, which is no list of different module numbers.",
            "Set it to numbers such as 0,1,2,3, or unset it.",
        )
    return named


def choose_module(index: int, local_size: int, there: int) -> None:
    """Say which module this process is to open, before it opens any.

    A process alone that wants the first module leaves the choice to the driver, as the vendor's
    tools do, so that two such processes on one machine get different modules.

    Args:
        index: Of the device in the plan: a place among the visible modules.
        local_size: Processes of the run on this machine.
        there: Modules that this process sees.
    """
    if index == 0 and local_size == 1:
        return
    modules = visible_modules(os.environ, there)
    wanted = modules[index] if index < len(modules) else str(index)
    usual = os.environ.get("LOCAL_RANK", "")
    by_rank = modules[int(usual)] if usual.isdigit() and int(usual) < len(modules) else None
    # Set already: by a manager, whose word counts, or by the bridge from the local rank.
    if os.environ.get(MODULE) in {None, by_rank}:
        os.environ[MODULE] = wanted
