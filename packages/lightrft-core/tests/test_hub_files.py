"""Where a pretrained model's weights are looked for: in a folder, or in the local cache of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.hub_files import pretrained_files
from lightrft.strategy.meta_init import plan_fill
from lightrft.testing.tiny_models import tiny_model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("qwen2").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def on_meta(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_a_meta_model_whose_shards_are_not_all_there_is_refused_with_their_names(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert not plan_fill(on_meta(sharded)).unknown
    for lost in shards[1:3]:
        lost.unlink()
    names = f"{shards[1].name}, {shards[2].name}"
    with pytest.raises(CheckpointError, match=f"lacks {names}, which model.safetensors.index.json lists; copy or"):
        plan_fill(on_meta(sharded))


def test_files_that_the_index_does_not_list_are_not_read(sharded: Path) -> None:
    found = pretrained_files(str(sharded))
    (sharded / "consolidated.safetensors").write_bytes(b"of another tool")
    assert pretrained_files(str(sharded)) == found
    for name, path in found.items():
        with safe_open(path, framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118 - no mapping
