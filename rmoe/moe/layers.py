"""Where a model routes, found by looking at it: a gate beside experts, in a stack of layers.

No family is named here. A module routes if it has a child `experts` and, beside it, a child called as gates are
called. Its stack is the outermost `ModuleList` above it; an encoder-decoder has two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rmoe.errors import RequestError
from rmoe.model.layers import RMoESparseMoeBlock
from rmoe.moe.reading import Reader, own_router, reader_of

GATE_NAMES = ("gate", "router", "wg")
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "total_experts")
_TOP_K = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """One MoE layer of a model.

    Attributes:
        name: path of the block that has gate and experts.
        stack: path of the `ModuleList` it is in; "" if it is in none. index: of its element there.
        gate: the router. gate_name: its path.
        experts: the module that the chosen experts are run by.
        num_experts: E.
        top_k: k; 1 where the layer does not say, as layers that choose one expert do.
        slots: K that a choice has room for, where nothing else decides it; more than k in a layer of our own that has
            a smaller k than the model.
        reader: how its choice is read, and what by: `reader.at`, `reader.scoring`.
    """

    name: str
    stack: str
    index: int
    gate: nn.Module
    gate_name: str
    experts: nn.Module
    num_experts: int
    top_k: int
    reader: Reader = field(repr=False)

    @property
    def slots(self) -> int:
        own = own_router(self.gate)
        return self.top_k if own is None else own.geometry.top_k


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The MoE layers of a model in the order of its modules, an encoder's before a decoder's; empty without any.

    Raises:
        RequestError: experts without a gate beside them, or that do not say how many they are.
    """
    found = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        experts = children.get("experts")
        if experts is None:
            continue
        gate_name = next((child for child in GATE_NAMES if child in children), None)
        if gate_name is None:
            allowed = f"a gate beside the experts of {name}: {', '.join(GATE_NAMES)}"
            raise RequestError("model", kind_of(model), allowed)
        gate = children[gate_name]
        path = f"{name}.{gate_name}" if name else gate_name
        stack, index = stack_of(model, path)
        owners = (experts, gate, block, getattr(model, "config", None))
        # Ours says it, and may have fewer matrices: the row `dense`.
        stated = block.config.num_experts if isinstance(block, RMoESparseMoeBlock) else None
        num_experts = stated or _experts_of(experts) or _size(_NUM_EXPERTS, owners, index)
        if num_experts is None:
            raise RequestError("model", type(block).__name__, "an MoE block that says its num_experts")
        top_k = _size(_TOP_K, owners[1:], index) or 1
        reader = reader_of(name, gate, experts, num_experts, top_k)
        found.append(RoutedLayer(name, stack, index, gate, path, experts, num_experts, top_k, reader))
    return found


def routed_stacks(layers: Iterable[RoutedLayer]) -> dict[str, list[RoutedLayer]]:
    """Layers by the path of their stack, both in the order given."""
    stacks: dict[str, list[RoutedLayer]] = {}
    for layer in layers:
        stacks.setdefault(layer.stack, []).append(layer)
    return stacks


def require_layers(model: nn.Module) -> list[RoutedLayer]:
    """`routed_layers`.

    Raises:
        RequestError: there are none.
    """
    layers = routed_layers(model)
    if not layers:
        raise RequestError("MODEL", kind_of(model), "a model with MoE layers: a router beside experts")
    return layers


def names_of_calls(layers: Iterable[str]) -> list[str]:
    """Of each call its layer's name, with the pass where a layer runs more than once.

    >>> names_of_calls(["a", "b", "a"])
    ['a', 'b', 'a (pass 2)']
    """
    seen: Counter[str] = Counter()
    names = []
    for name in layers:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} (pass {seen[name]})")
    return names


def layer_of_call(name: str) -> str:
    """The layer's name in one of `names_of_calls`."""
    return name.split(" (pass ")[0]


def kind_of(model: nn.Module) -> str:
    """How an error names a model."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def stack_of(model: nn.Module, path: str) -> tuple[str, int]:
    """The outermost `ModuleList` above a module and the index of its element there; ("", 0) if there is none."""
    parts = path.split(".")
    for depth in range(1, len(parts) - 1):
        above = ".".join(parts[:depth])
        if isinstance(model.get_submodule(above), nn.ModuleList):
            return above, int(parts[depth])
    return "", 0


def _experts_of(experts: nn.Module) -> int | None:
    """E by the experts themselves: how many submodules, or the first dimension of their stacked matrices."""
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return sum(any(True for _ in child.parameters()) for child in experts.children())
    stacked = [p.shape[0] for p in experts.parameters(recurse=False) if p.dim() == 3]
    return max(stacked, default=None)


def _size(names: Sequence[str], owners: Sequence[Any], index: int) -> int | None:
    """The first integer of one of these names that an owner has; a configuration may have one for each layer."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, list | tuple) and index < len(value):
                value = value[index]
            if type(value) is int:
                return value
    return None
