"""What a run builds of its settings: a flag that reached no model would change nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

from lightrft.data import DataError, prompt_dataset_from_config
from lightrft.data.tasks import build_model, build_tokenizer
from lightrft.strategy import ConfigError, FakeStrategy, StrategyConfig
from lightrft.trainer.run import build_models, data_options, load_tokenizer

ALL: dict[str, Any] = {"advantage_estimator": "gae", "enable_ema": True}  # actor, critic, reference and average


def labels(folder: Path, **settings: Any) -> list[Any]:
    data = folder / "data.jsonl"
    data.write_text('{"input": "12="}\n{"input": "34="}\n')
    config = StrategyConfig(prompt_data=str(data), engine_type="hf", **settings)
    prompts = prompt_dataset_from_config(config, build_tokenizer(), **data_options(config, multimodal=False))
    return [prompt.label for prompt in prompts]


@pytest.mark.parametrize(
    "grades",
    [
        {"reward_pretrain": "some/model"},
        {"remote_rm_url": "http://localhost:1"},
        {"reward": "format"},
        {"reward": "format=0.5,my_rewards:brevity"},
    ],
)
def test_data_without_labels_is_taken_where_no_rule_reads_them(tmp_path: Path, grades: dict[str, Any]) -> None:
    assert labels(tmp_path, **grades) == [None, None]


@pytest.mark.parametrize(
    "settings", [{"reward": "format,numeric_answer=2"}, {"reward": "format", "label_key": "answer"}]
)
def test_a_line_without_its_label_is_named_where_a_rule_or_the_user_asks_for_it(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: no '\w+'; it has 'input' \(--label_key\)"):
        labels(tmp_path, **settings)


def layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def of_adapters(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: {read(layer) for layer in layers(model).values()}


# Each flag, what a model shows of it, and in which models it must show, in the order of ALL.
FLAGS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "packing": ({"packing_samples": True}, lambda m: m.packing_samples, "actor critic reference"),
    "fused": ({"fused_linear_logprob": True}, lambda m: getattr(m, "fused_linear_logprob", None), "actor reference"),
    "chunks": (
        {"fused_linear_logprob": True, "chunk_size": 7},
        lambda m: getattr(m, "chunk_size", None),
        "actor reference",
    ),
    "recomputed": ({"gradient_checkpointing": True}, lambda m: m.model.is_gradient_checkpointing, "actor critic"),
    "rank": ({"lora_rank": 3}, of_adapters(lambda layer: layer.r["default"]), "actor critic average"),
    "alpha": ({"lora_rank": 2, "lora_alpha": 6.0}, of_adapters(lambda x: x.scaling["default"]), "actor critic average"),
    "dropout": (
        {"lora_rank": 2, "lora_dropout": 0.25},
        of_adapters(lambda layer: getattr(layer.lora_dropout["default"], "p", 0.0)),
        "actor critic average",
    ),
    "targets": (
        {"lora_rank": 2, "target_modules": "q_proj"},
        lambda model: {name.rpartition(".")[2] for name in layers(model)},
        "actor critic average",
    ),
}


def models(folder: Path, **settings: Any) -> dict[str, Any]:
    config = StrategyConfig(strategy="fake", engine_type="hf", pretrain=str(folder), **ALL, **settings)
    actor, critic, _, reference, average = build_models(FakeStrategy(args=config), config, multimodal=False)
    return {"actor": actor, "critic": critic, "reference": reference, "average": average}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_reaches_the_models_that_it_is_for(folder: Path, flag: str) -> None:
    settings, shown, concerned = FLAGS[flag]
    without = {"lora_rank": 2} if flag in ("alpha", "dropout", "targets") else {}
    plain, other = models(folder, **without), models(folder, **settings)
    differ = {name for name, model in other.items() if model is not None and shown(model) != shown(plain[name])}
    assert differ == set(concerned.split())


def test_a_critic_begins_where_it_was_told(folder: Path, tmp_path: Path) -> None:
    build_model(seed=7).save_pretrained(tmp_path)
    critic = models(folder, critic_pretrain=str(tmp_path))["critic"].model
    assert torch.equal(critic.embed_tokens.weight, build_model(seed=7).model.embed_tokens.weight)


def test_with_adapters_no_reference_is_loaded(folder: Path) -> None:
    assert models(folder)["reference"] is not None
    assert models(folder, lora_rank=2)["reference"] is None


def test_flash_attention_that_cannot_be_had_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--flash_attn"):
        models(folder, flash_attn=True)


@pytest.fixture
def asked_attention(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, torch.dtype]]:
    """The attention and the dtype of each model that is loaded, where flash-attn seems to be installed."""
    asked: list[tuple[str | None, torch.dtype]] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "flash_attn" or find(name, *rest))
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        load = loader.from_pretrained

        def record(source: Any, *, load: Any = load, attn_implementation: str | None = None, **options: Any) -> Any:
            asked.append((attn_implementation, options["dtype"]))
            return load(source, **options)

        monkeypatch.setattr(loader, "from_pretrained", record)
    return asked


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_flash_attention_is_for_what_computes_in_16_bit_though_its_weights_are_held_in_fp32(
    folder: Path, asked_attention: list[Any], flag: str
) -> None:
    models(folder, flash_attn=True, **{flag: True})
    compute = torch.bfloat16 if flag == "bf16" else torch.float16
    assert [name for name, _ in asked_attention] == ["flash_attention_2"] * 4
    assert [held for _, held in asked_attention] == [torch.float32, torch.float32, compute, torch.float32]


def test_flash_attention_in_fp32_is_refused_with_the_flag_that_allows_it(
    folder: Path, asked_attention: list[Any]
) -> None:
    with pytest.raises(ValueError, match=r"--flash_attn computes in bf16 or fp16, not in torch.float32; add --bf16"):
        models(folder, flash_attn=True)
    assert not asked_attention


def test_a_text_model_is_not_trained_as_one_that_sees(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    build_model(layers=1, width=64).config.save_pretrained(tmp_path)
    config = StrategyConfig(pretrain=str(tmp_path))
    with pytest.raises(ConfigError, match=r"takes no images; `lightrft train` trains it"):
        load_tokenizer(config, multimodal=True)


@pytest.mark.parametrize("multimodal", [False, True])
def test_a_model_without_a_tokenizer_is_named_with_its_flag(tmp_path: Path, multimodal: bool) -> None:
    what = "processor" if multimodal else "tokenizer"
    build_model(layers=1, width=64).config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"--pretrain {tmp_path}: its {what} cannot be loaded: "):
        load_tokenizer(StrategyConfig(pretrain=str(tmp_path)), multimodal=multimodal)


def test_a_name_that_is_no_folder_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"--pretrain modell: there is no such folder, and as a name on the hub, its"):
        load_tokenizer(StrategyConfig(pretrain="modell"), multimodal=False)
