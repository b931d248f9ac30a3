"""Recipes. Every field has to be given, since its defaults are not known."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Format(Enum):
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


@dataclass
class DelayedScaling:
    margin: int
    interval: int
    fp8_format: Format
    amax_history_len: int
    amax_compute_algo: str
    reduce_amax: bool
