from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightrft.data import tasks
from lightrft.strategy import ConfigError, FakeStrategy, StrategyConfig
from lightrft.trainer.run import build
from lightrft.trainer.vocabularies import require_same_tokens


def model_with(folder: Path, vocabulary: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    """A model's folder whose tokenizer numbers its tokens in this order."""
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "VOCABULARY", vocabulary)
        tasks.build_tokenizer().save_pretrained(folder)
    tasks.build_model_config().save_pretrained(folder)
    return str(folder)


def test_a_model_that_would_be_given_another_models_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with such a reward model trained on its noise."""
    actor = model_with(tmp_path / "actor", tasks.VOCABULARY, monkeypatch)
    other = model_with(tmp_path / "other", tasks.VOCABULARY[::-1], monkeypatch)
    named: dict[str, Any] = {"reward_pretrain": other, "critic_pretrain": other, "advantage_estimator": "gae"}
    config = StrategyConfig(strategy="fake", engine_type="hf", pretrain=actor, prompt_data="never.jsonl", **named)
    with pytest.raises(ConfigError) as caught:
        build(FakeStrategy(args=config), config, tmp_path)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        f"--reward_pretrain {other!r}",
        f"--critic_pretrain {other!r}",
    ]


def test_more_tokens_or_no_tokenizer_are_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = model_with(tmp_path / "larger", (*tasks.VOCABULARY, "+"), monkeypatch)
    (tmp_path / "bare").mkdir()
    tasks.build_model_config().save_pretrained(tmp_path / "bare")
    models = [("reward_pretrain", larger), ("reward_pretrain", str(tmp_path / "bare"))]
    require_same_tokens(tasks.build_tokenizer(), models, trust_remote_code=False)
