"""Marks, and what inference wants."""

from __future__ import annotations

from fake_gaudi.marks import CALLS

from habana_frameworks import torch as _torch_side
from habana_frameworks.torch.utils.internal import is_lazy

hpu = _torch_side.hpu


def mark_step(device_str="", sync=False):
    if is_lazy():
        CALLS.append("mark_step")


def iter_mark_step(device_str=""):
    if is_lazy():
        CALLS.append("iter_mark_step")


def add_step_closure(closure, args=()):
    if is_lazy():
        closure(*args)


def hpu_set_inference_env(model=None):
    CALLS.append("hpu_set_inference_env")
    return model


def hpu_inference_initialize(
    model=None, mark_only_scales_as_const=False, optimizer=None, args=None
):
    CALLS.append("hpu_inference_initialize")


def hpu_teardown_inference_env():
    pass


hpu_set_env = hpu_set_inference_env
hpu_initialize = hpu_inference_initialize
hpu_reset_env = hpu_teardown_inference_env
