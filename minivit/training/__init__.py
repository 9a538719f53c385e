"""Training: the trainer of single steps, `train` with its loop and recipes, and profiles."""
