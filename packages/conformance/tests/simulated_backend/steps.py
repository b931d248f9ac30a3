"""The toolkit's strategies, refusing what simulated devices were told not to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import UnsupportedError
from drivetrain_toolkit.strategies import DDPStrategy, EagerStrategy, SingleDeviceStrategy

from drivetrain_conformance import simulated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import EvalSpec, EvalStep


class _OnSimulated(EagerStrategy):
    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step; refuses inference mode where the devices lack it."""
        if spec.inference_mode and not simulated.current_options().inference_mode:
            raise UnsupportedError(
                "Evaluation in inference mode was asked for, which these simulated devices lack.",
                "Set inference_mode=False.",
            )
        return super().eval_step(spec)


class SimulatedSingleDevice(_OnSimulated, SingleDeviceStrategy):
    """One process, one simulated device."""


class SimulatedDDP(_OnSimulated, DDPStrategy):
    """Several processes, one simulated device each."""


STRATEGIES: Mapping[str, type[SimulatedSingleDevice | SimulatedDDP]] = {
    "single_device": SimulatedSingleDevice,
    "ddp": SimulatedDDP,
}
