"""What every package's tests share: property tests give the same answer each time and have no clock."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("lightrft", deadline=None, derandomize=True, database=None, print_blob=True)
    settings.load_profile("lightrft")
