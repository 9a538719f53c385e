"""Files: weights, run folders, models."""
