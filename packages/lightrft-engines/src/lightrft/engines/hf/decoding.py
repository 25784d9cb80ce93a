"""The decoding loop: prefill each distinct prompt once, then one step per token for all unfinished rows.

Finished rows leave the batch and waiting samples take their place. A row's state is one row of a few tensors, so that
moving it is one copy each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightrft.strategy.sampling import SamplingParams

from ..processed_prompts import Prompt
from ..sampling import RowSampling, SamplingShape, draw, noise_ahead, noise_stream, tokens_ahead
from .batching import group_equal, prefill_buckets, swap_remove, worth_compacting
from .cache import Prefill, SlotCache
from .step import DecoderModel, StepInputs, decode, forward
from .step_graphs import GraphShape, StepGraphs

# Columns of a row's integers and floats.
_SAMPLE, _LENGTH, _SHIFT, _TOKEN, _INDEX, _LIMIT, _MINIMUM, _SEED, _TOP_K = range(9)
_TEMPERATURE, _TOP_P, _MIN_P = range(3)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response to generate.

    :param limit: most output tokens, within the context.
    :param stops: tokens that end the response, including the model's own unless they are ignored.
    """

    prompt: Prompt
    sampling: SamplingParams
    seed: int
    limit: int
    stops: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Response:
    """The response: output tokens, their logprobs, and why it ended."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Decoder:
    """Decodes samples with one model.

    :param max_rows: most rows decoded at once. :param graphs: replays its steps, on a device that can.
    """

    def __init__(self, model: DecoderModel, memory: SlotCache, max_rows: int, graphs: StepGraphs | None = None) -> None:
        self.m = model
        self.memory = memory
        self.max_rows = max_rows
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, samples: Sequence[Sample], deadline: float | None = None) -> list[Response]:
        """Generate all responses, in order of the samples.

        :raises TimeoutError: ``deadline`` (on the monotonic clock) passed.
        """
        if not samples:
            return []
        # Longest prompts first: memory has its final size from the start, and neighbours have similar lengths.
        order = [i for group in group_equal([s.prompt for s in samples]) for i in group]
        order.sort(key=lambda i: -len(samples[i].prompt.ids))
        batch = _Batch(self.m, self.memory, samples, min(self.max_rows, len(samples)), self.graphs)
        position = 0
        while position < len(order) or batch.rows:
            room = batch.max_rows - batch.rows
            if room and position < len(order):
                admitted = batch.admit(order[position : position + room])
                position += admitted
            while batch.rows and not batch.finished_enough(len(order) - position):
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{batch.rows + len(order) - position} of {len(order)} samples were unfinished")
                batch.step()
            batch.compact()
        return batch.responses()


class _Batch:
    """The rows being decoded."""

    def __init__(
        self, m: DecoderModel, memory: SlotCache, samples: Sequence[Sample], rows: int, graphs: StepGraphs | None
    ) -> None:
        self.m, self.memory, self.samples, self.max_rows, self.graphs = m, memory, samples, rows, graphs
        device = m.device
        self.rows = 0
        self.width = max(1, max(len(s.stops) for s in samples))
        self.ints = torch.zeros((rows, 9), dtype=torch.int64, device=device)
        self.floats = torch.zeros((rows, 3), dtype=torch.float32, device=device)
        self.stops = torch.full((rows, self.width), -1, dtype=torch.int64, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        longest = max(s.limit for s in samples)
        # One spare place per sample, for draws of a finished row that has not left yet.
        self.tokens = torch.zeros((len(samples), longest + 1), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((len(samples), longest + 1), dtype=torch.float32, device=device)
        self.flat_tokens, self.flat_logprobs = self.tokens.view(-1), self.logprobs.view(-1)
        self.counts = torch.zeros(len(samples), dtype=torch.int64, device=device)
        self.stopped = torch.zeros(len(samples), dtype=torch.bool, device=device)
        self.finished = 0
        self.shape = SamplingShape()
        self.quiet = 0  # tokens to draw before any row may end; until then no step asks the device
        self.left = 0  # most tokens that any row will still draw
        self.noise: torch.Tensor | None = None  # [rows, tokens, vocabulary], of which the first `used` tokens are drawn
        self.used = 0
        self.any_minimum = self.any_stop = self.all_stop = self.any_images = False
        self.longest_row = 0
        self.graph_shape: GraphShape | None = None
        self.lockstep: Any = None  # transformers' own cache, for models with which ours does not work
        self.mask = torch.empty(0)

    # ---- rows in and out --------------------------------------------------------------------------------------------
    def admit(self, indices: Sequence[int]) -> int:
        """Prefill samples and give them rows; returns how many were taken."""
        if not self.m.plain:
            if self.rows:
                return 0
            length = len(self.samples[indices[0]].prompt.ids)
            indices = [
                i for i in indices if len(self.samples[i].prompt.ids) == length and not self._needs_alone(i, indices[0])
            ]
        chosen = [self.samples[i] for i in indices]
        groups = group_equal([s.prompt for s in chosen])
        prompts = [chosen[group[0]].prompt for group in groups]
        first, self.rows = self.rows, self.rows + len(chosen)
        self._reserve(first, chosen)
        # Prompts with further inputs (images) are prefilled one by one: each family arranges its inputs differently.
        alone = [p for p, prompt in enumerate(prompts) if prompt.inputs]
        plain = [p for p, prompt in enumerate(prompts) if not prompt.inputs]
        buckets = [[plain[i] for i in b] for b in self._buckets([len(prompts[p].ids) for p in plain])]
        row = first
        logits: list[torch.Tensor] = []
        for bucket in [*buckets, *([p] for p in alone)]:
            members = [i for p in bucket for i in groups[p]]
            source = torch.tensor([at for at, p in enumerate(bucket) for _ in groups[p]], device=self.m.device)
            ends, shift = self._prefill([prompts[p] for p in bucket], row, source)
            self._write_rows(row, [indices[i] for i in members], shift)
            logits.append(ends[source])
            row += len(members)
        self.longest_row = max(self.longest_row, max(len(p.ids) for p in prompts))
        self.noise = None
        self._views()
        self._take(first, torch.cat(logits) if len(logits) > 1 else logits[0])
        return len(chosen)

    def _needs_alone(self, index: int, head: int) -> bool:
        """In lockstep a prompt with images shares its batch with no other prompt."""
        mine, theirs = self.samples[index].prompt, self.samples[head].prompt
        return mine is not theirs and bool(mine.inputs or theirs.inputs)

    def _buckets(self, lengths: Sequence[int]) -> list[list[int]]:
        if self.m.plain:
            return prefill_buckets(lengths)
        return [list(range(len(lengths)))] if lengths else []  # in lockstep: one length, one batch

    def finished_enough(self, waiting: int) -> bool:
        return self.finished > 0 and worth_compacting(self.finished, self.rows, waiting)

    def compact(self) -> None:
        """Remove finished rows: unfinished ones from the end take their places."""
        if not self.finished:
            return
        done = self.done[: self.rows].tolist()
        holes, movers = swap_remove(done)
        living = self.rows - sum(done)
        if living and self.lockstep is not None:
            keep = list(range(living))
            for hole, mover in zip(holes, movers, strict=True):
                keep[hole] = mover
            self.lockstep.reorder_cache(torch.tensor(keep, device=self.m.device))
        if movers:
            to, origin = (torch.tensor(rows, device=self.m.device) for rows in (holes, movers))
            for table in (self.ints, self.floats, self.stops, self.mask):
                table[to] = table[origin]
            if self.noise is not None:
                self.noise[to] = self.noise[origin]
            if self.lockstep is None:
                self.memory.move(to, origin, self.longest_row)
        self.rows, self.finished = living, 0
        self.noise = None if self.noise is None else self.noise[:living]
        self.done[:] = False
        self.longest_row = int(self.ints[:living, _LENGTH].max()) if living else 0
        if living:
            self._views()

    def _reserve(self, first: int, chosen: Sequence[Sample]) -> None:
        if not self.m.plain:
            return
        held = self.memory.capacity if first else 0
        # Room for the prompts and a part of the answers; it grows for long answers.
        need = max(len(s.prompt.ids) + min(s.limit, 256) for s in chosen)
        self._grow(max(need, held), first)

    def _grow(self, capacity: int, living: int) -> None:
        self.memory.reserve(self.max_rows, capacity, living)
        if self.mask.shape[0] != self.max_rows or self.mask.shape[1] < self.memory.capacity:
            mask = torch.full(
                (self.max_rows, self.memory.capacity), -torch.inf, dtype=self.m.dtype, device=self.m.device
            )
            if living:
                mask[:living, : self.mask.shape[1]] = self.mask[:living]
            self.mask = mask

    def _write_rows(self, first: int, indices: Sequence[int], shift: int) -> None:
        chosen = [self.samples[i] for i in indices]
        rows = slice(first, first + len(chosen))
        ints, floats, stops = [], [], []
        for index, s in zip(indices, chosen, strict=True):
            p = s.sampling
            free = p.greedy  # truncation does not change the likeliest token
            ints.append(
                [index, len(s.prompt.ids), shift, 0, 0, s.limit, p.min_tokens, s.seed, 0 if free else max(p.top_k, 0)]
            )
            floats.append([p.temperature, 1.0 if free else p.top_p, 0.0 if free else p.min_p])
            stops.append([*s.stops, *[s.stops[0] if s.stops else -1] * (self.width - len(s.stops))])
        device = self.m.device
        self.ints[rows] = torch.tensor(ints, device=device)
        self.floats[rows] = torch.tensor(floats, device=device)
        self.stops[rows] = torch.tensor(stops, device=device)
        if self.m.plain:
            slots = torch.arange(self.mask.shape[1], device=device)
            self.mask[rows] = torch.where(slots < self.ints[rows, _LENGTH].unsqueeze(1), 0.0, -torch.inf).to(
                self.mask.dtype
            )
        self.any_images |= shift != 0

    def _views(self) -> None:
        """Sampling parameters of the unfinished rows, by column, and what they need together."""
        n = self.rows
        self.length, self.token, self.index = (self.ints[:n, c] for c in (_LENGTH, _TOKEN, _INDEX))
        self.slots, self.inputs = self.length.unsqueeze(1), self.token.unsqueeze(1)
        self.sample = self.ints[:n, _SAMPLE].contiguous()
        self.limit, self.minimum = (self.ints[:n, c].contiguous() for c in (_LIMIT, _MINIMUM))
        self.row_stops, self.row_done = self.stops[:n], self.done[:n]
        self.sampling = RowSampling(
            temperature=self.floats[:n, _TEMPERATURE].contiguous(),
            top_p=self.floats[:n, _TOP_P].contiguous(),
            min_p=self.floats[:n, _MIN_P].contiguous(),
            top_k=self.ints[:n, _TOP_K].contiguous(),
            stream=noise_stream(self.ints[:n, _SEED]),
        )
        living = [self.samples[i] for i in self.ints[:n, _SAMPLE].tolist()]
        params = [s.sampling for s in living]
        drawn = [p for p in params if not p.greedy]
        top_k = [p.top_k for p in drawn]
        self.shape = SamplingShape(
            all_greedy=not drawn,
            any_temperature=any(p.temperature != 1 for p in drawn),
            any_greedy=len(drawn) < len(params),
            min_p=any(p.min_p > 0 for p in drawn),
            top_p=any(p.top_p < 1 for p in drawn),
            max_top_k=_widest(top_k if len(drawn) == len(params) else [*top_k, 0]),
        )
        self.any_minimum = any(p.min_tokens > 0 for p in params)
        self.any_stop = any(s.stops for s in living)
        self.all_stop = all(s.stops for s in living)
        written = self.index.tolist()
        self.quiet = quiet_tokens(living, written)
        self.left = max((s.limit - count for s, count in zip(living, written, strict=True)), default=0)
        self.place = self.sample * self.tokens.shape[1]
        if self.m.plain:
            self.row_mask = self.mask[:n]

    # ---- forwards ---------------------------------------------------------------------------------------------------
    def _prefill(self, prompts: Sequence[Prompt], first_row: int, source: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Run whole prompts; their cache is copied to rows from ``first_row`` on, prompt ``source[i]`` to row i.

        :return: logits ``[prompts, vocabulary]`` after each prompt, and by how much positions exceed the token count.
        """
        device = self.m.device
        lengths = [len(prompt.ids) for prompt in prompts]
        longest = max(lengths)
        ids = torch.tensor([[*p.ids, *[0] * (longest - len(p.ids))] for p in prompts], device=device)
        ends = sorted({length - 1 for length in lengths})
        inputs: dict[str, Any] = {name: value.to(device) for name, value in prompts[0].inputs.items()}
        if not inputs:  # with images the model computes the positions itself
            inputs["position_ids"] = torch.arange(longest, device=device).expand(len(prompts), -1)
        if self.m.plain:
            caught: Any = Prefill()
        else:
            from transformers import DynamicCache

            caught = DynamicCache(config=self.m.model.config)
        keep = torch.tensor(ends, device=device) if len(ends) > 1 else 1
        inputs[self.m.cache_argument] = caught
        out = self.m.model(input_ids=ids, attention_mask=None, use_cache=True, logits_to_keep=keep, **inputs)
        if self.m.plain:
            self.memory.admit(caught, first_row, source)
        else:
            caught.reorder_cache(source)
            self.lockstep = caught
        shift = getattr(out, "rope_deltas", None) if prompts[0].inputs else None
        logits = out.logits
        if len(ends) > 1:
            at = torch.tensor([ends.index(length - 1) for length in lengths], device=device)
            logits = logits[torch.arange(len(prompts), device=device), at]
        else:
            logits = logits[:, -1]
        return logits, 0 if shift is None else int(shift.reshape(-1)[0])

    def step(self) -> None:
        """One token for every row."""
        self.longest_row += 1
        logits = self._slotted_logits() if self.m.plain else self._lockstep_logits()
        self.length += 1 if self.quiet else ~self.row_done
        self._take(0, logits)

    def _lockstep_logits(self) -> torch.Tensor:
        return decode(self.m, self.lockstep, self.inputs, self._positions(self.rows, self.slots), None)

    def _slotted_logits(self) -> torch.Tensor:
        n, length = self.rows, self.longest_row
        if length > self.memory.capacity:
            self._grow(max(length, self.memory.capacity * 3 // 2), n)
            self.row_mask = self.mask[:n]
        if self.graphs is not None and self.graphs.usable:
            most = (self.max_rows, self.memory.capacity)
            shape = GraphShape.next(self.graph_shape, rows=n, slots=length, most=most, left=self.left)
            self.graph_shape = shape
            logits = self.graphs.logits(self._step_inputs(shape.rows, shape.slots)) if shape.worth else None
            if logits is not None:
                return logits[:n]
        return forward(self.m, self.memory, self._step_inputs(n, length))

    def _step_inputs(self, rows: int, length: int) -> StepInputs:
        """The inputs of the first ``rows`` rows, which may be more than the unfinished ones."""
        slots, ids, mask = self.slots, self.inputs, self.row_mask
        if rows != self.rows:
            slots, ids, mask = self.ints[:rows, _LENGTH, None], self.ints[:rows, _TOKEN, None], self.mask[:rows]
        mask.scatter_(1, slots, 0.0)
        return StepInputs(
            ids=ids,
            positions=self._positions(rows, slots),
            places=self.memory.places(slots.squeeze(1)),
            masks=self._masks(mask[:, :length], slots),
        )

    def _positions(self, rows: int, slots: torch.Tensor) -> torch.Tensor:
        if not self.any_images:
            return slots
        return (slots + self.ints[:rows, _SHIFT].unsqueeze(1)).expand(3, -1, -1)

    def _masks(self, full: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For layers without and with a sliding window, as far as the model has them."""
        if self.m.window is None:
            return (full,)
        near = full
        if full.shape[1] > self.m.window:
            near = full.masked_fill(
                torch.arange(full.shape[1], device=full.device) <= slots - self.m.window, -torch.inf
            )
        return (full, near) if self.m.mixed else (near,)

    def _take(self, first: int, logits: torch.Tensor) -> None:
        """Draw a token for each row from ``first`` on, store it, and note which are finished."""

        def part(whole: torch.Tensor) -> torch.Tensor:
            return whole[first:] if first else whole  # whole[0:] would be one more view for each token

        index, place, stops, sampling = part(self.index), part(self.place), part(self.row_stops), self.sampling
        if first:  # rows that were just admitted behind others
            sampling = RowSampling(**{name: part(value) for name, value in vars(sampling).items()})
        if self.quiet and self.all_stop:  # none may end yet
            logits = logits.scatter_(1, stops, -torch.inf)
        elif self.any_minimum and self.any_stop:
            logits = _forbid(logits.float(), stops, index < part(self.minimum))
        token, logprob = draw(logits, index, sampling, self.shape, self._noise(first, logits.shape[-1]))
        place = place + index
        self.flat_tokens.index_copy_(0, place, token)
        self.flat_logprobs.index_copy_(0, place, logprob)
        part(self.token).copy_(token)
        if not first:
            self.left -= 1
        if self.quiet:
            self.quiet -= 1
            index += 1
            return
        done, sample = part(self.row_done), part(self.sample)
        live = ~done
        index += live
        ended = index >= part(self.limit)
        if self.any_stop:
            hit = (token.unsqueeze(1) == stops).any(1) & live
            self.stopped[sample] |= hit
            ended |= hit
        done |= ended
        self.counts[sample] = index
        self.finished = int(self.done[: self.rows].sum())

    def _noise(self, first: int, vocabulary: int) -> torch.Tensor | None:
        """This token's noise for all rows, made for several tokens at a time; None if that is not faster."""
        if first or self.shape.truncates or self.shape.all_greedy:
            return None
        if self.noise is None or self.used == self.noise.shape[1]:
            count = tokens_ahead(self.rows, vocabulary, self.left)
            if count == 1:
                self.noise = None
                return None
            self.noise, self.used = noise_ahead(self.sampling.stream, self.index, vocabulary, count), 0
        self.used += 1
        return self.noise[:, self.used - 1]

    def responses(self) -> list[Response]:
        counts, stopped = self.counts.tolist(), self.stopped.tolist()
        tokens, logprobs = self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()  # whose rows are quick to slice
        return [
            Response(
                tokens=tokens[i, :count].tolist(),
                logprobs=logprobs[i, :count].tolist(),
                finish_reason="stop" if stopped[i] else "length",
            )
            for i, count in enumerate(counts)
        ]


def _widest(top_k: Sequence[int]) -> int:
    """The largest top_k if all rows have one, 0 if none has, -1 if only some have."""
    limited = [k for k in top_k if k > 0]
    if not limited:
        return 0
    return max(limited) if len(limited) == len(top_k) else -1


def quiet_tokens(samples: Sequence[Sample], written: Sequence[int]) -> int:
    """How many more tokens can be drawn before a sample may end.

    :param written: output tokens that each has.
    """
    first_end = [min(s.limit, s.sampling.min_tokens + 1) if s.stops else s.limit for s in samples]
    return max(0, min((end - count - 1 for end, count in zip(first_end, written, strict=True)), default=0))


def _forbid(logits: torch.Tensor, stops: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """Set the stop tokens (``[rows, stops]``, -1 for none) of the rows that may not end yet (``early``) to -inf."""
    ids = stops.clamp(min=0)
    held = logits.gather(1, ids)
    return logits.scatter(1, ids, held.masked_fill(early.unsqueeze(1) & (stops >= 0), -torch.inf))
