from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightrft.cli import launch
from lightrft.cli.main import build_parser
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import ConfigError, LightRFTError

NOBODY = 2**22 + 1  # Linux gives no process that number


def failure(exitcode: int, text: str | None = None, *, timestamp: int = 0, secondary: bool = False) -> SimpleNamespace:
    message: Any = f"exit code {exitcode}"
    if text is not None:
        message = {"message": text, "extraInfo": {"timestamp": str(timestamp), "secondary": secondary}}
    return SimpleNamespace(exitcode=exitcode, message=message, timestamp=timestamp)


def options(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["train", *arguments])


def test_the_root_cause_is_named_not_the_ranks_that_waited_for_it() -> None:
    failures = {
        0: failure(1, "rank 1 is late", secondary=True, timestamp=1),
        1: failure(1, "the reward raised", timestamp=2),
    }
    assert launch.describe_failures(failures) == "rank 1: the reward raised"


def test_a_rank_that_was_told_of_the_cause_names_that_rank() -> None:
    """The launcher may have ended the rank at fault before it could tell by itself."""
    told = failure(1, "rank 1: the reward raised", secondary=True)
    told.message["extraInfo"]["of_another_rank"] = True
    assert launch.describe_failures({0: told}) == "rank 1: the reward raised"
    assert launch.describe_failures({0: told, 2: failure(1, "no data")}) == "rank 2: no data"


def test_a_killed_rank_is_the_cause_whoever_noticed_first() -> None:
    failures = {
        0: failure(1, "rank 1 is gone", secondary=True),
        1: failure(-signal.SIGKILL, timestamp=9),
        2: failure(-signal.SIGTERM),
    }
    assert launch.describe_failures(failures) == (
        "rank 1 was killed by SIGKILL (out of memory? or it stalled and was killed)\nrank 1 is gone"
    )


def test_an_error_is_the_cause_where_the_launcher_killed_a_rank_that_was_stuck_because_of_it() -> None:
    """Half a minute after the error, in which the other rank did not end by itself."""
    failures = {0: failure(-signal.SIGKILL, timestamp=130), 1: failure(1, "the engine broke", timestamp=100)}
    assert launch.describe_failures(failures) == "rank 1: the engine broke"
    # A rank that lost a killed one in a call of its own notices later.
    failures = {0: failure(-signal.SIGKILL, timestamp=100), 1: failure(1, "connection lost", timestamp=101)}
    assert launch.describe_failures(failures).startswith("rank 0 was killed by SIGKILL")


def test_an_abort_is_the_cause_only_where_nothing_else_is() -> None:
    aborted = failure(-signal.SIGABRT)
    assert launch.describe_failures({0: aborted, 1: failure(-signal.SIGKILL)}).startswith(
        "rank 1 was killed by SIGKILL"
    )
    assert launch.describe_failures({0: aborted, 1: failure(1, "no data")}) == "rank 1: no data"
    assert launch.describe_failures({0: aborted}) == "rank 0 was killed by SIGABRT"


def test_a_rank_without_a_word_shows_its_exit_code() -> None:
    assert launch.describe_failures({3: failure(7)}) == "rank 3 ended with exit code 7"


@pytest.mark.parametrize("saved", [True, False])
def test_a_failed_run_names_a_checkpoint_only_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: bool
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    if saved:
        (run / "checkpoints" / "latest").touch()
    (tmp_path / "outcome.json").write_text(json.dumps({"output_dir": str(run), "command": "train-vl"}))
    assert launch._report(tmp_path, {0: failure(1, "no data")}, options()) == 1
    how = "Continue from the last" if saved else "There is no"
    shown = capsys.readouterr().err
    assert shown.startswith(f"lightrft: rank 0: no data\n{how} checkpoint")
    assert shown.endswith(f"\n  lightrft train-vl --resume --output_dir {run}\n")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", ""),
        ("--nproc_per_node 3", " --nproc_per_node 3"),
        (
            "--nnodes 2 --node_rank 1 --master_addr first",
            " --nnodes 2 --node_rank 1 --master_addr first --master_port 29500 --rdzv_id lightrft",
        ),
    ],
)
def test_a_run_is_resumed_on_as_many_ranks_as_it_was_started_on(given: str, told: str) -> None:
    line = launch.resume_line("train", "my runs/first", options(*given.split()))
    assert line == f"lightrft train --resume --output_dir 'my runs/first'{told}"


def test_a_run_in_a_folder_that_looks_like_a_flag_is_resumed_as_the_line_says() -> None:
    line = shlex.split(launch.resume_line("train", "-my runs/first", options()))
    assert build_parser().parse_args(line[1:]).output_dir == "-my runs/first"


@pytest.mark.parametrize("rank", ["0", ""])
def test_a_rank_that_no_launcher_has_started_is_told_what_makes_it_one(rank: str) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert launch.is_rank(whole)
    assert not launch.is_rank({**dict(list(whole.items())[1:])})
    with pytest.raises(ConfigError, match=r"RANK=.* MASTER_PORT (is|are) not set; `unset RANK` to start ranks here"):
        launch.is_rank({**whole, "RANK": rank, "MASTER_PORT": ""})


def test_a_machine_without_room_for_temporary_files_is_told_which_variable_names_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(LightRFTError, match=r"No usable temporary .*/tmp.*set TMPDIR"), launch.launch_folder("x-"):
        pass


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "check_settings", lambda config, **_: config)
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ConfigError, match=r"--output_dir .*cannot be made: No space left on device; name another"):
        launch.launch(StrategyConfig(output_dir=str(tmp_path / "run")), options(), multimodal=False)


def test_a_signal_is_forwarded_though_the_disk_of_the_log_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(text: str) -> None:
        raise OSError(errno.ENOSPC, text)

    (tmp_path / f"pid.{NOBODY}").touch()
    with monkeypatch.context() as patched, launch._forwarded_signals(tmp_path, "the ranks stop"):
        patched.setattr(sys, "stderr", SimpleNamespace(write=full))
        os.kill(os.getpid(), signal.SIGTERM)
    assert (tmp_path / launch.ASKED_FILE).exists()


def test_a_launcher_without_ranks_starts_none_after_a_signal(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    with pytest.raises(SignalException), launch._forwarded_signals(tmp_path, "the ranks stop"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert (tmp_path / launch.ASKED_FILE).exists(), "ranks that are about to start look for it"


def test_a_second_signal_is_taken_without_a_word_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python writes each into a socket, and complains on the terminal if nobody reads there any more."""
    monkeypatch.setattr(launch, "HANDLER_SECONDS", 0.0)
    monkeypatch.setattr(launch, "rank_pids", lambda folder: [NOBODY])
    with launch._forwarded_signals(tmp_path, "the ranks stop"):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
    assert capfd.readouterr().err == "\nlightrft: stopping: the ranks stop (press again to stop at once)\n"


@pytest.mark.parametrize(
    ("heard", "rank", "ends"),
    [(False, None, True), (False, NOBODY, True), (True, None, False), (False, os.getpid(), False)],
    ids=["no rank yet", "no rank any more", "its handlers run", "a rank runs"],
)
def test_a_launcher_that_waits_for_nodes_in_a_library_is_ended_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: bool, rank: int | None, ends: bool
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(launch, "HANDLER_SECONDS", 0.0)
    told, tells = socket.socketpair()
    tells.send(bytes([signal.SIGCHLD, signal.SIGTERM]))
    tells.close()
    if rank is not None:
        (tmp_path / f"pid.{rank}").touch()
    launch._end_if_deaf(told, [signal.SIGTERM] if heard else [], tmp_path)
    assert codes == ([130] if ends else [])
    assert tmp_path.exists() != ends


def test_nodes_that_do_not_meet_are_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import DistNetworkError
    from torch.distributed.launcher import api

    def alone(*_: Any) -> None:
        raise DistNetworkError("timed out\nframe #5: c10d::TCPStore")

    monkeypatch.setattr(api, "elastic_launch", lambda *_: alone)
    config = launch._launch_config(options("--nnodes", "2", "--master_addr", "first"), 4, tmp_path)
    with pytest.raises(launch.NodesApartError) as error:
        launch._run(config, tmp_path, [], "the ranks stop")
    assert str(error.value) == (
        "the nodes do not reach each other at first:29500: timed out\n"
        "Start the same command on all 2 nodes; with --master_addr, each with its own --node_rank, from 0 on the first "
        "to 1"
    )


def test_cores_are_shared_between_ranks_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch.thread_environment(2, 8) == {"OMP_NUM_THREADS": "4"}
    assert launch.thread_environment(4, 2) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.thread_environment(2, 8) == {}


def test_one_node_meets_on_a_free_port_of_its_own(tmp_path: Path) -> None:
    config = launch._launch_config(options(), 2, tmp_path)
    assert (config.nproc_per_node, config.max_nodes, config.rdzv_endpoint) == (2, 1, "localhost:0")
    assert config.max_restarts == 0
    assert launch._launch_config(options(), 2, tmp_path).run_id != config.run_id


def test_several_nodes_meet_at_the_first(tmp_path: Path) -> None:
    config = launch._launch_config(options("--nnodes", "2", "--node_rank", "1", "--master_addr", "first"), 4, tmp_path)
    assert (config.min_nodes, config.rdzv_backend, config.rdzv_endpoint) == (2, "static", "first:29500")
    assert config.rdzv_configs["rank"] == 1
    config = launch._launch_config(
        options("--nnodes", "2", "--rdzv_endpoint", "first:1234", "--rdzv_id", "mine"), 4, tmp_path
    )
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "first:1234", "mine")


def test_several_nodes_without_a_meeting_point_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --master_addr"):
        launch._launch_config(options("--nnodes", "2"), 1, tmp_path)


def test_at_least_one_rank() -> None:
    with pytest.raises(ConfigError, match="--nproc_per_node 0: must be at least 1"):
        launch.ranks_on_this_node(0)
