"""Reward models and critics are given the actor's tokens: one of another family would score noise, and not say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightrft.strategy.errors import ConfigError


def require_same_tokens(tokenizer: Any, models: Sequence[tuple[str, str]], *, trust_remote_code: bool) -> None:
    """Compare each model's tokenizer with the actor's; one that has none is taken as it is.

    Tokens that were added to a vocabulary are not compared: models of one family differ in those.

    :param models: the flag that named each, and its folder or hub name.
    :raises ConfigError: a token of the actor's has another id there; one fault for each such model.
    """
    import transformers

    mine, problems = _own_tokens(tokenizer), []
    for flag, name in models:
        try:
            other = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            continue
        theirs = _own_tokens(other)
        different = [token for token, index in mine.items() if theirs.get(token, index) != index]
        if different:
            token = different[0]
            problems.append(
                f"--{flag} {name!r}: reads other tokens than --pretrain writes, for example {token!r}, which is "
                f"{theirs[token]} there and {mine[token]} here; name a model with the tokenizer of --pretrain"
            )
    if problems:
        raise ConfigError(problems)


def _own_tokens(tokenizer: Any) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
