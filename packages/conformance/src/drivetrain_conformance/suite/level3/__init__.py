"""Level 3 compares loss curves with recorded ones."""
