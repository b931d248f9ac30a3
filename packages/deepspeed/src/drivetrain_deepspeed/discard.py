"""Dropping the gradients of half a window, when user code raised in the middle of it."""

from __future__ import annotations

from typing import Any


def discard(engine: Any) -> None:
    """Bring the engine to where it was before the window. It has no call for that itself."""
    engine.zero_grad()
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        return
    optimizer.zero_grad()
    for name in ("averaged_gradients", "all_grad_tensors"):
        held = getattr(optimizer, name, None)
        if isinstance(held, dict):
            for key in held:
                held[key] = None
