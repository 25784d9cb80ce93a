"""The parts of the SGLang engine that need no SGLang: options, prompts, shared memory, seeds, its process's end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightrft.engines.recorded_weights import check_whole
from lightrft.engines.sampling import noise_keys, noise_start, noise_stream
from lightrft.engines.sglang import options, prompts
from lightrft.engines.sglang.host import Host
from lightrft.engines.sglang.link import Link
from lightrft.engines.sglang.mailbox import ANSWER_BYTES, Mailbox, aligned
from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError, RolloutError
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.tiny_models import tiny_config


def arguments(**spec: Any) -> dict[str, Any]:
    return options.engine_arguments(EngineSpec(**{"pretrain": "somewhere", **spec}), "somewhere", tiny_config("qwen2"))


# ---- options ---------------------------------------------------------------------------------------------------------
def test_the_spec_becomes_sglangs_arguments() -> None:
    found = arguments(dtype=torch.bfloat16, memory_utilization=0.3, max_batch_size=7, max_model_len=100)
    assert (found["dtype"], found["mem_fraction_static"], found["max_running_requests"]) == ("bfloat16", 0.3, 7)
    assert found["load_format"] == "auto"
    assert found["context_length"] > 100, "SGLang keeps some positions to itself"
    assert found["max_total_tokens"] >= 2 * 100


def test_a_model_without_weights_is_born_with_dummies() -> None:
    assert arguments(pretrain=None, model_config=tiny_config("qwen2"))["load_format"] == "dummy"


def test_on_a_gpu_memory_can_be_given_back() -> None:
    found = arguments(device=torch.device("cuda", 3))
    assert (found["base_gpu_id"], found["enable_memory_saver"]) == (3, True)
    assert "attention_backend" not in found


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ({}, ValueError, "--pretrain"),
        ({"pretrain": "x", "dtype": torch.float64}, NotBuiltError, "float64"),
        ({"pretrain": "x", "extra": {"tp_size": 2}}, ValueError, "tp_size are set by the flags"),
        ({"model_config": tiny_config("qwen2_vl")}, NotBuiltError, "set --pretrain"),
    ],
)
def test_what_it_cannot_do_is_refused(spec: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        options.check_spec(EngineSpec(**spec), {})


def test_all_parts_of_an_engine_are_on_one_node() -> None:
    spec = EngineSpec(pretrain="x", tensor_parallel_size=4)
    options.check_spec(spec, {"LOCAL_WORLD_SIZE": "8"})
    with pytest.raises(NotBuiltError, match="2 ranks: --engine_tp_size 4 must divide them"):
        options.check_spec(spec, {"LOCAL_WORLD_SIZE": "2"})


def test_its_processes_are_no_ranks_of_the_launch() -> None:
    own = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "HOME": "h",
    }
    found = options.environment(EngineSpec(), own)
    assert found["HOME"] == "h"
    assert not set(found) & (set(own) - {"HOME"})
    assert found["SGLANG_USE_CPU_ENGINE"] == "1"


def test_cores_are_shared_out_among_ranks() -> None:
    assert options.cores_by_rank(2, [0, 1, 2, 3]) == "0,1|2,3"
    assert options.cores_by_rank(2, [5]) == "5|5"


# ---- prompts ---------------------------------------------------------------------------------------------------------
def test_end_tokens_are_ours_to_say() -> None:
    found = prompts.sampling_arguments(SamplingParams(stop_token_ids=(9, 2)), (2, 3), 11, 7)
    assert (found["stop_token_ids"], found["sampling_seed"], found["max_new_tokens"]) == ([2, 3, 9], 11, 7)
    assert prompts.sampling_arguments(SamplingParams(ignore_eos=True), (2, 3), 1, 7)["stop_token_ids"] == []


def test_the_least_length_is_no_longer_than_the_longest() -> None:
    assert prompts.sampling_arguments(SamplingParams(min_tokens=9), (), 1, 7)["min_new_tokens"] == 7


def test_images_cross_as_arrays() -> None:
    assert prompts.image_input({}) is None
    found = prompts.image_input({"pixel_values": torch.ones(2, 3)})
    assert found is not None
    assert found["format"] == "processor_output"
    assert isinstance(found["pixel_values"], np.ndarray)


def test_top_k_1_is_not_greedy() -> None:
    sampled = prompts.sampling_arguments(SamplingParams(top_k=1), (), 1, 7)
    assert "top_k" not in sampled
    assert sampled["min_p"] == 1.0
    assert "min_p" not in prompts.sampling_arguments(SamplingParams(temperature=0.0, min_p=0.5), (), 1, 7)


def test_a_token_is_drawn_with_the_same_noise_wherever_it_is_counted_from() -> None:
    seeds, lengths, index = torch.tensor([5, 2**62 + 1]), torch.tensor([4, 17]), torch.tensor([0, 3])
    positions = lengths - 1 + index  # as SGLang counts: the last token that the model was fed
    assert torch.equal(noise_keys(noise_start(seeds, 1 - lengths), positions), noise_keys(noise_stream(seeds), index))


# ---- the mailbox -----------------------------------------------------------------------------------------------------
def test_both_ends_of_a_mailbox_see_the_same_and_its_name_can_go() -> None:
    mine = Mailbox.create(1000, ranks=2)
    theirs = Mailbox(mine.path, mine.nbytes, 2)
    mine.unlink()
    assert not Path(mine.path).exists()
    values = torch.arange(10, dtype=torch.bfloat16).view(2, 5)
    mine.view(aligned(1), (2, 5), torch.bfloat16).copy_(values)
    assert torch.equal(theirs.view(64, (2, 5), torch.bfloat16), values)
    theirs.answer(1, {"result": [3, "x"]})
    assert mine.answers() == [{}, {"result": [3, "x"]}]
    mine.clear_answers()
    assert theirs.answers() == [{}, {}]


def test_an_answer_that_is_too_long_is_cut() -> None:
    mailbox = Mailbox.create(0, ranks=1)
    mailbox.unlink()
    mailbox.answer(0, {"kind": "WeightSyncError", "error": "é" * ANSWER_BYTES})
    assert mailbox.answers()[0]["error"].startswith("éé")


def test_elements_that_lie_on_no_part_of_a_split_model_are_named() -> None:
    shapes = {"norm": (4,), "matrix": (2, 3)}
    check_whole("sglang", shapes, [8, 6])
    with pytest.raises(NotBuiltError, match="only a part of matrix"):
        check_whole("sglang", shapes, [8, 5])


# ---- its process -----------------------------------------------------------------------------------------------------
def test_a_request_that_is_late_is_given_up_and_nothing_runs_on() -> None:
    aborted = []

    async def never(**asked: Any) -> list[dict[str, Any]]:
        while not aborted:
            await asyncio.sleep(0.01)
        return [{} for _ in asked["input_ids"]]

    mine, theirs = socket.socketpair()
    host, loop = Host(Connection(theirs.detach())), asyncio.new_event_loop()
    host._engine = SimpleNamespace(
        async_generate=never,
        loop=loop,
        tokenizer_manager=SimpleNamespace(abort_request=lambda abort_all: aborted.append(abort_all)),
    )
    with pytest.raises(TimeoutError, match="2 samples were not generated within"):
        host.generate([[1], [2]], [{}, {}], [None, None], 0.05)
    assert host.generate([[1]], [{}], [None], None) == [{}]
    assert aborted == [True]
    mine.close()
    loop.close()


def test_a_process_that_ends_is_named_and_nothing_stays_behind() -> None:
    link = Link(EngineSpec(call_timeout=60.0))
    with pytest.raises(RolloutError, match='failed during "no_such_method": AttributeError'):
        link.call("no_such_method")
    os.killpg(link._process.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match=r'ended during "begin" \(exit code -9\); shut it down'):
        link.call("begin")
    link.end()
    with pytest.raises(ProcessLookupError):
        os.killpg(link._process.pid, 0)


def test_it_ends_when_it_is_asked_to() -> None:
    link = Link(EngineSpec(call_timeout=120.0))
    with pytest.raises(RolloutError, match="AttributeError"):  # it has started: what it imports may take long
        link.call("no_such_method")
    link.end()
    assert link._process.returncode == 0
