"""A backend that was written for contracts to come."""

from drivetrain_interfaces import BackendSpec, Capabilities, ContractVersion, DeviceFacts, Probe


def _probe() -> Probe:
    raise AssertionError("a contract that is not served is not probed")


def _load() -> None:
    raise AssertionError("nothing may load this")


spec = BackendSpec(
    name="future",
    contract=ContractVersion(99, 0),
    capabilities=Capabilities(precisions=frozenset({"32-true"})),
    facts=DeviceFacts("cpu", "gloo", "cpu"),
    strategies=("single_device",),
    probe=_probe,
    load=_load,
    priority=99,
)
