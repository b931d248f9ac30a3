"""A spec module that breaks B1: it loads torch."""

from __future__ import annotations

import mutants
import torch

spec = mutants.good
assert torch
