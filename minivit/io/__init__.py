"""File formats: weights, models and run folders."""
