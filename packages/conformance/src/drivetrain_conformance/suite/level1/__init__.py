"""Level 1 needs one device."""
