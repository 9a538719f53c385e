"""The command line: `main`, one file per command, and common functions."""

from .main import main

__all__ = ["main"]
