"""How many threads a process of several on a machine is to use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def share_of_threads(local_size: int, current: int, env: Mapping[str, str], cores: int) -> int:
    """Torch threads for one of ``local_size`` processes on this machine.

    The user's word counts: with ``OMP_NUM_THREADS`` set nothing changes, and neither does it with
    a single process. Fewer threads than the share are left as they are: the user asked torch for
    them, or the launcher did, which gives a forked process one, since threads survive no fork.

    Args:
        local_size: Processes of the run on this machine.
        current: Threads that torch would use now.
        env: The environment of this process.
        cores: What the processes share.
    """
    if local_size == 1 or env.get("OMP_NUM_THREADS"):
        return current
    return min(current, max(1, cores // local_size))
