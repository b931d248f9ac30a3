"""A pool of simulated IPUs, each of which one executor holds at a time."""

import os

from poptorch.errors import Error
from poptorch.rules import holds

VARIABLE = "POPTORCH_SIMULATED_IPUS"
_held = {}


def size():
    """How many IPUs this process may use."""
    return int(os.environ.get(VARIABLE, "16"))


def acquire(owner, number):
    """Take IPUs for an executor."""
    free = size() - (sum(_held.values()) if holds("exclusive-device") else 0)
    if number > free:
        raise Error(f"Failed to acquire {number} IPU(s): {free} of {size()} are free")
    _held[id(owner)] = number


def release(owner):
    """Give them back."""
    _held.pop(id(owner), None)


def held():
    """IPUs that are in use."""
    return sum(_held.values())


def ipuHardwareIsAvailable(num_ipus=1):
    """Whether there is a group of that size."""
    return num_ipus <= size() and "POPTORCH_IPU_MODEL" not in os.environ


def ipuHardwareVersion():
    """Always the second generation."""
    assert size(), "no IPU"
    return 2
