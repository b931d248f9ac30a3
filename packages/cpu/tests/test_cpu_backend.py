"""The factory: every declared part can be made, and everything else is refused by name."""

from __future__ import annotations

import pytest
import torch
from drivetrain_interfaces import (
    Accelerator,
    Backend,
    CheckpointIO,
    Collectives,
    Precision,
    Strategy,
    StrategyContext,
    SupportsMemoryStats,
    UnsupportedError,
    World,
)

from drivetrain_cpu import spec
from drivetrain_cpu.accelerator import CpuAccelerator
from drivetrain_cpu.backend import CpuBackend


@pytest.fixture
def backend() -> CpuBackend:
    return CpuBackend()


@pytest.fixture
def context(backend: CpuBackend) -> StrategyContext:
    return StrategyContext(
        accelerator=backend.accelerator(),
        device_index=0,
        world=World(),
        collectives=backend.collectives(World()),
        precision=backend.precision("32-true"),
    )


def test_it_satisfies_the_contracts() -> None:
    """The annotations are checked by mypy, so that a changed contract shows in the editor."""
    backend: Backend = CpuBackend()
    accelerator: Accelerator = CpuAccelerator()
    statistics: SupportsMemoryStats = CpuAccelerator()
    assert isinstance(backend, Backend)
    assert isinstance(accelerator, Accelerator)
    assert isinstance(statistics, SupportsMemoryStats)


def test_loading_the_spec_gives_the_backend() -> None:
    assert isinstance(spec.load(), CpuBackend)


@pytest.mark.parametrize("name", sorted(spec.capabilities.precisions))
def test_every_declared_precision_can_be_made(backend: CpuBackend, name: str) -> None:
    """B4"""
    precision = backend.precision(name)
    assert isinstance(precision, Precision)
    assert precision.name == name


def test_the_common_precisions_are_declared() -> None:
    assert {"32-true", "64-true", "bf16-mixed", "16-mixed"} <= spec.capabilities.precisions


def test_an_undeclared_precision_is_refused_by_name(backend: CpuBackend) -> None:
    """B14"""
    with pytest.raises(UnsupportedError, match=r"precision 'fp4-maybe'.*32-true"):
        backend.precision("fp4-maybe")


@pytest.mark.parametrize("name", spec.strategies)
def test_every_declared_strategy_can_be_made(
    backend: CpuBackend, context: StrategyContext, name: str
) -> None:
    """B4"""
    strategy = backend.strategy(name, context)
    assert isinstance(strategy, Strategy)
    assert strategy.device == torch.device("cpu")
    strategy.close()


def test_an_undeclared_strategy_is_refused_by_name(
    backend: CpuBackend, context: StrategyContext
) -> None:
    """B14"""
    with pytest.raises(UnsupportedError, match=r"strategy 'zero3'.*ddp, single_device"):
        backend.strategy("zero3", context)


def test_one_process_needs_no_communication(backend: CpuBackend) -> None:
    """B15"""
    collectives = backend.collectives(World())
    assert isinstance(collectives, Collectives)
    assert torch.equal(collectives.all_reduce(torch.tensor([2.0])), torch.tensor([2.0]))


def test_checkpoints_and_the_shared_launchers_come_with_it(backend: CpuBackend) -> None:
    """B16, B17"""
    assert isinstance(backend.checkpoint_io(), CheckpointIO)
    assert backend.launcher("script") is None


def test_every_part_is_a_new_object(backend: CpuBackend) -> None:
    """B13"""
    assert backend.accelerator() is not backend.accelerator()
    assert backend.precision("16-mixed") is not backend.precision("16-mixed")
    assert backend.checkpoint_io() is not backend.checkpoint_io()
