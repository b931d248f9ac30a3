"""Options of programs, typed, and each the one of ``poptorch.Options`` that it is named after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError

from drivetrain_ipu.sdk import load_popdist

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import World


@dataclass(frozen=True)
class IpuOptions:
    """What programs are compiled with.

    Gradient accumulation is not here: it is the trainer's ``accumulate_grad_batches``.

    Attributes:
        replication_factor: Copies of the model that this process drives; 0 takes ``devices=``.
        device_iterations: Updates that one call of the training program makes. Schedulers, counters
            and checkpoints only see its end.
        inference_device_iterations: The same for evaluation, without updates.
        use_ipu_model: Run on the SDK's emulator, which is slow and has no replicas.
        available_memory_proportion: By IPU, such as ``{"IPU0": 0.5}``: the share of memory that
            products may use for intermediate values.
        executable_cache: A folder for compiled programs, to compile each only once.
        random_seed: Of dropout and the like on the device; None derives one from torch's.
        stochastic_rounding: Round at random in training, so that small updates count on average.
        partials: ``"float"`` or ``"half"``: the type of partial sums of products. Empty leaves it.
        floating_point_exceptions: Stop at overflow, division by zero and invalid operations.
        convolution_dithering: Spread convolutions over tiles differently.
        automatic_loss_scaling: Let the device choose the loss scale. A preview of the vendor's.
        broadcast_buffers: Whether all replicas share buffers; False where a module writes some, as
            batch normalization does.
        auto_round_num_ipus: Take more IPUs than needed where their number is no power of two.
        num_io_tiles: Tiles for input and output, even, from 32 to 192; 0 for none.
        engine_options: For the engine, such as ``{"target.deterministicWorkers": "portable"}``.
        profile_folder: Where a profile is written; empty for none.
        log_folder: Where the SDK writes its logs; empty leaves its own choice.
        synthetic_data: Let the device make up its input, to measure it alone.
        on_demand: Wait for a device when a program is run, not when it is compiled.
    """

    replication_factor: int = 0
    device_iterations: int = 1
    inference_device_iterations: int = 1
    use_ipu_model: bool = False
    available_memory_proportion: Mapping[str, float] = field(default_factory=dict)
    executable_cache: str = ""
    random_seed: int | None = None
    stochastic_rounding: bool = False
    partials: str = ""
    floating_point_exceptions: bool = False
    convolution_dithering: bool = False
    automatic_loss_scaling: bool = False
    broadcast_buffers: bool = True
    auto_round_num_ipus: bool = False
    num_io_tiles: int = 0
    engine_options: Mapping[str, str] = field(default_factory=dict)
    profile_folder: str = ""
    log_folder: str = ""
    synthetic_data: bool = False
    on_demand: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            problem = _problem(item.name, getattr(self, item.name), item.type)
            if problem:
                raise ConfigurationError(
                    f"{item.name}={getattr(self, item.name)!r} was asked for, which is no "
                    f"{problem}.",
                    f"Give a {problem}.",
                )


_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("bool", lambda value: isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "Mapping[str, float]": (
        "mapping from IPUs to shares",
        lambda value: isinstance(value, Mapping),
    ),
    "Mapping[str, str]": ("mapping of names to texts", lambda value: isinstance(value, Mapping)),
    "int | None": ("number from 0 up, or None", lambda value: value is None or _count(value, 0)),
}
_LEAST = {"replication_factor": 0, "num_io_tiles": 0}


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _problem(name: str, value: Any, kind: Any) -> str:
    """What a value should be; empty if it is."""
    if name == "partials":
        return "" if value in {"", "float", "half"} else "'float' or 'half'"
    if name == "num_io_tiles" and value:
        good = _count(value, 32) and value <= 192 and value % 2 == 0  # noqa: PLR2004 - the SDK's
        return "" if good else "even number from 32 to 192"
    if kind == "int":
        least = _LEAST.get(name, 1)
        return "" if _count(value, least) else f"whole number from {least} up"
    words, good_kind = _KINDS[kind]
    return "" if good_kind(value) else words


#: From fields to setters of ``poptorch.Options``, for those whose value is passed as it is.
SETTERS: Mapping[str, str] = {
    "available_memory_proportion": "setAvailableMemoryProportion",
    "auto_round_num_ipus": "autoRoundNumIPUs",
    "broadcast_buffers": "broadcastBuffers",
    "engine_options": "_Popart.setEngineOptions",
    "executable_cache": "enableExecutableCaching",
    "floating_point_exceptions": "Precision.enableFloatingPointExceptions",
    "log_folder": "logDir",
    "num_io_tiles": "TensorLocations.numIOTiles",
    "profile_folder": "enableProfiling",
    "synthetic_data": "enableSyntheticData",
    "use_ipu_model": "useIpuModel",
}
#: The same for programs that train; they exist nowhere else.
TRAINING_SETTERS: Mapping[str, str] = {
    "automatic_loss_scaling": "Training.setAutomaticLossScaling",
    "convolution_dithering": "Training.setConvolutionDithering",
    "stochastic_rounding": "Precision.enableStochasticRounding",
}


@dataclass(frozen=True)
class Programs:
    """What all programs of a run have in common.

    Attributes:
        options: The user's.
        replicas: Copies of the model in this process.
        world: The place of this process.
        seed: For the device's random numbers, equal in all processes.
        strategy: An execution strategy of the SDK for training, and one for evaluation, or Nones.
    """

    options: IpuOptions
    replicas: int
    world: World
    seed: int
    strategy: tuple[Any, Any] = (None, None)

    @property
    def training_parts(self) -> int:
        """Into how many parts one microbatch of the trainer is divided."""
        return self.replicas * self.options.device_iterations

    @property
    def inference_parts(self) -> int:
        """The same for a batch of an evaluation."""
        return self.replicas * self.options.inference_device_iterations


def training_options(sdk: Any, programs: Programs, accumulate: int) -> Any:
    """``poptorch.Options`` of the program that trains.

    Every loss comes back, and not only the last one: how a window went is their mean.
    """
    made = _common(sdk, programs)
    options = programs.options
    made.deviceIterations(options.device_iterations)
    made.Training.gradientAccumulation(accumulate)
    made.outputMode(sdk.OutputMode.All)
    for name, setter in TRAINING_SETTERS.items():
        if getattr(options, name):
            _call(made, setter, getattr(options, name))
    if programs.strategy[0] is not None:
        made.setExecutionStrategy(programs.strategy[0])
    return made


def inference_options(sdk: Any, programs: Programs) -> Any:
    """``poptorch.Options`` of a program that evaluates: no accumulation, no random rounding."""
    made = _common(sdk, programs)
    made.deviceIterations(programs.options.inference_device_iterations)
    if programs.strategy[1] is not None:
        made.setExecutionStrategy(programs.strategy[1])
    return made


def _common(sdk: Any, programs: Programs) -> Any:
    options, world = programs.options, programs.world
    if world.environment == "popdist":
        made = load_popdist().Options()  # which has its replicas and processes from poprun
    else:
        made = sdk.Options()
        made.replicationFactor(programs.replicas)
        if world.size > 1:
            made.Distributed.configureProcessId(world.rank, world.size)
        else:
            made.Distributed.disable()  # a stray mpirun would change it
    for name, setter in SETTERS.items():
        value = getattr(options, name)
        default = getattr(IpuOptions(), name)
        if value != default:
            _call(made, setter, value)
    if options.partials:
        made.Precision.setPartialsType(torch.half if options.partials == "half" else torch.float)
    if options.on_demand:
        made.connectionType(sdk.ConnectionType.OnDemand)
    if world.rank:
        made.showCompilationProgressBar(show=False)
    before = torch.get_rng_state()  # setting the device's seed sets torch's as well
    made.randomSeed(programs.seed)
    torch.set_rng_state(before)
    return made


def _call(options: Any, path: str, value: Any) -> None:
    target = options
    for name in path.split("."):
        target = getattr(target, name)
    target(dict(value) if isinstance(value, Mapping) else value)
