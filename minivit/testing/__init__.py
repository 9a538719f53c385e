"""Whether gradients are right and kernels accurate."""
