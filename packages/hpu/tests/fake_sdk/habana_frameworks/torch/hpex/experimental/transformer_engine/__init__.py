"""The engine under its name inside the bridge."""

from intel_transformer_engine import Linear, distributed, fp8_autocast, recipe

__all__ = ["Linear", "distributed", "fp8_autocast", "recipe"]
