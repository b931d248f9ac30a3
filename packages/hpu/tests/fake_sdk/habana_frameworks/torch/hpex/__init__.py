"""A part of the fake Gaudi software."""
