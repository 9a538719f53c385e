"""Checks of gradients and of the accuracy of kernels."""
