"""Level 0 runs anywhere: import, metadata, probe, refusals, messages."""
