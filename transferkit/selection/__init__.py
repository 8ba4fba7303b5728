"""Which model, which settings: cross-validation."""
