"""What launchers share that send their function to processes which somebody else starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_toolkit.launchers.pickles import need_cloudpickle
from drivetrain_toolkit.launchers.plans import check_numbers, refuse_inside_a_rank

if TYPE_CHECKING:
    from drivetrain_interfaces.launcher import LaunchRequest


class SendingLauncher:
    """A launcher whose ranks are all elsewhere: rank 0 too, and nothing is run again."""

    name = ""

    @property
    def interactive(self) -> bool:
        """True: the function is sent, and no script is run again."""
        return True

    @property
    def in_place(self) -> bool:
        """False: rank 0 runs elsewhere, so objects here keep the state they have."""
        return False

    def _check(self, request: LaunchRequest) -> None:
        """Refuse what cannot be met.

        Raises:
            ClusterError: A number is out of range, or this process is a rank already.
            NotFoundError: cloudpickle is not installed.
        """
        check_numbers(request, self.name)
        refuse_inside_a_rank(self.name)
        need_cloudpickle(self.name)
