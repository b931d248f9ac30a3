"""Activation checkpointing around the engine's layers."""

from __future__ import annotations

from contextlib import nullcontext


def activation_checkpointing():
    return nullcontext()
