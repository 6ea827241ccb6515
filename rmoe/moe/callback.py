"""The routing of any MoE in the logs of `transformers.Trainer`: load, dead experts, entropy."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from rmoe.moe.layers import RoutedLayer, require_layers
from rmoe.moe.recorder import listen
from rmoe.moe.records import RoutingRecord
from rmoe.moe.replaying import Pass, passes
from rmoe.moe.tokens import Tokens
from rmoe.routing.balance import summed_over_ranks
from rmoe.routing.contract import count_assignments

QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


class RoutingCallback(TrainerCallback):
    """Log how any MoE routes, to whatever trackers a Trainer reports to.

        trainer.add_callback(rmoe.moe.RoutingCallback(trainer))

    Of the steps that are logged, over all their micro-batches and ranks, padding left out:

        routing/load_min, _p05, _median, _p95, _max   an expert's assignments over its layer's mean; 1 is balance
        routing/max_violation                         largest load over the mean, minus 1 (MaxVio); mean over layers
        routing/dead_experts                          experts of all layers that no token went to
        routing/entropy                               of the router's distribution in nats, mean over tokens and layers

    Args:
        trainer: its `log` is called. Its model may be RMoE, a graft, or any MoE that `rmoe analyze` reads.
        per_layer: also the last three of each layer, as `routing/LAYER/...`.
    """

    def __init__(self, trainer: Trainer, per_layer: bool = False) -> None:
        self.trainer, self.per_layer = trainer, per_layer
        self._hooks = ExitStack()
        self._layers: list[RoutedLayer] = []
        self._sums: dict[str, list[Tensor]] = {}  # of each layer: assignments per expert, entropy, tokens
        self._heard: list[tuple[RoutedLayer, RoutingRecord]] = []
        self._listening = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start to listen.

        Raises:
            RequestError: the model is no MoE, or cannot be read.
        """
        self._hooks.close()  # of a training that ended with an exception
        self._sums = {}
        self._layers = require_layers(model)
        current = self._hooks.enter_context(passes(model, self._begin, self._end))

        def receive(layer: RoutedLayer, record: RoutingRecord) -> None:
            if current() is not None:  # else a backward pass runs it again
                self._heard.append((layer, record))

        self._hearing = self._hooks.enter_context(listen(self._layers, receive))
        self._hearing.paused = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen in the steps that will be logged."""
        by_step = str(args.logging_strategy.value) == "steps"
        self._listening = not by_step or (state.global_step + 1) % max(int(state.logging_steps), 1) == 0
        self._listening |= state.global_step == 0 and args.logging_first_step
        self._hearing.paused = not self._listening

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was heard, if this step is logged."""
        self._hearing.paused = True
        self._log(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was heard in the epoch, if epochs are logged."""
        self._log(control)

    def _log(self, control: Any) -> None:
        if control.should_log and self._sums:
            self.trainer.log(self.measures())
            control.should_log = True  # a log takes it back, and the Trainer's own is still to come
            self._sums = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._sums = {}
        self._hooks.close()

    def _begin(self, tokens: Tokens) -> Pass:
        self._heard = []  # of a pass that ended with an exception
        return Pass(tokens)

    def _end(self, done: Pass, cache: Any) -> None:
        """One forward pass: add up what its layers decided for real tokens."""
        heard, self._heard = self._heard, []
        trains = self.trainer.model.training and torch.is_grad_enabled()  # without gradients: samples
        if not heard or not trains:
            return
        real = torch.cat(done.tokens.rows)
        for layer, record in heard:
            same = len(record.experts) == done.tokens.total  # an encoder's tokens are not the decoder's
            one = record.select(real.to(record.experts.device)) if same else record
            probs = one.probs.detach().float()
            sums = [
                count_assignments(one.experts, one.num_experts),
                torch.special.entr(probs).sum(),
                torch.tensor(len(one.experts), device=probs.device),
            ]
            if (before := self._sums.get(layer.name)) is not None:
                sums = [a + b for a, b in zip(before, sums, strict=True)]
            self._sums[layer.name] = sums

    def measures(self) -> dict[str, float]:
        """The values over what was heard since the last time, the same on every rank."""
        loads, layers = [], {}
        for name, sums in self._sums.items():
            counts, entropy, tokens = map(summed_over_ranks, sums)
            load = counts.float() / counts.float().mean().clamp(min=1e-9)
            loads.append(load.cpu())
            layers[name] = {
                "max_violation": float(load.max()) - 1,
                "dead_experts": float((counts == 0).sum()),
                "entropy": float(entropy / tokens.clamp(min=1)),
            }
        every = torch.cat(loads)
        logs = {f"routing/load_{name}": float(every.quantile(q)) for name, q in QUANTILES.items()}
        for key in ("max_violation", "dead_experts", "entropy"):
            total = sum(values[key] for values in layers.values())
            logs[f"routing/{key}"] = total if key == "dead_experts" else total / len(layers)
        if self.per_layer:
            for name, values in layers.items():
                logs |= {f"routing/{name}/{key}": value for key, value in values.items()}
        return logs
