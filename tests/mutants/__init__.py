"""Small faults made by rule, to see whether the suite notices them: `make mutants`, docs/mutants.md."""
