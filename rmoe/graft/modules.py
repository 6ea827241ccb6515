"""The grafted layer and the grafted gate, as subclasses made of the family's own classes.

How the state travels. Between layers it is explicit: a layer that used to return `hidden` returns
`RouterStream(hidden, state)`, the family's loop hands that to the next layer as it hands on anything, and the last
routed layer returns plain `hidden` again. So a layer's forward is a function of its arguments, and whatever
re-runs, splits, shards or compiles layers needs nothing from us. Within one layer the family's code between the
layer and its gate knows of no state; there it rides on the gate for the length of that one call.

Both subclasses carry their parent's name: transformers and accelerate find layers by class name, and record
router logits by `isinstance`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmoe.graft.spec import GraftSpec
from rmoe.routing.contract import State
from rmoe.routing.initial import Initialized, Initializer, constant, linear_fp32, normal
from rmoe.routing.options import Geometry
from rmoe.routing.recurrence import Recurrence
from rmoe.routing.router import without_autocast


class RouterStream(NamedTuple):
    """What flows from layer to layer: hidden states `[B, S, d]` and router state, each part `[B * S, p]`."""

    hidden: Tensor
    state: State


class RecurrentOffset(Initialized):
    """`h_i` from the projector and the shared cell, and the gate's offset `B_i h_i`: `[T, d]` -> `[T, d]`.

    `B` is `[d, p]` and starts at zero, so the first gradient reaches `B` only, and from the second step on
    projector and cell too. With `pure` the offset is all that the gate reads; then zero would make all experts
    equal, so `B` starts normal with standard deviation `p^-1/2`, which gives entries of the size of `h`'s.
    """

    def __init__(self, spec: GraftSpec, geometry: Geometry) -> None:
        super().__init__()
        self.recurrence = Recurrence(spec.recurrence, geometry)
        self.B = nn.Parameter(torch.empty(geometry.hidden_size, spec.recurrence.width))
        self.B_init = normal(spec.recurrence.width**-0.5) if spec.pure else constant(0.0)

    def initializers(self) -> dict[str, Initializer]:
        return {"B": self.B_init}

    def forward(self, hidden: Tensor, state: State, shared: nn.Module | None) -> tuple[Tensor, State]:
        with without_autocast(hidden.device.type):
            features, state = self.recurrence(hidden, state, shared=shared)  # [T, p], at least float32
            return linear_fp32(features, self.B).to(hidden.dtype), state


class CellOwner:
    """The backbone, as a gate knows it: not a submodule, and not copied with a copy of the gate alone.

    Copying the whole model gives each copied gate its own backbone; PEFT, which copies single gates, must not get
    a backbone with each.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    def __deepcopy__(self, memo: dict[int, Any]) -> CellOwner:
        return CellOwner(memo.get(id(self.backbone), self.backbone))


@dataclass
class Ride:
    """The router's state during one call of a layer: as it comes in, and as it goes out once the gate has run."""

    incoming: State = ()
    outgoing: State | None = None


class _Riding(threading.local):
    """What rides on gates in one thread: another may run the same model meanwhile.

    Attributes:
        states: by `id` of each gate whose layer is being called.
    """

    def __init__(self) -> None:
        self.states: dict[int, Ride] = {}


_RIDING = _Riding()


class GraftedGate(nn.Module):
    """Mixin of every grafted gate, and how one is recognised.

    Attributes:
        owner: whose cell this gate uses.
        router_offset: this layer's projector and `B`.
        pure: read the offset alone.
    """

    owner: CellOwner
    router_offset: RecurrentOffset
    pure: bool

    @property
    def ride(self) -> Ride:
        """What rides on this gate in this thread; outside a call of its layer an empty one, which nobody keeps."""
        return _RIDING.states.get(id(self), Ride())

    def shared(self) -> nn.Module | None:
        """The cell, looked up at its owner each time: PEFT may have put a trainable copy in its place."""
        return self.owner.backbone.router_cell  # type: ignore[return-value]

    def steer(self, x: Tensor) -> Tensor:
        """`x + B h` (or `B h`), moving the state on; `x` is `[..., d]`."""
        ride, flat = self.ride, x.reshape(-1, x.shape[-1])
        offset, ride.outgoing = self.router_offset(flat, ride.incoming, shared=self.shared())
        offset = offset.view(x.shape)
        return offset if self.pure else x + offset


class GraftedLayer(nn.Module):
    """Mixin of every layer from the first routed one to the last.

    Attributes:
        gate_path: where this layer's gate is, None in a dense layer between routed ones.
        index: of this layer among the backbone's. last: of the last routed one.
        owner: the backbone.
    """

    gate_path: str | None
    index: int
    last: int
    owner: CellOwner

    @property
    def ends_stream(self) -> bool:
        """Whether this is the last routed layer that runs: assisted generation's early exit runs fewer."""
        running = getattr(self.owner.backbone.config, "num_hidden_layers", self.last + 1)
        return self.index == min(self.last, running - 1)

    def gates(self) -> list[GraftedGate]:
        """The gate; with PEFT's `modules_to_save` its trainable copies too."""
        if self.gate_path is None:
            return []
        return [
            module
            for module in self.get_submodule(self.gate_path).modules()
            if isinstance(module, GraftedGate)
        ]


@cache
def grafted_gate_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a family's gate whose input is steered; all else is the family's."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, self.steer(hidden_states), *args, **kwargs)

    return _subclass(base, GraftedGate, forward, grafted_gate_class)


@cache
def grafted_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a family's layer that takes and returns a `RouterStream`.

    Where the family checkpoints layers, defining a subclass makes transformers wrap this forward too, so the
    checkpoint's inputs are the stream and its recomputation starts from the state of its own call.
    """

    def forward(self: Any, hidden_states: Tensor | RouterStream, *args: Any, **kwargs: Any) -> Any:
        hidden, state = hidden_states if isinstance(hidden_states, RouterStream) else (hidden_states, ())
        gates = self.gates()
        riding = _RIDING.states
        outer = [riding.get(id(gate)) for gate in gates]  # of a call that this one is nested in
        for gate in gates:
            riding[id(gate)] = Ride(state)
        try:
            output = base.forward(self, hidden, *args, **kwargs)
            if gates:
                state = _moved_on(gates, type(self).__name__)
        finally:  # a recomputation may stop half-way; nothing may outlive the call
            for gate, ride in zip(gates, outer, strict=True):
                if ride is None:
                    del riding[id(gate)]
                else:
                    riding[id(gate)] = ride
        if self.ends_stream:
            return output
        if isinstance(output, tuple):
            return (RouterStream(output[0], state), *output[1:])
        return RouterStream(output, state)

    return _subclass(base, GraftedLayer, forward, grafted_layer_class)


def _moved_on(gates: list[GraftedGate], layer: str) -> State:
    """The state the gate that ran has left.

    Raises:
        RuntimeError: none ran. Something replaced the family's block and reads its weights directly.
    """
    for gate in gates:
        if gate.ride.outgoing is not None:
            return gate.ride.outgoing
    raise RuntimeError(
        f"{layer} did not call its grafted gate: a kernel that routes by itself has replaced the block; load without it"
    )


def _subclass(base: type[nn.Module], mixin: type[nn.Module], forward: Any, factory: Any) -> type[nn.Module]:
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body = named | {"forward": forward, "__reduce_ex__": reduce_as(factory, base)}
    return type(base.__name__, (base, mixin), body)


def reduce_as(factory: Callable[..., type], *arguments: type) -> Callable[[Any, Any], tuple[Any, ...]]:
    """`__reduce_ex__` for a class made at run time, which pickle cannot find by its name: by whom, and from what.

    Args:
        factory: a function of a module, cached, so that equal arguments give the same class.
        arguments: its arguments.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _instance, (factory, *arguments), self.__getstate__()

    return __reduce_ex__


def _instance(factory: Callable[..., type], *arguments: type) -> Any:
    made: Any = factory(*arguments)
    return made.__new__(made)
