"""Preparing models: before or after their optimizer, several at once, over fewer ranks than requested."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from lightrft.strategy.hub_layout import HubLayout, hub_sources

from .claims import (
    StrategyClaims,
    constant_schedule,
    gradients_of,
    next_token_loss,
    on_ranks,
    refused,
    weights_of,
)


class PreparingClaims(StrategyClaims):
    """prepare, prepare_model, prepare_models_and_optimizers, create_optimizer."""

    @on_ranks
    def test_either_order_prepares(self) -> None:
        results = []
        for order in ("model first", "optimizer first", "with scheduler"):
            strategy = self.strategy()
            model = self.model()
            scheduler = None
            if order == "model first":
                model = strategy.prepare(model)
                optimizer = strategy.create_optimizer(model)
            else:
                optimizer = strategy.create_optimizer(model)
                scheduler = constant_schedule(optimizer) if order == "with scheduler" else None
                prepared = strategy.prepare((model, optimizer, scheduler))
                assert isinstance(prepared, tuple)
                assert prepared[1] is optimizer
                assert prepared[2] is scheduler
                model = prepared[0]
            outcome = self.train(strategy, model, optimizer, scheduler=scheduler)
            assert outcome[0].stepped, order
            results.append(weights_of(strategy, model))
        for result in results[1:]:
            self.assert_same_weights(result, results[0], exact=True)

    @on_ranks
    def test_a_pair_without_a_scheduler_comes_back_as_a_pair(self) -> None:
        strategy = self.strategy()
        model = self.model()
        optimizer = strategy.create_optimizer(model)
        prepared = strategy.prepare((model, optimizer))
        assert len(prepared) == 2
        assert prepared[1] is optimizer

    @on_ranks
    def test_prepare_keeps_the_order_and_passes_none_through(self) -> None:
        strategy = self.strategy()
        models = [self.model(seed=seed) for seed in range(3)]
        expected = [copy.deepcopy(model) for model in models]
        rows = self.rows(2)
        prepared = strategy.prepare(models[0], None, models[1], models[2], is_rlhf=True)
        assert isinstance(prepared, tuple)
        assert prepared[1] is None
        with torch.no_grad():
            for model, plain in zip((prepared[0], *prepared[2:]), expected, strict=True):
                logits = model(input_ids=rows.to(strategy.device)).logits.cpu()
                torch.testing.assert_close(logits, plain(input_ids=rows).logits, atol=1e-4, rtol=1e-4)

    @on_ranks
    def test_one_model_comes_back_as_one_object(self) -> None:
        strategy = self.strategy()
        prepared = strategy.prepare(self.model(), is_rlhf=True)
        assert isinstance(prepared, torch.nn.Module)
        assert isinstance(strategy.unwrap_model(prepared), torch.nn.Module)

    @on_ranks
    def test_a_model_that_nobody_holds_any_more_is_freed(self) -> None:
        strategy = self.strategy()
        model, frozen = strategy.prepare(self.model()), strategy.prepare_model(self.model(seed=1))
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer)
        held = {
            "trained": weakref.ref(strategy.unwrap_model(model)),
            "frozen": weakref.ref(strategy.unwrap_model(frozen)),
        }
        del model, frozen, optimizer
        gc.collect()
        assert [name for name, reference in held.items() if reference() is not None] == []

    @on_ranks
    def test_what_is_not_trainable_is_frozen(self) -> None:
        strategy = self.strategy()
        actor, critic, reference = (self.model(seed=seed) for seed in range(3))
        actor, critic, reference = strategy.prepare(actor, critic, reference, trainable=[actor, critic])
        for model in (actor, critic):
            assert any(p.requires_grad for p in model.parameters())
        assert not any(p.requires_grad for p in reference.parameters())
        assert not reference.training

    @on_ranks
    def test_a_frozen_model_is_sharded_over_as_many_ranks_as_there_are(self) -> None:
        strategy = self.strategy()
        plain = self.model(seed=3)
        rows = self.rows(2)
        with torch.no_grad():
            expected = plain(input_ids=rows).logits
        for shard_size in (1, 8, None):
            model = strategy.prepare_model(copy.deepcopy(plain), shard_size=shard_size)
            assert not any(p.requires_grad for p in model.parameters())
            with torch.no_grad():
                logits = model(input_ids=rows.to(strategy.device)).logits.cpu()
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    @on_ranks
    def test_several_reward_models_are_prepared_one_by_one(self) -> None:
        strategy = self.strategy()
        rows = self.rows(1)
        models = [self.model(seed=seed) for seed in range(3)]
        plain = [copy.deepcopy(model) for model in models]
        prepared = [strategy.prepare_model(model, shard_size=8) for model in models]
        with torch.no_grad():
            for model, original in zip(prepared, plain, strict=True):
                logits = model(input_ids=rows.to(strategy.device)).logits.cpu()
                torch.testing.assert_close(logits, original(input_ids=rows).logits, atol=1e-4, rtol=1e-4)

    @on_ranks
    def test_everything_that_ppo_needs_comes_in_the_order_that_scripts_unpack(self) -> None:
        strategy = self.strategy()
        settings = {
            "actor_learning_rate": 6e-3,
            "critic_learning_rate": 9e-3,
            "adam_betas": [0.8, 0.97],
            "l2": 0.3,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_ratio": 0.2,
        }
        actor, critic = self.model(), self.model(seed=1)
        rewards, reference = [self.model(seed=2), self.model(seed=3)], self.model(seed=4)
        prepared = strategy.prepare_models_and_optimizers(actor, critic, rewards, reference, settings, 10)
        (actor, actor_optim, actor_schedule), (critic, critic_optim, critic_schedule), rewards, reference = prepared
        assert len(rewards) == 2
        assert actor_optim is not critic_optim
        assert actor_schedule.optimizer is actor_optim
        assert critic_schedule.optimizer is critic_optim
        for optimizer, peak in ((actor_optim, 6e-3), (critic_optim, 9e-3)):
            matrices = optimizer.param_groups[0]
            assert matrices["lr"] == pytest.approx(peak / 3), "two of ten steps rise to the peak"
            assert (tuple(matrices["betas"]), matrices["weight_decay"]) == ((0.8, 0.97), 0.3)
        assert not any(p.requires_grad for model in (*rewards, reference) for p in model.parameters())
        assert self.train(strategy, actor, actor_optim, scheduler=actor_schedule)[0].stepped
        assert self.train(strategy, critic, critic_optim, scheduler=critic_schedule)[0].stepped

    @on_ranks
    def test_a_missing_critic_reward_or_reference_stays_missing(self) -> None:
        strategy = self.strategy(lr_scheduler="constant")
        (actor, optimizer, _), critic, rewards, reference = strategy.prepare_models_and_optimizers(
            self.model(), None, None, None, None, 4
        )
        assert critic == (None, None, None)
        assert rewards is None
        assert reference is None
        assert self.train(strategy, actor, optimizer)[0].stepped

    @on_ranks
    def test_the_optimizer_takes_its_options_from_the_configuration_and_arguments_win(self) -> None:
        strategy = self.strategy(actor_learning_rate=3e-3, adam_betas=(0.8, 0.9), l2=0.1)
        model = strategy.prepare(self.model())
        groups = strategy.create_optimizer(model).param_groups
        assert {group["lr"] for group in groups} == {3e-3}
        assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
        assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
        other = strategy.prepare(self.model())
        groups = strategy.create_optimizer(other, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.2).param_groups
        assert {group["lr"] for group in groups} == {1e-5}
        assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.95)}
        assert {group["weight_decay"] for group in groups} == {0.2, 0.0}

    @on_ranks
    def test_a_model_without_trainable_parameters_gets_no_optimizer(self) -> None:
        strategy = self.strategy()
        model = self.model()
        model.requires_grad_(False)
        with refused(ValueError, saying=["trainable"]):
            strategy.create_optimizer(strategy.prepare(model))

    @on_ranks
    def test_an_optimizer_of_another_model_is_refused(self) -> None:
        strategy = self.strategy()
        stranger = strategy.create_optimizer(self.model(seed=1))
        with refused(ValueError, saying=["optimizer"]):
            strategy.prepare((self.model(), stranger))

    @on_ranks
    def test_preparing_twice_changes_nothing(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        again = strategy.prepare(model)
        assert again is model
        optimizer = strategy.create_optimizer(model)
        assert self.train(strategy, model, optimizer)[0].stepped

    @on_ranks
    def test_a_model_may_be_built_without_memory_and_filled_later(self) -> None:
        strategy = self.strategy(meta_init=True)
        plain = self.model(seed=5)
        with strategy.init_model_context(meta_init=True):
            empty = self.model()
        assert all(p.is_meta for p in empty.parameters())
        with strategy.init_model_context(meta_init=False):
            assert not any(p.is_meta for p in self.model().parameters())
        model = strategy.prepare(empty)
        layout, tensors = HubLayout(plain), dict(hub_sources(plain))
        whole = ((hub.name, hub.view(tensors[hub.source].detach())) for hub in layout.by_name.values())
        strategy.import_weights(model, whole)
        rows = self.rows(2)
        with torch.no_grad():
            logits = model(input_ids=rows.to(strategy.device)).logits.cpu()
            torch.testing.assert_close(logits, plain(input_ids=rows).logits, atol=1e-4, rtol=1e-4)
        optimizer = strategy.create_optimizer(model)
        assert self.train(strategy, model, optimizer)[0].stepped

    @on_ranks
    def test_a_strategy_trains_two_models_without_mixing_them(self) -> None:
        reference = self.reference()
        expected = {}
        for seed in (0, 1):
            model = reference.prepare(self.model(seed=seed))
            optimizer = reference.create_optimizer(model)
            self.train(reference, model, optimizer, first=seed)
            expected[seed] = gradients_of(reference, model, optimizer)
        strategy = self.strategy()
        models = [strategy.prepare(self.model(seed=seed)) for seed in (0, 1)]
        optimizers = [strategy.create_optimizer(model) for model in models]
        losses = [
            next_token_loss(model, self.share(strategy, self.rows(strategy.config.train_batch_size, seed), 2, 0))
            for seed, model in enumerate(models)
        ]
        for loss, model, optimizer in zip(losses, models, optimizers, strict=True):  # interleaved
            strategy.backward(loss, model, optimizer)
        for seed, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            assert strategy.optimizer_step(optimizer, model, None).stepped
            self.assert_same_gradients(gradients_of(strategy, model, optimizer), expected[seed])
