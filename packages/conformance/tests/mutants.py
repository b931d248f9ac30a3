"""Backends that each break one rule, so that the kit's own tests can see the kit notice.

``mutants:NAME`` is the spec of one; ``mutants:good`` breaks nothing. What each breaks, and which
tests of the suite must notice, is in ``mutants.toml``. Like every spec module this one loads no
torch: the broken parts are in ``mutant_parts.py``, by the same name.
"""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    ALL_STEP_HOOKS,
    BackendSpec,
    Capabilities,
    ContractVersion,
    DeviceFacts,
    Feature,
    Probe,
    StepHook,
)
from drivetrain_interfaces.devices import parse_devices
from drivetrain_toolkit.specs import DDP_FEATURES, PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import Backend

FACTS = DeviceFacts("cpu", "gloo", "cpu", default_devices=1, indexed=False)


def probe() -> Probe:
    """Two devices, so that two processes have one each."""
    return Probe(2, names=("first", "second"))


def load(name: str) -> Backend:
    """The backend of that name among the parts."""
    parts = importlib.import_module("mutant_parts")
    made: Backend = parts.backend(name)
    return made


GOOD = BackendSpec(
    name="good",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(features=DDP_FEATURES, precisions=PRECISIONS),
    facts=FACTS,
    strategies=("single_device", "ddp"),
    probe=probe,
    load=partial(load, "good"),
)


def without(*features: Feature, hooks: frozenset[StepHook] = ALL_STEP_HOOKS) -> Capabilities:
    """What the good backend declares, less these; its parts do them all the same."""
    return Capabilities(DDP_FEATURES - set(features), PRECISIONS, hooks)


# Probes


def raises() -> Probe:
    """Breaks B8."""
    raise RuntimeError("the driver is asleep")


def needs_a_home() -> Probe:
    """Breaks B8 only where there is no home."""
    assert os.environ["HOME"]
    return probe()


def leaves_a_variable() -> Probe:
    """Breaks B8: other packages see the variable."""
    os.environ["ACME_PROBED"] = "1"
    return probe()


def opens_a_device() -> Probe:
    """Breaks B8: the file stays open."""
    KEPT.append(open("/dev/full", "wb"))  # noqa: SIM115
    return probe()


def dawdles() -> Probe:
    """Breaks B8."""
    time.sleep(1.2)
    return probe()


def wavers() -> Probe:
    """Breaks B8: another answer each time."""
    KEPT.append(None)
    return Probe(1 + len(KEPT) % 2)


KEPT: list[Any] = []


# Requests for devices


def forgives(request: Any, found: Probe, backend: str) -> tuple[int, ...]:
    """Breaks B7: what it does not understand means all devices."""
    try:
        return parse_devices(request, found, backend)
    except ValueError:
        return tuple(range(found.devices))


def asks_the_machine(request: Any, found: Probe, backend: str) -> tuple[int, ...]:
    """Breaks B7: the answer depends on this machine, not on the probe that was given."""
    return parse_devices(request, Probe(1), backend)


def remembers(request: Any, found: Probe, backend: str) -> tuple[int, ...]:
    """Breaks B7: another answer each time."""
    KEPT.append(None)
    return parse_devices(request, found, backend)[:: 1 if len(KEPT) % 2 else -1]


#: What differs from the good spec. A mutant whose parts are broken is not listed.
CHANGES: dict[str, dict[str, Any]] = {
    "probe_raises": {"probe": raises},
    "probe_needs_a_home": {"probe": needs_a_home},
    "probe_leaves_a_variable": {"probe": leaves_a_variable},
    "probe_opens_a_device": {"probe": opens_a_device},
    "probe_dawdles": {"probe": dawdles},
    "probe_wavers": {"probe": wavers},
    "probe_gives_no_reason": {"probe": lambda: Probe(0)},
    "probe_names_too_few": {"probe": lambda: Probe(2, names=("first",))},
    "contract_of_the_future": {"contract": ContractVersion(9, 0)},
    "contract_is_a_text": {"contract": "0.1"},
    "facts_name_no_strategy": {"facts": replace(FACTS, one_device_strategy="solo")},
    "facts_lack_an_autocast_type": {"facts": replace(FACTS, autocast_type="")},
    "facts_name_no_launcher": {"facts": replace(FACTS, interactive_launcher="")},
    "makes_a_format_undeclared": {
        "capabilities": Capabilities(DDP_FEATURES, PRECISIONS - {"16-mixed"})
    },
    "facts_count_backwards": {"facts": replace(FACTS, default_devices=-1)},
    "priority_over_everyone": {"priority": 1000},
    "no_precision": {"capabilities": Capabilities(DDP_FEATURES, frozenset())},
    "a_feature_of_its_own": {
        "capabilities": Capabilities(DDP_FEATURES | {"warp"}, PRECISIONS)  # type: ignore[operator]
    },
    "devices_forgiven": {"parse_devices": forgives},
    "devices_of_this_machine": {"parse_devices": asks_the_machine},
    "devices_remembered": {"parse_devices": remembers},
    "accumulates_undeclared": {"capabilities": without(Feature.ACCUMULATION)},
    "clips_norms_undeclared": {"capabilities": without(Feature.CLIP_NORM)},
    "clips_values_undeclared": {"capabilities": without(Feature.CLIP_VALUE)},
    "takes_closures_undeclared": {"capabilities": without(Feature.CLOSURE)},
    "takes_optimizers_undeclared": {"capabilities": without(Feature.SEVERAL_OPTIMIZERS)},
    "steps_manually_undeclared": {"capabilities": without(Feature.MANUAL_STEP)},
    "infers_undeclared": {"capabilities": without(Feature.INFERENCE_MODE)},
    "spreads_undeclared": {"capabilities": without(Feature.SEVERAL_PROCESSES)},
    "calls_a_hook_undeclared": {
        "capabilities": without(hooks=ALL_STEP_HOOKS - {StepHook.BEFORE_ZERO_GRAD})
    },
}


def __getattr__(name: str) -> BackendSpec:
    if name.startswith("_"):
        raise AttributeError(name)
    if name.startswith("installed"):  # what is broken is in the metadata
        return replace(GOOD, name=name)
    given: dict[str, Any] = {"load": _loads(name), **CHANGES.get(name, {})}
    return replace(GOOD, **given)


def _loads(name: str) -> Callable[[], Backend]:
    return partial(load, "good" if name in CHANGES else name)
