"""The module ``torch.hpu`` of the fake: the recorded names, and no others."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any

import fake_gaudi
import torch
from drivetrain_conformance import simulated
from fake_gaudi import acquire
from fake_gaudi.marks import CALLS

from habana_frameworks.torch.utils.internal import is_lazy

HABANA_VISIBLE_MODULES_VAR = "HABANA_VISIBLE_MODULES"
HLS_MODULE_ID_VAR = "HLS_MODULE_ID"

#: The module that the simulated device would have: its kernels, streams and random numbers.
_usual: Any = None
_initialized: list[bool] = []
_autocast = {"enabled": False, "dtype": torch.bfloat16}
_flags = {"deterministic": False, "dynamic": True, "sync_debug": 0, "recompute": False}
_counted: list[int] = []


def _lazy_init() -> None:
    """What torch calls when the first tensor is made."""
    _open("tensor")


def _open(caller: str) -> None:
    acquire(caller)
    if not _initialized:
        _initialized.append(True)
        # As the bridge does when the device is first used.
        torch.utils.checkpoint.DefaultDeviceType.set_device_type("hpu")


def _is_in_bad_fork() -> bool:
    return False


def init():
    _open("init")


def is_initialized():
    return bool(_initialized)


def is_available():
    return device_count() > 0


def device_count():
    if not _counted:
        _counted.append(len(fake_gaudi.visible()))
    return _counted[0]


def current_device():
    _open("current_device")
    return 0


def set_device(device):
    pass


def synchronize():
    _open("synchronize")
    _usual.synchronize()


def get_device_name(device=None):
    if not device_count():
        warnings.warn("no device", stacklevel=2)
        return ""
    _open("get_device_name")
    return fake_gaudi.option("generation", "GAUDI2")


def get_device_capability(device=None):
    _open("get_device_capability")
    return "1.24.1"


def get_device_properties(device=None):
    _open("get_device_properties")
    return "sramBaseAddress=0x0"


def is_bf16_supported():
    return True


def setDeterministic(val):
    _flags["deterministic"] = bool(val)


def getDeterministic():
    return _flags["deterministic"]


def enable_dynamic_shape():
    _flags["dynamic"] = True


def disable_dynamic_shape():
    _flags["dynamic"] = False


def get_dynamic_shape_status():
    return _flags["dynamic"]


# Memory -------------------------------------------------------------------------------------------


def _limit() -> int:
    return int(fake_gaudi.option("limit", 96 * 2**30))


def memory_stats(device=None):
    _open("memory_stats")
    used, peak = simulated.memory(0)
    counted = simulated.counters(0)
    return {
        "Limit": _limit(), "InUse": used, "MaxInUse": peak, "NumAllocs": counted.launches,
        "NumFrees": 0, "ActiveAllocs": 0, "MaxAllocSize": 0, "TotalSystemAllocs": 0,
        "TotalSystemFrees": 0, "TotalActiveAllocs": 0,
    }  # fmt: skip


def memory_allocated(device=None):
    return memory_stats()["InUse"]


def max_memory_allocated(device=None):
    return memory_stats()["MaxInUse"]


def memory_reserved(device=None):
    return memory_stats()["Limit"]


def max_memory_reserved(device=None):
    return memory_stats()["Limit"]


def mem_get_info(device=None):
    stats = memory_stats()
    return stats["Limit"] - stats["InUse"], stats["Limit"]


def reset_peak_memory_stats(device=None):
    _open("reset_peak_memory_stats")
    _usual.reset_peak_memory_stats()


# Random numbers -----------------------------------------------------------------------------------


def manual_seed(seed):
    _usual.manual_seed(seed)


def manual_seed_all(seed):
    _usual.manual_seed_all(seed)


def initial_seed():
    return _usual.initial_seed()


def _only_device(device) -> None:
    where = torch.device(device) if isinstance(device, str) else device
    index = where if isinstance(where, int) else where.index
    if index is None:
        _open("rng_state")
    elif index != 0:
        raise RuntimeError("Only device 0 has a generator in a process.")


def get_rng_state(device="hpu"):
    _only_device(device)
    return _usual.get_rng_state(0)


def set_rng_state(new_state, device="hpu"):
    _only_device(device)
    _usual.set_rng_state(new_state, 0)


def get_rng_state_all():
    return [get_rng_state(0)]


def set_rng_state_all(new_states):
    if len(new_states) != 1:
        raise RuntimeError("A process has one generator; a list of one state is needed.")
    set_rng_state(new_states[0], 0)


# Streams ------------------------------------------------------------------------------------------


def current_stream(device=None):
    _open("current_stream")
    return _usual.current_stream()


def default_stream(device=None):
    return current_stream()


def set_stream(stream):
    _usual.set_stream(stream)


def stream(stream):
    return _usual.stream(stream)


Stream = torch.Stream
Event = torch.Event


@contextmanager
def device(device):
    yield


# Metrics ------------------------------------------------------------------------------------------


class _Metric:
    def name(self):
        return "graph_compilation"

    def stats(self):
        from habana_frameworks.torch.dynamo.compile_backend import COMPILED

        return [("TotalNumber", len(COMPILED))]


def metric_global(name):
    return _Metric() if name == "graph_compilation" else None


# Graphs: these names are absent in eager mode -----------------------------------------------------


class _ModuleCacher:
    def __init__(self, max_graphs=10):
        self.max_graphs = max_graphs

    def __call__(
        self,
        model,
        use_lfu=False,
        inplace=True,
        allow_unused_input=False,
        asynchronous=False,
        have_grad_accumulation=False,
        log_frequency=100,
        verbose=False,
        disable_tensor_cache=False,
        dry_run=False,
    ):
        hooked = [part for part in model.modules() if part._backward_hooks]
        if hooked:
            raise RuntimeError("HPU graphs cannot hold gradient hooks")
        own, shapes = model.forward, set()

        def forward(*args):
            if torch.is_grad_enabled():
                key = tuple(tuple(value.shape) for value in args)
                if key in shapes and any(p.grad is None for p in model.parameters()):
                    raise RuntimeError("HPU graph: the memory of a gradient is gone")
                CALLS.append("replay" if key in shapes else "capture")
                shapes.add(key)
                if len(shapes) > self.max_graphs:
                    raise RuntimeError("HPU graphs: more shapes than max_graphs")
            return own(*args)

        model.forward = forward
        return model


if is_lazy():
    ModuleCacher = _ModuleCacher
