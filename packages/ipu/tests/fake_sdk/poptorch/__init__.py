"""A simulator of PopTorch 3.4, for tests: it traces, freezes and refuses what PopTorch does.

Programs run on the host. What is not simulated is not there, so that using it fails. Its rules can
be turned off one at a time (``rules.py``), to see that a test notices.
"""

from poptorch import enums as enums
from poptorch import optim as optim
from poptorch.blocks import (
    BeginBlock as BeginBlock,
)
from poptorch.blocks import (
    Block as Block,
)
from poptorch.blocks import (
    PipelinedExecution as PipelinedExecution,
)
from poptorch.blocks import (
    ShardedExecution as ShardedExecution,
)
from poptorch.blocks import (
    Stage as Stage,
)
from poptorch.blocks import (
    removeBlocks as removeBlocks,
)
from poptorch.devices import ipuHardwareIsAvailable as ipuHardwareIsAvailable
from poptorch.devices import ipuHardwareVersion as ipuHardwareVersion
from poptorch.enums import (
    AutoStage as AutoStage,
)
from poptorch.enums import (
    CommGroupType as CommGroupType,
)
from poptorch.enums import (
    ConnectionType as ConnectionType,
)
from poptorch.enums import (
    DataLoaderMode as DataLoaderMode,
)
from poptorch.enums import (
    HalfFloatCastingBehavior as HalfFloatCastingBehavior,
)
from poptorch.enums import (
    Liveness as Liveness,
)
from poptorch.enums import (
    MatMulSerializationMode as MatMulSerializationMode,
)
from poptorch.enums import (
    MeanReductionStrategy as MeanReductionStrategy,
)
from poptorch.enums import (
    MultiConvPlanType as MultiConvPlanType,
)
from poptorch.enums import (
    OutputMode as OutputMode,
)
from poptorch.enums import (
    OverlapMode as OverlapMode,
)
from poptorch.enums import (
    ReductionType as ReductionType,
)
from poptorch.enums import (
    SharingStrategy as SharingStrategy,
)
from poptorch.enums import (
    SyncPattern as SyncPattern,
)
from poptorch.enums import (
    VariableRetrievalMode as VariableRetrievalMode,
)
from poptorch.errors import Error as Error
from poptorch.errors import RecoverableError as RecoverableError
from poptorch.errors import UnrecoverableError as UnrecoverableError
from poptorch.executor import PoplarExecutor as PoplarExecutor
from poptorch.executor import inferenceModel as inferenceModel
from poptorch.executor import trainingModel as trainingModel
from poptorch.loader import DataLoader as DataLoader
from poptorch.options import Options as Options
from poptorch.options import TensorLocationSettings as TensorLocationSettings
from poptorch.tracing import identity_loss as identity_loss
from poptorch.tracing import isRunningOnIpu as isRunningOnIpu

__version__ = "3.4.0"
