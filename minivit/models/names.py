"""Mapping from our parameter names to those in Google's released files for ViT and Mixer."""

from __future__ import annotations


def norm(ours: str, theirs: str) -> dict[str, str]:
    """The names of a normalisation's parameters."""
    return {f"{ours}.weight": f"{theirs}/scale", f"{ours}.bias": f"{theirs}/bias"}


def dense(ours: str, theirs: str) -> dict[str, str]:
    """The names of a linear layer's parameters."""
    return {f"{ours}.weight": f"{theirs}/kernel", f"{ours}.bias": f"{theirs}/bias"}
