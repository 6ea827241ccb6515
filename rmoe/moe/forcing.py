"""Make a family's own router choose given experts: only the operator by which it chooses gives another answer.

All else of the router's code runs as it is: scores, weights, normalisation, scale, recurrent state. So with the
choice it would have made itself, it computes the same bits; and with another one, its weights follow from its live
scores for those experts, with their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOPK = (torch.topk, Tensor.topk)
BEST = (torch.max, Tensor.max)
ARGMAX = (torch.argmax, Tensor.argmax)


class Forcing(TorchFunctionMode):
    """Within, the choice among C classes for T tokens is the given one.

    Top-k over groups of experts, before that over experts, takes the groups of the given ones first.

    Args:
        ids: [T, k] int64, the choice. Negative where there is none: there the router's own best of the rest. So too for
            `num_experts`, an empty slot, unless the router has a class for it.
        num_experts: E.

    Attributes:
        active: whether choices are still to be made; off once the experts are called.
    """

    def __init__(self, ids: Tensor, num_experts: int) -> None:
        super().__init__()
        self.ids, self.num_experts = ids, num_experts
        self.active = True
        self._slot = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.active and func in TOPK:
            return self._topk(func, args, kwargs)
        if self.active and func in (*BEST, *ARGMAX):
            return self._best(func, args, kwargs)
        return func(*args, **kwargs)

    def _topk(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores = args[0]
        k = args[1] if len(args) > 1 else kwargs["k"]
        live = func(*args, **kwargs)
        if self._is_classes(scores) and k == self.ids.shape[1]:
            index = self.fill(scores.reshape(len(self.ids), -1), self.ids).view(*scores.shape[:-1], k)
        elif self._is_groups(scores):
            index = self._groups(scores, k)
        else:
            return live
        return type(live)((scores.gather(-1, index), index))

    def _best(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One slot at a time, by `max` or `argmax` (SparseMixer)."""
        live = func(*args, **kwargs)
        scores, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(dim, int) or not self._is_classes(scores):
            return live
        slot = min(self._slot, self.ids.shape[1] - 1)
        self._slot += 1
        flat = scores.reshape(len(self.ids), -1)
        index = self.fill(flat, self.ids[:, slot : slot + 1]).view(*scores.shape[:-1], 1)
        keep = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
        if func in ARGMAX:
            return index if keep else index.squeeze(-1)
        values = scores.gather(-1, index)
        return type(live)((values, index) if keep else (values.squeeze(-1), index.squeeze(-1)))

    def _is_classes(self, scores: Tensor) -> bool:
        """Whether these are the T tokens' scores for all classes."""
        classes = scores.shape[-1] if scores.dim() > 1 else 0
        return (
            classes in (self.num_experts, self.num_experts + 1) and scores.numel() == len(self.ids) * classes
        )

    def _is_groups(self, scores: Tensor) -> bool:
        """Whether these are the T tokens' scores for groups of experts."""
        if scores.dim() != 2 or len(scores) != len(self.ids):
            return False
        return scores.shape[1] < self.num_experts and self.num_experts % scores.shape[1] == 0

    def fill(self, scores: Tensor, ids: Tensor) -> Tensor:
        """The given choice, and the best of the others in slots without one."""
        given = (ids >= 0) & (ids < scores.shape[1])
        safe = ids.clamp(0, scores.shape[1] - 1)
        taken = torch.zeros_like(scores, dtype=torch.int64).scatter_add(1, safe, given.long()) > 0
        rest = scores.detach().masked_fill(taken, -torch.inf).topk(ids.shape[1], -1).indices
        return torch.where(given, safe, rest)

    def _groups(self, scores: Tensor, k: int) -> Tensor:
        size = self.num_experts // scores.shape[1]
        given = (self.ids >= 0) & (self.ids < self.num_experts)
        group = self.ids.clamp(0, self.num_experts - 1) // size
        wanted = torch.zeros_like(scores, dtype=torch.int64).scatter_add(1, group, given.long()) > 0
        return scores.detach().masked_fill(wanted, torch.inf).topk(k, -1).indices
