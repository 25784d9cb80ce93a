"""Helpers that scripts use: command-line flags."""

from .arguments import add_arguments

__all__ = ["add_arguments"]
