"""From typed options and DeepSpeed's own configuration to one that nobody contradicts.

A value may be set in two places only if both say the same. Whatever else is wrong is collected, so
that the user sees all of it at once.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError
from drivetrain_interfaces.errors import listed

from drivetrain_deepspeed.keys import FILLED, LEFT_TO_ENGINE, NOT_HERE, SECTIONS, TOP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

AUTO = "auto"
_OFFLOADS = ("cpu", "nvme")
_MAX_STAGE = 3
_STAGE = 2  # if nobody says


@dataclass(frozen=True, slots=True)
class Options:
    """What ``DeepSpeedStrategy`` takes. None leaves the choice to DeepSpeed or to ``config``.

    Attributes:
        stage: 0 divides nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too.
        offload_optimizer: ``"cpu"`` or ``"nvme"``: where the optimizer's state waits.
        offload_parameters: The same for parameters; stage 3 alone.
        nvme_path: The folder for what goes to ``"nvme"``.
        pin_memory: Whether what waits in host memory is page-locked.
        overlap_comm: Reduce gradients while backward still runs.
        contiguous_gradients: Copy gradients into one buffer as they are made.
        reduce_bucket_size: Elements that are reduced at once.
        allgather_bucket_size: Elements that are gathered at once.
        sub_group_size: Elements that one update takes; stage 3 alone.
        exclude_frozen_parameters: Leave parameters that are not trained out of a saved state.
        gather_for_evaluation: At stage 3, an evaluation gathers the whole model when it is entered.
            False gathers layer by layer, in which case every rank needs as many batches.
        activation_checkpointing: DeepSpeed's section of that name.
        config: DeepSpeed's own configuration: a mapping, or the path of a JSON file.
    """

    stage: int | None = None
    offload_optimizer: str | None = None
    offload_parameters: str | None = None
    nvme_path: str | None = None
    pin_memory: bool | None = None
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    reduce_bucket_size: int | None = None
    allgather_bucket_size: int | None = None
    sub_group_size: int | None = None
    exclude_frozen_parameters: bool = False
    gather_for_evaluation: bool = True
    activation_checkpointing: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | str | Path | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the trainer decided, for the parts of the configuration that follow from it.

    Attributes:
        accumulate: The most microbatches of a window.
        clip: The largest norm of gradients, or None.
        world_size: Number of ranks.
        precision: The name of the precision, for messages.
        parameters: The dtype in which parameters are stored, by torch's name.
    """

    accumulate: int
    clip: float | None
    world_size: int
    precision: str
    parameters: str


@dataclass(slots=True)
class Merged:
    """A configuration while it is put together.

    Attributes:
        values: DeepSpeed's configuration.
        filled: What was filled in for ``"auto"`` or because nobody said it, by dotted key.
        problems: Everything that is wrong so far, as sentences.
    """

    values: dict[str, Any]
    filled: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The value of a dotted key, or None."""
        node: Any = self.values
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key, whatever was there."""
        *sections, last = key.split(".")
        node = self.values
        for part in sections:
            node = node.setdefault(part, {})
        node[last] = value

    def agree(self, key: str, value: Any, source: str) -> None:
        """Set a dotted key, or note that it has another value already."""
        found = self.get(key)
        if found is None or found == AUTO:
            self.filled[key] = value
            self.put(key, value)
        elif found != value:
            self.problems.append(f"{source} is {value!r}, and config has {key}={found!r}")

    def finish(self) -> None:
        """Raise ``ConfigurationError`` for all that is wrong."""
        if self.problems:
            raise ConfigurationError(
                f"DeepSpeed cannot be configured so: {'; '.join(self.problems)}.",
                "Say each thing in one place; values that the trainer knows may be left out, or "
                "be 'auto'.",
            )


def read(options: Options) -> Merged:
    """The user's configuration with the typed options in it, checked by itself.

    Raises:
        ConfigurationError: A file that cannot be read, a key that nobody reads, a value that is not
            possible, or an option and a key that differ.
    """
    merged = Merged(_raw(options.config))
    _check_keys(merged)
    stage = options.stage
    found = merged.get("zero_optimization.stage")
    if stage is not None:
        _option(merged, "zero_optimization.stage", stage, "stage")
    elif found in {None, AUTO}:
        merged.agree("zero_optimization.stage", _STAGE, "stage")
    _check_stage(merged, options)
    for name in ("overlap_comm", "contiguous_gradients", "reduce_bucket_size"):
        _option(merged, f"zero_optimization.{name}", getattr(options, name), name)
    for name in ("allgather_bucket_size", "sub_group_size"):
        _option(merged, f"zero_optimization.{name}", getattr(options, name), name)
    _offload(merged, "optimizer", options.offload_optimizer, options)
    _offload(merged, "param", options.offload_parameters, options)
    for key, value in (options.activation_checkpointing or {}).items():
        _option(
            merged, f"activation_checkpointing.{key}", value, f"activation_checkpointing[{key!r}]"
        )
    _check_keys_of_sections(merged)
    merged.finish()
    return merged


def complete(merged: Merged, wanted: Wanted) -> Merged:
    """A copy with what the trainer decided in it: what is handed to DeepSpeed.

    Raises:
        ConfigurationError: The configuration contradicts an argument of the trainer; both are
            quoted. Or a value is ``"auto"`` that nobody knows.
    """
    made = Merged(copy.deepcopy(merged.values), dict(merged.filled))
    made.agree("gradient_accumulation_steps", wanted.accumulate, "the trainer's accumulation")
    if wanted.clip is not None:
        made.agree("gradient_clipping", wanted.clip, "the trainer's clipping by norm")
    elif made.get("gradient_clipping") in {None, AUTO}:
        made.agree("gradient_clipping", 0.0, "the trainer's clipping by norm")
    _fill_batch(made, wanted)
    _fill_precision(made, wanted)
    made.values["managed_gradient_accumulation"] = False
    _settle_auto(made)
    made.finish()
    return made


def _raw(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, str | Path):
        return copy.deepcopy(dict(config))
    path = Path(config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"config={str(path)!r} was given for DeepSpeed, and it could not be read: {error}.",
            "Give the path of a JSON file, or a mapping.",
        ) from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"config={str(path)!r} holds a {type(values).__name__}, not an object.",
            "Give the path of a JSON file that holds one object.",
        )
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{listed({n for n in names if names.count(n) > 1})} is there twice")
    return made


def _check_keys(merged: Merged) -> None:
    for key in sorted(merged.values.keys() - TOP):
        near = get_close_matches(key, TOP, 1)
        merged.problems.append(
            f"config has {key!r}, which DeepSpeed does not read"
            + (f" (it reads {near[0]!r})" if near else "")
        )
    for key, instead in NOT_HERE.items():
        if merged.values.get(key) not in (None, {}, False):
            merged.problems.append(
                f"config has {key!r}, which is not for DeepSpeed here ({instead})"
            )


def _check_keys_of_sections(merged: Merged) -> None:
    for section, known in SECTIONS.items():
        value = merged.values.get(section)
        if value is None:
            continue
        if not isinstance(value, dict):
            merged.problems.append(f"config has {section}={value!r}, which is a section")
            continue
        merged.problems += [
            f"config has {section}.{key}, which DeepSpeed does not read"
            for key in sorted(value.keys() - known)
        ]


def _check_stage(merged: Merged, options: Options) -> None:
    stage = merged.get("zero_optimization.stage")
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= _MAX_STAGE:
        merged.problems.append(f"the ZeRO stage is {stage!r}, and there are 0, 1, 2 and 3")
        return
    if options.offload_parameters and stage < _MAX_STAGE:
        merged.problems.append(
            f"offload_parameters={options.offload_parameters!r} needs stage 3, and the stage is "
            f"{stage}"
        )
    if options.offload_optimizer and stage < 1:
        merged.problems.append(
            f"offload_optimizer={options.offload_optimizer!r} needs stage 1, 2 or 3, and the stage "
            "is 0"
        )


def _option(merged: Merged, key: str, value: Any, name: str) -> None:
    if value is None:
        return
    before = dict(merged.filled)
    merged.agree(key, value, name)
    merged.filled = before  # the user said it


def _offload(merged: Merged, what: str, device: str | None, options: Options) -> None:
    if device is None:
        return
    name = "offload_optimizer" if what == "optimizer" else "offload_parameters"
    section = f"zero_optimization.offload_{what}"
    if device not in _OFFLOADS:
        merged.problems.append(f"{name} is {device!r}, and there are {listed(_OFFLOADS)}")
        return
    _option(merged, f"{section}.device", device, name)
    _option(merged, f"{section}.pin_memory", options.pin_memory, "pin_memory")
    _option(merged, f"{section}.nvme_path", options.nvme_path, "nvme_path")
    if device == "nvme" and merged.get(f"{section}.nvme_path") is None:
        merged.problems.append(f"{name}='nvme' needs a folder, and nvme_path was not given")


def _fill_batch(made: Merged, wanted: Wanted) -> None:
    """DeepSpeed asks for the size of a batch, and uses it to print samples per second alone."""
    together = wanted.accumulate * wanted.world_size
    total = made.get("train_batch_size")
    micro = made.get("train_micro_batch_size_per_gpu")
    if total in {None, AUTO}:
        total = None
    elif micro in {None, AUTO}:
        if total % together:
            made.problems.append(
                f"config has train_batch_size={total!r}, which {wanted.world_size} processes with "
                f"{wanted.accumulate} microbatches each cannot share"
            )
        micro = total // together
    if micro in {None, AUTO}:
        micro = 1
    made.agree("train_micro_batch_size_per_gpu", micro, "the microbatch")
    if total is not None and total != micro * together and not made.problems:
        made.problems.append(
            f"config has train_batch_size={total!r} and train_micro_batch_size_per_gpu={micro!r}, "
            f"and the trainer has {wanted.world_size} processes with {wanted.accumulate} "
            "microbatches each"
        )
    made.agree("train_batch_size", micro * together, "the trainer's batch")


def _fill_precision(made: Merged, wanted: Wanted) -> None:
    if "bfloat16" in made.values:  # an older spelling of the same section
        made.values.setdefault("bf16", made.values.pop("bfloat16"))
    source = f"precision={wanted.precision!r}"
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = wanted.parameters == dtype
        found = made.get(f"{section}.enabled")
        if not enabled and found not in {None, AUTO, False}:
            made.problems.append(
                f"{source} stores parameters in {wanted.parameters}, and config has "
                f"{section}.enabled={found!r}"
            )
        elif enabled and found is False:
            made.problems.append(
                f"{source} stores parameters in {dtype}, and config has {section}.enabled=False"
            )
        elif enabled or found == AUTO:
            made.filled[f"{section}.enabled"] = enabled
            made.put(f"{section}.enabled", enabled)


def _settle_auto(made: Merged) -> None:
    for key in list(_autos(made.values)):
        *sections, last = key.split(".")
        if key in LEFT_TO_ENGINE:
            node = made.values
            for part in sections:
                node = node[part]
            del node[last]
            made.filled[key] = "DeepSpeed's default"
        else:
            made.problems.append(
                f"config has {key}='auto', and only {listed(FILLED | LEFT_TO_ENGINE)} can be filled"
            )


def _autos(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if value == AUTO:
            yield f"{prefix}{key}"
        elif isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
