"""Dense gradients: the router's gradient is the dense mixture's, everything else is the sparse layer's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM, initialize
from rmoe.model.layers import RMoESparseMoeBlock
from rmoe.routing import RouterContext, Routing
from tests import naive
from tests.model.small import config, loss_and_gradients, model, tokens, with_lora_on_experts

ROUTERS = [
    "smoe",
    "smoe-topk-softmax",
    "smoe-bias",
    "rmoe",
    "deepseek-v3",
    "eda",
    "smoe-capacity",
    "remoe",
    "dynmoe",
]


def block_of(router: str, dense: str | None, **changes: object) -> RMoESparseMoeBlock:
    settings = config(router=router, num_shared_experts=0, dense_gradients=dense, **changes)
    block = RMoESparseMoeBlock(settings, 0).double()
    block.config = settings  # type: ignore[assignment]
    initialize(block, 1)
    return block


def routed(block: RMoESparseMoeBlock, x: Tensor) -> Routing:
    shared = None
    if block.gate.spec.recurrence.kind == "cell":
        from rmoe.routing import build_shared
        from rmoe.routing.initial import fill

        shared = build_shared(block.gate.spec, block.gate.geometry)
        if shared is not None:
            shared = shared.double()
            fill(shared, 2, 0.3)
    return block.gate(x, (), shared, RouterContext(1, len(x)))[0]


def plain(block: RMoESparseMoeBlock, n: int, x: Tensor) -> Tensor:
    experts = block.experts
    first = experts.gate_up_proj if experts.gated else experts.up_proj
    return torch.stack([naive.expert(t, first[n], experts.down_proj[n], experts.gated) for t in x])


def dense_mixture(block: RMoESparseMoeBlock, x: Tensor, routing: Routing) -> Tensor:
    """Token by token, from the definition: chosen experts as the gate weighs them, the others `p r`."""
    every = [plain(block, n, x).detach() for n in range(block.experts.num_experts)]
    rows = []
    for t in range(len(x)):
        dropped = (
            [False] * routing.experts.shape[1] if routing.dropped is None else routing.dropped[t].tolist()
        )
        slots = [
            (n, w)
            for n, w, gone in zip(routing.experts[t].tolist(), routing.weights[t], dropped, strict=True)
            if n < len(every) and not gone
        ]
        chosen = dict(slots)
        mass = sum(float(routing.probs[t, n]) for n in chosen)
        unit = sum(float(w) for w in chosen.values()) / mass if chosen else 0.0
        weights = [chosen.get(n, routing.probs[t, n] * unit) for n in range(len(every))]
        rows.append(sum(w * every[n][t] for n, w in enumerate(weights)))
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_densemixer_gives_the_router_the_dense_mixtures_gradient(router: str, gated: bool) -> None:
    """float64, 1e-10; the output and the experts' gradients are the sparse layer's."""
    changes: dict[str, object] = {} if gated else {"mlp_gated": False, "hidden_act": "relu"}
    dense, sparse = block_of(router, "densemixer", **changes), block_of(router, None, **changes)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(11, 36, dtype=torch.float64, generator=generator)
    direction = torch.randn(11, 36, dtype=torch.float64, generator=generator)
    routers = [p for p in dense.gate.parameters() if p.requires_grad]
    routing = routed(dense, x)
    got_out = dense(x[None], routing)[0]
    got = torch.autograd.grad(
        (got_out * direction).sum(), [*routers, *dense.experts.parameters()], allow_unused=True
    )
    routing = routed(dense, x)
    passthrough = 0.0 if routing.passthrough is None else routing.passthrough[:, None] * x
    mixture = dense_mixture(dense, x, routing) + passthrough
    want = torch.autograd.grad((mixture * direction).sum(), routers, allow_unused=True)
    for a, b in zip(got, want, strict=False):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))
    plain_out = sparse(x[None], routed(sparse, x))[0]
    assert torch.equal(got_out, plain_out)
    of_experts = torch.autograd.grad((plain_out * direction).sum(), list(sparse.experts.parameters()))
    for a, b in zip(got[len(routers) :], of_experts, strict=True):
        assert torch.equal(a, b)


def test_densemixer_reaches_experts_that_were_not_chosen() -> None:
    """What the sparse gradient misses: without renormalisation a row of the router no token chose learns nothing."""
    gradients = []
    for dense in (None, "densemixer"):
        block = block_of("smoe", dense, norm_topk_prob=False, num_experts_per_tok=1)
        x = torch.ones(1, 36, dtype=torch.float64)
        routing = routed(block, x)
        block(x[None], routing).sum().backward()
        gradients.append(block.gate.scorer.linear.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


@pytest.mark.parametrize("experts", ["eager", "sorted_mm", "grouped_mm"])
def test_in_a_model(experts: str) -> None:
    """The same output with recomputation or without, whatever computes the experts; evaluation costs nothing more."""
    results = []
    for recompute in (False, True):
        net = model(router="rmoe", experts=experts, dense_gradients="densemixer").train()
        if recompute:
            net.gradient_checkpointing_enable()
        results.append(loss_and_gradients(net, tokens()))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert (gradient - results[1][1][name]).abs().max() < 1e-6, name
    sparse = model(router="rmoe", experts=experts)
    sparse_loss, sparse_gradients = loss_and_gradients(sparse, tokens())
    assert abs(sparse_loss - results[0][0]) < 1e-6
    last = "model.layers.2.mlp.gate.scorer.linear.weight"
    assert (results[0][1][last] - sparse_gradients[last]).abs().max() > 1e-7


@pytest.mark.parametrize("router", ["smoe", "smoe-bias", "deepseek-v3", "smoe-capacity"])
def test_default_outputs_stand_in_for_experts_that_were_not_chosen(router: str) -> None:
    block = block_of(router, "default").train()
    generator = torch.Generator().manual_seed(6)
    block.default_outputs.mean.normal_(generator=generator)  # type: ignore[union-attr]
    block.default_outputs.double()  # type: ignore[union-attr]
    x = torch.randn(9, 36, dtype=torch.float64, generator=generator)
    routing = routed(block, x)
    mask = torch.tensor([True] * 7 + [False] * 2)
    observed: list[Tensor] = []
    out = block(x[None], routing, mask, observed)
    mean = block.default_outputs.mean.double()  # type: ignore[union-attr]
    slots = routing.experts if routing.dropped is None else routing.experts.masked_fill(routing.dropped, 99)
    sums = torch.zeros(5, 37, dtype=torch.float64)
    for t in range(9):
        chosen = {n: w for n, w in zip(slots[t].tolist(), routing.weights[t], strict=True) if n < 5}
        mass = sum(float(routing.probs[t, n]) for n in chosen)
        unit = sum(float(w) for w in chosen.values()) / mass if chosen else 0.0
        want = sum(w * plain(block, n, x[t : t + 1])[0] for n, w in chosen.items())
        want = want + sum(routing.probs[t, n] * unit * mean[n] for n in range(5) if n not in chosen)
        assert (out[0, t] - want).abs().max() < 1e-10
        for n in chosen if mask[t] else ():
            sums[n] += torch.cat((plain(block, n, x[t : t + 1])[0], torch.ones(1, dtype=torch.float64)))
    (seen,) = observed
    assert (seen.view(5, 37) - sums).abs().max() < 1e-10
    block.eval()
    assert (block(x[None], routing) - out).abs().max() < 1e-10


def test_default_outputs_move_once_per_step_and_not_by_recomputation() -> None:
    means = []
    for recompute in (False, True):
        net = model(router="smoe", dense_gradients="default").train()
        if recompute:
            net.gradient_checkpointing_enable()
        first, second = net(tokens(seed=1), labels=tokens(seed=1)), net(tokens(seed=2), labels=tokens(seed=2))
        (first.loss + second.loss).backward()
        defaults = net.model.layers[1].mlp.default_outputs
        assert (defaults.mean == 0).all()
        stats = first.router_stats.add(second.router_stats)
        net.update_routers(stats, 1, 10)
        sums = stats.observed[0].view(5, 37)
        assert torch.equal(sums[:, -1].long(), stats.counts[0])
        assert (defaults.mean - 0.1 * sums[:, :-1] / sums[:, -1:]).abs().max() < 1e-6
        means.append(defaults.mean.clone())
    assert torch.equal(*means)
    assert net.eval()(tokens()).router_stats.observed is None


def test_default_outputs_are_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net = model(router="smoe", dense_gradients="default").train()
    net.update_routers(net(tokens()).router_stats, 1, 10)
    net.save_pretrained(tmp_path)
    loaded = RMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for a, b in zip(net.model.layers[1:], loaded.model.layers[1:], strict=True):
        assert b.mlp.default_outputs.mean.dtype == torch.float32
        assert torch.equal(a.mlp.default_outputs.mean, b.mlp.default_outputs.mean)


@pytest.mark.parametrize(
    "changes",
    [
        {"dense_gradients": "dense"},
        {"dense_gradients": "densemixer", "router": "hash"},
        {"dense_gradients": "default", "router": "llama-4"},
    ],
)
def test_refused(changes: dict) -> None:
    with pytest.raises(RequestError, match="dense_gradients"):
        config(**changes)


@pytest.mark.parametrize("groups", [{"ep_size": 2}, {"tp_size": 2}, {"enable_expert_parallel": True}])
@pytest.mark.parametrize("dense", ["densemixer", "default"])
def test_refused_with_experts_cut_up(dense: str, groups: dict) -> None:
    settings = config(dense_gradients=dense)
    settings.distributed_config = SimpleNamespace(**groups)
    with pytest.raises(RequestError, match="dense_gradients"):
        RMoEForCausalLM(settings)


@pytest.mark.parametrize("dense", [None, "densemixer"])
def test_lora_on_the_experts_one_by_one(dense: str | None) -> None:
    """Under PEFT an expert's weight is computed, no parameter; and one expert alone cannot be."""
    net, ids = with_lora_on_experts(model(router="smoe", dense_gradients=dense)), tokens()
    if dense is not None:
        with pytest.raises(
            RequestError, match=r"dense_gradients is 'densemixer'; allowed: null with experts in a"
        ):
            net(input_ids=ids, labels=ids)
        return
    net(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if "lora_B" in name)
