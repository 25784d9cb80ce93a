"""Our code inside SGLang's schedulers, one per tensor-parallel rank: the sampler, and their side of a weight sync."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightrft.strategy.errors import WeightSyncError

from ..model_folder import read_configs
from ..recorded_weights import WeightMap
from ..storages import Storages
from .mailbox import ERRORS, Mailbox, aligned


def run(*args: Any, **kwargs: Any) -> None:
    """A scheduler's process: SGLang's own, with our sampler, and with end tokens only from the requests."""
    from sglang.srt.configs.model_config import ModelConfig  # pyright: ignore[reportMissingImports]
    from sglang.srt.managers.scheduler import run_scheduler_process  # pyright: ignore[reportMissingImports]
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    from . import sampler

    sampler.register()
    ModelConfig._get_hf_eos_token_id = lambda _: None
    # SGLang reads the field by the name that it had before transformers 5.
    Qwen2VLVisionConfig.attribute_map = {"in_chans": "in_channels", **Qwen2VLVisionConfig.attribute_map}
    run_scheduler_process(*args, **kwargs)


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """SGLang's ``custom_weight_loader``: do what the message says, which is passed as a tensor's name.

    Errors become answers, since raising them would end the scheduler.
    """
    message = json.loads(named_tensors[0][0])
    worker = _worker(model, message)
    try:
        words = {"result": getattr(worker, message["act"])(**message["arguments"])}
    except Exception as error:  # noqa: BLE001 - the trainer raises it
        kind = type(error).__name__
        words = {"kind": kind, "error": str(error) if kind in ERRORS else f"{kind}: {error}"}
    worker.mailbox.answer(message["rank"], words)


_WORKERS: dict[int, _Worker] = {}


def _worker(model: torch.nn.Module, message: Mapping[str, Any]) -> _Worker:
    worker = _WORKERS.setdefault(id(model), _Worker(model))
    worker.rank = message["rank"]
    worker.map(**message["mailbox"])
    return worker


class _Worker:
    """One rank's weights, and the mailbox through which they are written and read back."""

    rank: int
    mailbox: Mailbox

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._weights: WeightMap | None = None
        self._storages: Storages | None = None
        self._path = ""

    def map(self, path: str, nbytes: int, ranks: int) -> None:
        """Use this region from now on; keep the last one mapped, since its file may be unlinked."""
        if path != self._path:
            self.mailbox, self._path = Mailbox(path, nbytes, ranks), path

    @property
    def weights(self) -> WeightMap:
        if self._weights is None:
            raise WeightSyncError('engine "sglang": the locations of its weights are not known yet')
        return self._weights

    def learn(self, folder: str, dtype: str, trust_remote_code: bool, split: bool, answer: int) -> None:
        """Find where each weight is. :param answer: from there on, how many elements of each are here (int64)."""
        config, _ = read_configs(folder, trust_remote_code=trust_remote_code)
        self._weights = WeightMap("sglang", self._model, config, getattr(torch, dtype), split=split)
        held = torch.tensor(list(self._weights.counts().values()))
        self.mailbox.view(answer, tuple(held.shape), held.dtype).copy_(held)
        gc.freeze()  # on a CPU SGLang collects garbage whenever it empties its cache: 0.6 s over all that it imported

    def begin(self) -> None:
        """Start an update; also clear cached image features, which SGLang's own flush keeps."""
        from sglang.srt.managers import mm_schedule  # pyright: ignore[reportMissingImports]

        if mm_schedule.embedding_cache is not None:
            mm_schedule.embedding_cache.clear()
        self.weights.begin()

    def write(self, tensors: Sequence[Sequence[Any]]) -> None:
        """Copy tensors in. :param tensors: (name, offset, shape, dtype) of each."""
        self.weights.load(
            {
                name: self.mailbox.view(offset, tuple(shape), getattr(torch, dtype))
                for name, offset, shape, dtype in tensors
            }
        )

    def read(self, tensors: Sequence[Sequence[Any]], answer: int) -> list[tuple[int, str, int]]:
        """Read elements back. :param tensors: (name, offset, count) of each tensor's positions.

        :param answer: from there on, for each tensor in order: which positions are here, then their values.
        :return: for each tensor its place there, the values' dtype, and how many they are.
        """
        places = []
        asked = {name: self.mailbox.view(offset, (count,), torch.int64).clone() for name, offset, count in tensors}
        local = self.weights.local(asked)
        held = self.weights.sample(local)
        for name, _, count in tensors:
            values = held[name]
            self.mailbox.view(answer, (count,), torch.uint8).copy_(torch.isin(asked[name], local[name]))
            self.mailbox.view(answer + aligned(count), tuple(values.shape), values.dtype).copy_(values)
            places.append((answer, str(values.dtype).removeprefix("torch."), values.numel()))
            answer += aligned(count) + aligned(8 * count)
        return places

    def empty(self) -> int:
        """Free the weights' memory; returns bytes. For a CPU, where SGLang has no sleep."""
        self._storages = self._storages or Storages(parameter.data for parameter in self._model.parameters())
        return self._storages.empty()

    def fill(self) -> None:
        """Allocate it again, with zeros."""
        assert self._storages is not None
        self._storages.fill()
