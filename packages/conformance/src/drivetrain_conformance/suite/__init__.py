"""The suite, by level. Run it through the plugin: ``pytest --pyargs drivetrain_conformance.suite``."""
