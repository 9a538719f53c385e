"""Cascades: a model with several exits, the thresholds by which an image stops early, and how these are sought."""
