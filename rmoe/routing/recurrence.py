"""Stage 1: `features, state = recurrence(hidden, state, shared)`, Eq. 4 and 5.

The recurrence runs over depth. A token's state meets no other token's, so neither the sequence nor the key-value
cache has any part in it. What all layers share (the cell, in S-proj the projector) belongs to the model and comes
in as `shared`; what is a layer's own belongs to the layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmoe.routing.cells import LAYER_CELLS, SHARED_CELLS, Identity
from rmoe.routing.contract import State
from rmoe.routing.initial import PassedModule, ProjectionFP32, normal, rms_norm_as_input
from rmoe.routing.options import Geometry, Mechanism, Options
from rmoe.validation import PositiveInt, require


class BaseRecurrence(nn.Module, Mechanism):
    """Base of all recurrences: `[T, d]` and the state of the layer below -> features `[T, f]` and the new state.

    Built from (options, geometry).
    """

    class Config(Options):
        stage = "recurrence"

        def features(self, geometry: Geometry) -> int:
            """Width `f` of the features it gives the scorer."""
            raise NotImplementedError

        def build_shared(self, geometry: Geometry) -> nn.Module | None:
            """What it shares with the other layers, built once for the model; None is nothing."""
            return None

    def forward(self, hidden: Tensor, state: State, shared: nn.Module | None) -> tuple[Tensor, State]:
        raise NotImplementedError


class NoRecurrence(BaseRecurrence):
    """The scorer reads the hidden state itself, and the state stays empty: every router of Eq. 1."""

    class Config(BaseRecurrence.Config):
        kind = "none"
        equation = "f = x"

        def described(self) -> str:
            return ""

        def features(self, geometry: Geometry) -> int:
            return geometry.hidden_size

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, state: State, shared: nn.Module | None) -> tuple[Tensor, State]:
        return hidden, state


class Recurrence(BaseRecurrence):
    """Project to `width`, then one step of a cell, Eq. 4 and 5, for one layer.

    Shapes: hidden `[T, d]`, any floating dtype -> features `[T, p]` (`[T, d + p]` with `concat_hidden`), at least
    float32, and the state, each part `[T, p]`.
    """

    class Config(BaseRecurrence.Config):
        """Attributes:
        cell: "gru", "rnn", "lstm" are shared by all layers; "decay" is `x' + a * h` with a vector `a` per layer
            (ZAYA1's EDA, arXiv:2605.05365); "gated_decay" is `x' + z * h` where `z` depends on `x'` and `h`, its
            weights per layer; "identity" has no memory: a low-rank linear router.
        width: `p`.
        projector: one per layer, or one shared by all (Table 6, S-proj).
        projector_bias: the public code has none; EDA has one.
        carry: the state of the layer below is "passed"; "detached" (its values without their gradient); or
            "zero" (NP: same parameters and FLOPs, no memory).
        truncate_every: cut the gradient of the state that enters every n-th layer (n, 2n, ...), so that it runs
            through at most n layers; 1 is "detached"; None never.
        normalize: RMSNorm of the state before it is scored; the state itself is carried as it is.
        concat_hidden: score `[x; h]` instead of `h`.
        """

        kind = "cell"

        cell: Literal["gru", "rnn", "lstm", "decay", "gated_decay", "identity"] = "gru"
        width: PositiveInt = 128
        projector: Literal["layer", "shared"] = "layer"
        projector_bias: bool = False
        carry: Literal["passed", "detached", "zero"] = "passed"
        truncate_every: PositiveInt | None = None
        normalize: bool = False
        concat_hidden: bool = False

        def check(self) -> None:
            ok = self.truncate_every is None or self.carry == "passed"
            require(
                ok,
                "recurrence.truncate_every",
                self.truncate_every,
                "null unless recurrence.carry is 'passed'",
            )
            memoryless = self.cell == "identity" and self.carry != "zero"
            require(not memoryless, "recurrence.carry", self.carry, "'zero' with cell 'identity'")

        @property
        def equation(self) -> str:
            gated = "z = sig(W [norm(P x); norm(h)] + b); h = P x + z * h"
            steps = {"decay": "h = P x + a * h", "gated_decay": gated, "identity": "h = P x"}
            step = steps.get(
                self.cell, f"h = {self.cell.upper()}(P x, {'0' if self.carry == 'zero' else 'h'})"
            )
            read = "norm(h)" if self.normalize else "h"
            return f"{step}; f = {f'[x; {read}]' if self.concat_hidden else read}"

        @property
        def carries(self) -> str:
            if self.carry == "zero":
                return ""
            detached = " (detached)" if self.carry == "detached" else ""
            return f"{'h, c' if self.cell == 'lstm' else 'h'} [{self.width}]{detached}"

        @property
        def has_shared(self) -> bool:
            return self.cell in SHARED_CELLS or self.projector == "shared"

        def described(self) -> str:
            implied = ("carry",) if self.cell == "identity" else ()
            options = [f"p={self.width}", *self.changed("cell", "width", *implied)]
            return f"{self.cell}({', '.join(options)})"

        def features(self, geometry: Geometry) -> int:
            return self.width + (geometry.hidden_size if self.concat_hidden else 0)

        def build_shared(self, geometry: Geometry) -> nn.Module | None:
            return SharedRecurrence(self, geometry) if self.has_shared else None

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__()
        self.options = options
        self.projector = _projector(options, geometry) if options.projector == "layer" else None
        self.cell: nn.Module | None = None
        if options.cell in LAYER_CELLS:
            self.cell = LAYER_CELLS[options.cell](options.width, geometry.layer_index)
        elif options.cell == "identity":
            self.cell = Identity()
        self.norm = nn.RMSNorm(options.width, eps=1e-5) if options.normalize else None
        cut = options.truncate_every is not None and geometry.layer_index % options.truncate_every == 0
        self.detached = cut or options.carry == "detached"

    def forward(self, hidden: Tensor, state: State, shared: nn.Module | None) -> tuple[Tensor, State]:
        projector: Any = self.projector if self.projector is not None else _of(shared).projector
        cell: Any = self.cell if self.cell is not None else _of(shared).cell
        x = projector(hidden)  # [T, p]
        if not state or self.options.carry == "zero":
            state = cell.initial(x)
        elif self.detached:
            state = tuple(part.detach() for part in state)
        # A shared cell may be on another device than this layer (`device_map`), and gives its state there.
        state = tuple([part.to(hidden.device) for part in cell(x, state)])
        features = state[0]
        if self.norm is not None:
            features = rms_norm_as_input(features, self.norm)
        if self.options.concat_hidden:
            features = torch.cat((hidden.to(features.dtype), features), -1)
        return features, () if self.options.carry == "zero" else state


def _projector(options: Recurrence.Config, geometry: Geometry) -> ProjectionFP32:
    return ProjectionFP32(
        geometry.hidden_size, options.width, normal(geometry.initializer_range), options.projector_bias
    )


class SharedRecurrence(PassedModule):
    """The part of the recurrence that belongs to the model: the cell, and in S-proj the projector."""

    def __init__(self, options: Recurrence.Config, geometry: Geometry) -> None:
        super().__init__()
        self.cell = SHARED_CELLS[options.cell](options.width) if options.cell in SHARED_CELLS else None
        self.projector = _projector(options, geometry) if options.projector == "shared" else None


def _of(shared: nn.Module | None) -> nn.Module:
    if shared is None:
        raise ValueError("this recurrence shares its cell or projector: pass the model's `router_shared`")
    return shared
