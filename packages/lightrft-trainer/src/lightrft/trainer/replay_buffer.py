"""The samples of one rollout step by global index, and the plan of training on them.

Every rank has its own samples, and the owner and length of all samples. From these and (seed, step, epoch) each rank
derives the same plan without communication, also after a resume on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .experience import Experience, pack, unpack
from .minibatches import MicroBatch, cut_microbatches, plan_minibatches


class SampleRecord(NamedTuple):
    """What every rank knows of a sample: its owner (a data rank), its tokens and the response's, its reward, and the
    version of the weights that wrote it.
    """

    owner: int
    length: int
    response_length: int
    reward: float = 0.0
    weight_version: int = 0

    @classmethod
    def of(cls, sample: Experience, owner: int) -> SampleRecord:
        """The record of a sample."""
        return cls(owner, sample.length, sample.response_length, sample.reward, sample.weight_version)


@dataclass(frozen=True)
class OptimizerBatch:
    """One optimizer step on this rank.

    :param microbatches: this rank's, the same number on every rank. :param tokens: response tokens over all ranks.
    :param sequences: samples with a response over all ranks.
    """

    microbatches: Sequence[MicroBatch]
    indices: Sequence[int]
    tokens: int
    sequences: int


@dataclass
class ReplayBuffer:
    """This rank's samples of a step, and the records of all samples."""

    samples: dict[int, Experience] = field(default_factory=dict)
    records: dict[int, SampleRecord] = field(default_factory=dict)

    def fill(self, samples: Sequence[Experience], records: Mapping[int, SampleRecord]) -> None:
        """Replace the content."""
        self.samples = {sample.index: sample for sample in samples}
        self.records = dict(records)

    def clear(self) -> None:
        """Drop everything."""
        self.samples, self.records = {}, {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def items(self) -> list[Experience]:
        """This rank's samples in the order of their global indices."""
        return [self.samples[index] for index in sorted(self.samples)]

    def steps(self, *, n_samples: int, batch_size: int, seed: int, step: int, epoch: int) -> list[list[int]]:
        """The samples of each optimizer step of one epoch over the buffer, the same on every rank."""
        # Dynamic sampling may have left gaps, which the layout skips.
        held = sorted(self.records)
        prompts = len({index // n_samples for index in held})
        planned = plan_minibatches(
            prompts=prompts, n_samples=n_samples, batch_size=batch_size, seed=seed, step=step, epoch=epoch
        )
        return [[held[place] for place in places] for places in planned]

    def exchange(self, owners: Mapping[int, int], *, rank: int, gather: Callable[[Any], Any]) -> None:
        """Send each sample to its new owner. A collective.

        :param owners: the data rank of every sample. :param gather: returns the argument of every data rank, as a list.
        """
        leaving = [sample for sample in self.samples.values() if owners[sample.index] != rank]
        for sample in (sample for part in gather(leaving) for sample in part):
            if owners[sample.index] == rank:
                self.samples[sample.index] = sample
        self.samples = {index: self.samples[index] for index in sorted(self.samples) if owners[index] == rank}
        self.records = {index: record._replace(owner=owners[index]) for index, record in self.records.items()}

    def plan(
        self,
        steps: Sequence[Sequence[int]],
        *,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        max_tokens: int | None = None,
        packed: bool = False,
        n_samples: int = 1,
    ) -> list[OptimizerBatch]:
        """Optimizer steps with their micro-batches; which are this rank's; the rest is the same on every rank.

        :param steps: from :meth:`steps`. The other parameters are those of
            :func:`lightrft.trainer.minibatches.cut_microbatches`.
        """
        batches = []
        owners = {index: record.owner for index, record in self.records.items()}
        for indices in steps:
            cut = cut_microbatches(
                indices,
                owners,
                self.lengths,
                world_size=ranks,
                size=micro_batch_size,
                max_tokens=max_tokens,
                packed=packed,
                n_samples=n_samples,
            )
            responses = [self.records[index].response_length for index in indices]
            batches.append(
                OptimizerBatch(
                    cut[rank], list(indices), sum(responses), sum(1 for response in responses if response > 0)
                )
            )
        return batches

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of every rank's samples."""
        return {index: record.length for index, record in self.records.items()}

    # ---- checkpoint -------------------------------------------------------------------------------------------------
    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's samples as tensors by name."""
        return pack(self.items)

    @staticmethod
    def restore(states: Sequence[Mapping[str, Tensor]], *, n_samples: int, rank: int, ranks: int) -> ReplayBuffer:
        """The buffer from the states of all saved ranks (``states[i]`` is data rank i's).

        On the same number of ranks each gets its own samples; otherwise they are distributed by prompt, in turn.
        """
        saved = [(origin, sample) for origin, state in enumerate(states) for sample in unpack(state)]
        saved.sort(key=lambda item: item[1].index)
        places = {prompt: place for place, prompt in enumerate(sorted({s.index // n_samples for _, s in saved}))}
        buffer = ReplayBuffer()
        for origin, sample in saved:
            owner = origin if len(states) == ranks else places[sample.index // n_samples] % ranks
            buffer.records[sample.index] = SampleRecord.of(sample, owner)
            if owner == rank:
                buffer.samples[sample.index] = sample
        return buffer
