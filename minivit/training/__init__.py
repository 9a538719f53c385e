"""Training: Trainer for single steps, `train` with its loop and recipes, and profiling."""
