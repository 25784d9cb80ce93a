"""What the tests of datasets share."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest


@pytest.fixture
def reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The real reasoning_gym, importable without pycosat.

    That C extension, which only the zebra puzzles call, has no wheel; the workspace leaves it out so that a checkout
    needs no compiler (see exclude-dependencies in the root pyproject.toml).
    """
    if importlib.util.find_spec("pycosat") is None:
        monkeypatch.setitem(sys.modules, "pycosat", ModuleType("pycosat"))
    return pytest.importorskip("reasoning_gym", reason="pip install 'lightrft-trainer[reasoning-gym]'")
