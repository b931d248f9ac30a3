"""The name of the older plugin API that belongs to CUDA devices."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from drivetrain_interfaces import ConfigurationError
from drivetrain_toolkit.masters import MasterWeightsPrecision
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.seeds import MixedPrecisionPlugin

from drivetrain_cuda import FACTS


class ApexMixedPrecisionPlugin(MixedPrecisionPlugin):
    """What the optimization levels of NVIDIA's apex meant, done by torch.

    ``apex.amp`` does not exist any more. ``"O0"`` is ``"32-true"``. ``"O1"``, which patched torch
    to cast the inputs of single operations, is ``"16-mixed"``. ``"O2"`` is float16 with float32
    master weights and batch normalization in float32. ``"O3"`` is ``"16-true"``.

    Args:
        amp_level: ``"O0"``, ``"O1"``, ``"O2"`` or ``"O3"``.
        device: The device type that it is for.

    Raises:
        ConfigurationError: There is no such level.
    """

    _LEVELS: ClassVar[dict[str, str]] = {
        "O0": "32-true",
        "O1": "16-mixed",
        "O2": "float16 with float32 master weights",
        "O3": "16-true",
    }

    def __init__(self, amp_level: str = "O2", device: str = FACTS.autocast_type) -> None:
        if amp_level not in self._LEVELS:
            raise ConfigurationError(
                f"ApexMixedPrecisionPlugin(amp_level={amp_level!r}) was asked for; levels are "
                f"{', '.join(self._LEVELS)}.",
                "Use one of them, or set precision= of the trainer.",
            )
        meaning = self._LEVELS[amp_level]
        warnings.warn(
            f"apex.amp does not exist any more: amp_level={amp_level!r} is run as {meaning}, by "
            "torch. Set precision= of the trainer instead, such as 'bf16-mixed'.",
            stacklevel=2,
        )
        inner: Any = (
            MasterWeightsPrecision(device) if amp_level == "O2" else make_precision(meaning, device)
        )
        self._inner = inner
        self.name = inner.name
        self.policy = inner.policy
