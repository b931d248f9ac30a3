"""What a request means: short forms spelled out, and every part sorted by its kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.accelerator import Accelerator
from drivetrain_interfaces.backend import BackendSpec
from drivetrain_interfaces.checkpoint import CheckpointIO
from drivetrain_interfaces.cluster import ClusterEnvironment
from drivetrain_interfaces.errors import ConfigurationError
from drivetrain_interfaces.launcher import Launcher
from drivetrain_interfaces.precision import Precision
from drivetrain_interfaces.strategy import Strategy

from drivetrain.names import table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from drivetrain_interfaces.errors import DrivetrainError

    from drivetrain.plan import Request

#: Names that some backend may make, so that a misspelled one is told from an unsupported one.
PRECISIONS: Final = frozenset(
    {
        "64-true",
        "32-true",
        "16-true",
        "bf16-true",
        "16-mixed",
        "bf16-mixed",
        "fp8",
        "transformer-engine",
        "transformer-engine-float16",
    }
)
_SHORT: Final = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_AMBIGUOUS: Final = {"16": "16-true", "bf16": "bf16-true"}
_STRATEGY_ARGUMENTS: Final = {
    "_find_unused_parameters_true": True,
    "_find_unused_parameters_false": False,
}
_STRATEGY_LAUNCHERS: Final = {"_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_CONTRACTS: Final[dict[str, type]] = {
    "strategy": Strategy,
    "precision": Precision,
    "checkpoint_io": CheckpointIO,
    "environment": ClusterEnvironment,
    "launcher": Launcher,
}
#: What a strategy or an accelerator object may carry, and what asks for devices on a strategy.
_CARRIED: Final = ("precision_plugin", "checkpoint_io", "cluster_environment")
_STRATEGY_MEMBERS: Final = ("prepare", "train_step", "eval_step", "state", "load", "close")


@dataclass(frozen=True, slots=True)
class Ask:
    """One part that the user asked for, and the setting that says so."""

    value: Any
    by: str


@dataclass(slots=True)
class Asks:
    """All parts that the user asked for; None where the choice is free.

    ``problems`` and ``notices`` are what came up while sorting.
    """

    strategy: Ask | None = None
    precision: Ask | None = None
    launcher: Ask | None = None
    environment: Ask | None = None
    checkpoint_io: Ask | None = None
    devices: Ask | None = None
    options: dict[str, Any] = field(default_factory=dict)
    problems: list[DrivetrainError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def _stubs(value: object, kind: str) -> tuple[str, ...]:
    """Members that a subclass of a contract inherits from it and so never implemented."""
    contract = _CONTRACTS[kind]
    members = [name for name in vars(contract) if not name.startswith("_")]
    return tuple(
        name
        for name in members
        if getattr_static(type(value), name, None) is getattr_static(contract, name)
    )


def is_strategy(value: object) -> bool:
    """Whether an object is a strategy, bound or not. Evaluates none of its properties."""
    return not isinstance(value, type) and all(
        getattr_static(value, member, None) is not None for member in _STRATEGY_MEMBERS
    )


def kind_of(value: object) -> str | None:
    """Which field of ``Asks`` an object belongs to, or None if it is no part at all."""
    if isinstance(value, type):
        return None
    if is_strategy(value):
        return "strategy"
    return next(
        (
            kind
            for kind, contract in _CONTRACTS.items()
            if kind != "strategy" and isinstance(value, contract)
        ),
        None,
    )


def is_accelerator_object(value: object) -> bool:
    """Whether ``accelerator=`` holds an accelerator rather than a name or a spec."""
    return not isinstance(value, str | BackendSpec | type) and isinstance(value, Accelerator)


def sort_out(request: Request) -> Asks:
    """Sort arguments, plugins and what hangs on an accelerator object by kind."""
    asks = Asks()
    _ask_devices(request, asks)
    for kind, setting, value, free in (
        ("strategy", "strategy", request.strategy, "auto"),
        ("precision", "precision", request.precision, None),
        ("launcher", "launcher", request.launcher, "auto"),
        ("environment", "cluster_environment", request.cluster_environment, "auto"),
    ):
        if value is None or (isinstance(value, str) and value == free):
            continue
        by = f"{setting}={_shown(value)}"
        if _fits(kind, value):
            setattr(asks, kind, Ask(value, by))
        else:
            asks.problems.append(
                ConfigurationError(
                    f"{by} is a {type(value).__name__}, which is neither a name nor an object "
                    f"with the members of a {kind.replace('_', ' ')}.",
                    f"Give a name, or an object of such a class, or leave {setting} out.",
                )
            )
    for value, by in _plugins(request):
        _add(asks, value, by)
    _add_what_the_strategy_carries(asks)
    for kind in _CONTRACTS:
        _check_complete(asks, kind)
    _spell_out_precision(asks)
    _spell_out_strategy(asks)
    return asks


def _fits(kind: str, value: object) -> bool:
    if isinstance(value, str):
        return True
    if kind == "precision" and isinstance(value, int):
        return not isinstance(value, bool)
    if kind == "strategy" and callable(value):
        return not isinstance(value, type)
    return kind_of(value) == kind


def _shown(value: object) -> str:
    if isinstance(value, str | int | list | tuple):
        return repr(value)
    return f"{type(value).__name__}(...)" if not isinstance(value, type) else value.__name__


def _plugins(request: Request) -> Iterator[tuple[object, str]]:
    for value in request.plugins:
        yield value, f"plugins=[{_shown(value)}]"
    if is_accelerator_object(request.accelerator):
        for name in ("precision_plugin", "training_type_plugin"):
            value = getattr(request.accelerator, name, None)
            if value is not None:
                yield value, f"{type(request.accelerator).__name__}({name}={_shown(value)})"


def _add_what_the_strategy_carries(asks: Asks) -> None:
    """Parts and devices that were given to the strategy object rather than to the trainer."""
    ask = asks.strategy
    if ask is None or not is_strategy(ask.value):
        return
    for name in _CARRIED:
        value = getattr(ask.value, name, None)
        if value is not None:
            _add(asks, value, f"{type(ask.value).__name__}({name}={_shown(value)})")
    devices = getattr(ask.value, "parallel_devices", None)
    if devices is None:
        return
    indices = [_index(device) for device in devices]
    by = f"{type(ask.value).__name__}(parallel_devices={[str(device) for device in devices]})"
    if asks.devices is not None:
        asks.problems.append(
            ConfigurationError(
                f"{asks.devices.by} and {by} were asked for, and both say which devices to use.",
                "Keep one of them.",
            )
        )
        return
    asks.devices = Ask(len(indices) if None in indices else indices, by)


def _index(device: Any) -> int | None:
    """The index of a number or a device object; None for one without, such as a host's."""
    index = device if isinstance(device, int) else getattr(device, "index", None)
    return index if isinstance(index, int) else None


def _check_complete(asks: Asks, kind: str) -> None:
    ask: Ask | None = getattr(asks, kind)
    if ask is None or isinstance(ask.value, str | int):
        return
    missing = _stubs(ask.value, kind)
    if missing:
        asks.problems.append(
            ConfigurationError(
                f"{ask.by}: {type(ask.value).__name__} does not implement {', '.join(missing)}, "
                f"which a {kind.replace('_', ' ')} needs.",
                f"Implement {'it' if len(missing) == 1 else 'them'}.",
            )
        )


def _add(asks: Asks, value: object, by: str) -> None:
    if isinstance(value, type):
        asks.problems.append(
            ConfigurationError(
                f"{by} holds a class, where an object is needed.",
                f"Pass an object of it: {value.__name__}(...).",
            )
        )
        return
    if isinstance(value, str):
        asks.problems.append(
            ConfigurationError(
                f"{by} holds a name, and plugins are objects.",
                f"Pass it by its argument: strategy={value!r}, precision={value!r} or the like.",
            )
        )
        return
    kind = kind_of(value)
    if kind is None:
        asks.problems.append(
            ConfigurationError(
                f"{by} holds a {type(value).__module__}.{type(value).__qualname__}, which is no "
                "strategy, precision, checkpoint IO, cluster environment or launcher.",
                "Implement all members of one of these contracts, or remove it.",
            )
        )
        return
    earlier: Ask | None = getattr(asks, kind)
    if earlier is not None:
        what = kind.replace("_", " ")
        asks.problems.append(
            ConfigurationError(
                f"Two parts of the kind {what!r} were asked for: by {earlier.by} and by {by}.",
                "Keep one of them.",
            )
        )
        return
    setattr(asks, kind, Ask(value, by))


def _ask_devices(request: Request, asks: Asks) -> None:
    if not (isinstance(request.devices, str) and request.devices == "auto"):
        asks.devices = Ask(request.devices, f"devices={request.devices!r}")
    if request.gpus is None:
        return
    by = f"gpus={request.gpus!r}"
    if asks.devices is not None:
        asks.problems.append(
            ConfigurationError(
                f"{asks.devices.by} and {by} were asked for, and both say which devices to use.",
                "Keep devices=, and name the accelerator if it must not be the host.",
            )
        )
        return
    if no_gpus(request):
        asks.notices.append(f"{by} is read as: devices of the host only.")
        return
    asks.devices = Ask(request.gpus, by)
    asks.notices.append(
        f"{by} is short for devices={request.gpus!r} on the best accelerator that is not the host. "
        "Write accelerator= and devices= to be exact."
    )


def no_gpus(request: Request) -> bool:
    """Whether ``gpus=`` asks for none, which used to mean the host."""
    return not isinstance(request.gpus, bool) and str(request.gpus) == "0"


def _spell_out_precision(asks: Asks) -> None:
    ask = asks.precision
    if ask is None or not isinstance(ask.value, str | int):
        return
    short = str(ask.value)
    name = _SHORT.get(short, short)
    asks.precision = Ask(name, ask.by)
    if short in _AMBIGUOUS:
        asks.notices.append(
            f"{ask.by} is read as {name!r}; the other meaning is written {_AMBIGUOUS[short]!r}."
        )


def _spell_out_strategy(asks: Asks) -> None:
    """``ddp_spawn`` and its like: one strategy, with a launcher or an option in its name."""
    ask = asks.strategy
    if ask is None:
        return
    name, launcher = "ddp", None
    if isinstance(ask.value, str):
        name, launcher = _split_name(ask.value, asks.options)
        asks.strategy = Ask(name, ask.by)
        if name != ask.value:
            asks.notices.append(_read_as(ask.by, name, launcher, asks.options))
    elif isinstance(getattr(ask.value, "launcher", None), str):
        launcher = ask.value.launcher
    if launcher is None:
        return
    if asks.launcher is not None and asks.launcher.value != launcher:
        asks.problems.append(
            ConfigurationError(
                f"{ask.by} includes the launcher {launcher!r}, and {asks.launcher.by} was asked "
                "for too.",
                f"Use strategy={name!r}, and choose the launcher by launcher= alone.",
            )
        )
        return
    asks.launcher = Ask(launcher, ask.by)


def _read_as(by: str, name: str, launcher: str | None, options: Mapping[str, Any]) -> str:
    parts = [f"strategy={name!r}"]
    parts += [f"launcher={launcher!r}"] if launcher else []
    parts += [f"the option {key}={value!r}" for key, value in options.items()]
    return f"{by} is an older name, and read as {', '.join(parts)}."


def _split_name(name: str, options: dict[str, Any]) -> tuple[str, str | None]:
    older = table()["strategies"].get(name, {})
    if "instead" in older:
        options.update(older.get("options", {}))
        return older["instead"], older.get("launcher")
    if not name.startswith("ddp_"):
        return name, None
    base, launcher = name, None
    for suffix, value in _STRATEGY_ARGUMENTS.items():
        if base.endswith(suffix):
            base = base.removesuffix(suffix)
            options["find_unused_parameters"] = value
    for suffix, launched in _STRATEGY_LAUNCHERS.items():
        if base == f"ddp{suffix}":
            base, launcher = "ddp", launched
    if base != "ddp":
        options.clear()
        return name, None
    return base, launcher
