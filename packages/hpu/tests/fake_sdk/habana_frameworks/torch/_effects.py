"""What importing the bridge changes in torch."""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
from datetime import timedelta
from enum import Enum
from typing import Any

import fake_gaudi
import torch
import torch.distributed as dist
from drivetrain_conformance import simulated
from drivetrain_conformance.simulated import process_group
from torch.distributed import distributed_c10d

_OPS = (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT)
_NATIVE = (torch.float32, torch.bfloat16)
_THROUGH_FLOAT = (
    torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def apply(*, lazy: bool) -> None:
    hpu = importlib.import_module("habana_frameworks.torch.hpu")

    def module(usual: Any) -> Any:
        hpu._usual = usual
        return hpu

    limit = fake_gaudi.option("memory", None)
    simulated.install("hpu", simulated.Options(devices=1, memory_limit=limit), module=module)
    sys.modules["torch.hpu"] = hpu
    dist.Backend.register_backend("hccl", _create, extended_api=True, devices=["hpu"])
    _wrap_always()
    if lazy:
        _wrap_lazy()
    else:
        from habana_frameworks.torch.dynamo.compile_backend import hpu_backend

        torch._dynamo.register_backend(hpu_backend)


# Process groups -----------------------------------------------------------------------------------


def _create(options: Any, _: Any) -> Any:
    return _hccl_class()("hccl", "hpu", options)


@functools.cache
def _hccl_class() -> Any:
    base: Any = process_group._group_class()

    class ProcessGroupHCCL(base):
        def _refuse(self, op):
            if not any(op == known for known in _OPS):
                raise RuntimeError("Unsupported ReduceOp for HCCL process group")

        def _reduce_hosts(self, hosts, op):
            self._refuse(op)
            for host in hosts:
                if host.dtype in _NATIVE:
                    super()._reduce_hosts([host], op)
                elif host.dtype in _THROUGH_FLOAT:
                    wide = host.to(torch.float32)
                    super()._reduce_hosts([wide], op)
                    host.copy_(wide.to(host.dtype))
                else:
                    raise RuntimeError(
                        "Input tensor data type is not supported for HCCL process group"
                    )

        def barrier(self, opts=None):
            fake_gaudi.acquire("barrier")
            return super().barrier(opts)

        def abort(self):
            raise RuntimeError("ProcessGroupHCCL does not implement abort")

    return ProcessGroupHCCL


# Functions with fewer arguments than torch's ------------------------------------------------------


def _wrap_always() -> None:
    start, group = dist.init_process_group, dist.new_group
    usual_device = distributed_c10d._get_pg_default_device
    seed_host, fork_host = torch.manual_seed, torch.random.fork_rng
    usual_timeout = distributed_c10d.default_pg_timeout

    @functools.wraps(start)
    def init_process_group(
        backend,
        init_method=None,
        timeout=timedelta(seconds=1800),
        world_size=-1,
        rank=-1,
        store=None,
        group_name="",
        pg_options=None,
    ):
        return start(backend, init_method, timeout, world_size, rank, store, group_name, pg_options)

    @functools.wraps(group)
    def new_group(ranks=None, timeout=usual_timeout, backend=None, pg_options=None):
        return group(ranks, timeout, backend, pg_options)

    def _get_pg_default_device(group=None):
        return torch.device("hpu") if dist.get_backend(group) == "hccl" else usual_device(group)

    @functools.wraps(seed_host)
    def manual_seed(seed):
        torch.hpu.manual_seed_all(int(seed))
        return seed_host(seed)

    @functools.wraps(fork_host)
    def fork_rng(
        devices=None, enabled=True, _caller="fork_rng", _devices_kw="devices", device_type=None
    ):
        return fork_host(devices, enabled, _caller, _devices_kw, device_type or "hpu")

    for name, function in {
        "init_process_group": init_process_group,
        "new_group": new_group,
    }.items():
        del function.__wrapped__  # so that its signature is its own
        setattr(dist, name, function)
    del manual_seed.__wrapped__, fork_rng.__wrapped__
    distributed_c10d._get_pg_default_device = _get_pg_default_device
    torch.manual_seed = torch.random.manual_seed = manual_seed
    torch.random.fork_rng = fork_rng
    _replace_profiler()


class ProfilerActivity(Enum):
    CPU = 0
    CUDA = 1
    HPU = 2


def _replace_profiler() -> None:
    import torch.profiler

    usual, activities_of_torch = torch.profiler.profile, torch.profiler.ProfilerActivity

    class profile(usual):
        def __init__(
            self,
            *,
            activities=None,
            debug_activities=None,
            schedule=None,
            on_trace_ready=None,
            record_shapes=False,
            profile_memory=False,
            with_stack=False,
            with_flops=False,
            with_modules=False,
            experimental_config=None,
            use_cuda=None,
        ):
            asked = activities or []
            if not all(isinstance(one, ProfilerActivity) for one in asked):
                raise TypeError("activities are of another class: import them after the bridge")
            self.asked = asked
            super().__init__(
                activities=[activities_of_torch.CPU],
                schedule=schedule,
                on_trace_ready=on_trace_ready,
                record_shapes=record_shapes,
                profile_memory=profile_memory,
                with_stack=with_stack,
            )

    older = torch.autograd.profiler.profile
    torch.profiler.profile = profile
    torch.autograd.profiler.profile = type("profile", (older,), {})
    torch.profiler.ProfilerActivity = ProfilerActivity


def _wrap_lazy() -> None:
    """In lazy mode files are written with plain containers, and every tensor on its own."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.detach().cpu().clone()
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list):
            return [plain(one) for one in value]
        return tuple(plain(one) for one in value) if isinstance(value, tuple) else value

    def save(
        obj,
        f,
        pickle_module=pickle,
        pickle_protocol=4,
        _use_new_zipfile_serialization=True,
        _disable_byteorder_record=False,
    ):
        torch.serialization.save(plain(obj), f, pickle_module, pickle_protocol)

    def load(
        f, map_location=None, pickle_module=pickle, weights_only=False, mmap=None,
        **pickle_load_args,
    ):  # fmt: skip
        return torch.serialization.load(f, map_location, weights_only=weights_only)

    torch.save, torch.load = save, load
