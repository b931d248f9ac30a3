"""The contracts between the trainer and hardware packages. Standard library only.

Importing this package loads no torch. Names are re-exported lazily, so that a backend's spec module
pays for what it uses and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain_interfaces.accelerator import Accelerator as Accelerator
    from drivetrain_interfaces.accelerator import DeviceFacts as DeviceFacts
    from drivetrain_interfaces.accelerator import SupportsMemoryStats as SupportsMemoryStats
    from drivetrain_interfaces.accelerator import SupportsRng as SupportsRng
    from drivetrain_interfaces.accelerator import SupportsStreams as SupportsStreams
    from drivetrain_interfaces.backend import Backend as Backend
    from drivetrain_interfaces.backend import BackendSpec as BackendSpec
    from drivetrain_interfaces.backend import Probe as Probe
    from drivetrain_interfaces.backend import StrategySpec as StrategySpec
    from drivetrain_interfaces.capabilities import ALL_STEP_HOOKS as ALL_STEP_HOOKS
    from drivetrain_interfaces.capabilities import Capabilities as Capabilities
    from drivetrain_interfaces.capabilities import Feature as Feature
    from drivetrain_interfaces.capabilities import StepHook as StepHook
    from drivetrain_interfaces.checkpoint import CheckpointFacts as CheckpointFacts
    from drivetrain_interfaces.checkpoint import CheckpointIO as CheckpointIO
    from drivetrain_interfaces.checkpoint import Difference as Difference
    from drivetrain_interfaces.checkpoint import PendingSave as PendingSave
    from drivetrain_interfaces.checkpoint import Refused as Refused
    from drivetrain_interfaces.checkpoint import SaveGroup as SaveGroup
    from drivetrain_interfaces.checkpoint import Shard as Shard
    from drivetrain_interfaces.checkpoint import StoredTensor as StoredTensor
    from drivetrain_interfaces.checkpoint import SupportsBackgroundSave as SupportsBackgroundSave
    from drivetrain_interfaces.checkpoint import SupportsConvert as SupportsConvert
    from drivetrain_interfaces.checkpoint import SupportsInspect as SupportsInspect
    from drivetrain_interfaces.checkpoint import SupportsListing as SupportsListing
    from drivetrain_interfaces.checkpoint import SupportsPrune as SupportsPrune
    from drivetrain_interfaces.checkpoint import SupportsShardedLoad as SupportsShardedLoad
    from drivetrain_interfaces.checkpoint import SupportsShardedSave as SupportsShardedSave
    from drivetrain_interfaces.checkpoint import SupportsVerify as SupportsVerify
    from drivetrain_interfaces.checkpoint import TensorEntry as TensorEntry
    from drivetrain_interfaces.cluster import ClusterEnvironment as ClusterEnvironment
    from drivetrain_interfaces.cluster import DescribesMachines as DescribesMachines
    from drivetrain_interfaces.cluster import JobManager as JobManager
    from drivetrain_interfaces.cluster import Machines as Machines
    from drivetrain_interfaces.cluster import Remarks as Remarks
    from drivetrain_interfaces.cluster import StatesPriority as StatesPriority
    from drivetrain_interfaces.cluster import World as World
    from drivetrain_interfaces.cluster import priority_of as priority_of
    from drivetrain_interfaces.collectives import Collectives as Collectives
    from drivetrain_interfaces.collectives import ReduceOp as ReduceOp
    from drivetrain_interfaces.collectives import SideChannel as SideChannel
    from drivetrain_interfaces.collectives import SupportsAbort as SupportsAbort
    from drivetrain_interfaces.collectives import SupportsClose as SupportsClose
    from drivetrain_interfaces.collectives import SupportsSideChannel as SupportsSideChannel
    from drivetrain_interfaces.collectives import SupportsTimeout as SupportsTimeout
    from drivetrain_interfaces.contract import CONTRACT as CONTRACT
    from drivetrain_interfaces.contract import ContractVersion as ContractVersion
    from drivetrain_interfaces.errors import BrokenPackageError as BrokenPackageError
    from drivetrain_interfaces.errors import CheckpointError as CheckpointError
    from drivetrain_interfaces.errors import ClusterError as ClusterError
    from drivetrain_interfaces.errors import ConfigurationError as ConfigurationError
    from drivetrain_interfaces.errors import ContractMismatchError as ContractMismatchError
    from drivetrain_interfaces.errors import DataError as DataError
    from drivetrain_interfaces.errors import DrivetrainError as DrivetrainError
    from drivetrain_interfaces.errors import NonFiniteLossError as NonFiniteLossError
    from drivetrain_interfaces.errors import NotFoundError as NotFoundError
    from drivetrain_interfaces.errors import ProcessFailedError as ProcessFailedError
    from drivetrain_interfaces.errors import StorageError as StorageError
    from drivetrain_interfaces.errors import UnavailableError as UnavailableError
    from drivetrain_interfaces.errors import UnsupportedError as UnsupportedError
    from drivetrain_interfaces.errors import UserCodeError as UserCodeError
    from drivetrain_interfaces.launcher import Launcher as Launcher
    from drivetrain_interfaces.launcher import LaunchPlan as LaunchPlan
    from drivetrain_interfaces.launcher import LaunchRequest as LaunchRequest
    from drivetrain_interfaces.launcher import RunsInPlace as RunsInPlace
    from drivetrain_interfaces.precision import Precision as Precision
    from drivetrain_interfaces.precision import PrecisionPolicy as PrecisionPolicy
    from drivetrain_interfaces.strategy import Clip as Clip
    from drivetrain_interfaces.strategy import EvalSpec as EvalSpec
    from drivetrain_interfaces.strategy import EvalStep as EvalStep
    from drivetrain_interfaces.strategy import ManualSpec as ManualSpec
    from drivetrain_interfaces.strategy import ManualStep as ManualStep
    from drivetrain_interfaces.strategy import ModelState as ModelState
    from drivetrain_interfaces.strategy import StepHooks as StepHooks
    from drivetrain_interfaces.strategy import StepResult as StepResult
    from drivetrain_interfaces.strategy import StepSpec as StepSpec
    from drivetrain_interfaces.strategy import Strategy as Strategy
    from drivetrain_interfaces.strategy import StrategyContext as StrategyContext
    from drivetrain_interfaces.strategy import StrategyFactory as StrategyFactory
    from drivetrain_interfaces.strategy import SupportsManualStep as SupportsManualStep
    from drivetrain_interfaces.strategy import SupportsShardedState as SupportsShardedState
    from drivetrain_interfaces.strategy import TrainStep as TrainStep
    from drivetrain_interfaces.strategy import refuse_what_is_newer as refuse_what_is_newer
    from drivetrain_interfaces.submit import JobFile as JobFile
    from drivetrain_interfaces.submit import JobRequest as JobRequest
    from drivetrain_interfaces.submit import Submitter as Submitter

_NAMES = {
    "accelerator": (
        "Accelerator",
        "DeviceFacts",
        "SupportsMemoryStats",
        "SupportsRng",
        "SupportsStreams",
    ),
    "backend": ("Backend", "BackendSpec", "Probe", "StrategySpec"),
    "capabilities": ("ALL_STEP_HOOKS", "Capabilities", "Feature", "StepHook"),
    "checkpoint": (
        "CheckpointFacts",
        "CheckpointIO",
        "Difference",
        "PendingSave",
        "Refused",
        "SaveGroup",
        "Shard",
        "StoredTensor",
        "SupportsBackgroundSave",
        "SupportsConvert",
        "SupportsInspect",
        "SupportsListing",
        "SupportsPrune",
        "SupportsShardedLoad",
        "SupportsShardedSave",
        "SupportsVerify",
        "TensorEntry",
    ),
    "cluster": (
        "ClusterEnvironment",
        "DescribesMachines",
        "JobManager",
        "Machines",
        "Remarks",
        "StatesPriority",
        "World",
        "priority_of",
    ),
    "collectives": (
        "Collectives",
        "ReduceOp",
        "SideChannel",
        "SupportsAbort",
        "SupportsClose",
        "SupportsSideChannel",
        "SupportsTimeout",
    ),
    "contract": ("CONTRACT", "ContractVersion"),
    "errors": (
        "BrokenPackageError",
        "CheckpointError",
        "ClusterError",
        "ConfigurationError",
        "ContractMismatchError",
        "DataError",
        "DrivetrainError",
        "NonFiniteLossError",
        "NotFoundError",
        "ProcessFailedError",
        "StorageError",
        "UnavailableError",
        "UnsupportedError",
        "UserCodeError",
    ),
    "launcher": ("LaunchPlan", "LaunchRequest", "Launcher", "RunsInPlace"),
    "precision": ("Precision", "PrecisionPolicy"),
    "strategy": (
        "Clip",
        "EvalSpec",
        "EvalStep",
        "ManualSpec",
        "ManualStep",
        "ModelState",
        "StepHooks",
        "StepResult",
        "StepSpec",
        "Strategy",
        "StrategyContext",
        "StrategyFactory",
        "SupportsManualStep",
        "SupportsShardedState",
        "TrainStep",
        "refuse_what_is_newer",
    ),
    "submit": ("JobFile", "JobRequest", "Submitter"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 - a test compares it with the imports above


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
