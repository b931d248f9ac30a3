"""Four devices of a vendor that nobody here has heard of. They compute as the host does."""

from __future__ import annotations

from dataclasses import replace

from drivetrain_cpu import FACTS
from drivetrain_cpu import spec as host
from drivetrain_interfaces import Probe
from drivetrain_interfaces.devices import parse_devices

spec = replace(
    host,
    name="quad",
    facts=replace(FACTS, indexed=True, default_devices=0, several_devices_launcher="fork"),
    probe=lambda: Probe(4, names=("quad-a", "quad-b", "quad-c", "quad-d")),
    priority=90,
    parse_devices=parse_devices,
)
