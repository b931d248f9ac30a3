"""What tests of the suite share: models, data, tolerances, faults. No test is in here."""
