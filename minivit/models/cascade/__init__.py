"""Cascades: models with several exits, the thresholds for exiting early, and their optimisation."""
