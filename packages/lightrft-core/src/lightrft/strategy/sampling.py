"""Sampling parameters in one typed form, and the seed of every sample.

Engines honour :class:`SamplingParams`; users may also bring a dict with vLLM's names or an engine's own object.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

# Other names of our fields, in an engine's own object or an older script.
ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
# Further settings of an engine's own object that do not change which tokens are sampled: how outputs are written, and
# what a model's GenerationConfig has besides. do_sample and eos_token_id are read separately.
_BESIDES = (
    "bos_token_id",
    "detokenize",
    "do_sample",
    "eos_token_id",
    "include_stop_str_in_output",
    "no_stop_trim",
    "output_attentions",
    "output_hidden_states",
    "output_kind",
    "pad_token_id",
    "skip_clone",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "transformers_version",
    "use_cache",
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw a response. Names and meanings are vLLM's.

    :param n: samples for each prompt.
    :param temperature: divides the logits; 0 is greedy.
    :param top_p: smallest set of tokens whose probability reaches this; 1 keeps all.
    :param top_k: this many likeliest tokens; 0 or -1 keeps all.
    :param min_p: drops tokens below this share of the likeliest one's probability; 0 keeps all.
    :param max_tokens: longest response, in tokens.
    :param min_tokens: end and stop tokens cannot be drawn before this many.
    :param stop_token_ids: tokens that end a response, besides the model's own end tokens.
    :param ignore_eos: continue after the model's own end token.
    :param seed: every sample's seed derives from it (see :func:`sample_seed`); None: the run's seed.
    :param logprobs: return the logprob of each sampled token under the distribution it was drawn from.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)!r}: must be {rule}"
            for name, ok, rule in (
                ("n", self.n >= 1, "at least 1"),
                ("temperature", self.temperature >= 0, "0 (greedy) or more"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("top_k", self.top_k >= -1, "-1 or 0 (all tokens), or a positive count"),
                ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
                ("max_tokens", self.max_tokens >= 1, "at least 1"),
                ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            )
            if not ok
        ]
        if problems:
            raise ValueError("sampling parameters: " + "; ".join(problems))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def full_support(self) -> bool:
        """True where only the temperature shapes the distribution, so that trainer logprobs are comparable."""
        return self.top_p == 1 and self.top_k <= 0 and self.min_p == 0

    @classmethod
    def coerce(cls, value: Any) -> SamplingParams:
        """Accept ours, a mapping with vLLM's names, an object with such attributes, or None for the defaults.

        :raises ValueError: a mapping's name is unknown, or an object sets what is not one of ours: neither a typo nor
            an unknown setting may silently change what is sampled.
        """
        if value is None:
            return cls()
        if isinstance(value, SamplingParams):
            return value
        names = {field.name for field in dataclasses.fields(cls)}
        spelled = {**{name: name for name in names}, **ALIASES}
        if isinstance(value, Mapping):
            if unknown := sorted(set(map(str, value)) - {*spelled, *_BESIDES}):
                raise ValueError(
                    f"sampling parameters: unknown {', '.join(unknown)}; known are {', '.join(sorted(names))}"
                )
            value = SimpleNamespace(**value)
        elif not any(hasattr(value, name) for name in spelled):
            raise ValueError(
                f"sampling parameters: {type(value).__name__} has none of {', '.join(sorted(names))}; "
                "pass SamplingParams, a dict with those names, or the engine's own object"
            )
        elif lost := _settings_besides(value, {*spelled, *_BESIDES}):
            raise ValueError(
                f"sampling parameters: {type(value).__name__} sets {', '.join(lost)}, which would be lost; set "
                f"only {', '.join(sorted(names))}"
            )
        given: dict[str, Any] = {
            ours: getattr(value, theirs) for theirs, ours in spelled.items() if hasattr(value, theirs)
        }
        if getattr(value, "do_sample", None) is False:
            given["temperature"] = 0.0
        if (ends := getattr(value, "eos_token_id", None)) is not None:
            ends = [ends] if isinstance(ends, int) else ends
            given["stop_token_ids"] = [*(given.get("stop_token_ids") or ()), *ends]
        given = {key: item for key, item in given.items() if item is not None}
        if "stop_token_ids" in given:
            given["stop_token_ids"] = tuple(int(token) for token in given["stop_token_ids"])
        if "logprobs" in given:  # vLLM's 0 means "the sampled token's", so only False turns it off
            given["logprobs"] = given["logprobs"] is not False
        return cls(**given)


def _settings_besides(value: Any, known: Container[str]) -> list[str]:
    """Settings of an engine's own object other than ``known``, as ``name=value``."""
    try:
        untouched = type(value)()
    except (TypeError, ValueError):  # a type without defaults
        return []
    fields = getattr(value, "__struct_fields__", None) or getattr(value, "__dict__", ())  # vLLM's is a msgspec struct
    # Attributes that the type does not have are not settings: a Namespace may have any.
    settings = [name for name in fields if name[0] != "_" and name not in known and hasattr(untouched, name)]
    default, given = ({name: repr(getattr(one, name)) for name in settings} for one in (untouched, value))
    return [f"{name}={given[name]}" for name in settings if given[name] != default[name]]


def sample_seed(run_seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """The seed of one sample, a pure function of its place in the run and of nothing else.

    It does not depend on world size, tensor-parallel size, batch composition or engine, so neither does the sample.

    :return: an int in [0, 2**63).
    """
    key = f"{run_seed}:{step}:{prompt_index}:{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
