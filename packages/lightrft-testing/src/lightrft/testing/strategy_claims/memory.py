"""Moving models and optimizer states to the host and back: repeated moves do nothing, training is unchanged."""

from __future__ import annotations

from unittest import mock

import torch

from .claims import StrategyClaims, moments_of, on_ranks, weights_of


class MemoryClaims(StrategyClaims):
    """offload_model, reload_model, maybe_offload_optimizer, maybe_load_optimizer."""

    @on_ranks
    def test_training_goes_on_after_an_offload_as_if_there_had_been_none(self) -> None:
        results = []
        for moves in (False, True):
            strategy = self.strategy()
            model = strategy.prepare(self.model())
            optimizer = strategy.create_optimizer(model)
            for step in range(3):
                if moves:
                    strategy.reload_model(model)
                    strategy.maybe_load_optimizer(optimizer)
                self.train(strategy, model, optimizer, first=step)
                if moves:
                    strategy.maybe_offload_optimizer(optimizer)
                    strategy.offload_model(model)
            if moves:
                strategy.reload_model(model)
                strategy.maybe_load_optimizer(optimizer)
            results.append((weights_of(strategy, model), moments_of(strategy, model, optimizer)))
        self.assert_same_weights(results[1][0], results[0][0], exact=True)
        self.assert_same_weights(results[1][1], results[0][1], exact=True)

    @on_ranks
    def test_an_optimizer_that_was_never_offloaded_may_be_loaded(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        assert strategy.maybe_load_optimizer(optimizer).nbytes == 0
        self.train(strategy, model, optimizer)
        assert strategy.maybe_load_optimizer(optimizer).nbytes == 0

    @on_ranks
    def test_a_repeated_move_does_nothing(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer)
        strategy.maybe_offload_optimizer(optimizer)
        assert strategy.maybe_offload_optimizer(optimizer).nbytes == 0
        strategy.maybe_load_optimizer(optimizer)
        assert strategy.maybe_load_optimizer(optimizer).nbytes == 0
        strategy.offload_model(model)
        assert strategy.offload_model(model).nbytes == 0
        strategy.reload_model(model)
        assert strategy.reload_model(model).nbytes == 0

    @on_ranks
    def test_where_nothing_moves_the_devices_cache_is_left_alone(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        with mock.patch.object(strategy, "sync_and_clear_cache") as cleared:
            self.train(strategy, model, optimizer)
            strategy.maybe_load_optimizer(optimizer)
            strategy.reload_model(model)
        cleared.assert_not_called()

    @on_ranks
    def test_a_move_says_how_many_bytes_it_took(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer)
        reports = [strategy.maybe_offload_optimizer(optimizer), strategy.offload_model(model)]
        for report in reports:
            assert report.seconds >= 0
            # If the trainer computes on the host there is nowhere to move to.
            assert (report.nbytes > 0) == (strategy.device.type != "cpu")
        state = next(iter(strategy.iter_state(model, optimizer)))
        assert state.weight.device == torch.device("cpu")

    @on_ranks
    def test_the_state_can_be_read_while_it_is_offloaded(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer)
        expected = moments_of(strategy, model, optimizer)
        strategy.maybe_offload_optimizer(optimizer)
        self.assert_same_weights(moments_of(strategy, model, optimizer), expected, exact=True)
