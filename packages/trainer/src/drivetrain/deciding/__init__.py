"""The decisions of a plan, one module each. ``drivetrain.resolve`` puts them together."""
