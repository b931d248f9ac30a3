"""The suite, by level. ``pytest --pyargs drivetrain_conformance.suite`` runs it."""
