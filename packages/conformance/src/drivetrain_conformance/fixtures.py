"""The fixtures of the suite. Registered by the plugin, so that no conftest has to be found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces import ConfigurationError, Feature, StrategyContext, World

from drivetrain_conformance.outcomes import BY_DECLARATION, NOT_HERE
from drivetrain_conformance.run import RUN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drivetrain_interfaces import (
        Accelerator,
        Backend,
        BackendSpec,
        CheckpointIO,
        Collectives,
        Precision,
        Probe,
        Strategy,
    )

    from drivetrain_conformance.options import Options
    from drivetrain_conformance.support.crew import Crew, LonelyCrew
    from drivetrain_conformance.support.setups import Setup
    from drivetrain_conformance.target import Target

    Bind = Callable[..., Strategy]
    Build = Callable[..., Setup]

#: In which of the declared precisions tests run that are not about precision: the first of these.
USUAL_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


def usual_precision(target: Target) -> str:
    """The precision for tests that are not about precision."""
    declared = target.capabilities.precisions
    for name in (*USUAL_PRECISIONS, *sorted(declared)):
        if name in declared:
            return name
    pytest.fail("R: B4: a backend declares at least one precision, and this one declares none")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for each declared precision, or strategy, if it takes one."""
    run = metafunc.config.stash.get(RUN, None)
    if run is None:
        return
    if "declared_precision" in metafunc.fixturenames:
        names = sorted(run.target.capabilities.precisions) or ["none"]
        metafunc.parametrize("declared_precision", names)
    if "strategy_name" in metafunc.fixturenames:
        # "none" skips: an empty list would leave the test out without a word.
        names = list(run.target.several_devices_strategies) or ["none"]
        metafunc.parametrize("strategy_name", names, indirect=True)


@pytest.fixture(scope="session")
def target(pytestconfig: pytest.Config) -> Target:
    """What is under test."""
    return pytestconfig.stash[RUN].target


@pytest.fixture(scope="session")
def spec(target: Target) -> BackendSpec:
    """The backend's spec."""
    return target.spec


@pytest.fixture(scope="session")
def found_devices(spec: BackendSpec) -> Probe:
    """What the probe found on this machine."""
    return spec.probe()


@pytest.fixture(scope="session")
def backend(spec: BackendSpec, found_devices: Probe) -> Backend:
    """The backend. Without a device a test is skipped if the backend does not even load."""
    if found_devices.devices:
        return spec.load()
    try:
        return spec.load()
    except Exception as error:  # noqa: BLE001 - whatever the vendor's library raises when it is missing
        pytest.skip(f"{NOT_HERE}the backend does not load here ({type(error).__name__}: {error})")


@pytest.fixture(scope="session")
def device_backend(backend: Backend, found_devices: Probe) -> Iterator[Backend]:
    """The backend, for a test that uses a device. Skipped where the probe found none."""
    if not found_devices.devices:
        pytest.skip(f"{NOT_HERE}the probe found no device: {found_devices.reason}")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the suite's tensors are small: more threads wait for each other
    yield backend
    torch.set_num_threads(before)


@pytest.fixture
def accelerator(device_backend: Backend) -> Iterator[Accelerator]:
    """A new accelerator that is closed afterwards."""
    made = device_backend.accelerator()
    yield made
    made.close()


@pytest.fixture
def checkpoint_io(backend: Backend) -> CheckpointIO:
    """A new checkpoint IO."""
    return backend.checkpoint_io()


@pytest.fixture
def bind(device_backend: Backend, target: Target) -> Iterator[Bind]:
    """Makes strategies that are bound to this process, and closes them afterwards.

    Arguments are ``precision`` (a name or an object), ``name`` of the strategy, ``world``,
    ``collectives``, ``sync_batchnorm`` and ``options``.
    """
    made: list[Any] = []

    def bind_one(
        precision: str | Precision | None = None,
        *,
        name: str | None = None,
        world: World | None = None,
        collectives: Collectives | None = None,
        sync_batchnorm: bool = False,
        options: dict[str, Any] | None = None,
    ) -> Strategy:
        if precision is None:
            precision = usual_precision(target)
        if isinstance(precision, str):
            precision = device_backend.precision(precision)
        accelerator = device_backend.accelerator()
        made.append(accelerator)
        accelerator.activate(0, 1)
        context = StrategyContext(
            accelerator=accelerator,
            device_index=0,
            world=world or World(),
            collectives=collectives or device_backend.collectives(World()),
            precision=precision,
            sync_batchnorm=sync_batchnorm,
            options=options or {},
        )
        strategy = target.make_strategy(device_backend, name or target.one_device_strategy, context)
        made.append(strategy)
        return strategy

    yield bind_one
    for part in reversed(made):
        part.close()


@pytest.fixture
def build(device_backend: Backend, bind: Bind, target: Target) -> Build:
    """Makes a ``Setup``: a strategy, a module on it, optimizers and a train step.

    Takes ``precision`` (a name), ``sync_batchnorm`` and what ``make_setup`` takes.
    """
    from drivetrain_conformance.support.setups import make_setup

    def build_one(
        precision: str | None = None, *, sync_batchnorm: bool = False, **settings: Any
    ) -> Setup:
        made = device_backend.precision(precision or usual_precision(target))
        return make_setup(bind(made, sync_batchnorm=sync_batchnorm), made, **settings)

    return build_one


@pytest.fixture
def scaled_precision(backend: Backend, target: Target) -> str:
    """A declared precision that scales the loss. Skipped where there is none."""
    for name in sorted(target.capabilities.precisions):
        if backend.precision(name).policy.loss_scaling:
            return name
    pytest.skip(f"{BY_DECLARATION}no precision scales the loss")


class Crews:
    """The processes that level 2 runs in: one crew for each size of world, started when needed."""

    def __init__(self, target: Target, options: Options, probe: Probe) -> None:
        self._target = target
        self._options = options
        self._probe = probe
        self._crews: dict[int, Crew | LonelyCrew] = {}

    def of(self, size: int) -> Crew | LonelyCrew:
        """The crew of that size; a new one if the last one lost a process."""
        crew = self._crews.get(size)
        if crew is None or crew.broken:
            if crew is not None:
                crew.stop()
            crew = self._crews[size] = self.new(size)
        return crew

    def new(self, size: int) -> Crew | LonelyCrew:
        """A crew that the caller stops. Skips the test where there are too few devices."""
        from drivetrain_conformance.support.crew import Crew, LonelyCrew

        spec = self._target.spec
        if size > 1 and not self._target.declares(Feature.SEVERAL_PROCESSES):
            pytest.skip(f"{BY_DECLARATION}{Feature.SEVERAL_PROCESSES.value} is not declared")
        try:
            devices = spec.parse_devices(size, self._probe, spec.name)
        except ConfigurationError as error:
            pytest.skip(f"{NOT_HERE}a world of {size} needs as many devices ({error.message})")
        kind = LonelyCrew if size == 1 else Crew
        return kind(self._options.backend, self._options.strategy, devices)

    def stop(self) -> None:
        """End all processes."""
        for crew in self._crews.values():
            crew.stop()


@pytest.fixture(scope="session")
def crews(
    target: Target, pytestconfig: pytest.Config, found_devices: Probe, device_backend: Backend
) -> Iterator[Crews]:
    """Crews by size, ended when the session ends."""
    assert device_backend is not None
    made = Crews(target, pytestconfig.stash[RUN].options, found_devices)
    yield made
    made.stop()


@pytest.fixture
def strategy_name(request: pytest.FixtureRequest, target: Target) -> str:
    """A strategy for several devices."""
    if not target.several_devices_strategies:
        pytest.skip(f"{BY_DECLARATION}{target.strategy_name!r} is a strategy for one device")
    name = str(request.param)
    if name in target.spec.strategy_capabilities:
        needs = [each for mark in request.node.iter_markers("needs") for each in mark.args]
        features = [each for each in needs if isinstance(each, Feature)]
        lacks = target.spec.capabilities_of(name).missing(features)
        if lacks:
            pytest.skip(f"{BY_DECLARATION}{name!r} does not declare {lacks[0].value!r}")
    return name


@pytest.fixture(params=[1, 2, 4], ids=lambda size: f"world{size}")
def crew(request: pytest.FixtureRequest, crews: Crews) -> Crew | LonelyCrew:
    """Worlds of 1, 2 and 4 processes."""
    return crews.of(request.param)


@pytest.fixture(params=[2, 4], ids=lambda size: f"world{size}")
def several(request: pytest.FixtureRequest, crews: Crews) -> Crew | LonelyCrew:
    """Worlds of 2 and 4 processes."""
    return crews.of(request.param)


@pytest.fixture
def pair(crews: Crews) -> Crew | LonelyCrew:
    """A world of 2 processes."""
    return crews.of(2)
