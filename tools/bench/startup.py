"""How soon a command answers: `uv run python tools/bench/startup.py`.

Times whole processes, in turn with a bare interpreter, and says which heavy libraries each one loaded.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "transformers", "pydantic", "deepspeed", "vllm", "sglang", "lightrft.fsdp", "lightrft.engines")
COMMAND = """
import sys
sys.argv = {argv!r}
from lightrft.cli.main import main
try:
    main()
except SystemExit:
    pass
"""
SETTINGS = """
import argparse
from lightrft.strategy import StrategyConfig
from lightrft.utils import add_arguments
add_arguments(argparse.ArgumentParser())
"""
CASES = {
    "bare interpreter": "",
    "lightrft --help": COMMAND.format(argv=["lightrft", "--help"]),
    "lightrft train --help": COMMAND.format(argv=["lightrft", "train", "--help"]),
    "StrategyConfig, add_arguments": SETTINGS,
    "import lightrft.strategy": "import lightrft.strategy",
    "StrategyBase": "from lightrft.strategy import StrategyBase",
}


def run(code: str) -> tuple[float, str]:
    """Seconds of a fresh interpreter on ``code``, and which heavy libraries it loaded."""
    script = f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return time.perf_counter() - begun, done.stdout.splitlines()[-1]


def main(rounds: int = 5) -> None:
    """Every case once to warm the disk's cache, then ``rounds`` times in turn."""
    times: dict[str, list[float]] = {name: [] for name in CASES}
    loaded: dict[str, str] = {}
    for counted in range(rounds + 1):
        for name, code in CASES.items():
            seconds, loaded[name] = run(code)
            if counted:
                times[name].append(seconds)
    print(f"{'':32} {'median s':>8} {'max s':>8}   loaded")
    for name, seconds in times.items():
        print(f"{name:32} {statistics.median(seconds):8.3f} {max(seconds):8.3f}   {loaded[name] or '-'}")


if __name__ == "__main__":
    main()
