"""How a layer's choice is read, and how that becomes a record.

Routers do not agree on what they return: the same position holds logits in one family and scores in another, and
not even one family agrees with itself from one release of transformers to the next. What they do agree on is the
call `experts(hidden, index, weights)`. So the choice is read there, where it takes effect; the logits are the
`[T, C]` tensor among the router's results that is not handed on to the experts; and what the family chooses by is
that function of the logits which gives the weights, found once for each layer.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmoe.errors import RequestError
from rmoe.moe.records import RoutingRecord
from rmoe.moe.scores import SCORES, TOLERANCE, disproportion
from rmoe.routing.contract import Routing
from rmoe.routing.router import BaseRouter

EXAMINED = 256
"""Tokens by which it is decided what a layer scores by."""


@dataclass
class Reader(ABC):
    """How one layer is read.

    Attributes:
        name: of the layer.
        num_experts, top_k: E, k.
        scoring: what the layer chooses by, a key of `SCORES`; None until its first tokens were read.
        scaled_by: `[E]`, a parameter of the router that weights are multiplied by after the choice (Gemma 4).
    """

    name: str
    num_experts: int
    top_k: int
    scoring: str | None = None
    scaled_by: nn.Parameter | None = None

    at: ClassVar[str]
    """Where the choice is read: "experts", at their inputs, or "router", in its result."""

    @abstractmethod
    def read(self, gate_output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RoutingRecord:
        """The record of the T tokens of one call.

        Args:
            gate_output: what the router returned.
            args, kwargs: what the experts are called with.

        Raises:
            RequestError: the layer cannot be read correctly; says what was found.
        """


class RoutingReader(Reader):
    """Of a router of this package, which returns its `Routing` itself."""

    at = "router"

    def read(self, gate_output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RoutingRecord:
        routing: Routing = gate_output[0]
        return RoutingRecord.from_routing(routing, self.num_experts)


class ExpertsReader(Reader):
    """Of experts that are told their choice: whole numbers and the weights that belong to them."""

    at = "experts"
    scales: tuple[nn.Parameter, ...] = ()
    """What `scaled_by` may be: the router's own vectors of one number per expert."""

    def read(self, gate_output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RoutingRecord:
        experts, weights = self.choice(args, kwargs)
        exact = torch.finfo(weights.dtype).smallest_normal  # float16 keeps few digits of smaller ones
        logits = self._logits(gate_output, weights)
        experts, weights, logits = experts.detach(), weights.detach().float(), logits.detach()
        if logits.shape[-1] == self.num_experts + 1:
            # The last class stands for "no expert" (ZAYA1), handed on as expert 0 with weight exactly 0.
            experts = experts.masked_fill((weights == 0) & (experts == 0), self.num_experts)
        weights = weights.masked_fill(experts >= self.num_experts, 0.0)
        wide = logits.float()
        scoring = self.scoring or self._find_scoring(wide, experts, weights, exact)
        return record_of(logits, self._scores(scoring, wide), experts, weights, self.num_experts)

    def choice(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The experts `[T, K]` and their weights `[T, K]` among what the experts are called with."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][1:]
        index = [value for value in given if not value.is_floating_point()]
        weights = [value for value in given if value.is_floating_point()]
        if len(index) != 1 or len(weights) != 1:
            shapes = [tuple(value.shape) for value in given]
            raise RequestError(
                "MODEL", self.name, f"experts called with their indices and weights, not {shapes}"
            )
        (experts,), (weight,) = index, weights
        if experts.dim() == 3:  # a dispatch mask [T, K, E]; a token beyond the capacity has no expert
            experts = experts.argmax(-1).masked_fill(experts.sum(-1) == 0, self.num_experts)
        return experts, weight

    def _logits(self, gate_output: Any, weights: Tensor) -> Tensor:
        """The router's one `[T, C]` floating-point result that is not the experts' weights; C is E or E + 1."""
        results = [gate_output] if isinstance(gate_output, Tensor) else gate_output
        floats = [
            value.reshape(-1, value.shape[-1])
            for value in results
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() > 1
            and value is not weights
        ]
        shapes = [(len(weights), classes) for classes in (self.num_experts, self.num_experts + 1)]
        found = [value for value in floats if tuple(value.shape) in shapes]
        if len(found) != 1:
            raise RuntimeError(
                f"{self.name}: {len(found)} of the router's results look like logits {shapes[0]}"
            )
        return found[0]

    def _scores(self, scoring: str, logits: Tensor) -> Tensor:
        return SCORES["softmax" if scoring == "sparsemixer" else scoring](logits)

    def _find_scoring(self, logits: Tensor, experts: Tensor, weights: Tensor, exact: float) -> str:
        """Which function of the logits the weights are proportional to, token by token.

        Raises:
            RequestError: none of `SCORES`.
        """
        logits, experts, weights = logits[:EXAMINED], experts[:EXAMINED], weights[:EXAMINED]
        used = (experts < self.num_experts) & (weights.abs() >= exact)
        chosen = experts.clamp(max=self.num_experts - 1)
        errors: dict[tuple[str, int], float] = {}
        for at, scale in enumerate((None, *self.scales)):
            bare = weights if scale is None else weights / scale.detach().float()[chosen]
            for name, function in SCORES.items():
                errors[name, at] = disproportion(bare, function(logits).gather(-1, chosen), used)
        best = min(errors, key=errors.__getitem__)
        if errors[best] <= TOLERANCE:
            # Else these tokens cannot tell: look again.
            if sum(error <= TOLERANCE for error in errors.values()) == 1:
                self.scoring, self.scaled_by = best[0], (None, *self.scales)[best[1]]
            return best[0]
        if _is_sparse_mixer(logits, chosen, weights):
            self.scoring = "sparsemixer"
            return self.scoring
        allowed = f"a router whose weights follow from its scores by one of {', '.join(SCORES)}"
        ran = f"{experts.unique().numel()} of {self.num_experts} experts in {experts.shape[-1]} slots a token"
        raise RequestError(
            "MODEL", self.name, f"{allowed}; the nearest is off by {errors[best]:.2g}, with {ran}"
        )


class DenseReader(Reader):
    """Of experts that all run on every token, scaled by a score that is zero for all but the chosen (Llama 4)."""

    at = "router"

    def read(self, gate_output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RoutingRecord:
        scores, logits = self.scores_and_logits(gate_output)
        experts = logits.masked_fill(scores == 0, -torch.inf).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts).detach().float()
        self.scoring = "sigmoid"
        wide = logits.detach().float()
        return record_of(logits.detach(), SCORES[self.scoring](wide), experts, weights, self.num_experts)

    def scores_and_logits(self, gate_output: Any) -> tuple[Tensor, Tensor]:
        """Scores have k entries a token that are not zero, where logits have E."""
        dense = [v for v in gate_output if isinstance(v, Tensor) and v.shape[-1] == self.num_experts]
        sparse = [value for value in dense if bool(((value != 0).sum(-1) <= self.top_k).all())]
        rest = [value for value in dense if not any(value is found for found in sparse)]
        if len(sparse) != 1 or len(rest) != 1:
            raise RequestError(
                "MODEL", self.name, f"a router that returns scores and logits, not {len(dense)} such tensors"
            )
        return sparse[0], rest[0]


def record_of(
    logits: Tensor, scores: Tensor, experts: Tensor, weights: Tensor, num_experts: int
) -> RoutingRecord:
    """A record whose distribution is `s / sum(s)`."""
    return RoutingRecord(logits, scores / scores.sum(-1, keepdim=True), experts, weights, num_experts)


def is_own(gate: nn.Module) -> bool:
    """Whether a gate is a router of this package, or PEFT's `modules_to_save` around one, which does what that does."""
    return own_router(gate) is not None


def own_router(gate: nn.Module) -> BaseRouter | None:
    """The router of this package that a gate is, or that PEFT has wrapped; None for another's."""
    return next((module for module in (gate, *gate.children()) if isinstance(module, BaseRouter)), None)


def reader_of(name: str, gate: nn.Module, experts: nn.Module, num_experts: int, top_k: int) -> Reader:
    """The reader that fits how gate and experts are called."""
    if is_own(gate):
        return RoutingReader(name, num_experts, top_k, "own")
    named = [p for p in inspect.signature(experts.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    if len(named) == 1:
        return DenseReader(name, num_experts, top_k)
    reader = ExpertsReader(name, num_experts, top_k)
    reader.scales = tuple(p for p in gate.parameters(recurse=False) if tuple(p.shape) == (num_experts,))
    return reader


def _is_sparse_mixer(logits: Tensor, experts: Tensor, weights: Tensor) -> bool:
    """Whether weights are SparseMixer's: each a probability among a subset of the experts (2409.12136).

    The first choice's subset is those within a threshold of the best, the second's the same without the first: so
    each weight is at least the expert's probability among all that are left, and the choice is the k best.
    """
    left = logits.clone()
    for slot in range(experts.shape[-1]):
        expert = experts[:, slot : slot + 1]
        if not torch.equal(left.argmax(-1, keepdim=True), expert):
            return False
        least = left.softmax(-1).gather(-1, expert)
        if bool(
            (weights[:, slot : slot + 1] < least * (1 - TOLERANCE)).any() | (weights > 1 + TOLERANCE).any()
        ):
            return False
        left = left.scatter(-1, expert, -torch.inf)
    return True
