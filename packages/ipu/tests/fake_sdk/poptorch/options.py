"""Options: stored fields, their checks, and freezing."""

import copy
import os

import torch

from poptorch import enums
from poptorch.errors import Error
from poptorch.rules import holds


class _Frozen:
    """Setters that stop once the object was used."""

    _root = None

    def _set(self, **values):
        root = self._root or self
        if root.__dict__.get("_is_frozen") and holds("frozen-options"):
            raise Error("Can't modify frozen Options")
        self.__dict__.setdefault("_values", {}).update(values)
        return self

    def __getattr__(self, name):
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        raise AttributeError(name)


def _integer(name, value, least=1):
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise Error(f"{name} must be an integer of at least {least}, not {value!r}")
    return value


class _Training(_Frozen):
    def __init__(self, root):
        self._root = root
        self._values = {
            "gradient_accumulation": 1,
            "accumulation_and_replication_reduction_type": enums.ReductionType.Mean,
            "meanAccumulationAndReplicationReductionStrategy": enums.MeanReductionStrategy.Post,
        }

    def gradientAccumulation(self, gradient_accumulation):
        return self._set(gradient_accumulation=_integer("gradient", gradient_accumulation))

    def accumulationAndReplicationReductionType(self, reduction_type):
        return self._set(
            accumulation_and_replication_reduction_type=enums.ReductionType(reduction_type)
        )

    def setMeanAccumulationAndReplicationReductionStrategy(self, mean_reduction_strategy):
        return self._set(meanAccumulationAndReplicationReductionStrategy=mean_reduction_strategy)

    def setAutomaticLossScaling(self, enabled):
        return self._set(auto_loss_scaling=bool(enabled))

    def setConvolutionDithering(self, enabled):
        return self._set(convolution_dithering=bool(enabled))


class _Precision(_Frozen):
    def __init__(self, root):
        self._root = root
        self._values = {}

    def enableFloatingPointExceptions(self, enabled):
        return self._set(floating_point_exceptions=bool(enabled))

    def enableStochasticRounding(self, enabled):
        return self._set(stochastic_rounding=bool(enabled))

    def setPartialsType(self, dtype):
        if dtype not in (torch.float, torch.half):
            raise Error(f"partials cannot be {dtype}")
        return self._set(partials_type=dtype)

    def halfFloatCasting(self, half_float_casting):
        return self._set(half_float_casting=half_float_casting)

    def runningStatisticsAlwaysFloat(self, value):
        return self._set(running_statistics=value)


class TensorLocationSettings(_Frozen):
    """Where one kind of tensor is kept."""

    def minElementsForOffChip(self, min_elements):
        return self._set(off_chip=min_elements)

    def minElementsForReplicatedTensorSharding(self, min_elements):
        return self._set(sharding=min_elements)

    def useOnChipStorage(self, use=True):
        return self._set(on_chip=use)

    def useReplicatedTensorSharding(self, use=True):
        return self._set(use_sharding=use)

    def useIOTilesToLoad(self, use=True):
        return self._set(load=use)

    def useIOTilesToStore(self, use=True):
        return self._set(store=use)


class _TensorLocations(_Frozen):
    def __init__(self, root):
        self._root = root
        self._values = {}

    def numIOTiles(self, num_tiles):
        if num_tiles % 2 or not 32 <= num_tiles <= 192:
            raise Error(f"numIOTiles must be even and within 32 to 192, not {num_tiles}")
        return self._set(num_io_tiles=num_tiles)

    def setActivationLocation(self, location):
        return self._set(activation=location)

    def setWeightLocation(self, location):
        return self._set(weight=location)

    def setOptimizerLocation(self, location):
        return self._set(optimizer=location)

    def setAccumulatorLocation(self, location):
        return self._set(accumulator=location)


class _Distributed(_Frozen):
    def __init__(self, root):
        self._root = root
        self._values = {
            "process_id": int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")),
            "num_processes": int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")),
        }

    def configureProcessId(self, process_id, num_processes):
        return self._set(process_id=process_id, num_processes=num_processes)

    def disable(self):
        return self._set(process_id=0, num_processes=1)

    def setEnvVarNames(self, var_num_processes, var_process_id):
        return self._set(
            num_processes=int(os.environ[var_num_processes]),
            process_id=int(os.environ[var_process_id]),
        )

    @property
    def processId(self):
        return self._values["process_id"]

    @property
    def numProcesses(self):
        return self._values["num_processes"]


class _Popart(_Frozen):
    def __init__(self, root):
        self._root = root
        self._values = {"options": {}}

    def set(self, key, value):
        return self._set(options={**self.options, key: value})

    def setEngineOptions(self, engine_options):
        return self.set("engineOptions", engine_options)

    def setPatterns(self, patterns, level=2):
        return self.set("patterns", (patterns, level))


class Options(_Frozen):
    """How programs are compiled and run."""

    def __init__(self):
        self._is_frozen = False
        self._values = {
            "replication_factor": 1,
            "input_group_size": 1,
            "broadcast_buffers": True,
            "device_iterations": 1,
            "output_mode": enums.OutputMode.Default,
            "output_return_period": 1,
            "connection_type": enums.ConnectionType.Always,
            "sync_pattern": enums.SyncPattern.Full,
            "available_memory_proportion": {},
            "anchored_tensors": {},
            "auto_round_num_ipus": False,
            "log_dir": ".",
            "max_repeat_logs": 4,
            "execution_strategy": None,
        }
        for name, kind in _PARTS.items():
            self.__dict__["_" + name] = kind(self)

    def clone(self):
        made = copy.deepcopy(self)
        made._is_frozen = False
        return made

    def toDict(self):
        return dict(self._values)

    def exists(self, name):
        return name in self._values

    def deviceIterations(self, device_iterations):
        return self._set(device_iterations=_integer("deviceIterations", device_iterations))

    def replicationFactor(self, replication_factor):
        return self._set(replication_factor=_integer("replicationFactor", replication_factor))

    def inputReplicaGrouping(self, input_group_size, input_group_type):
        return self._set(input_group_size=_integer("inputReplicaGrouping", input_group_size))

    def broadcastBuffers(self, broadcast_buffers=True):
        return self._set(broadcast_buffers=broadcast_buffers)

    def autoRoundNumIPUs(self, auto_round_num_ipus=True):
        return self._set(auto_round_num_ipus=auto_round_num_ipus)

    def setExecutionStrategy(self, strategy):
        return self._set(execution_strategy=strategy)

    def setAvailableMemoryProportion(self, available_memory_proportion):
        if not all(name.startswith("IPU") for name in available_memory_proportion):
            raise Error(f"{available_memory_proportion!r} does not name IPUs")
        return self._set(available_memory_proportion=dict(available_memory_proportion))

    def outputMode(self, output_mode, output_return_period=None):
        if output_mode == enums.OutputMode.EveryN and not output_return_period:
            raise Error("EveryN needs output_return_period")
        return self._set(output_mode=output_mode, output_return_period=output_return_period or 1)

    def defaultOutputMode(self):
        return self._values["output_mode"] == enums.OutputMode.Default

    def randomSeed(self, random_seed):
        _integer("randomSeed", random_seed, 0)
        torch.manual_seed(random_seed)
        return self._set(random_seed=random_seed)

    def connectionType(self, connection_type):
        return self._set(connection_type=connection_type)

    def syncPattern(self, sync_pattern):
        return self._set(sync_pattern=sync_pattern)

    def useIpuId(self, ipu_id):
        return self._set(ipu_id=_integer("useIpuId", ipu_id, 0))

    def useIpuModel(self, use_model):
        return self._set(use_model=use_model)

    def enableExecutableCaching(self, path):
        return self._set(cache_path=path)

    def enableStableNorm(self, enabled):
        return self._set(stable_norm=enabled)

    def enableSyntheticData(self, enabled):
        return self._set(synthetic_data=enabled)

    def enableProfiling(self, profile_dir=None):
        return self._set(profile_dir=profile_dir)

    def logCycleCount(self, log_cycle_count):
        return self._set(log_cycle_count=log_cycle_count)

    def logDir(self, log_dir):
        return self._set(log_dir=log_dir)

    def modelName(self, name):
        return self._set(model_name=name)

    def relaxOptimizerAttributesChecks(self, relax=True):
        return self._set(relax=relax)

    def showCompilationProgressBar(self, show=True):
        return self._set(progress_bar=show)

    TensorLocations = property(lambda self: self._TensorLocations)
    Distributed = property(lambda self: self._Distributed)
    Precision = property(lambda self: self._Precision)
    Training = property(lambda self: self._Training)
    _Popart = property(lambda self: self.__dict__["__Popart"])


_PARTS = {
    "TensorLocations": _TensorLocations,
    "Distributed": _Distributed,
    "Precision": _Precision,
    "Training": _Training,
    "_Popart": _Popart,
}


def checked(options):
    """Options for an executor or a loader, frozen from now on."""
    if options is None:
        options = Options()
    if not isinstance(options, Options):
        raise Error("options must be a poptorch.Options")
    options._is_frozen = True
    return options
