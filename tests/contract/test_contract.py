"""One contract, run for every row of the zoo."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch

from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.routing import (
    ZOO,
    Geometry,
    Noise,
    RouterContext,
    RouterSpec,
    Routing,
    balance_loss,
    build_router,
    build_shared,
    dispatched_experts,
    find,
)
from tests.contract.naive_routers import NaiveLayer, run
from tests.reload import assert_reloaded

LAYERS, WIDTH, EXPERTS, BATCH, LENGTH, VOCAB = 3, 21, 8, 3, 9, 40
TOKENS = BATCH * LENGTH
ROWS = sorted(ZOO)
STARTS = (
    "gate.expert_scale",
    "gate.norm.weight",
    "gate.threshold",
    "global_scale",
    "scorer.scale",
    "scorer.linear.bias",
    "zero_experts.constant_values",
)
"""Parameters that start at a constant: moved off it where values are compared."""
GOLDEN = Path(__file__).parents[1] / "golden" / "zoo.json"


class Routers(torch.nn.Module):
    """The routers of a model and what they share, on inputs of their own per layer."""

    def __init__(self, name: str, seed: int = 0, experts: int = EXPERTS, width: int = WIDTH) -> None:
        super().__init__()
        row = find(name)
        self.spec, self.top_k = row.spec, row.top_k or 2
        sizes = [Geometry(width, experts, self.top_k, LAYERS, i, VOCAB, 0.5) for i in range(LAYERS)]
        self.config = RMoEConfig(initializer_range=0.5)
        self.router_shared = build_shared(self.spec, sizes[0])
        self.routers = torch.nn.ModuleList(build_router(self.spec, size) for size in sizes)
        initialize(self, seed)

    def forward(
        self, inputs: torch.Tensor, ids: torch.Tensor, noise: Noise | None = None, batch: int = BATCH
    ) -> tuple[list[Routing], torch.Tensor]:
        context = RouterContext(batch, inputs.shape[1] // batch, None, ids, noise)
        state, routings = (), []
        for router, x in zip(self.routers, inputs, strict=True):
            routing, state = router(x, state, self.router_shared, context)
            routings.append(routing)
        return routings, balance_loss(list(self.routers), routings, context, 0.01)


def data(
    dtype: torch.dtype = torch.float64, tokens: int = TOKENS, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(LAYERS, tokens, width, dtype=torch.float64, generator=generator).to(dtype)
    return inputs, torch.randint(0, VOCAB, (tokens,), generator=generator)


def dense(routing: Routing, experts: int = EXPERTS) -> torch.Tensor:
    """Weights by expert, `[T, E]`; empty and dropped slots fall into a column that is cut off."""
    slots = dispatched_experts(routing, experts)
    return routing.weights.new_zeros(slots.shape[0], experts + 1).scatter_add(1, slots, routing.weights)[
        :, :experts
    ]


def besides(routing: Routing) -> torch.Tensor | None:
    """What a routing says besides the experts' weights, `[T, *]`: passthrough, constants, shared experts' weights."""
    passthrough = None if routing.passthrough is None else routing.passthrough[:, None]
    parts = [part for part in (passthrough, routing.added, routing.shared_weights) if part is not None]
    return torch.cat(parts, -1) if parts else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ROWS)
def test_shapes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    routers = Routers(name).to(dtype)
    inputs, ids = data(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    routings, loss = routers(inputs, ids)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    for routing in routings:
        classes = routing.logits.shape[1]
        router = routers.spec.to_dict()["router"]
        more = sum(router.get(f"{kind}_experts", 0) for kind in ("identity", "zero", "constant"))
        assert classes in (EXPERTS + more, EXPERTS + 1)
        assert routing.logits.shape == routing.probs.shape == (TOKENS, classes)
        assert routing.weights.shape == routing.experts.shape
        assert routing.experts.dtype == torch.int64
        assert routing.logits.dtype == routing.probs.dtype == routing.weights.dtype == wide
        assert ((routing.experts >= 0) & (routing.experts <= EXPERTS)).all()
        assert (routing.weights[routing.experts == EXPERTS] == 0).all()
        assert torch.isfinite(routing.weights).all()
        used = routing.probs.sum(-1) > 0  # a ReLU router may leave a token without any expert
        assert (routing.probs[used].sum(-1) - 1).abs().max() < 1e-5
        for row in routing.experts.tolist():
            real = [n for n in row if n < EXPERTS]
            assert len(real) == len(set(real)), "an expert is chosen twice"


@pytest.mark.parametrize("name", ROWS)
def test_gradients_reach_what_they_should(name: str) -> None:
    """In training, every trainable parameter; what a row declares zero by construction is exactly zero."""
    row, routers = find(name), Routers(name).double().train()
    inputs, ids = data(
        tokens=300
    )  # enough that SparseMixer meets near ties, the only place it has a gradient
    routings, balance = routers(inputs, ids, Noise(torch.tensor(11)))
    task = sum((dense(r) * torch.randn(300, EXPERTS, dtype=torch.float64)).sum() for r in routings)
    task = task + sum(
        (more * torch.randn_like(more)).sum() for r in routings if (more := besides(r)) is not None
    )
    parameters = dict(routers.named_parameters())
    if row.spec.balance.losses and parameters:
        grads = torch.autograd.grad(balance, list(parameters.values()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads), (
            "the balance loss reaches no parameter"
        )
    if parameters:
        (task + balance).backward()
    for parameter_name, parameter in parameters.items():
        gradient = parameter.grad
        declared = any(re.fullmatch(pattern, parameter_name) for pattern in row.zero_gradient)
        assert gradient is not None, parameter_name
        assert torch.isfinite(gradient).all(), parameter_name
        assert (gradient == 0).all() if declared else (gradient != 0).any(), parameter_name


@pytest.mark.parametrize("name", ROWS)
def test_raw_logits(name: str) -> None:
    """Logits come out before temperature and bias, and are no probabilities (a published bug was a double softmax)."""
    routers = Routers(name).double()
    inputs, ids = data()
    before, _ = routers(inputs, ids)
    for buffer_name, buffer in routers.named_buffers():
        if buffer_name.endswith(("log_value", "selection_bias.bias")):
            buffer.add_(0.7)
    after, _ = routers(inputs, ids)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.logits, b.logits)
        assert (a.logits.sum(-1) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in ROWS if ZOO[n].permutes == "yes"])
def test_permuting_tokens_permutes_the_routing(name: str) -> None:
    routers = Routers(name).double().eval()
    inputs, ids = data()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    plain, _ = routers(inputs, ids)
    permuted, _ = routers(inputs[:, order], ids[order])
    for a, b in zip(plain, permuted, strict=True):
        assert (a.logits[order] - b.logits).abs().max() < 1e-12
        assert (dense(a)[order] - dense(b)).abs().max() < 1e-12
        if (more := besides(a)) is not None:
            assert (more[order] - besides(b)).abs().max() < 1e-12
        assert torch.equal(dense(a)[order] > 0, dense(b) > 0)


def test_rows_that_do_not_permute_say_why() -> None:
    for name, row in ZOO.items():
        drops = row.spec.balance.capacity_factor is not None
        drops = drops or row.spec.router.kind in ("round_robin", "multi_level_context")
        assert drops == (row.permutes != "yes"), name


@pytest.mark.parametrize("name", ROWS)
def test_no_token_sees_a_later_one(name: str) -> None:
    routers = Routers(name).double().eval()
    inputs, ids = data()
    changed, changed_ids, cut = inputs.clone(), ids.clone(), 14
    changed[:, cut:] = changed[:, cut:].flip(1) * 1.7 + 0.3
    changed_ids[cut:] = (changed_ids[cut:] + 7) % VOCAB
    plain, _ = routers(inputs, ids, batch=1)
    other, _ = routers(changed, changed_ids, batch=1)
    same = all(torch.equal(dense(a)[:cut], dense(b)[:cut]) for a, b in zip(plain, other, strict=True))
    assert same == routers.spec.is_causal


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_deterministic(name: str, training: bool) -> None:
    inputs, ids = data(torch.float32)
    results = []
    for _ in range(2):
        torch.manual_seed(len(results))  # the default generator must not matter
        noise = Noise(torch.tensor(4)) if training else None
        results.append(Routers(name).train(training)(inputs, ids, noise))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a.weights, b.weights)
        assert torch.equal(a.experts, b.experts)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ROWS)
def test_equals_the_naive_reference(name: str) -> None:
    """float64, outputs and gradients, 1e-10."""
    routers = Routers(name).double().eval()
    for buffer_name, buffer in routers.named_buffers():  # move training-time state off its start
        if buffer_name.endswith("selection_bias.bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()))
        elif buffer_name.endswith("threshold"):
            buffer.copy_(torch.linspace(-1, 1.5, buffer.numel()))
        elif buffer_name.endswith("l1_weight"):
            buffer.fill_(0.3)
    with torch.no_grad():
        for layer, router in enumerate(routers.routers):
            for parameter_name, parameter in router.named_parameters():
                if parameter_name in ("recurrence.cell.weight", *STARTS):  # the gated decay's starts at zero
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(layer))
    inputs, ids = data()
    spec = routers.spec.to_dict()
    leaves = inputs.clone().requires_grad_()
    routings, loss = routers(leaves, ids)
    direction = torch.randn(
        LAYERS, TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(8)
    )
    task = sum((dense(r) * w).sum() for r, w in zip(routings, direction, strict=True))
    more = [besides(routing) for routing in routings]
    task = task + sum((part**2).sum() for part in more if part is not None)
    names, parameters = zip(*[("", leaves), *routers.named_parameters()], strict=True)
    learns = (task + loss).requires_grad  # nothing in hash routing does
    got = (
        torch.autograd.grad(task + loss, parameters, allow_unused=True)
        if learns
        else [None] * len(parameters)
    )

    def tensors(module: torch.nn.Module | None) -> dict[str, torch.Tensor]:
        if module is None:
            return {}
        return dict(module.named_buffers()) | dict(module.named_parameters())

    shared = tensors(routers.router_shared)
    layers = [
        NaiveLayer(spec, tensors(router), shared, i, EXPERTS, routers.top_k)
        for i, router in enumerate(routers.routers)
    ]
    if name == "stable-moe":
        for layer in layers:
            layer.penalty = stable_penalty(layer, routers.spec.router, ids)
    want = run(layers, [leaves[i] for i in range(LAYERS)], ids.tolist(), BATCH)
    want_task = sum((w * d).sum() for w, d in zip(want["weights"], direction, strict=True))
    want_task = want_task + sum((part**2).sum() for part in want["besides"] if part is not None)
    want_total = want_task + want["loss"]
    assert want_total.requires_grad == learns
    want_gradients = torch.autograd.grad(want_total, parameters, allow_unused=True) if learns else got

    for layer, routing in enumerate(routings):
        assert (routing.logits - want["logits"][layer]).abs().max() < 1e-10
        assert (routing.probs - want["probs"][layer]).abs().max() < 1e-10
        assert (dense(routing) - want["weights"][layer]).abs().max() < 1e-10
        assert (more[layer] is None) == (want["besides"][layer] is None)
        if more[layer] is not None:
            assert (more[layer] - want["besides"][layer]).abs().max() < 1e-10
    assert abs(float(loss.detach()) - float(torch.as_tensor(want["loss"]).detach())) < 1e-10
    for parameter_name, a, b in zip(names, got, want_gradients, strict=True):
        a = torch.zeros(1, dtype=torch.float64) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        assert (a - b).norm() <= 1e-10 * max(1.0, float(b.norm())), parameter_name or "input"


def stable_penalty(layer: NaiveLayer, options: object, ids: torch.Tensor):  # type: ignore[no-untyped-def]
    def penalty(rows: dict[str, list]) -> torch.Tensor:
        tokens, mean = len(ids), len(ids) / EXPERTS
        balance = distill = torch.zeros((), dtype=torch.float64)
        for t, logits in enumerate(rows["logits"]):
            best = rows["chosen"][t][0]
            load = sum(c == [best] for c in rows["chosen"])
            balance = balance + (load - mean) / mean / (1 + torch.exp(-logits[best]))
            student = layer.own["word_router.weight"] @ layer.own["word_embeddings"][ids[t]]
            distill = distill - torch.log_softmax(student, 0)[best]
        return options.balance_weight * balance / tokens + options.distill_weight * distill / tokens  # type: ignore[attr-defined]

    return penalty


@pytest.mark.parametrize("name", ROWS)
def test_bfloat16_inputs_choose_as_float32_does(name: str) -> None:
    """E = 16, k = 2 (1 where the row is top-1): at least 99% of 2,000 random tokens get the same experts."""
    routers = Routers(name, experts=16, width=64).eval()
    inputs, ids = data(torch.float32, tokens=2000, width=64)
    exact, _ = routers(inputs, ids, batch=1)
    rounded, _ = routers(inputs.bfloat16(), ids, batch=1)
    for a, b in zip(exact, rounded, strict=True):
        assert b.logits.dtype == torch.float32
        same = (dense(a, 16) > 0) == (dense(b, 16) > 0)
        # No top-k: 16 comparisons are 16 decisions.
        if name not in ("remoe", "expert-threshold", "dynmoe", "blockffn"):
            same = same.all(-1)
        # A choice that hangs on another choice, an expert one layer below or the nearest neighbours, flips with it.
        assert same.double().mean() >= (0.97 if name in ("acmoe", "mcf-moe") else 0.99)


@pytest.mark.parametrize("name", ROWS)
def test_json_round_trip(name: str) -> None:
    spec = find(name).spec
    assert RouterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("name", ROWS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Training-time state included: routers after three updates."""
    row = find(name)
    config = RMoEConfig(
        vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, moe_intermediate_size=8,
        num_experts=8, num_experts_per_tok=row.top_k or 2, router=name,
    )  # fmt: skip
    net = RMoEForCausalLM(config)
    initialize(net, 1)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    for step in range(1, 4):
        net.update_routers(net(ids).router_stats, step, 10)
    net.save_pretrained(tmp_path)
    loaded = RMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.router_spec == row.spec
    assert_reloaded(loaded, net, ids)


def test_golden() -> None:
    """Resolved configuration of every row; RMOE_UPDATE_GOLDEN=1 rewrites it."""
    resolved = {name: row.spec.to_dict() for name, row in ZOO.items()}
    text = json.dumps(resolved, indent=1, sort_keys=True) + "\n"
    if os.environ.get("RMOE_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert json.loads(GOLDEN.read_text()) == json.loads(text)


def test_at_least_ninety_distinct_rows() -> None:
    specs = {json.dumps(row.spec.to_dict(), sort_keys=True) for row in ZOO.values()}
    assert len(specs) == len(ZOO) >= 90
    assert all(row.source and row.summary for row in ZOO.values())


def test_specs_are_frozen() -> None:
    spec = find("rmoe").spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.gate = None  # type: ignore[misc]
