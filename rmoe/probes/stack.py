"""The routers of one probe as a module, and several of them trained as one: a model per seed, stacked.

`torch.func.vmap` runs one forward pass for all seeds; what a router does not allow under vmap runs seed by seed.
Experts and optimizer are stacked either way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from rmoe.errors import one_line
from rmoe.probes.world import CONTENT, HIDDEN
from rmoe.results.probes import Knobs
from rmoe.routing.balance import balance_loss
from rmoe.routing.contract import (
    RouterContext,
    RouterStats,
    Routing,
    State,
    dispatched_experts,
    gate_entropy,
    logit_variance,
)
from rmoe.routing.initial import fill, keyed_generator
from rmoe.routing.noise import Noise
from rmoe.routing.options import Geometry
from rmoe.routing.recurrence import Recurrence
from rmoe.routing.router import build_router, build_shared
from rmoe.routing.spec import RouterSpec, vary
from rmoe.routing.step_state import StepState

EXPERTS_RATE = 4.0  # the experts' learning rate over the routers': they have to differ before any choice pays
ZOO_WIDTH = 128  # the zoo's p, which the knob `width` stands for


class Routed(NamedTuple):
    """All layers' decisions for one seed's tokens; stacked, each has the seeds in front.

    Attributes:
        gates: `[L, T, E]`, each expert's weight.
        passthrough: `[L, T]`, the content's own weight in the output.
        balance: scalar, weighted balance losses and penalties.
        counts, entropy, dropped, logit_variance: `[L, E]`, then `[L]`, sums over tokens, for training-time state; the
            floats are zero for a router that has none.
        probs: `[L, T, C]`.
        states: `[L, T, p]`, what each layer hands to the next; `p` is 0 without memory.
        observed: `[L, O]`, as of `RouterStats`; `O` is 0 where there is nothing.
        added: `[L, T, d_u]`, what constant experts add to the output.
    """

    gates: Tensor
    passthrough: Tensor
    balance: Tensor
    counts: Tensor
    entropy: Tensor
    dropped: Tensor
    logit_variance: Tensor
    probs: Tensor
    states: Tensor
    observed: Tensor
    added: Tensor


def fitted(spec: RouterSpec, width: int) -> RouterSpec:
    """The spec with its state width on the probes' scale: the zoo's 128 becomes `width`, the rest in proportion."""
    if not isinstance(spec.recurrence, Recurrence.Config):
        return spec
    return vary(spec, recurrence={"width": max(1, spec.recurrence.width * width // ZOO_WIDTH)})


class RouterStack(nn.Module):
    """The routers of L layers and what they share.

    Raises:
        RequestError: the router cannot work at these sizes.
    """

    def __init__(self, spec: RouterSpec, top_k: int, knobs: Knobs) -> None:
        super().__init__()
        # Weights that a router does not scale itself start at d^-1/2: scores of about 1 for every router. One token id.
        size = Geometry(HIDDEN, knobs.experts, top_k, knobs.layers, 0, 1, HIDDEN**-0.5)
        self.coefficient = knobs.balance
        self.router_shared = build_shared(spec, size)
        self.routers = nn.ModuleList(
            build_router(spec, replace(size, layer_index=layer)) for layer in range(knobs.layers)
        )
        self.num_experts = knobs.experts
        self.moves = any(
            isinstance(m, StepState)
            and type(m).update is not StepState.update
            and any(True for _ in m.buffers(recurse=False))
            for m in self.modules()
        )

    def forward(
        self, inputs: Tensor, noise_key: Tensor | None = None, cut: bool = False, measured: bool = False
    ) -> Routed:
        """Route `[L, T, d]`.

        Args:
            noise_key: scalar int64 in training; None outside it.
            cut: detach the state between layers.
            measured: give `probs` and `states` too; they are empty without.
        """
        routings, states = self._routings(inputs, noise_key, cut)
        context = self._context(inputs, None)
        experts = torch.stack([routing.experts for routing in routings])
        counts = _counts(experts, self.num_experts)
        balance = balance_loss(
            list(self.routers),  # type: ignore[arg-type]
            routings,
            context,
            self.coefficient,
            counts=counts,
        )
        probs = torch.stack([routing.probs for routing in routings])
        logits = torch.stack([routing.logits.detach() for routing in routings])
        nothing, zero = torch.zeros_like(inputs[:, :, 0]), counts[:, 0].float() * 0
        gates = torch.stack([_dense(routing, self.num_experts) for routing in routings])
        return Routed(
            gates=gates,
            passthrough=_stacked_or(nothing, [r.passthrough for r in routings]),
            balance=balance.to(gates.dtype),
            counts=counts,
            entropy=gate_entropy(probs.detach()).sum(-1).float() if self.moves else zero,
            dropped=_stacked_or(torch.zeros_like(counts[:, :1]), [r.dropped for r in routings])
            .flatten(1)
            .sum(1),
            logit_variance=logit_variance(logits).sum(-1).float() if self.moves else zero,
            probs=probs if measured else probs[:, :0],
            states=_stacked(states) if measured else nothing[:, :0],
            observed=_stacked_or(zero[:, None][:, :0], [r.observed for r in routings]),
            added=_stacked_or(torch.zeros_like(inputs), [r.added for r in routings])[..., -CONTENT:],
        )

    def _context(self, inputs: Tensor, noise_key: Tensor | None) -> RouterContext:
        tokens = inputs.shape[1]
        noise = None if noise_key is None else Noise(noise_key)
        # The tokens of a probe have nothing to do with each other: for who reads neighbours, each is a sequence.
        batch = tokens if self.routers[0].options.reads_sequence else 1  # type: ignore[union-attr]
        return RouterContext(batch, tokens // batch, None, torch.zeros(tokens, dtype=torch.int64), noise)

    def _routings(
        self, inputs: Tensor, noise_key: Tensor | None, cut: bool
    ) -> tuple[list[Routing], list[Tensor]]:
        context = self._context(inputs, noise_key)
        state: State = ()
        routings, states = [], []
        for router, x in zip(self.routers, inputs.unbind(0), strict=True):
            if cut:
                state = tuple(part.detach() for part in state)
            routing, state = router(x, state, self.router_shared, context)
            routings.append(routing)
            states.append(torch.cat(state, -1) if state else x[:, :0])
        return routings, states


def _stacked_or(missing: Tensor, parts: list[Tensor | None]) -> Tensor:
    """What every layer gives, `[L, *]`; `missing` where they give None."""
    found = [part for part in parts if part is not None]
    return torch.stack(found) if found else missing


def _stacked(states: list[Tensor]) -> Tensor:
    """`[L, T, p]` of `[T, *]`: a state that grows over the layers has zeros where it has not grown yet."""
    width = max(state.shape[-1] for state in states)
    return torch.stack([F.pad(state, (0, width - state.shape[-1])) for state in states])


def _dense(routing: Routing, experts: int) -> Tensor:
    """Weights by expert, `[T, E]`; empty and dropped slots fall into a column that is cut off."""
    slots = dispatched_experts(routing, experts)
    dense = torch.zeros_like(routing.weights[:, :1]).expand(-1, experts + 1)
    return dense.scatter_add(1, slots, routing.weights)[:, :experts]


def _counts(experts: Tensor, num_experts: int) -> Tensor:
    """Assignments, `[L, T, K]` -> `[L, E]`."""
    flat = experts.flatten(1)
    zero = torch.zeros(flat.shape[0], num_experts + 1, dtype=torch.int64)
    return zero.scatter_add(1, flat, torch.ones_like(flat))[:, :num_experts]


class _Update(nn.Module):
    """One optimizer step's update of a stack's training-time state, as a forward pass, so that it can be stacked."""

    def __init__(self, stack: RouterStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, sums: Sequence[Tensor], step: int, total: int) -> Tensor:
        """Move the state by the fields of a `RouterStats`; what nothing observed is an empty tensor here."""
        stats = RouterStats(*sums)
        if not sums[-1].numel():
            stats = stats._replace(observed=None)
        for router in self.stack.routers:
            router.update_all(stats, step, total)  # type: ignore[operator]
        return stats.tokens


class Ensemble:
    """The same router on one probe under several seeds, trained in one pass.

    Args:
        spec: as it is built; see `fitted`.
        top_k: the router's k.
        lanes: (probe, seed) of each model.

    Attributes:
        note: why the routers are not stacked; empty where they are.
    """

    def __init__(
        self,
        spec: RouterSpec,
        top_k: int,
        lanes: Sequence[tuple[str, int]],
        knobs: Knobs,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        models = []
        experts = []
        for probe, seed in lanes:
            model = RouterStack(spec, top_k, knobs)
            fill(model, seed, HIDDEN**-0.5, f"{probe}/")
            models.append(model.to(dtype))
            start = keyed_generator(seed, f"{probe}/experts")
            shape = (knobs.layers, knobs.experts, CONTENT, CONTENT)
            experts.append(torch.randn(shape, generator=start).to(dtype) / CONTENT**0.5)
        self.base, self.lanes, self.knobs = models[0], list(lanes), knobs
        self.parameters, self.buffers = stack_module_state(models)  # type: ignore[arg-type]
        self.experts = torch.stack(experts).requires_grad_()  # [S, L, E, d_u, d_u]
        groups = [
            {"params": list(self.parameters.values()), "scale": 1.0},
            {"params": [self.experts], "scale": EXPERTS_RATE},
        ]
        self.optimizer = torch.optim.Adam(
            [g for g in groups if g["params"]], lr=knobs.learning_rate, fused=True
        )
        self.note = "one model" if len(lanes) == 1 else self._why_not_stacked(dtype)

    @property
    def router_parameters(self) -> int:
        """Of one model, frozen ones included."""
        frozen = sum(b[0].numel() for b in self.buffers.values() if b.is_floating_point())
        return frozen + sum(p[0].numel() for p in self.parameters.values())

    def route(
        self, inputs: Tensor, noise: Tensor | None = None, *, learns: bool = True, **options: bool
    ) -> Routed:
        """Route `[S, L, T, d]`; noise keys `[S]` int64 in training. Without `learns` no gradient is recorded."""
        state = {**self.parameters, **self.buffers}
        if not learns:
            state = {name: value.detach() for name, value in state.items()}

        def one(state: dict[str, Tensor], x: Tensor, key: Tensor | None) -> Routed:
            return functional_call(self.base, state, (x, key), options)

        return self._for_each(one, state, inputs, noise)

    def update(self, routed: Routed, step: int) -> None:
        """Move training-time state after an optimizer step."""
        if not self.base.moves:
            return
        state = {f"stack.{name}": value for name, value in (*self.parameters.items(), *self.buffers.items())}
        module, tokens = _Update(self.base), torch.full((len(self.lanes),), self.knobs.tokens)

        def one(state: dict[str, Tensor], *sums: Tensor) -> Tensor:
            return functional_call(module, state, (sums, step, self.knobs.steps))

        with torch.no_grad():
            self._for_each(one, state, routed.counts, tokens, *routed[4:7], routed.observed)

    def _for_each(self, one: Callable[..., Any], state: dict[str, Tensor], *stacked: Any) -> Any:
        """`one` for every seed: by vmap, or in turn."""
        if not self.note:
            return torch.func.vmap(one, in_dims=(0, *(None if part is None else 0 for part in stacked)))(
                state, *stacked
            )
        found = [
            one({k: v[i] for k, v in state.items()}, *(None if part is None else part[i] for part in stacked))
            for i in range(len(self.lanes))
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found)
        return Routed(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    def predict(self, routed: Routed, inputs: Tensor) -> Tensor:
        """What the gated experts give, `[S, L, T, d_u]`: `sum_n g_n W_n u + passthrough u + added`."""
        content = inputs[..., -CONTENT:]
        spread = (routed.gates.unsqueeze(-1) * content.unsqueeze(-2)).flatten(-2)  # [S, L, T, E * d_u]
        mixed = torch.bmm(spread.flatten(0, 1), self.experts.flatten(2, 3).flatten(0, 1))
        return mixed.view_as(content) + routed.passthrough.unsqueeze(-1) * content + routed.added

    def loss(self, routed: Routed, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error per seed and layer, `[S, L]`."""
        return (self.predict(routed, inputs) - targets).square().mean((-2, -1))

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss outside training, `[S, L]`, without gradient."""
        return self.loss(self.route(inputs, learns=False), inputs, targets).detach()

    def _why_not_stacked(self, dtype: torch.dtype) -> str:
        """Empty if a forward, a backward pass and an update run under vmap; else the first line of what stops them."""
        before = {name: value.clone() for name, value in self.buffers.items()}
        shape = (len(self.lanes), self.knobs.layers, 4, HIDDEN)
        inputs = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
        self.note = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that an operation is slow under vmap is no reason
                routed = self.route(inputs, torch.arange(len(self.lanes)))
                (self.loss(routed, inputs, inputs[..., :CONTENT]).sum() + routed.balance.sum()).backward()
                self.update(routed, 1)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            return one_line(str(error).strip().partition("\n")[0])[:160] or type(error).__name__
        finally:
            self.optimizer.zero_grad()
            with torch.no_grad():
                for name, value in before.items():
                    self.buffers[name].copy_(value)
        return ""
