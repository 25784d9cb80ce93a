"""A sampler for SGLang with this package's draws: a seed per sample, and logprobs of the distribution sampled from.

SGLang's own honours seeds only in its deterministic mode, and returns logprobs from before top-k, top-p and min-p. This
one replaces it (``register_sampler_backend``).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend  # pyright: ignore[reportMissingImports]
from sglang.srt.sampling import sampling_params  # pyright: ignore[reportMissingImports]
from sglang.srt.sampling.penaltylib import BatchedMinNewTokensPenalizer  # pyright: ignore[reportMissingImports]
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo  # pyright: ignore[reportMissingImports]
from sglang.srt.sampling.sampling_params import TOP_K_ALL  # pyright: ignore[reportMissingImports]

from ..sampling import RowSampling, SamplingShape, draw, noise_start
from .options import SAMPLING_BACKEND


class SeededSampler(Sampler):
    """Draws one token per row, as :func:`lightrft.engines.sampling.draw` does for the embedded engine."""

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: Any,
        token_ids_logprobs: Any,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        rows, shape = _asked(sampling_info)
        tokens, logprobs = draw(logits_output.next_token_logits, positions.long(), rows, shape)
        if return_logprob:
            logits_output.next_token_logprobs = logprobs
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


def register() -> None:
    """Register it as a ``sampling_backend``, and let every batch have its samples' seeds."""
    for name in (SAMPLING_BACKEND, "pytorch"):  # SGLang replaces any name by the second on a CPU
        register_sampler_backend(name, SeededSampler)
    SamplingBatchInfo.adjusted_from_schedule_batch = _carry_seeds
    _take_least_lengths()


def _take_least_lengths() -> None:
    """SGLang needs a tokenizer for ``min_new_tokens``, to know the end tokens, which each request has anyway.

    So :class:`_NoTokenizer` replaces it.
    """
    sampling_params.raise_if_tokenizer_required = lambda *_: None
    prepare = BatchedMinNewTokensPenalizer._prepare

    def prepare_without_tokenizer(self: Any) -> None:
        for request in self.orchestrator.reqs():
            request.tokenizer = request.tokenizer or _NoTokenizer
        prepare(self)

    BatchedMinNewTokensPenalizer._prepare = prepare_without_tokenizer


class _NoTokenizer:
    """Has no end tokens."""

    eos_token_id = None
    additional_stop_token_ids = None


def _carry_seeds(info: Any, batch: Any, vocab_size: int) -> None:
    """The start of each sample's noise, in SGLang's field for seeds, which moves with the rows.

    The sampler gets a token's position in the whole text, so the prompt's length is subtracted here.
    """
    seeds = torch.tensor([request.sampling_params.sampling_seed or 0 for request in batch.reqs])
    prompts = torch.tensor([len(request.origin_input_ids) for request in batch.reqs])
    info.sampling_seed = noise_start(seeds, 1 - prompts).to(batch.device)


def _asked(info: Any) -> tuple[RowSampling, SamplingShape]:
    """SGLang writes a greedy row as top_k 1; requests with top_k 1 are sent with min_p 1 instead (:mod:`.prompts`)."""
    greedy = info.top_ks == 1
    top_k = torch.where(greedy | (info.top_ks >= TOP_K_ALL), 0, info.top_ks).long()
    rows = RowSampling(
        temperature=torch.where(greedy, 0.0, info.temperatures.view(-1)),
        top_k=top_k,
        top_p=torch.where(greedy, 1.0, info.top_ps),
        min_p=torch.where(greedy, 0.0, info.min_ps),
        stream=info.sampling_seed,
    )
    widest = 0
    if info.need_top_k_sampling and not info.is_all_greedy:
        # On an accelerator do not wait for the largest top_k: sort the whole vocabulary.
        some_take_all = top_k.device.type != "cpu" or bool(((top_k == 0) & ~greedy).any()) or bool(greedy.any())
        widest = -1 if some_take_all else int(top_k.max())
    return rows, SamplingShape(
        all_greedy=info.is_all_greedy,
        any_greedy=info.is_any_greedy,
        min_p=info.need_min_p_sampling,
        top_p=info.need_top_p_sampling,
        max_top_k=widest,
    )
