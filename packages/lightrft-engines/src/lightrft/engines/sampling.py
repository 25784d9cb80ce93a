"""Logits to tokens: temperature, truncation, Gumbel-max on counter-based noise, and the logprob of what was drawn.

Each row of a batch is drawn from its own distribution with its own noise. The noise of a token is a pure function of
(the sample's seed, the index of the output token, the vocabulary id), so that a sample does not depend on the other
rows. Gumbel-max (Gumbel 1954; Maddison et al., 2014, "A* Sampling") turns a small change of the logits into a
changed token far more rarely than inverting the cumulative distribution does. It is computed as a race: the token
with the largest p_i / e_i wins, e_i standard exponential. With g_i = -log(e_i) that is the largest log(p_i) + g_i, but
it needs one logarithm per element less, and shares its exponentials with the logprob.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as int64: splitmix64's step
_MIX_A, _MIX_B = -4658895280553007687, -7723592293110705685  # splitmix64's multipliers (Steele et al., 2014)
_STEP32, _MUL32_A, _MUL32_B = -1640531527, 0x7FEB352D, 0x846CA68B - 2**32  # C. Wellons' low-bias 32-bit mixer
_BLOCK = 2**19  # elements processed at once: two megabytes of float32 stay in a core's cache
_AHEAD = 2**17  # noises made at once if a token needs fewer: their intermediate values stay in that cache, too
_FIRST_CANDIDATES = 256  # top_p looks this far down the ranking before it sorts the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """Sampling parameters of a batch, one element per row; greedy rows have temperature 0.

    :param temperature: float32 ``[rows]``. :param top_k: int64, 0 keeps all. :param top_p: float32, 1 keeps all.
    :param min_p: float32, 0 keeps all. :param stream: int64, :func:`noise_stream` of the samples' seeds.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    stream: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingShape:
    """Which steps any row of the batch needs: known on the host, so that no step must wait for the device.

    :param any_temperature: some drawn row has a temperature other than 1.
    :param max_top_k: the largest top_k, or 0 if some row keeps all tokens.
    """

    all_greedy: bool = False
    any_greedy: bool = False
    any_temperature: bool = True
    min_p: bool = False
    top_p: bool = False
    max_top_k: int = 0

    @property
    def truncates(self) -> bool:
        return self.min_p or self.top_p or self.max_top_k != 0


def splitmix64(state: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser on int64 (two's complement), a bijection.

    :param state: int64 of any shape; left as it is.
    """
    state = state ^ ((state >> 30) & (2**34 - 1))
    state = state * _MIX_A
    state = state ^ ((state >> 27) & (2**37 - 1))
    state = state * _MIX_B
    return state ^ ((state >> 31) & (2**33 - 1))


def noise_stream(seed: torch.Tensor) -> torch.Tensor:
    """The start of each sample's noise stream: int64 of any shape, from int64 seeds. Constant for a sample."""
    return splitmix64(seed)


def noise_start(seed: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The noise stream of samples whose output tokens are counted from ``-shift`` instead of 0: int64, int64 each."""
    return noise_stream(seed) + shift * _GOLDEN


def noise_keys(stream: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A 64-bit key for output token ``index`` of the sample with that noise stream.

    :param stream: int64 ``[rows]``. :param index: int64 ``[rows]``, 0 for the first output token.
    :return: int64 ``[rows]``.
    """
    return splitmix64(stream + (index + 1) * _GOLDEN)


def _hash32(ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """31 random bits for each (key, id): int32 ``[rows, ids]`` in [0, 2**31).

    The two halves of the key enter at two stages of the mixer, so that no two keys give shifted copies of one stream.
    """
    low = keys.to(torch.int32).unsqueeze(1)
    high = (keys >> 32).to(torch.int32).unsqueeze(1)
    x = ids * _STEP32 + low
    shifted = x >> 16
    x ^= shifted.bitwise_and_(0xFFFF)
    x *= _MUL32_A
    torch.bitwise_right_shift(x, 15, out=shifted)
    x ^= shifted.bitwise_and_(0x1FFFF)
    x += high
    x *= _MUL32_B
    torch.bitwise_right_shift(x, 16, out=shifted)
    x ^= shifted
    return x.bitwise_and_(0x7FFFFFFF)


def exponential_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard exponential noise for vocabulary ids.

    Built on a uniform in the open interval (0, 1) that keeps its relative precision near 0, so that a token of
    probability 1e-9 is drawn with that probability.

    :param keys: int64 ``[rows]``. :param ids: int32 ``[ids]`` or ``[rows, ids]``.
    :return: float32 ``[rows, ids]``, above 0.
    """
    uniform = _hash32(ids, keys).to(torch.float32)
    uniform.add_(0.5).mul_(-(2.0**-31)).clamp_(min=-1 + 2.0**-24)  # this is -u; a float32 must not round it to -1
    return uniform.log1p_().neg_()  # -log(1 - u)


def noise_ahead(stream: torch.Tensor, index: torch.Tensor, vocabulary: int, tokens: int) -> torch.Tensor:
    """Noise for the next ``tokens`` output tokens of rows that draw from the whole vocabulary.

    :param stream: int64 ``[rows]``. :param index: int64 ``[rows]``, how many output tokens each already has.
    :return: float32 ``[rows, tokens, vocabulary]``.
    """
    device = stream.device
    keys = noise_keys(stream.unsqueeze(1), index.unsqueeze(1) + torch.arange(tokens, device=device)).flatten()
    noise = exponential_noise(keys, torch.arange(vocabulary, dtype=torch.int32, device=device))
    return noise.unflatten(0, (-1, tokens))


def tokens_ahead(rows: int, vocabulary: int, left: int) -> int:
    """Number of tokens for which noise is made at a time: with small vocabularies calls cost more than numbers.

    :param left: most tokens that any row will still draw.
    """
    return max(1, min(left, _AHEAD // (rows * vocabulary)))


def truncate(logits: torch.Tensor, rows: RowSampling, shape: SamplingShape) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Drop tokens by min_p, then top_k, then top_p over the rest (vLLM's order). Dropped tokens become -inf.

    :param logits: float32 ``[rows, vocabulary]``, temperature already applied.
    :return: values and their vocabulary ids (int64), ``[rows, candidates]`` ranked downwards; ids are None if no
        ranking was needed and ``values`` covers the vocabulary.
    """
    if shape.min_p:
        floor = logits.amax(-1, keepdim=True) + rows.min_p.log().unsqueeze(1)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    vocabulary = logits.shape[-1]
    if shape.max_top_k > 0:
        values, ids = logits.topk(min(shape.max_top_k, vocabulary), dim=-1)
        rank = torch.arange(values.shape[-1], device=values.device)
        values = values.masked_fill(rank >= rows.top_k.unsqueeze(1), -torch.inf)
        return (_top_p(values, rows.top_p, values.logsumexp(-1))[0] if shape.top_p else values), ids
    some_top_k = shape.max_top_k < 0
    if not some_top_k and not shape.top_p:
        return logits, None
    if not some_top_k:
        total, count = logits.logsumexp(-1), _FIRST_CANDIDATES
        while count < vocabulary:
            values, ids = logits.topk(count, dim=-1)
            values, reached = _top_p(values, rows.top_p, total)
            if bool(reached.all()):
                return values, ids
            count *= 8
    values, ids = logits.sort(dim=-1, descending=True)
    if some_top_k:
        kept = torch.where(rows.top_k > 0, rows.top_k, vocabulary)
        values = values.masked_fill(torch.arange(vocabulary, device=values.device) >= kept.unsqueeze(1), -torch.inf)
    return (_top_p(values, rows.top_p, values.logsumexp(-1))[0] if shape.top_p else values), ids


def _top_p(values: torch.Tensor, top_p: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep ranked tokens until their probability reaches top_p; also returns for each row whether it was reached."""
    share = (values - total.unsqueeze(1)).exp()
    before = share.cumsum(-1) - share
    limit = top_p.unsqueeze(1)
    reached = (before[:, -1] + share[:, -1] >= top_p) & (top_p < 1)
    return values.masked_fill((before >= limit) & (limit < 1), -torch.inf), reached


def draw(
    logits: torch.Tensor,
    index: torch.Tensor,
    rows: RowSampling,
    shape: SamplingShape,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row.

    :param logits: ``[rows, vocabulary]`` of any floating dtype. :param index: int64 ``[rows]``, how many output tokens
        the row already has.
    :param noise: float32 ``[rows, vocabulary]``, these tokens' of :func:`noise_ahead`; None: it is made here.
    :return: tokens (int64 ``[rows]``) and their natural-log probabilities (float32 ``[rows]``) under the distribution
        drawn from; for greedy rows under the model's own, at temperature 1.
    """
    per_block = max(1, _BLOCK // logits.shape[-1]) if logits.device.type == "cpu" else logits.shape[0]
    if noise is not None or logits.shape[0] <= per_block:
        return _draw_block(logits.float(), index, rows, shape, noise)
    tokens, logprobs = [], []
    for begin in range(0, logits.shape[0], per_block):
        part = slice(begin, begin + per_block)
        block = RowSampling(
            temperature=rows.temperature[part],
            top_k=rows.top_k[part],
            top_p=rows.top_p[part],
            min_p=rows.min_p[part],
            stream=rows.stream[part],
        )
        token, logprob = _draw_block(logits[part].float(), index[part], block, shape)
        tokens.append(token)
        logprobs.append(logprob)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_block(
    logits: torch.Tensor,
    index: torch.Tensor,
    rows: RowSampling,
    shape: SamplingShape,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = logits, None
    if shape.any_temperature and not shape.all_greedy:
        temperature = rows.temperature
        if shape.any_greedy:
            temperature = torch.where(temperature > 0, temperature, 1.0)
        values = logits / temperature.unsqueeze(1)
    if shape.truncates and not shape.all_greedy:
        values, ids = truncate(values, rows, shape)
    shares = values.softmax(-1)
    total, scores = shares.sum(-1, keepdim=True), values
    if not shape.all_greedy:
        if noise is None:
            wanted = (
                torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
                if ids is None
                else ids.to(torch.int32)
            )
            noise = exponential_noise(noise_keys(rows.stream, index), wanted)
        scores = shares / noise
        if shape.any_greedy:  # by the values: two near the peak may have equal probabilities
            scores = torch.where((rows.temperature == 0).unsqueeze(1), values, scores)
    choice = scores.max(-1, keepdim=True).indices  # faster than argmax
    # Over a large vocabulary softmax adds up less exactly than sum does: 1e-5 of a logprob.
    logprobs = (shares.gather(-1, choice) / total).log_().squeeze(1)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(1), logprobs
