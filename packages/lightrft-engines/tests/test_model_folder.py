"""What an engine holds after its start, against the files of its model: a folder, or a hub name in the local cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightrft.engines.manifest import Manifest
from lightrft.engines.model_folder import check_loaded
from lightrft.strategy.errors import NotBuiltError
from lightrft.testing.tiny_models import tiny_model

NAME, COMMIT = "org/model", "0" * 40


class Reader:
    """An engine's weights."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.manifest = Manifest(shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self.compared: set[str] = set()

    def local(self, positions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return positions

    def sample(self, positions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        self.compared |= positions.keys()
        return {name: self.tensors[name].reshape(-1)[where] for name, where in positions.items()}


@pytest.fixture(params=["folder", "hub name"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of several shards, in a folder or where the hub's library keeps what it downloaded."""
    cached = tmp_path / f"models--{NAME.replace('/', '--')}"
    folder = cached / "snapshots" / COMMIT
    tiny_model("qwen2").save_pretrained(folder, max_shard_size="100KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return str(folder) if request.param == "folder" else NAME


def test_a_weight_that_an_engine_keeps_in_another_form_is_found(model: str) -> None:
    weights = AutoModelForCausalLM.from_pretrained(model, local_files_only=True).state_dict()
    reader = Reader(weights)
    check_loaded("mine", reader, model)
    assert reader.compared == weights.keys()
    changed = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(
        NotBuiltError, match=f'engine "mine" stores {changed} on this device in another form than the checkpoint'
    ):
        check_loaded("mine", Reader({**weights, changed: weights[changed].flip(1)}), model)
