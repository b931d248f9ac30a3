"""The fake bridge. Its import does what the real one's does to the process."""

from __future__ import annotations

import os

import fake_gaudi

_FAULT = fake_gaudi.option("fault", "")
if _FAULT == "assertion":
    raise AssertionError("torch 2.11 is needed, and another is installed")
if _FAULT == "attribute":
    raise AttributeError("'NoneType' object has no attribute 'startswith'")
if _FAULT == "os":
    raise OSError("libSynapse.so: cannot open shared object file")

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ.setdefault("HABANA_PROFILE", "profile_api_light")

from habana_frameworks.torch.utils import internal as _internal  # noqa: E402

_internal._read_mode()

from habana_frameworks.torch._effects import apply as _apply  # noqa: E402

_apply(lazy=_internal.is_lazy())

from habana_frameworks.torch import hpu  # noqa: E402
from habana_frameworks.torch.distributed.hccl import initialize_distributed_hpu as _join  # noqa: E402

_join()

__all__ = ["hpu"]
