"""Every router class of the installed transformers against its row of the zoo: choice, weights, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from experiments.zoo_page.shipped import DIFFERENCES, RELEASE, WITHOUT_ROW, rows_of_classes
from rmoe.routing import ZOO, Geometry, RouterContext, Routing, build_router, find, vary
from rmoe.routing.gate import TopK
from tests.routing import transformers_routers as theirs
from tests.routing.transformers_routers import EXPERTS, VOCAB, WIDTH

TOKENS = 201
INSTALLED = theirs.router_classes()
PAIRS = [(name, row) for name, rows in rows_of_classes().items() if name in INSTALLED for row in rows]


def test_every_router_class_has_a_row_or_a_reason() -> None:
    known = rows_of_classes().keys() | WITHOUT_ROW.keys()
    assert len(set(INSTALLED) & known) > 40
    if Version(transformers.__version__) >= Version(RELEASE):
        missing = set(INSTALLED) - known
        assert not missing, (
            "new in transformers: name its row in experiments/zoo_page/shipped.py, or say why none"
        )
    assert not rows_of_classes().keys() & WITHOUT_ROW.keys()
    assert DIFFERENCES.keys() <= rows_of_classes().keys()
    assert {row for rows in rows_of_classes().values() for row in rows} <= ZOO.keys()


def test_a_new_family_would_be_found() -> None:
    import ast

    source = """
class NewRouter(nn.Module): ...
class NewGate(nn.Module): ...
class Other(nn.Module): ...
class NewBlock(nn.Module):
    def __init__(self):
        self.gate = NewGate()
        self.experts = Other()
class NewMoE(nn.Module):
    def forward(self, x):
        return F.softmax(self.w(x)).topk(self.num_experts_per_tok)
class Attention(nn.Module):
    def forward(self, x):
        return F.softmax(self.w(x)).topk(3)
"""
    assert set(theirs._routers(ast.parse(source))) == {"NewRouter", "NewGate", "NewMoE"}


def counterpart(row: str, top_k: int, layer: int) -> Any:
    """The row's router; without the capacity limit, which no router class of transformers has as ours."""
    spec = find(row).spec
    spec = vary(spec, balance={"capacity_factor": None})
    if row == "eda":
        spec = vary(spec, scorer={"norm_eps": 1e-6})
    return build_router(spec, Geometry(WIDTH, EXPERTS, top_k, 3, layer, VOCAB))


@torch.no_grad()
def copy_weights(ours: Any, router: nn.Module, bias: Tensor | None) -> None:
    tensors = dict(router.named_parameters()) | dict(router.named_buffers())
    pairs = dict(SAME_NAMES)
    if hasattr(ours.scorer, "linear"):
        shape = ours.scorer.linear.weight.shape
        (matrix,) = (name for name, tensor in tensors.items() if tensor.shape == shape)
        pairs["scorer.linear.weight"] = matrix
    for mine, name in pairs.items():
        if name in tensors and mine in dict(ours.named_parameters()) | dict(ours.named_buffers()):
            target = (
                ours.get_parameter(mine) if mine in dict(ours.named_parameters()) else ours.get_buffer(mine)
            )
            target.copy_(tensors[name])
    if ours.selection_bias is not None:
        assert bias is not None
        ours.selection_bias.bias.copy_(bias)
    else:
        assert bias is None


SAME_NAMES = {
    "scorer.linear.bias": "bias",
    "scorer.scale": "scale",
    "gate.expert_scale": "per_expert_scale",
    "global_scale": "global_scale",
    "table": "tid2eid",
    "scorer.keys.weight": "router_gate.weight",
    "recurrence.projector.weight": "down_proj.weight",
    "recurrence.projector.bias": "down_proj.bias",
    "recurrence.cell.scale": "router_states_scale",
    "scorer.norm.weight": "router_mlp.norm.weight",
    "scorer.fc1.weight": "router_mlp.fc1.weight",
    "scorer.fc1.bias": "router_mlp.fc1.bias",
    "scorer.fc2.weight": "router_mlp.fc2.weight",
    "scorer.fc2.bias": "router_mlp.fc2.bias",
    "scorer.out.weight": "router_mlp.out_proj.weight",
}
"""Our tensor -> theirs, where the shape does not say it."""


def decision(routing: Routing) -> theirs.Decision:
    dense = routing.weights.new_zeros(len(routing.weights), EXPERTS + 1)
    chosen = torch.zeros_like(dense, dtype=torch.bool).scatter(1, routing.experts, True)
    dense = dense.scatter_add(1, routing.experts, routing.weights)
    return theirs.Decision(dense[:, :EXPERTS], chosen[:, :EXPERTS], routing.shared_weights)


@pytest.fixture
def same_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves rounding to torch, done in one way.

    Many families ask `topk` for no order. Which one they then get is torch's affair, and so is how the sum over the
    weights rounds: here they get the order of the scores, which is ours. Our linear state is a fused multiply-add:
    here it is a product and a sum, as theirs.
    """
    plain = torch.topk

    def topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        return plain(input, k, dim, largest, True)

    monkeypatch.setattr(torch, "topk", topk)
    monkeypatch.setattr(Tensor, "topk", topk)
    monkeypatch.setattr(torch, "addcmul", lambda x, a, b: x + a * b)


@pytest.mark.usefixtures("same_rounding")
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_row_is_the_family(name: str, row: str, layer: int) -> None:
    """float32: same experts, same weights to the bit; gradients of the input and the weights to 1e-6."""
    spec = find(row).spec
    top_k = {"sparsemixer": 2, "gshard": 2, "switch": 1, "eda": 1, "hunyuan": 2, "axk2": 8}.get(row, 4)
    ours = counterpart(row, top_k, layer)
    gate = ours.gate.options if isinstance(ours.gate, TopK) else None
    outside = gate.scale if gate is not None and name in theirs_without_scale() else 1.0
    router = theirs.build(name, theirs.settings(spec, gate, top_k), layer)
    bias = theirs.selection_bias(router, theirs.takes_bias(router))
    copy_weights(ours, router, bias)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    classes = EXPERTS + getattr(spec.router, "identity_experts", 0)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    state = (theirs.state_below(TOKENS),) if row == "eda" and layer else ()
    one_by_one = row == "doge"  # products of one row round as those of one row
    if one_by_one:
        parts = [ours(token[None], (), None, RouterContext(1, 1))[0] for token in mine]
        routing = parts[0]._replace(
            weights=torch.cat([p.weights for p in parts]), experts=torch.cat([p.experts for p in parts])
        )
    else:
        routing, _ = ours(mine, state, None, RouterContext(1, TOKENS, None, ids))
    got, want = decision(routing), theirs.decide(name, router, other, ids, bias, classes)
    want = want._replace(weights=want.weights * outside)
    assert torch.equal(got.chosen, want.chosen[:, :EXPERTS])
    assert torch.equal(got.weights, want.weights[:, :EXPERTS])
    if classes > EXPERTS:
        assert (routing.passthrough - want.weights[:, EXPERTS:].sum(-1)).abs().max() < 1e-6
    assert (got.shared is None) == (want.shared is None)
    if got.shared is not None:
        assert torch.equal(got.shared, want.shared)

    direction = torch.randn(EXPERTS, generator=generator)
    matrix = max(ours.scorer.parameters(), key=lambda p: p.numel())
    (their_matrix,) = (p for p in router.parameters() if p.shape == matrix.shape and torch.equal(p, matrix))
    ours_grad = torch.autograd.grad((got.weights * direction).sum(), (mine, matrix))
    their_grad = torch.autograd.grad((want.weights[:, :EXPERTS] * direction).sum(), (other, their_matrix))
    for a, b in zip(ours_grad, their_grad, strict=True):
        assert a.abs().max() > 0
        assert (a - b).abs().max() <= 1e-6 * max(1.0, float(b.abs().max()))


def theirs_without_scale() -> set[str]:
    """Routers whose block multiplies its output by the scale."""
    return {name for name, note in DIFFERENCES.items() if note.startswith("the scale multiplies")}
