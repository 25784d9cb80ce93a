"""``lightrft train`` as a user runs it: processes, files, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightrft.trainer.metrics import STEP_KEYS, read_metrics

Tiny = Callable[..., Any]


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "plots", "checkpoints", "model"}
    saved = yaml.safe_load((uninterrupted / "config.yaml").read_text())
    assert (saved["max_steps"], saved["fsdp"], saved["resume"]) == (8, True, False)
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(key in line for line in lines for key in STEP_KEYS)
    assert (uninterrupted / "plots" / "reward.png").stat().st_size > 1000
    assert [path.name for path in (uninterrupted / "plots").glob("response_lengths_*")] == [
        "response_lengths_000008.png"
    ]


def test_transformers_loads_the_model(uninterrupted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "model")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "model")
    ids = model.generate(**tokenizer("1234=", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("1234=")


def test_the_report_says_what_was_learned_and_where_it_is(uninterrupted: Path) -> None:
    shown = (uninterrupted.parent / "log.txt").read_text()
    assert "Held-out prompts (8, greedy)" in shown
    assert "Some held-out answers" in shown
    assert str(uninterrupted) in shown.replace("\n", "")
    assert "Traceback" not in shown


def test_the_number_of_ranks_does_not_change_the_run(
    rank_pools: Any, tiny_under_torchrun: Tiny, tmp_path: Path, uninterrupted: Path
) -> None:
    tiny_under_torchrun(tmp_path, pool=rank_pools(1)).results()
    alone, together = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", uninterrupted))
    # The same prompts, the same samples, the same optimizer steps; sums over ranks differ in rounding only, which eight
    # optimizer steps at this rate multiply by some thousands.
    for one, two in zip(alone[:2], together[:2], strict=True):
        rewards = [name for name in two if name.startswith("reward")]
        assert len(rewards) == 4, "mean, deviation, and each of two parts"
        for name in (*rewards, "finished_share"):
            assert one[name] == pytest.approx(two[name], abs=1e-9), name
        assert one["response_length_mean"] == two["response_length_mean"]
        for name in ("loss", "grad_norm", "policy_kl"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5)


def test_a_run_goes_on_with_another_number_of_ranks(
    rank_pools: Any, tiny_under_torchrun: Tiny, tmp_path: Path, uninterrupted: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    for step in (7, 8):  # as if it had ended after the sixth
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    tiny_under_torchrun(tmp_path, "--resume", pool=rank_pools(1)).results()
    assert "step_000006 at step 6" in rank_pools(1).output(0).replace("\n", "")
    alone, together = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", uninterrupted))
    assert [line["step"] for line in alone] == list(range(1, 9))
    for one, two in zip(alone[6:], together[6:], strict=True):
        assert one["reward_mean"] == pytest.approx(two["reward_mean"], abs=0.05)
        assert one["weight_version"] == two["weight_version"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_ctrl_c_saves_and_says_how_to_go_on(
    tiny: Tiny,
    tiny_under_torchrun: Tiny,
    tmp_path: Path,
    uninterrupted: Path,
    same_weights: Callable[[Path, Path], None],
    number: signal.Signals,
) -> None:
    """And so does a hang-up, which a terminal and its shell both send."""
    command = tiny(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert command.wait_until(lambda: len(read_metrics(metrics)) >= 2)
    ranks = command.rank_pids()
    assert len(ranks) == 2
    command.process.send_signal(number)
    if number == signal.SIGHUP:
        assert command.wait_until(lambda: "lightrft: stopping" in command.output())
        command.process.send_signal(number)
    assert command.finish() == 130
    shown = command.output()
    assert "a checkpoint was written. Continue with:" in shown
    assert f"lightrft train --resume --output_dir {tmp_path / 'run'}" in shown
    assert "Traceback" not in shown
    assert command.rank_pids() == []
    assert [path.name for path in command.scratch.iterdir() if not path.name.startswith("torchinductor_")] == []
    tiny_under_torchrun(tmp_path, "--resume").results()
    same_weights(tmp_path / "run", uninterrupted)


@pytest.mark.full  # test_output.py closes one under a stream
def test_a_run_whose_terminal_is_closed_saves_before_it_ends(
    tiny: Tiny,
    tiny_under_torchrun: Tiny,
    tmp_path: Path,
    uninterrupted: Path,
    same_weights: Callable[[Path, Path], None],
) -> None:
    terminal, its_own = os.openpty()
    os.set_blocking(terminal, False)
    command = tiny(tmp_path, terminal=its_own)
    os.close(its_own)

    def two_steps_are_done() -> bool:
        with contextlib.suppress(BlockingIOError):  # read, or it waits for a reader
            os.read(terminal, 2**16)
        return len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 2

    assert command.wait_until(two_steps_are_done)
    os.close(terminal)
    command.process.send_signal(signal.SIGHUP)
    assert command.finish() == 130
    assert not (tmp_path / "run" / "errors").exists()
    tiny_under_torchrun(tmp_path, "--resume").results()
    same_weights(tmp_path / "run", uninterrupted)


@pytest.mark.full  # test_worker.py holds what each launcher is told
def test_a_signal_to_one_node_stops_all_and_each_says_how_to_go_on(tiny: Tiny, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "run"), "--nproc_per_node", "1", *two_nodes()]
    nodes = [tiny(tmp_path / str(number), *words, "--node_rank", str(number)) for number in range(2)]
    assert nodes[0].wait_until(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 2)
    nodes[1].process.send_signal(signal.SIGTERM)
    for number, node in enumerate(nodes):
        assert node.finish() == 130
        assert "a checkpoint was written. Continue with:" in node.output()
        assert f" --node_rank {number} " in node.output()


@pytest.mark.full  # test_launch.py holds when a launcher ends itself
def test_a_launcher_that_waits_for_another_node_ends_with_a_signal(tiny: Tiny, tmp_path: Path) -> None:
    words = two_nodes()
    command = tiny(tmp_path, *words)

    def it_waits() -> bool:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(words[-1]))):
            return True
        return False

    assert command.wait_until(it_waits)
    command.process.send_signal(signal.SIGTERM)
    assert command.finish() == 130
    assert "lightrft: stopped while it waited for other nodes" in command.output()
    assert list(command.scratch.iterdir()) == []


def two_nodes() -> list[str]:
    """The flags of a run on two nodes that meet on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]


@pytest.mark.full  # data/test_prompts.py holds the message itself
def test_a_line_without_its_key_names_file_and_line(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"input": f"{i}=", "label": "1"} for i in range(8)]
    del rows[5]["label"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = tiny(tmp_path, "--prompt_data", str(data))
    assert command.finish() == 1
    shown = command.output()
    assert f"{data}:6: no 'label'" in shown
    assert "Traceback" not in shown


@pytest.mark.full  # test_worker.py kills the launcher of a rank that does not even heed the signal
@pytest.mark.skipif(sys.platform != "linux", reason="a rank asks Linux to end with its launcher")
def test_no_rank_outlives_a_killed_launcher(tiny: Tiny, tmp_path: Path) -> None:
    command = tiny(tmp_path)
    assert command.wait_until(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 1)
    command.process.kill()
    command.process.wait(timeout=30)
    deadline_checks = iter(range(6000))
    while command.rank_pids() and next(deadline_checks) < 5999:
        signal.sigtimedwait([], 0.01)
    assert command.rank_pids() == []


CUT = ("--sp_size", "2", "--packing_samples", "--fused_linear_logprob", "--chunk_size", "7")


def test_packed_fused_and_cut_sequences_train_as_plain_ones(
    tiny_under_torchrun: Tiny, tmp_path: Path, uninterrupted: Path
) -> None:
    tiny_under_torchrun(tmp_path, *CUT, "--max_tokens_per_micro_batch", "40").results()
    cut, plain = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", uninterrupted))
    assert len(cut) == 8
    for one, two in zip(cut[:2], plain[:2], strict=True):
        assert one["reward_mean"] == pytest.approx(two["reward_mean"], abs=1e-9)
        assert one["response_length_mean"] == two["response_length_mean"]
        for name in ("loss", "grad_norm", "policy_kl"):
            assert one[name] == pytest.approx(two[name], rel=2e-3, abs=2e-5)


@pytest.mark.full
def test_the_default_run_learns_its_task(train: Tiny, tmp_path: Path) -> None:
    """The README's first command, but for its folder."""
    command = train(tmp_path, "--output_dir", str(tmp_path / "run"))
    assert command.process.wait(timeout=900) == 0, command.output()
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["0"]["accuracy"] < 0.3 and found["200"]["accuracy"] > 0.8


@pytest.mark.full
def test_the_default_task_is_learned_by_adapters(train: Tiny, tmp_path: Path) -> None:
    """``model/`` and ``adapter/`` say the same, and that is what was learned."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    command = train(tmp_path, "--lora_rank", "8", "--output_dir", str(tmp_path / "run"))
    assert command.process.wait(timeout=900) == 0, command.output()
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["0"]["accuracy"] < 0.3 and found["200"]["accuracy"] > 0.8
    base, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / n) for n in ("initial_model", "model"))
    ids = torch.arange(3, 13).repeat(2, 1)
    with torch.no_grad():
        before = base(ids).logits
        logits = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))(ids).logits
        assert torch.allclose(logits, merged(ids).logits, atol=1e-4)
        assert not torch.allclose(logits, before, atol=0.1)


@pytest.mark.full
def test_the_default_task_is_learned_packed_fused_and_cut(train: Tiny, tmp_path: Path) -> None:
    """The whole run, and the plain one beside it, is in docs/equivalence.md."""
    steps = ("--max_steps", "101", "--eval_steps", "50")
    command = train(tmp_path, *CUT, *steps, "--output_dir", str(tmp_path / "run"))
    assert command.finish() == 0, command.output()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    half_way, end = (line["eval_accuracy"] for line in lines if "eval_accuracy" in line)
    assert half_way < 0.6 and end > 0.7


@pytest.mark.full
@pytest.mark.parametrize("cut_first", [True, False])
def test_a_run_goes_on_with_its_sequences_cut_otherwise(
    rank_pools: Any, tiny_under_torchrun: Tiny, tmp_path: Path, uninterrupted: Path, cut_first: bool
) -> None:
    """Two ranks of a cut run hold the same samples; afterwards each has its own, or one rank all; and back."""
    if cut_first:
        tiny_under_torchrun(tmp_path, *CUT).results()
    else:
        shutil.copytree(uninterrupted, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = read_metrics(metrics)
    assert [line["step"] for line in before] == list(range(1, 9))
    for step in (7, 8):  # as if it had ended after the sixth: neither their checkpoints nor their lines are there
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:6]))
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 7))
    pool = rank_pools(1 if cut_first else 2)
    tiny_under_torchrun(tmp_path, "--resume", *(("--sp_size", "1") if cut_first else CUT), pool=pool).results()
    assert "step_000006 at step 6" in pool.output(0).replace("\n", "")
    after = read_metrics(metrics)
    assert [line["step"] for line in after] == list(range(1, 9)) and after[:6] == before[:6]
    one, two = after[6], before[6]  # the first line after the resume, and that of the run which nobody interrupted
    assert one["reward_mean"] == pytest.approx(two["reward_mean"], abs=1e-9)
    assert one["response_length_mean"] == two["response_length_mean"]
    for name in ("loss", "grad_norm", "policy_kl"):
        assert one[name] == pytest.approx(two[name], rel=2e-3, abs=2e-5)
