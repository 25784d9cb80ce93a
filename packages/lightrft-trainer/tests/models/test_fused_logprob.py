from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightrft.models import Actor, pad_rows, token_statistics_from_logits
from lightrft.models import fused_logprob as module
from lightrft.models.fused_logprob import fused_token_statistics
from lightrft.testing.tiny_models import TEXT_KINDS, tiny_config, tiny_model

ROWS = pad_rows([[5, 6, 7], [8, 9, 10, 11, 12], [4]], [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2]], pad_token_id=0)


def draw(
    rows: int, width: int, vocabulary: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weight, bias and labels; logits are a few units wide."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return normal(rows, width), normal(vocabulary, width), normal(vocabulary) if bias else None, labels


def gradients(
    function: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, *, frozen: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Values of a statistic, and the gradients of its weighted sum: by all that is given, or by hidden states alone."""
    leaves = [t.detach().clone() for t in (hidden, weight, bias) if t is not None]
    wanted = [leaf.requires_grad_() for leaf in (leaves[:1] if frozen else leaves)]
    values = [v for v in function(leaves[0], leaves[1], leaves[2] if bias is not None else None) if v is not None]
    loss = sum((value * weights[i].to(value.dtype)).sum() for i, value in enumerate(values))
    assert isinstance(loss, Tensor)
    return [v.detach() for v in values], list(torch.autograd.grad(loss, wanted))


def plain(labels: Tensor, temperature: float, entropy: bool) -> Any:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        logits = nn.functional.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
        normalized = (logits / temperature).log_softmax(-1)
        chosen = normalized.gather(-1, labels[:, None])[:, 0]
        spread = normalized.exp() * normalized.clamp_min(-1e30)  # 0 where masked
        return chosen, -spread.sum(-1) if entropy else None

    return function


def fused(labels: Tensor, temperature: float, entropy: bool, chunk_size: int) -> Any:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return fused_token_statistics(
            hidden, weight, bias, labels, temperature=temperature, with_entropy=entropy, chunk_size=chunk_size
        )

    return function


@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 50),
    temperature=st.floats(0.3, 3.0),
    bias=st.booleans(),
    entropy=st.booleans(),
    chunk_size=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_values_and_gradients_equal_float64_whatever_the_chunks(
    rows: int, vocabulary: int, temperature: float, bias: bool, entropy: bool, chunk_size: int, seed: int
):
    hidden, weight, offset, labels = draw(rows, 8, vocabulary, bias=bias, seed=seed)
    weights = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed))
    values, grads = gradients(fused(labels, temperature, entropy, chunk_size), hidden, weight, offset, weights)
    double = [t.double() if t is not None else None for t in (hidden, weight, offset)]
    expected, expected_grads = gradients(plain(labels, temperature, entropy), *double, weights)  # type: ignore[arg-type]
    assert all((value <= 0).all() for value in values[:1])
    for ours, theirs in zip([*values, *grads], [*expected, *expected_grads], strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-5, rtol=1e-5)


def test_a_whole_vocabulary_equals_float64():
    hidden, weight, bias, labels = draw(300, 64, 5003, bias=True)  # neither a multiple of a chunk nor of a block
    hidden /= 8
    labels[:4] = torch.tensor([0, 5002, 255, 256])  # the vocabulary's edges
    weights = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    double = (hidden.double(), weight.double(), bias.double() if bias is not None else None)
    expected, expected_grads = gradients(plain(labels, 0.7, True), *double, weights)
    for chunk_size in (1, 128, 299, 300, 4096):
        values, grads = gradients(fused(labels, 0.7, True, chunk_size), hidden, weight, bias, weights)
        assert (values[0] <= 0).all()
        for ours, theirs in zip([*values, *grads], [*expected, *expected_grads], strict=True):
            assert torch.allclose(ours.double(), theirs, atol=1e-5, rtol=1e-5), (ours - theirs).abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_it_is_no_further_from_float64_than_plain_torch(dtype: torch.dtype, temperature: float, bias: bool):
    hidden, weight, offset, labels = draw(257, 64, 1000, bias=bias, dtype=dtype)
    hidden /= 4
    weights = torch.randn(2, 257, generator=torch.Generator().manual_seed(1)) / 257
    double = (hidden.double(), weight.double(), None if offset is None else offset.double())
    expected, expected_grads = gradients(plain(labels, temperature, True), *double, weights)
    theirs = gradients(plain(labels, temperature, True), hidden, weight, offset, weights)
    for chunk_size in (50, 4096):
        ours = gradients(fused(labels, temperature, True, chunk_size), hidden, weight, offset, weights)
        assert (ours[0][0] <= 0).all()
        for mine, reference, exact in zip(
            [*ours[0], *ours[1]], [*theirs[0], *theirs[1]], [*expected, *expected_grads], strict=True
        ):
            distance, allowed = (mine.double() - exact).norm(), (reference.double() - exact).norm()
            assert distance <= allowed * 1.01, (distance, allowed)


def test_a_certain_token_has_the_logprob_0_and_never_more():
    hidden, weight, _, _ = draw(64, 16, 200)
    logits = hidden @ weight.t()
    logprobs, _ = fused_token_statistics(hidden * 50, weight, None, logits.argmax(-1))
    assert (logprobs <= 0).all() and (logprobs == 0).any()


def test_a_masked_entry_of_the_vocabulary_gives_no_nan():
    # A vocabulary that is padded to a round number, and whose padding the bias switches off.
    hidden, weight, _, labels = draw(5, 8, 12)
    bias = torch.zeros(12)
    bias[10:] = -torch.inf
    labels %= 10
    weights = torch.full((2, 5), 3.0)  # more than 1: times the least number of fp32 it would be -inf
    values, grads = gradients(fused(labels, 1.0, True, 2), hidden, weight, bias, weights)
    cut, cut_grads = gradients(plain(labels, 1.0, True), hidden, weight[:10], None, weights)
    for ours, theirs in zip(values, cut, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(grads[1][:10], cut_grads[1], atol=1e-5) and (grads[1][10:] == 0).all()


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight, _, labels = draw(20, 4, 30)
    hidden.requires_grad_()
    logprobs, _ = fused_token_statistics(hidden, weight, None, labels, chunk_size=7)
    with _LargestTensor() as largest:
        logprobs.sum().backward()
    assert weight.grad is None and hidden.grad is not None
    assert largest.elements <= 7 * 30


class _LargestTensor(TorchDispatchMode):
    """The most elements that any tensor had which came out of an operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_more_logits_than_a_chunks_exist_at_one_time():
    hidden, weight, bias, labels = draw(640, 4, 600, bias=True)
    hidden.requires_grad_(), weight.requires_grad_()
    for chunk_size in (16, 64):
        with _LargestTensor() as largest:
            logprobs, entropies = fused_token_statistics(
                hidden, weight, bias, labels, with_entropy=True, chunk_size=chunk_size
            )
            assert entropies is not None
            (logprobs.sum() + entropies.sum()).backward()
        assert largest.elements == chunk_size * 600


def test_a_block_is_no_larger_than_pays_and_no_smaller_than_computes_well():
    cpu = torch.device("cpu")
    assert module.rows_in_block(4096, 32768, torch.float32, cpu) == 512
    assert module.rows_in_block(4096, 32768, torch.float32, cpu, matrices=2) == 256
    assert module.rows_in_block(4096, 151936, torch.float32, cpu) == module.SMALLEST_BLOCK
    assert module.rows_in_block(16, 151936, torch.float32, cpu) == 16


def test_what_does_not_fit_is_refused():
    hidden, weight, _, labels = draw(4, 8, 10)
    for arguments, options, words in [
        ((hidden, weight, None, labels[:3]), {}, r"\(4, 8\).*\(10, 8\).*\(3,\)"),
        ((hidden, weight, None, labels), {"temperature": 0.0}, "positive"),
        ((hidden, weight, None, labels), {"chunk_size": 0}, "chunk_size=0: must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            fused_token_statistics(*arguments, **options)


# ---- in an actor -----------------------------------------------------------------------------------------------------
def losses(actor: Actor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logprobs, entropies and gradients of a weighted sum of both."""
    logprobs, entropies = actor(
        ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, temperature=0.7, return_entropy=True
    )
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (logprobs * weights + 0.3 * entropies * weights).sum().backward()
    found = {name: p.grad for name, p in actor.named_parameters() if p.grad is not None}
    return logprobs.detach(), entropies.detach(), found


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_fused_actor_says_and_learns_what_a_plain_one_does(kind: str, frozen: bool):
    model = tiny_model(kind)
    if frozen:
        model.get_output_embeddings().weight.requires_grad_(False)
    ours = losses(Actor(copy.deepcopy(model), fused_linear_logprob=True, chunk_size=3))
    theirs = losses(Actor(model))
    assert ours[2].keys() == theirs[2].keys()
    for mine, other in [*zip(ours[:2], theirs[:2], strict=True), *((ours[2][n], theirs[2][n]) for n in ours[2])]:
        assert isinstance(mine, Tensor) and isinstance(other, Tensor)
        assert torch.allclose(mine, other, atol=1e-5, rtol=1e-4), (mine - other).abs().max()


def distances(
    device: torch.device, dtype: torch.dtype, *, rows: int, bias: bool, frozen: bool
) -> list[tuple[float, float]]:
    """How far from float64 values and gradients are, fused and plain; with a bias the vocabulary's end is masked."""
    vocabulary, masked = 20_000, 300  # several blocks of a kernel, and several parts of the weight
    hidden, weight, offset, labels = draw(rows, 64, vocabulary, bias=bias, dtype=dtype)
    hidden /= 4
    if offset is not None:
        offset[-masked:] = -torch.inf
    labels = (labels % (vocabulary - masked)).to(device)
    weights = torch.randn(2, rows, generator=torch.Generator().manual_seed(1)).to(device)

    def numbers(function: Any, kind: torch.dtype) -> list[Tensor]:
        given = (None if part is None else part.to(device, kind) for part in (hidden, weight, offset))
        values, grads = gradients(function, *given, weights, frozen=frozen)  # type: ignore[arg-type]
        return [part.double() for part in (*values, *grads)]

    exact = numbers(plain(labels, 0.7, True), torch.float64)
    ours = numbers(fused(labels, 0.7, True, max(1, rows // 3)), dtype)
    theirs = numbers(plain(labels, 0.7, True), dtype)
    assert len(ours) == 3 if frozen else 4 + bias
    assert all(part.isfinite().all() for part in ours)
    return [
        (float((mine - true).norm()), float((other - true).norm()))
        for mine, other, true in zip(ours, theirs, exact, strict=True)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
# In fp32 both are some 1e-7 off, and which is nearer is chance; in bf16 both are off by what the logits are rounded.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 4.0), (torch.bfloat16, 1.1)])
def test_an_accelerator_is_no_further_from_float64_than_plain_torch(
    dtype: torch.dtype, limit: float, bias: bool, frozen: bool
):
    device = torch.accelerator.current_accelerator()
    assert device is not None
    for mine, other in distances(device, dtype, rows=700, bias=bias, frozen=frozen):
        assert mine <= limit * other, (mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerator_gives_gradients_of_0_for_no_tokens(dtype: torch.dtype):
    device = torch.accelerator.current_accelerator()
    assert device is not None
    assert distances(device, dtype, rows=0, bias=True, frozen=False) == [(0.0, 0.0)] * 5


def test_a_fused_actor_makes_no_logits():
    rows = pad_rows([[5]] * 8, [list(range(10, 50))] * 8, pad_token_id=0)
    widest = 8 * 41 * 128  # what the layers themselves make
    for fused_linear_logprob, most in ((False, 320 * 512), (True, widest)):
        actor = Actor(tiny_model("qwen2"), fused_linear_logprob=fused_linear_logprob, chunk_size=64)
        with _LargestTensor() as largest, torch.no_grad():
            actor(rows.sequences, rows.attention_mask, rows.response_mask)
        assert largest.elements == most


def test_the_output_layer_is_itself_again_and_a_copy_has_its_own():
    actor = Actor(tiny_model("qwen2"), fused_linear_logprob=True)
    before = actor.model(input_ids=ROWS.sequences).logits
    with torch.no_grad():
        expected = actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
        other = copy.deepcopy(actor)
        with pytest.raises(ValueError, match="positive"):
            actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, temperature=0.0)
        assert torch.equal(actor.model(input_ids=ROWS.sequences).logits, before)
        for parameter in actor.parameters():
            parameter.zero_()
        assert torch.equal(other(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask), expected)


def test_models_whose_logits_are_not_their_output_layers_are_refused_by_name():
    from transformers import Gemma2Config

    model = tiny_model("qwen2")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="--fused_linear_logprob: Qwen2ForCausalLM ends in a Sequential"):
        Actor(model, fused_linear_logprob=True)
    shape = tiny_config("qwen2").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    capped = Actor(
        Gemma2Config(**{n: shape[n] for n in names}, num_key_value_heads=2, head_dim=32), fused_linear_logprob=True
    )
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits after the output layer"):
        capped(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)


@pytest.mark.parametrize("fused_linear_logprob", [False, True])
def test_an_actor_refuses_a_chunk_of_no_tokens_before_it_reads_a_model(fused_linear_logprob: bool):
    with pytest.raises(ValueError, match=r"chunk_size=0: must be at least 1.*drop it for 4096"):
        Actor("a-folder-that-is-not-there", fused_linear_logprob=fused_linear_logprob, chunk_size=0)


def test_under_autocast_it_computes_in_16_bit_as_the_layer_does():
    hidden, weight, _, labels = draw(6, 8, 20)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = fused_token_statistics(hidden, weight, None, labels)
        logits = nn.functional.linear(hidden, weight)
    expected, _ = token_statistics_from_logits(logits, labels)
    assert torch.allclose(logprobs, expected, atol=1e-6)
    logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
