"""What the parts in this package can do, as data. Importing this module loads no torch.

A backend builds its ``Capabilities`` from these sets, and adds or removes what its devices change:
``Feature.SYNC_BATCHNORM``, for one, is in none of them, because it depends on the device.
"""

from __future__ import annotations

from drivetrain_interfaces.capabilities import Feature

#: What ``SingleDeviceStrategy`` does on every device that torch runs eagerly.
SINGLE_DEVICE_FEATURES = frozenset(
    {
        Feature.ACCUMULATION,
        Feature.CLIP_NORM,
        Feature.CLIP_VALUE,
        Feature.CLOSURE,
        Feature.SEVERAL_OPTIMIZERS,
        Feature.MANUAL_STEP,
        Feature.INFERENCE_MODE,
        Feature.DETERMINISTIC,
    }
)

#: What ``DDPStrategy`` does: all of it, in several processes.
DDP_FEATURES = SINGLE_DEVICE_FEATURES | {Feature.SEVERAL_PROCESSES}

#: What ``make_precision`` can make.
PRECISIONS = frozenset(
    {
        "16-mixed",
        "16-true",
        "32-true",
        "64-true",
        "bf16-mixed",
        "bf16-true",
    }
)
