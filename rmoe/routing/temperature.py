"""Between scorer and gate: what the logits are divided by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmoe.routing.contract import RouterStats
from rmoe.routing.options import Geometry, Mechanism, Options
from rmoe.routing.step_state import StepState
from rmoe.validation import Positive, require


class Temperature(StepState, Mechanism):
    """`logits / T`; `T` held at `start`; or moved geometrically from `start` to `end` over training; or, with
    `target_entropy` (in nats), steered after each optimizer step so that the layer's mean gate entropy approaches the
    target: `ln T += rate * (target - entropy)`.
    """

    class Config(Options):
        stage = "temperature"
        kind = "temperature"

        start: Positive = 1.0
        end: Positive | None = None
        target_entropy: Positive | None = None
        rate: Positive = 0.05

        @property
        def equation(self) -> str:
            return "" if self.is_off else "s / T"

        @property
        def moves(self) -> bool:
            return self.end is not None or self.target_entropy is not None

        @property
        def is_off(self) -> bool:
            return self.start == 1.0 and not self.moves

        def check(self) -> None:
            both = self.end is not None and self.target_entropy is not None
            require(not both, "temperature.end", self.end, "null when temperature.target_entropy is set")

        def check_geometry(self, geometry: Geometry) -> None:
            limit, target = math.log(geometry.num_experts), self.target_entropy
            allowed = f"below ln(num_experts) = {limit:.4f} nats"
            require(target is None or target < limit, "temperature.target_entropy", target, allowed)

    log_value: Tensor

    def __init__(self, options: Config) -> None:
        super().__init__()
        self.options = options
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"log_value": torch.tensor(math.log(self.options.start), dtype=torch.float32)}

    def forward(self, logits: Tensor) -> Tensor:
        return logits * torch.exp(-self.log_value.to(logits.dtype))

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        options = self.options
        if options.target_entropy is not None:
            entropy = stats.entropy[layer] / stats.tokens.clamp(min=1)
            self.log_value += options.rate * (options.target_entropy - entropy)
        elif options.end is not None:
            share = min(step / total_steps, 1.0)
            self.log_value.fill_(math.log(options.start) * (1 - share) + math.log(options.end) * share)
