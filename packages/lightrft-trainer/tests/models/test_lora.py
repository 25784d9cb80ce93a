"""LoRA on one process: what trains, what is exported, what is saved, and what is refused."""

from __future__ import annotations

import copy
import errno
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightrft.models import Actor, ActorVL, Critic, lora, pad_rows
from lightrft.models.lora import WithoutAdapters, save_adapter
from lightrft.strategy import FakeStrategy
from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing.tiny_models import save_tiny_model, set_adapters, tiny_config, tiny_model

ROWS = pad_rows([[5, 6, 7], [8, 9, 10, 11]], [[20, 21, 2], [30, 2]], pad_token_id=0)
ASKED = (ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)


def adapted(kind: str = "qwen2", **options: Any) -> Actor:
    return set_adapters(Actor(tiny_model(kind), lora_rank=4, lora_alpha=6.0, **options))


def exported(strategy: FakeStrategy, model: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    specs = tuple(spec.cast(dtype) for spec in strategy.export_spec(model))
    plan = UpdatePlan(version=1, specs=specs, dtype=dtype, bucket_bytes=2**14)
    return {
        name: tensor.clone()
        for bucket in strategy.export_weights(model, plan)
        for name, tensor in bucket.tensors.items()
    }


def merged_by_peft(actor: Any, plain: Any) -> dict[str, torch.Tensor]:
    """Hub names and values after peft's own merge_and_unload, of ``plain`` with the actor's adapters."""
    peft = get_peft_model(plain, copy.copy(actor.model.peft_config["default"]))
    values = {name: parameter for name, parameter in actor.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(values.pop(name.removeprefix("base_model.")))
    assert not values
    merged: Any = peft.merge_and_unload()  # pyright: ignore[reportCallIssue]
    layout, tensors = HubLayout(merged), dict(hub_sources(merged))
    return {name: hub.view(tensors[hub.source].detach()) for name, hub in layout.by_name.items()}


def train(strategy: FakeStrategy, model: Any, steps: int = 3) -> Any:
    model = strategy.prepare(model)
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    for _ in range(steps):
        strategy.backward(-model(*ASKED).sum(), model, optimizer)
        strategy.optimizer_step(optimizer, model)
    return optimizer


# ---- export ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "llama", "qwen3_moe", "qwen2_vl"])
def test_the_export_is_what_peft_merges(kind: str) -> None:
    actor, strategy = adapted(kind), FakeStrategy()
    before = {name: tensor.clone() for name, tensor in hub_sources(actor)}
    expected, found = merged_by_peft(actor, tiny_model(kind)), exported(strategy, actor)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hub_sources(actor)), "the model stays apart"
    plain = {spec.name: spec.shape for spec in HubLayout(tiny_model(kind)).specs}
    assert {spec.name: spec.shape for spec in strategy.export_spec(actor)} == plain, "no engine sees an adapter"


def test_a_16_bit_export_rounds_once() -> None:
    actor = adapted()
    whole, rounded = exported(FakeStrategy(), actor), exported(FakeStrategy(), actor, torch.bfloat16)
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)


def test_adapters_beside_16_bit_weights_are_merged_in_fp32() -> None:
    actor = set_adapters(Actor(tiny_model("qwen2").bfloat16(), lora_rank=4))
    layer = actor.model.model.layers[0].self_attn.q_proj
    assert (layer.base_layer.weight.dtype, layer.lora_A.default.weight.dtype) == (torch.bfloat16, torch.float32)
    wanted = layer.base_layer.weight.float() + 4.0 * (layer.lora_B.default.weight @ layer.lora_A.default.weight)
    found = exported(FakeStrategy(), actor)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(found, wanted.bfloat16())


def test_imported_weights_are_exported_unchanged() -> None:
    actor, strategy = adapted(), FakeStrategy()
    values = exported(strategy, Actor(tiny_model("qwen2", seed=5)))
    strategy.import_weights(actor, iter(values.items()))
    found = exported(strategy, actor)
    assert all(torch.equal(found[name], values[name]) for name in values)


# ---- training --------------------------------------------------------------------------------------------------------
def test_an_adapted_model_begins_as_the_plain_one_and_trains_its_adapters_alone() -> None:
    plain, actor, strategy = Actor(tiny_model("qwen2")), Actor(tiny_model("qwen2"), lora_rank=4), FakeStrategy()
    assert torch.equal(actor(*ASKED), plain(*ASKED))
    before = {name: tensor.clone() for name, tensor in hub_sources(actor)}
    optimizer = train(strategy, actor)
    changed = {name for name, tensor in hub_sources(actor) if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        before[name].numel() for name in changed
    )


def test_the_exported_model_says_what_the_adapted_one_says() -> None:
    actor, strategy = Actor(tiny_model("qwen2"), lora_rank=4), FakeStrategy()
    train(strategy, actor)
    other = Actor(tiny_model("qwen2", seed=9))
    strategy.import_weights(other, iter(exported(strategy, actor).items()))
    assert torch.allclose(actor(*ASKED), other(*ASKED), atol=1e-5)
    assert not torch.allclose(actor(*ASKED), Actor(tiny_model("qwen2"))(*ASKED), atol=1e-2)


def test_adapters_begin_alike_in_every_model_of_a_run_and_otherwise_in_another() -> None:
    def first_factors(seed: int) -> list[torch.Tensor]:
        FakeStrategy(seed=seed).setup_distributed()
        torch.rand(int(torch.randint(1, 9, ())))
        return [p.detach() for n, p in Actor(tiny_model("qwen2"), lora_rank=2).named_parameters() if "lora_A" in n]

    once, again, other = first_factors(1), first_factors(1), first_factors(2)
    assert all(map(torch.equal, once, again))
    assert not any(map(torch.equal, once, other))


def test_dropout_acts_while_training_alone() -> None:
    torch.manual_seed(0)
    actor, plain = adapted(lora_dropout=0.5), adapted()
    assert not torch.equal(actor(*ASKED), actor(*ASKED))
    actor.eval()
    assert torch.equal(actor(*ASKED), plain(*ASKED))


def test_the_model_without_its_adapters_is_the_one_that_it_was_made_from() -> None:
    dropping = tiny_model("qwen2", attention_dropout=0.5)
    actor = set_adapters(Actor(dropping, lora_rank=4, lora_dropout=0.5)).train()
    trained = [name for name, parameter in actor.named_parameters() if parameter.requires_grad]
    reference = WithoutAdapters(actor)(*ASKED)
    assert torch.equal(reference, Actor(tiny_model("qwen2"))(*ASKED))
    assert not reference.requires_grad
    assert actor.training
    assert [name for name, parameter in actor.named_parameters() if parameter.requires_grad] == trained
    assert not torch.allclose(actor.eval()(*ASKED), reference, atol=1e-3), "they are back"


def test_a_critic_trains_its_value_head_beside_the_adapters() -> None:
    critic = Critic(tiny_config("qwen2"), lora_rank=4)
    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert {"value_head.weight", "value_head.bias"} < trained
    assert all("lora_" in name for name in trained - {"value_head.weight", "value_head.bias"})
    assert {"value_head.weight", "layers.0.self_attn.q_proj.weight"} < exported(FakeStrategy(), critic).keys()


def test_named_modules_alone_get_adapters() -> None:
    actor = Actor(tiny_model("qwen2"), lora_rank=2, target_modules="q_proj, layers.1.mlp.up_proj")
    layers = {name.split(".lora_A")[0] for name, _ in actor.named_parameters() if ".lora_A" in name}
    attention = {f"model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert layers == attention | {"model.model.layers.1.mlp.up_proj"}


def test_the_fused_logprob_and_packing_see_the_adapters() -> None:
    plain, fused = adapted(), adapted(fused_linear_logprob=True, chunk_size=2, packing_samples=True)
    found = []
    for actor in (plain, fused):
        values = actor(*ASKED)
        values.sum().backward()
        found.append((values, [p.grad for p in actor.parameters() if p.grad is not None]))
    (values, gradients), (fused_values, fused_gradients) = found
    assert torch.allclose(values, fused_values, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, fused_gradients, strict=True))


# ---- files -----------------------------------------------------------------------------------------------------------
def test_the_saved_model_and_the_saved_adapter_load_where_they_should(tmp_path: Path) -> None:
    base = save_tiny_model("qwen2", tmp_path / "base")
    actor, strategy = set_adapters(Actor(str(base), lora_rank=4, lora_alpha=6.0)).eval(), FakeStrategy()
    strategy.save_model(actor, None, tmp_path / "merged")
    save_adapter(strategy, actor, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    on_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(on_base, str(tmp_path / "adapter"))
    logits = actor.model(ROWS.sequences).logits
    assert torch.allclose(plain(ROWS.sequences).logits, logits, atol=1e-4)
    assert torch.equal(peft(ROWS.sequences).logits, logits), "the same adapter, not merged"
    assert peft.peft_config["default"].base_model_name_or_path == str(base)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_vision_language_adapter_loads_in_peft(tmp_path: Path) -> None:
    actor = set_adapters(ActorVL(tiny_model("qwen2_vl"), lora_rank=2))
    save_adapter(FakeStrategy(), actor, tmp_path / "adapter")
    peft = PeftModel.from_pretrained(tiny_model("qwen2_vl"), str(tmp_path / "adapter"))
    mine = {n: p for n, p in actor.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in peft.named_parameters() if "lora_" in n}
    assert len(mine) == len(theirs)
    assert all(torch.equal(p, theirs[f"base_model.{n}"]) for n, p in mine.items())


@pytest.mark.parametrize("fails", ["write_tensors", "settle"])
def test_an_adapter_that_cannot_be_written_leaves_the_one_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "before").touch()
    monkeypatch.setattr(lora, fails, full)
    with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
        save_adapter(FakeStrategy(), Actor(tiny_model("qwen2"), lora_rank=2), folder)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "adapter",
        "adapter/before",
    ]


def test_a_model_without_adapters_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        save_adapter(FakeStrategy(), Actor(tiny_model("qwen2")), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def make() -> tuple[FakeStrategy, Any, Any]:
        strategy, actor = FakeStrategy(), Actor(tiny_model("qwen2"), lora_rank=4)
        return strategy, actor, train(strategy, actor, 2)

    def two_more(strategy: FakeStrategy, actor: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        for _ in range(2):
            strategy.backward(-actor(*ASKED).sum(), actor, optimizer)
            strategy.optimizer_step(optimizer, actor)
        return exported(strategy, actor)

    strategy, actor, optimizer = make()
    strategy.save_ckpt(actor, tmp_path)
    expected = two_more(strategy, actor, optimizer)
    strategy, actor, optimizer = make()
    set_adapters(actor)
    strategy.load_ckpt(actor, tmp_path)
    found = two_more(strategy, actor, optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_of_adapters_is_converted_merged(tmp_path: Path) -> None:
    from lightrft.strategy.conversion import convert

    actor, strategy = adapted(), FakeStrategy()
    strategy.save_ckpt(actor, tmp_path / "ckpt")
    convert(tmp_path / "ckpt", tmp_path / "hub", verify=True)
    found, expected = load_file(tmp_path / "hub" / "model.safetensors"), exported(strategy, actor)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_an_unknown_module_is_refused_with_the_ones_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"--target_modules qkv: Qwen2ForCausalLM has no such .* down_proj, .*v_proj"):
        Actor(tiny_model("qwen2"), lora_rank=2, target_modules="qkv")
    with pytest.raises(ValueError, match="--target_modules lm_head"):
        Actor(tiny_model("qwen2"), lora_rank=2, target_modules="lm_head")


def shared_experts() -> Any:
    """Experts that transformers stacks, beside layers of the names that they have on the hub."""
    from transformers import DeepseekV3Config

    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    routed = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1}
    return AutoModelForCausalLM.from_config(DeepseekV3Config(**shape, **heads, **latent, **routed))


def linear_router() -> Any:
    """A router that is a linear layer by its class, but returns two tensors."""
    from transformers import PhimoeConfig

    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return AutoModelForCausalLM.from_config(PhimoeConfig(**shape, **heads))


def shared_weight() -> Any:
    model = tiny_model("qwen2")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    return model


@pytest.mark.parametrize("build", [shared_experts, linear_router, shared_weight])
def test_all_linear_leaves_out_what_cannot_be_adapted(build: Any, tmp_path: Path) -> None:
    model = build().eval()
    plain, strategy = copy.deepcopy(model), FakeStrategy()
    actor = set_adapters(Actor(model, lora_rank=2))
    merged = Actor(copy.deepcopy(plain))
    strategy.import_weights(merged, iter(exported(strategy, actor).items()))
    with torch.no_grad():
        said = actor(*ASKED)
        assert not torch.allclose(said, Actor(plain)(*ASKED), atol=1e-2)
        assert torch.allclose(said, merged(*ASKED), atol=1e-4)
        save_adapter(strategy, strategy.prepare(actor), tmp_path)
        loaded: Any = PeftModel.from_pretrained(plain, str(tmp_path))
        assert torch.allclose(Actor(loaded.base_model.model)(*ASKED), said, atol=1e-5)


def test_a_name_that_peft_takes_for_stacked_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_proj: DeepseekV3ForCausalLM stacks its experts, for which peft takes"):
        Actor(shared_experts(), lora_rank=2, target_modules="gate_proj")


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="--lora_rank: GPT2LMHeadModel has no linear layer to adapt"):
        Actor(model, lora_rank=2)


def test_what_peft_refuses_is_an_error_of_the_flag() -> None:
    from transformers import MambaConfig

    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"--target_modules all-linear: .*out_proj.* Name others of dt_proj, in_proj"):
        Actor(model, lora_rank=2)


@pytest.mark.parametrize("name", ["experts", "gate_up_proj", "mlp.experts.down_proj"])
def test_stacked_experts_are_refused_by_name(name: str) -> None:
    said = (
        rf"--target_modules {name}: Qwen3MoeForCausalLM stacks its experts in \S*\.mlp\.experts\.\w+_proj, which gets"
    )
    with pytest.raises(ValueError, match=rf"{said} no adapter; possible are all-linear, or of k_proj, o_proj"):
        Actor(tiny_model("qwen3_moe"), lora_rank=2, target_modules=f"q_proj,{name}")


def test_a_model_without_memory_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"--lora_rank 2: .* --meta_init"):
        Actor(tiny_config("qwen2"), lora_rank=2)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(ValueError, match=r"pip install 'lightrft-trainer\[lora\]'"):
        Actor(tiny_model("qwen2"), lora_rank=2)
