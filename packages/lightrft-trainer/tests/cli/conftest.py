from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from lightrft.testing import RankJob, RankPool, announce
from lightrft.testing.faults import watch_file_events

START_SECONDS = 240.0
SLOW = "0.2"


class Command:
    """A ``lightrft train`` on two CPU ranks, in its own temporary folder, that a test can watch and kill.

    :param modules: a folder of modules that it can import. :param terminal: descriptor to which it writes in place of
        its log.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        name: str = "train",
        modules: Path | None = None,
        terminal: int | None = None,
    ) -> None:
        self.scratch = folder / "tmp"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "log.txt").open("a+")
        environment = {**os.environ, "TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        if modules is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment["TINY_REWARD_SECONDS"] = SLOW  # else a busy machine may see the tiny run end before its signal
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightrft.cli.main", name, *arguments],
            stdout=self.log if terminal is None else terminal,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def rank_pids(self) -> list[int]:
        """Process ids of the ranks that have started and still run."""
        found = [int(path.name.removeprefix("pid.")) for path in self.scratch.glob("lightrft-*/pid.*")]
        return [pid for pid in found if _alive(pid)]

    def wait_until(self, reached: Callable[[], bool], *, poll: float = 0.005) -> bool:
        """Wait for something to happen; False where the command ended first."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if reached():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(poll)
        raise TimeoutError(f"nothing happened within {START_SECONDS} s:\n{self.output()}")

    def finish(self) -> int:
        return self.process.wait(timeout=START_SECONDS)

    def output(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def end(self) -> None:
        """Leave nothing behind, whatever the test did."""
        for pid in self.rank_pids():
            _kill(pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)
        self.log.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie has ended
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands; all of them and their ranks are gone when the test ends."""
    started: list[Command] = []

    def start(folder: Path, *arguments: str, **options: Any) -> Command:
        started.append(Command(folder, *arguments, **options))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a very short run: two passes over each buffer, a checkpoint a step."""
    from lightrft.data.tasks import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    build_model(layers=1, width=64).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    (folder / "tiny_reward.py").write_text(
        "import os, time\n"
        "def even(prompts, responses, labels, **extras):\n"
        "    time.sleep(float(os.environ.get('TINY_REWARD_SECONDS', 0)))\n"
        "    return [sum(c in '02468' for c in r) / max(1, len(r)) for r in responses]\n"
    )
    settings = {
        "fsdp": True,
        "engine_type": "hf",
        "enable_engine_sleep": False,
        "pretrain": str(folder / "model"),
        "prompt_data": "task:reverse_digits",
        "eval_data": "task:reverse_digits",
        "max_samples": 64,
        "max_eval_samples": 8,
        "reward": "exact_match=2,tiny_reward:even",
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "train_batch_size": 8,
        "micro_train_batch_size": 2,
        "max_epochs": 2,
        "generate_max_len": 5,
        "prompt_max_len": 8,
        "actor_learning_rate": 0.01,
        "init_kl_coef": 0.0,
        "max_steps": 8,
        "save_steps": 1,
        "plot_every": 8,
        "use_tensorboard": False,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def uninterrupted(ranks: RankPool, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the tiny run when nobody disturbs it; one for all processes that share the tests out."""
    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "whole"
    with FileLock(f"{folder}.lock"):
        if not (folder / "run" / "model").exists():
            ranks.run(run_command, tiny_run.parent, "train", *tiny_words(tiny_run, folder))
            (folder / "log.txt").write_text(ranks.output(0))
    return folder / "run"


def tiny_words(config: Path, folder: Path, *arguments: str) -> tuple[str, ...]:
    return ("--config", str(config), "--output_dir", str(folder / "run"), *arguments)


def start_tiny(start: Callable[..., Command], config: Path, folder: Path, *arguments: str, **options: Any) -> Command:
    return start(folder, *tiny_words(config, folder, *arguments), modules=config.parent, **options)


@pytest.fixture
def tiny(train: Callable[..., Command], tiny_run: Path) -> Callable[..., Command]:
    """Starts the tiny run in a folder, with further arguments."""
    return lambda folder, *arguments, **options: start_tiny(train, tiny_run, folder, *arguments, **options)


def run_command(modules: Path, *words: str, held: tuple[int, Path, int] | None = None, slow: bool = False) -> None:
    """On a rank that a launcher has started: the command, with modules that lie in a folder.

    :param held: (rank, folder, n): before its nth file operation below the folder that rank announces "held", and waits
        to be killed. :param slow: rewards take their time, so that a busy machine does not miss the run's steps.
    """
    from lightrft.cli.main import main

    if held is not None and held[0] == int(os.environ["RANK"]):
        watch_file_events(held[1], lambda count: hold() if count == held[2] else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(modules)
        if slow:
            patch.setenv("TINY_REWARD_SECONDS", SLOW)
        assert main(words) == 0


def hold() -> None:
    announce("held")
    time.sleep(START_SECONDS)


@pytest.fixture
def under_torchrun(ranks: RankPool) -> Callable[..., RankJob]:
    """Starts a command on ranks that are there already, as torchrun would start them."""
    return lambda modules, *words, pool=ranks, **options: pool.submit(run_command, modules, *words, **options)


@pytest.fixture
def tiny_under_torchrun(under_torchrun: Callable[..., RankJob], tiny_run: Path) -> Callable[..., RankJob]:
    """Starts the tiny run in a folder, with further arguments."""

    def start(folder: Path, *arguments: str, **options: Any) -> RankJob:
        return under_torchrun(tiny_run.parent, "train", *tiny_words(tiny_run, folder, *arguments), **options)

    return start


@pytest.fixture
def same_weights() -> Callable[[Path, Path], None]:
    """Asserts that two runs ended with the same weights, bit for bit."""

    def compare(one: Path, other: Path) -> None:
        mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if mine[name].numpy().tobytes() != theirs[name].numpy().tobytes()] == []

    return compare
