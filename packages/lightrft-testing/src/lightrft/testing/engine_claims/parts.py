"""Parts of an engine's tests: prompts, models, a weight sync, and the answers of Hugging Face."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightrft.strategy.engine import GenerationOutput, GenerationRequest, RolloutEngine
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.weights import SyncReceipt, TensorSpec, WeightBucket, plan_buckets

from ..tiny_models import tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
# Different lengths, one of a single token, and two equal prompts.
PROMPTS = (
    (17, 301, 42, 7),
    (9,),
    (100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116),
    (17, 301, 42, 7),
    (500, 11, 250),
)


def hub_state(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors under their hub names: views of its own memory."""
    layout, sources = HubLayout(model), dict(hub_sources(model))
    return {name: tensor.view(sources[tensor.source].detach()) for name, tensor in layout.by_name.items()}


def specs_of(model: Any) -> list[TensorSpec]:
    """What a trainer with ``model`` would announce."""
    return HubLayout(model).specs


def push_weights(
    engine: RolloutEngine,
    model: Any,
    version: int,
    *,
    bucket_bytes: int = 2**20,
    order: Callable[[list[WeightBucket]], Sequence[WeightBucket]] = list,
    stop_after: int | None = None,
) -> SyncReceipt | None:
    """Stream a model's weights into an engine, as a strategy would; every bucket's memory is overwritten once loaded.

    :param bucket_bytes: 1 sends each atom (each of the engine's fused groups) alone.
    :param order: in which order buckets are sent. :param stop_after: stop after this many, without an abort.
    """
    state = hub_state(model)
    plan = engine.begin_update(version, specs_of(model), bucket_bytes=bucket_bytes)
    groups = plan_buckets(plan)
    buckets = [
        WeightBucket(i, {s.name: state[s.name].to(s.dtype, copy=True).contiguous() for s in group})
        for i, group in enumerate(groups)
    ]
    for sent, bucket in enumerate(order(buckets)):
        if sent == stop_after:
            return None
        engine.load_bucket(bucket)
        for tensor in bucket.tensors.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return engine.finish_update()


def requests_for(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int] | None = None
) -> list[GenerationRequest]:
    """One request per prompt, each with its own seed."""
    seeds = range(len(prompts)) if seeds is None else seeds
    return [
        GenerationRequest(prompt_token_ids=tuple(prompt), sampling=replace(sampling, seed=seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def tokens_of(outputs: Sequence[GenerationOutput]) -> list[list[int]]:
    """Only the output tokens."""
    return [output.output_token_ids for output in outputs]


@torch.no_grad()
def greedy_reference(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation by ``model.generate``, one prompt alone, without an end token."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def processed_logprobs(
    model: Any, output: GenerationOutput, sampling: SamplingParams, *, barred: Sequence[int] = ()
) -> list[torch.Tensor]:
    """For each output token the log distribution that it must be drawn from, by one teacher-forced forward pass.

    A plain implementation, token by token, that shares no code with an engine.
    """
    start = len(output.prompt_token_ids)
    ids = torch.tensor([[*output.prompt_token_ids, *output.output_token_ids]])
    logits = model(ids).logits[0, start - 1 : -1].double()
    rows = []
    for at, row in enumerate(logits):
        row = row / (sampling.temperature or 1.0)
        if at < sampling.min_tokens:
            row[list(barred)] = -torch.inf
        if sampling.min_p > 0:
            row[row < row.max() + math.log(sampling.min_p)] = -torch.inf
        ranked = row.argsort(descending=True)
        if sampling.top_k > 0:
            row[ranked[sampling.top_k :]] = -torch.inf
        if sampling.top_p < 1:
            mass = row.softmax(-1)[ranked]
            row[ranked[(mass.cumsum(0) - mass) >= sampling.top_p]] = -torch.inf
        rows.append(row.log_softmax(-1))
    return rows


@functools.cache
def shared_model(kind: str, seed: int = 0) -> Any:
    """A tiny model that several tests share and none changes."""
    return tiny_model(kind, seed=seed)
