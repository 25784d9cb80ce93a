"""SGLang's weights, written and read back through the mailbox, on every rank of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from lightrft.strategy.errors import RolloutError, WeightSyncError

from ..manifest import Manifest
from ..recorded_weights import check_whole
from .link import Link
from .mailbox import ERRORS, Mailbox, aligned

_POSITIONS_AT_ONCE = 2**21  # limits the memory of a full comparison


class RemoteWeights:
    """The weights of SGLang's model by hub name.

    :param ranks: over which SGLang splits the model. :param dtype: in which weights are sent.
    """

    def __init__(self, link: Link, manifest: Manifest, ranks: int, dtype: torch.dtype) -> None:
        self.manifest = manifest
        self._link, self._ranks, self._dtype = link, ranks, dtype
        self._mailbox: Mailbox | None = None

    def ask(self, act: str, room: int = 0, **arguments: Any) -> list[Any]:
        """Let every scheduler do something; returns the answers. :raises LightRFTError: a scheduler's error."""
        mailbox = self._room(room)
        return self._send(mailbox, act, arguments)

    def _send(self, mailbox: Mailbox, act: str, arguments: dict[str, Any], per_rank: Any = None) -> list[Any]:
        mailbox.clear_answers()
        where = {"path": mailbox.path, "nbytes": mailbox.nbytes, "ranks": mailbox.ranks}
        messages = [
            json.dumps(
                {
                    "act": act,
                    "rank": rank,
                    "mailbox": where,
                    "arguments": arguments | (per_rank(rank) if per_rank is not None else {}),
                }
            )
            for rank in range(self._ranks)
        ]
        try:
            self._link.call("tell", messages=messages)
        finally:
            mailbox.unlink()
        answers = mailbox.answers()
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise ERRORS.get(answer["kind"], RolloutError)(answer["error"])
            if "result" not in answer:
                raise RolloutError(f'engine "sglang": its rank {rank} did not answer "{act}"')
        return [answer["result"] for answer in answers]

    def _room(self, payload: int) -> Mailbox:
        if self._mailbox is None or self._mailbox.payload < payload:
            self._mailbox = Mailbox.create(payload, self._ranks)
        return self._mailbox

    def learn(self, folder: str, trust_remote_code: bool) -> None:
        """Let every scheduler find where its weights are.

        :raises NotBuiltError: they cannot be streamed into, or some elements are on no rank.
        """
        count = len(self.manifest.shapes)
        one_answer = aligned(8 * count)
        mailbox = self._room(self._ranks * one_answer)
        arguments = {
            "folder": folder,
            "dtype": str(self._dtype).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
            "split": self._ranks > 1,
        }
        self._send(mailbox, "learn", arguments, lambda rank: {"answer": rank * one_answer})
        held = sum(mailbox.view(rank * one_answer, (count,), torch.int64) for rank in range(self._ranks))
        check_whole("sglang", self.manifest.shapes, torch.as_tensor(held).tolist())

    # ---- writing ----------------------------------------------------------------------------------------------------
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write whole tensors, as one flat piece of memory."""
        mailbox = self._room(sum(aligned(tensor.nbytes) for tensor in tensors.values()))
        offset, table = 0, []
        for name, tensor in tensors.items():
            mailbox.view(offset, tuple(tensor.shape), tensor.dtype).copy_(tensor)
            table.append((name, offset, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
            offset += aligned(tensor.nbytes)
        self._send(mailbox, "write", {"tensors": table})

    # ---- reading ----------------------------------------------------------------------------------------------------
    def local(self, positions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """All of them: the engine's owner answers for its ranks."""
        return positions

    def sample(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Elements at flat positions, on the CPU. :raises WeightSyncError: unknown, or on no rank."""
        self.manifest.check_known(list(positions))
        found: dict[str, list[torch.Tensor]] = {name: [] for name in positions}
        batch: list[tuple[str, torch.Tensor]] = []
        waiting = 0
        for name, at in positions.items():
            for part in at.split(_POSITIONS_AT_ONCE) if at.numel() else ():
                if batch and waiting + part.numel() > _POSITIONS_AT_ONCE:
                    self._read(batch, found)
                    batch, waiting = [], 0
                batch.append((name, part))
                waiting += part.numel()
        if batch:
            self._read(batch, found)
        return {name: torch.cat(parts) if parts else torch.empty(0, dtype=self._dtype) for name, parts in found.items()}

    def _read(self, batch: list[tuple[str, torch.Tensor]], found: dict[str, list[torch.Tensor]]) -> None:
        counts = [part.numel() for _, part in batch]
        question = sum(aligned(8 * count) for count in counts)
        one_answer = sum(aligned(count) + aligned(8 * count) for count in counts)
        mailbox = self._room(question + self._ranks * one_answer)
        offset, table = 0, []
        for (name, part), count in zip(batch, counts, strict=True):
            mailbox.view(offset, (count,), torch.int64).copy_(part)
            table.append((name, offset, count))
            offset += aligned(8 * count)
        answers = self._send(mailbox, "read", {"tensors": table}, lambda rank: {"answer": question + rank * one_answer})
        for number, ((name, _), count) in enumerate(zip(batch, counts, strict=True)):
            values, seen = None, torch.zeros(count, dtype=torch.bool)
            for answer in answers:
                place, dtype, held = answer[number]
                here = mailbox.view(place, (count,), torch.uint8).bool()
                part = mailbox.view(place + aligned(count), (held,), getattr(torch, dtype))
                values = torch.empty(count, dtype=part.dtype) if values is None else values
                values[here] = part
                seen |= here
            if values is None or not bool(seen.all()):
                raise WeightSyncError(f"{name}: {int((~seen).sum())} of the requested elements are on no rank")
            found[name].append(values)
