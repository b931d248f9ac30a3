"""The enumerations, with the recorded values."""

import enum


class AutoStage(enum.IntEnum):
    """As recorded."""

    SameAsIpu = 0
    AutoIncrement = 1


class CommGroupType(enum.IntEnum):
    """As recorded."""

    All = 0
    Consecutive = 1
    Orthogonal = 2
    NoGrouping = 3


class ConnectionType(enum.IntEnum):
    """As recorded."""

    Always = 0
    OnDemand = 1
    Never = 2


class DataLoaderMode(enum.IntEnum):
    """As recorded."""

    Sync = 0
    Async = 1
    AsyncRebatched = 2


class HalfFloatCastingBehavior(enum.IntEnum):
    """As recorded."""

    FloatDowncastToHalf = 0
    HalfUpcastToFloat = 1
    Default = 2


class Liveness(enum.IntEnum):
    """As recorded."""

    AlwaysLive = 0
    OffChipAfterFwd = 1
    OffChipAfterFwdNoOverlap = 2
    OffChipAfterEachPhase = 3


class MatMulSerializationMode(enum.Enum):
    """As recorded."""

    InputChannels = "input_channels"
    ReducingDim = "reducing_dim"
    OutputChannels = "output_channels"
    Disabled = "none"


class MeanReductionStrategy(enum.IntEnum):
    """As recorded."""

    Running = 0
    Post = 1
    PostAndLoss = 2


class MultiConvPlanType(enum.IntEnum):
    """As recorded."""

    Parallel = 0
    Serial = 1


class OutputMode(enum.IntEnum):
    """As recorded."""

    Final = 0
    EveryN = 1
    All = 2
    Sum = 3
    Default = 4


class OverlapMode(enum.Enum):
    """As recorded."""

    NoOverlap = "no_overlap"
    OverlapAccumulationLoop = "overlap_accumulation_loop"
    OverlapDeviceIterationLoop = "overlap_device_iteration_loop"


class ReductionType(enum.IntEnum):
    """As recorded."""

    Sum = 0
    Mean = 1
    NoReduction = 2


class SharingStrategy(enum.IntEnum):
    """As recorded."""

    SharedMemory = 0
    FileSystem = 1
    Fork = 2
    ForkServer = 3


class SyncPattern(enum.IntEnum):
    """As recorded."""

    Full = 0
    SinglePipeline = 1
    ReplicaAndLadder = 2


class VariableRetrievalMode(enum.IntEnum):
    """As recorded."""

    OnePerGroup = 0
    AllReplicas = 2
