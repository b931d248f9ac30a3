"""Level 2 starts several processes."""
