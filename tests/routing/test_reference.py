"""A stack of routers and experts against the equations, every stage option, odd sizes, outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from rmoe.model.configuration_rmoe import RMoEConfig
from rmoe.model.initialize import initialize
from rmoe.model.layers import RMoESparseMoeBlock
from rmoe.routing import RouterContext, RouterSpec, balance_loss, build_shared, vary
from rmoe.routing.gate import Softmax
from rmoe.routing.recurrence import Recurrence
from rmoe.routing.scorer import Linear
from rmoe.routing.zoo import RMOE
from tests import naive

LAYERS, TOKENS, WIDTH, EXPERTS, TOP_K, P = 3, 11, 13, 5, 3, 7


class Stack(torch.nn.Module):
    """Blocks on a residual stream without attention or norms: what Eq. 4 to 6 speak of and nothing else."""

    def __init__(self, spec: RouterSpec, gated: bool) -> None:
        super().__init__()
        self.config = RMoEConfig(
            hidden_size=WIDTH, num_attention_heads=1, head_dim=2, num_hidden_layers=LAYERS, num_experts=EXPERTS,
            num_experts_per_tok=TOP_K, moe_intermediate_size=9, mlp_gated=gated, router=spec.to_dict(),
            hidden_act="silu" if gated else "relu", initializer_range=0.3,
        )  # fmt: skip
        self.config._experts_implementation = "eager"
        self.blocks = torch.nn.ModuleList(RMoESparseMoeBlock(self.config, i) for i in range(LAYERS))
        self.router_shared = build_shared(spec, self.config.router_geometry(0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state, routings = (), []
        context = RouterContext(1, x.shape[0])
        for block in self.blocks:
            routing, state = block.gate(x, state, self.router_shared, context)
            routings.append(routing)
            x = x + block(x[None], routing)[0]
        aux = balance_loss([b.gate for b in self.blocks], routings, context, 0.01)
        return x, aux


def naive_stack(stack: Stack, spec: RouterSpec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    recurrence, gate = spec.recurrence.to_dict(), spec.gate.to_dict()
    shared = dict(stack.named_parameters())
    states: list = [None] * x.shape[0]
    stream, losses = list(x), []
    for block in stack.blocks:
        own = dict(block.named_parameters())
        shared_projector = "router_shared.recurrence.projector.weight"
        params = {
            "projector": shared.get(shared_projector, own.get("gate.recurrence.projector.weight")),
            "scorer": own["gate.scorer.linear.weight"],
            "norm": own.get("gate.recurrence.norm.weight"),
        }
        prefix = "router_shared.recurrence.cell."
        params |= {"cell." + n.removeprefix(prefix): v for n, v in shared.items() if n.startswith(prefix)}
        first = own["experts.gate_up_proj"] if stack.config.mlp_gated else own["experts.up_proj"]
        all_logits, all_chosen = [], []
        for t, token in enumerate(stream):
            logits, states[t] = naive.route_layer(token, states[t], params, recurrence)
            chosen, weights = naive.gate(logits, TOP_K, gate["order"], gate["renormalize"])
            down = own["experts.down_proj"]
            outs = [
                w * naive.expert(token, first[n], down[n], stack.config.mlp_gated)
                for n, w in zip(chosen, weights, strict=True)
            ]
            stream[t] = token + sum(outs)
            all_logits.append(logits)
            all_chosen.append(chosen)
        losses.append(naive.load_balance(all_logits, all_chosen, EXPERTS))
    return torch.stack(stream), 0.01 * sum(losses) / len(losses)


RECURRENCES = [
    {"cell": cell, "carry": carry, "projector": projector}
    for cell, carry, projector in itertools.product(
        ("gru", "rnn", "lstm"), ("passed", "zero", "detached"), ("layer", "shared")
    )
] + [{"normalize": True}, {"concat_hidden": True}, {"normalize": True, "concat_hidden": True}]
GATES = [
    {"order": order, "renormalize": renormalize}
    for order, renormalize in itertools.product(("softmax_topk", "topk_softmax"), (True, False))
]
CASES = [(r, GATES[i % 4], bool(i % 2)) for i, r in enumerate(RECURRENCES)] + [({}, g, True) for g in GATES]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("recurrence", "gate", "gated"), CASES)
def test_equations(recurrence: dict, gate: dict, gated: bool, dtype: torch.dtype, bound: float) -> None:
    scorer = Linear.Config(init_std="inverse_sqrt")
    spec = vary(
        RMOE, recurrence=Recurrence.Config(width=P, **recurrence), scorer=scorer, gate=Softmax.Config(**gate)
    )
    stack = Stack(spec, gated).double()
    initialize(stack, 1)
    wanted_stack = Stack(spec, gated).double()
    wanted_stack.load_state_dict(stack.state_dict())
    stack = stack.to(dtype)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    got_x = x.to(dtype).clone().requires_grad_()
    out, aux = stack(got_x)
    ((out * direction.to(dtype)).sum() + aux).backward()
    want_x = x.clone().requires_grad_()
    want_out, want_aux = naive_stack(wanted_stack, spec, want_x)
    ((want_out * direction).sum() + want_aux).backward()

    assert relative(out, want_out) < bound
    assert relative(aux, want_aux) < bound
    assert relative(got_x.grad, want_x.grad) < bound
    for (name, got), (_, want) in zip(stack.named_parameters(), wanted_stack.named_parameters(), strict=True):
        wanted = torch.zeros_like(want) if want.grad is None else want.grad
        assert got.grad is not None, name
        assert relative(got.grad, wanted) < bound or wanted.norm() == got.grad.norm() == 0, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("cell", "form"), [("gru", "eager"), ("gru", "compiled"), ("rnn", "eager"), ("lstm", "eager")]
)
@pytest.mark.parametrize("tokens", [1, 29])
def test_cells_equal_torch(
    cell: str, form: str, tokens: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmoe.routing.cells import SHARED_CELLS

    monkeypatch.setattr("torch.compiler.is_compiling", lambda: form == "compiled")
    ours = SHARED_CELLS[cell](17).to(dtype)
    theirs = {"gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell, "lstm": torch.nn.LSTMCell}[cell](17, 17).to(
        dtype
    )
    ours.load_state_dict(theirs.state_dict())

    def step(module: torch.nn.Module, is_ours: bool) -> list[torch.Tensor]:
        """Outputs, and gradients of everything, of two steps."""
        x, h, c = torch.randn(3, tokens, 17, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()
        leaves = [x.requires_grad_(), h.requires_grad_(), *([c.requires_grad_()] if cell == "lstm" else [])]
        state = tuple(leaves[1:])
        for _ in range(2):
            found = module(x, state) if is_ours or cell == "lstm" else module(x, *state)
            state = found if isinstance(found, tuple) else (found,)
        gradients = torch.autograd.grad(
            sum(part.sin().sum() for part in state), [*leaves, *module.parameters()]
        )
        return [part.detach() for part in (*state, *gradients)]

    for a, b in zip(step(ours, True), step(theirs, False), strict=True):
        assert relative(a, b) < bound
        assert (a - b).abs().max() < bound * max(1.0, float(b.abs().max()))


def test_frozen_parts_of_the_gru_cost_no_gradient_and_change_none() -> None:
    from rmoe.routing.cells import GRU

    cell = GRU(17)
    for i, parameter in enumerate(cell.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i + 1))
    x, h = torch.randn(2, 29, 17, generator=torch.Generator().manual_seed(0)).unbind()
    leaves = [x, h, *cell.parameters()]

    def step(wanted: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is one for one in wanted))
        return torch.autograd.grad(cell(x, (h,))[0].sin().sum(), wanted)

    whole = step(leaves)
    for i, leaf in enumerate(leaves):
        assert torch.equal(step([leaf])[0], whole[i])
    with torch.no_grad():
        plain = cell(x, (h,))[0]
    assert relative(plain, cell(x, (h,))[0]) < 1e-6
