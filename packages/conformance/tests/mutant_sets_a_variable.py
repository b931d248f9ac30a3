"""A spec module that breaks B1: it changes the process that imports it."""

from __future__ import annotations

import os

import mutants

os.environ["ACME_WAS_HERE"] = "1"
spec = mutants.good
