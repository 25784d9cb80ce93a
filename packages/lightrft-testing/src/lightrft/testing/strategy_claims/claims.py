"""Claims about a strategy: written as tests, executed on every rank of a pool."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.strategy_base import StepResult, StrategyBase
from lightrft.testing.ranks import FunctionReference, RankPool
from lightrft.testing.tiny_models import VOCABULARY, tiny_model

SETTINGS: Mapping[str, Any] = {
    "seed": 7,
    "dist_timeout": 60.0,
    "max_norm": 0.0,
    "micro_train_batch_size": 2,
    "engine_type": "fake",
    "actor_learning_rate": 1e-2,
    "critic_learning_rate": 1e-2,
    # A larger epsilon keeps Adam from amplifying the rounding of tiny gradients.
    "adam_eps": 1e-4,
    "plot_every": -1,
}


class StrategyClaims:
    """The base of all claims. A subclass sets the strategy and the number of ranks."""

    world_size: ClassVar[int] = 1
    timeout: ClassVar[float] = 180.0
    # Relative error of a gradient, and absolute error of a weight after a few steps, that may be rounding.
    gradient_tolerance: ClassVar[float] = 1e-5
    weight_tolerance: ClassVar[float] = 2e-5

    # Set on the ranks.
    folder: Path

    @classmethod
    def make_strategy(cls, **settings: Any) -> StrategyBase:
        """The strategy under test, constructed but not set up. Called on every rank.

        :param settings: fields of :class:`lightrft.strategy.StrategyConfig`.
        """
        raise NotImplementedError(f"{cls.__name__}: define make_strategy(cls, **settings)")

    # ---- making things -----------------------------------------------------------------------------------------------
    def strategy(self, *, accumulation: int = 1, **settings: Any) -> StrategyBase:
        """A strategy with the suite's settings; ``accumulation`` micro-batches of two rows a step on each rank."""
        return self.make_strategy(**self.settings(accumulation, **settings))

    def settings(self, accumulation: int = 1, **settings: Any) -> dict[str, Any]:
        merged = {**SETTINGS, **settings}
        merged.setdefault("train_batch_size", merged["micro_train_batch_size"] * self.world_size * accumulation)
        return merged

    def reference(self, **settings: Any) -> FakeStrategy:
        """The reference: one process with the whole batch at once. Works on every rank, without the others."""
        merged = self.settings(**settings)
        merged["micro_train_batch_size"] = merged["train_batch_size"]
        return FakeStrategy(**merged)

    def model(self, kind: str = "qwen2", *, seed: int = 0) -> nn.Module:
        return tiny_model(kind, seed=seed)

    def rows(self, count: int, seed: int = 0, length: int = 10) -> torch.Tensor:
        """Token ids ``[count, length]``, the same on every rank."""
        return torch.randint(7, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1000 + seed))

    def share(self, strategy: StrategyBase, rows: torch.Tensor, micro: int, index: int) -> torch.Tensor:
        """This rank's ``index``-th micro-batch of ``micro`` rows; those of all ranks are a slice of ``rows``."""
        start = (index * strategy.data_parallel_size + strategy.data_parallel_rank) * micro
        return rows[start : start + micro].to(strategy.device)

    def train(
        self,
        strategy: StrategyBase,
        model: nn.Module,
        optimizer: Any,
        *,
        steps: int = 1,
        first: int = 0,
        scheduler: Any = None,
        accumulation: int = 1,
    ) -> list[StepResult]:
        """Some steps on batches that every strategy splits in the same way; returns the results at boundaries."""
        results = []
        micro = strategy.config.micro_train_batch_size
        for step in range(first, first + steps):
            rows = self.rows(strategy.config.train_batch_size, seed=step)
            for index in range(accumulation):
                loss = next_token_loss(model, self.share(strategy, rows, micro, index))
                strategy.backward(loss, model, optimizer)
                result = strategy.optimizer_step(optimizer, model, scheduler)
            results.append(result)
        return results

    # ---- comparing ---------------------------------------------------------------------------------------------------
    def assert_same_gradients(self, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
        """Each tensor within ``gradient_tolerance`` of the whole gradient's norm."""
        assert list(actual) == list(expected)
        scale = torch.stack([tensor.norm() for tensor in expected.values()]).norm().item()
        assert scale > 0
        errors = {name: (actual[name] - expected[name]).norm().item() / scale for name in expected}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= self.gradient_tolerance, f"{worst}: off by {errors[worst]:.2e} of the gradient's norm"

    def assert_same_weights(
        self, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, exact: bool = False
    ) -> None:
        """Each element within ``weight_tolerance``, or equal bit for bit."""
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            error = (actual[name] - tensor).abs().max().item()
            bound = 0.0 if exact else self.weight_tolerance
            assert error <= bound, f"{name}: off by {error:.2e}, {bound:.0e} is possible by rounding"


def on_ranks(claim: Callable[..., str | None]) -> Callable[..., None]:
    """Turn a method that is written for a rank into a test: pytest calls it once, and it runs on every rank.

    Within the claim ``self`` is a fresh instance, ``self.folder`` a folder that the ranks share; parameters beyond
    ``self`` come from ``pytest.mark.parametrize``. The result of rank 0 is printed.
    """
    parameters = list(inspect.signature(claim).parameters.values())[1:]

    def test(self: Any, rank_pools: Any, tmp_path: Path, **params: Any) -> None:
        suite = type(self)
        pool: RankPool = rank_pools(suite.world_size)
        reference = FunctionReference.of(suite)
        [result, *_] = pool.run(run_claim, reference, claim.__name__, tmp_path, params, timeout=suite.timeout)
        if isinstance(result, str):  # figures to look at
            sys.stdout.write(f"\n{result}")

    test.__name__, test.__qualname__, test.__doc__ = claim.__name__, claim.__qualname__, claim.__doc__
    test.__module__ = claim.__module__
    position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter(name, position) for name in ("self", "rank_pools", "tmp_path")]
    test.__signature__ = inspect.Signature([*own, *parameters])
    test.claim = claim
    return test


def run_claim(suite: FunctionReference, name: str, folder: Path, params: Mapping[str, Any]) -> Any:
    """On a rank: run a claim of a suite, or one of its methods."""
    instance = suite.resolve()()
    instance.folder = folder
    method = getattr(type(instance), name)
    return getattr(method, "claim", method)(instance, **params)


def next_token_loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each row's next tokens, 0-d."""
    logits = model(input_ids=rows).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def weights_of(strategy: StrategyBase, model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole weights by module name, on the CPU. Every rank must call."""
    return {item.name: item.weight.float() for item in strategy.iter_state(model)}


def moments_of(strategy: StrategyBase, model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Whole optimizer moments by ``kind/name``, on the CPU. Every rank must call."""
    return {
        f"{kind}/{item.name}": moment.float()
        for item in strategy.iter_state(model, optimizer)
        for kind, moment in item.moments.items()
    }


def gradients_of(strategy: StrategyBase, model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """The gradient of an optimizer's first step, read from its first moment. Every rank must call."""
    beta = optimizer.param_groups[0]["betas"][0]
    return {
        item.name: item.moments["exp_avg"].float() / (1 - beta)
        for item in strategy.iter_state(model, optimizer)
        if item.moments
    }


@contextmanager
def refused(*kinds: type[BaseException], saying: Sequence[str] = ()) -> Iterator[None]:
    """Within it an error of these kinds must be raised, with all of these words in its message."""
    try:
        yield
    except kinds as error:
        message = str(error)
    else:
        raise AssertionError(f"nothing was raised; expected {' or '.join(kind.__name__ for kind in kinds)}")
    lacking = [word for word in saying if word not in message]
    assert not lacking, f"the message does not say {lacking}: {message}"


constant_schedule: Callable[[Any], Any] = functools.partial(
    torch.optim.lr_scheduler.LambdaLR, lr_lambda=[lambda step: 1 / (step + 1)] * 2
)
