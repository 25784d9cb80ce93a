from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "pydantic", "deepspeed", "vllm", "sglang", "lightrft.fsdp", "lightrft.engines")


def loaded_after(code: str) -> set[str]:
    """Modules in memory after some code has run in a fresh interpreter."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_settings_and_flags_load_no_torch() -> None:
    modules = loaded_after(
        "import argparse\n"
        "from lightrft.strategy import StrategyConfig\n"
        "from lightrft.utils import add_arguments\n"
        "add_arguments(argparse.ArgumentParser()).format_help()\n"
        "StrategyConfig(seed=1)"
    )
    assert not modules & set(HEAVY)


def test_the_strategy_module_loads_neither_transformers_nor_a_backend() -> None:
    """Nor does it need a GPU: the old one asked for the current device as it was imported."""
    modules = loaded_after(
        "import lightrft.strategy, lightrft.strategy.strategy_base\n"
        "lightrft.strategy.get_strategy\nlightrft.strategy.FakeStrategy\nlightrft.strategy.EngineStatus"
    )
    assert "torch" in modules
    assert not modules & (set(HEAVY) - {"torch", "pydantic"})


def test_constructing_a_strategy_prints_nothing_and_joins_nobody() -> None:
    code = (
        "from lightrft.strategy.fake_strategy import FakeStrategy\n"
        "import torch.distributed as dist\n"
        "strategy = FakeStrategy(); strategy.print\n"
        "assert not dist.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lightrft_itself_is_a_namespace() -> None:
    spec = importlib.util.find_spec("lightrft")
    assert spec is not None
    assert spec.origin is None, "a lightrft/__init__.py would hide the other distributions"


def test_every_public_name_resolves() -> None:
    import lightrft.strategy as strategy

    for name in strategy.__all__:
        assert getattr(strategy, name).__name__ == name
    assert set(strategy.__all__) <= set(dir(strategy))
    with pytest.raises(AttributeError, match="no_such_name"):
        strategy.no_such_name  # noqa: B018


def test_the_documents_backend_classes_resolve_lazily() -> None:
    import lightrft.strategy as strategy
    from lightrft.strategy.errors import PluginError

    for name in ("DeepspeedStrategy", "FSDPV2Strategy"):
        try:
            assert getattr(strategy, name).__name__ == name
        except PluginError as error:
            assert "pip install" in str(error)  # noqa: PT017 - either is right
