"""A backend whose probe raises."""

from drivetrain_interfaces import BackendSpec, Capabilities, ContractVersion, DeviceFacts, Probe


def _probe() -> Probe:
    raise OSError("the driver is asleep")


def _load() -> None:
    raise AssertionError("nothing may load this")


spec = BackendSpec(
    name="shaky",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(precisions=frozenset({"32-true"})),
    facts=DeviceFacts("cpu", "gloo", "cpu"),
    strategies=("single_device",),
    probe=_probe,
    load=_load,
    priority=99,
)
