"""Memory that the trainer shares with SGLang's schedulers, for what is sent and what each of them answers.

Only bytes are in it; a separate short message says what is where. The file is unlinked when all have mapped it, so that
nothing is left behind however the processes end.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightrft.strategy.errors import NotBuiltError, WeightSyncError

# Errors of a scheduler, by the name in its answer.
ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (NotBuiltError, WeightSyncError)}
ANSWER_BYTES = 2**16  # bytes of one rank's answer
_ALIGNMENT = 64
_SHARED = Path("/dev/shm")


def aligned(nbytes: int) -> int:
    """The next aligned offset for a tensor of any dtype."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Mailbox:
    """One shared region: an answer for each rank, then the payload.

    :param path: a file of that size. :param ranks: number of ranks that answer.
    """

    def __init__(self, path: str, nbytes: int, ranks: int) -> None:
        self.path, self.nbytes, self.ranks = path, nbytes, ranks
        self._bytes = torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)

    @classmethod
    def create(cls, payload: int, ranks: int) -> Mailbox:
        """A new region with room for ``payload`` bytes."""
        size = ranks * ANSWER_BYTES + aligned(payload)
        folder = str(_SHARED) if _SHARED.is_dir() else None
        with tempfile.NamedTemporaryFile(prefix="lightrft-sglang-", dir=folder, delete=False) as file:
            file.truncate(size)
        return cls(file.name, size, ranks)

    @property
    def payload(self) -> int:
        """Bytes of room."""
        return self.nbytes - self.ranks * ANSWER_BYTES

    def unlink(self) -> None:
        """Unlink the file; processes that have mapped it keep the memory."""
        Path(self.path).unlink(missing_ok=True)

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor at ``offset`` of the payload."""
        begin = self.ranks * ANSWER_BYTES + offset
        count = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[begin : begin + count].view(dtype).view(shape)

    def answer(self, rank: int, words: dict[str, Any]) -> None:
        """Write a rank's answer; an error's text that is too long is truncated."""
        if "error" in words:
            words = {**words, "error": words["error"][: ANSWER_BYTES // 8]}
        text = json.dumps(words).encode()
        place = self._bytes[rank * ANSWER_BYTES : (rank + 1) * ANSWER_BYTES]
        place[: len(text) + 1] = torch.frombuffer(bytearray(text + b"\0"), dtype=torch.uint8)

    def answers(self) -> list[dict[str, Any]]:
        """The ranks' answers, in rank order; an empty dict for one that has not answered."""
        found = []
        for rank in range(self.ranks):
            text = bytes(self._bytes[rank * ANSWER_BYTES : (rank + 1) * ANSWER_BYTES].numpy())
            found.append(json.loads(text.split(b"\0", 1)[0] or b"{}"))
        return found

    def clear_answers(self) -> None:
        """Clear the answers before the next question."""
        self._bytes[: self.ranks * ANSWER_BYTES : ANSWER_BYTES] = 0
