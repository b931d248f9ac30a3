"""The factory: every declared part can be made, and everything else is refused by name."""

from __future__ import annotations

import pytest
import torch
from drivetrain_interfaces import (
    Backend,
    CheckpointIO,
    ClusterError,
    Collectives,
    ConfigurationError,
    LaunchRequest,
    Precision,
    StrategyContext,
    UnsupportedError,
    World,
)

from drivetrain_cuda import spec
from drivetrain_cuda.backend import CudaBackend, library


@pytest.fixture
def backend() -> CudaBackend:
    return CudaBackend()


def test_it_satisfies_the_contract() -> None:
    backend: Backend = CudaBackend()
    assert isinstance(backend, Backend)
    assert isinstance(spec.load(), CudaBackend)


@pytest.mark.parametrize("name", sorted(spec.capabilities.precisions - {"16-mixed"}))
def test_precisions_that_need_no_device_can_be_made(backend: CudaBackend, name: str) -> None:
    """B4"""
    precision = backend.precision(name)
    assert isinstance(precision, Precision)
    assert precision.name == name


def test_an_undeclared_precision_is_refused_by_name(backend: CudaBackend) -> None:
    """B14"""
    with pytest.raises(UnsupportedError, match=r"precision 'fp4-maybe'.*32-true"):
        backend.precision("fp4-maybe")


def test_an_undeclared_strategy_is_refused_by_name(backend: CudaBackend) -> None:
    """B14"""
    context = StrategyContext(
        backend.accelerator(),
        0,
        World(),
        backend.collectives(World()),
        backend.precision("32-true"),
    )
    with pytest.raises(UnsupportedError, match=r"strategy 'zero9'.*single_device"):
        backend.strategy("zero9", context)


def test_one_process_needs_no_communication(backend: CudaBackend) -> None:
    """B15"""
    assert isinstance(backend.collectives(World()), Collectives)


def test_gloo_is_used_on_request_only() -> None:
    assert library({"DRIVETRAIN_CUDA_COLLECTIVES": "gloo"}) == "gloo"
    with pytest.raises(ConfigurationError, match="DRIVETRAIN_CUDA_COLLECTIVES='mpi'"):
        library({"DRIVETRAIN_CUDA_COLLECTIVES": "mpi"})


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
@pytest.mark.parametrize("env", [{}, {"DRIVETRAIN_CUDA_COLLECTIVES": "nccl"}])
def test_a_torch_without_nccl_is_told_and_nothing_else_is_taken(env: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"need 'nccl'.*DRIVETRAIN_CUDA_COLLECTIVES=gloo"):
        library(env)


def test_forking_is_refused_where_a_context_exists(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = backend.launcher("fork")
    assert launcher is not None
    assert launcher.interactive
    plan = launcher.plan(LaunchRequest(local_size=1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ClusterError, match="used a GPU already"):
        launcher.plan(LaunchRequest(local_size=2))
    with pytest.raises(ClusterError, match="used a GPU already"):
        launcher.launch(lambda world: None, plan)


def test_forking_works_where_none_does(backend: CudaBackend) -> None:
    launcher = backend.launcher("fork")
    assert launcher is not None
    result = launcher.launch(lambda w: w.size, launcher.plan(LaunchRequest(local_size=2)))
    assert result == 2


def test_checkpoints_and_the_shared_launchers_come_with_it(backend: CudaBackend) -> None:
    """B16, B17"""
    assert isinstance(backend.checkpoint_io(), CheckpointIO)
    assert backend.launcher("script") is None
    assert backend.launcher("spawn") is None


def test_every_part_is_a_new_object(backend: CudaBackend) -> None:
    """B13"""
    assert backend.accelerator() is not backend.accelerator()
    assert backend.checkpoint_io() is not backend.checkpoint_io()
