"""The lightrft command: settings, launching, one rank, the report at the end."""

from __future__ import annotations
