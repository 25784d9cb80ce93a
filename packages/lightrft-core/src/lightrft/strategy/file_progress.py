"""Counts the pieces of files that this process has read or written, so that a long save does not look like a stall."""

from __future__ import annotations

_pieces = 0


def came_further() -> None:
    """Count a piece that was written or read. From any thread; a lost count does no harm."""
    global _pieces
    _pieces += 1


def pieces_done() -> int:
    """How many so far."""
    return _pieces
