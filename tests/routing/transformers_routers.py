"""Router classes of the installed transformers, found in its source, and each built and read with random weights."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from rmoe.routing import RouterSpec
from rmoe.routing.gate import TopK

EXPERTS, WIDTH, VOCAB, SHARED = 16, 24, 40, 2


@cache
def router_classes() -> list[str]:
    """`family.Class` of everything in transformers' modeling files that routes tokens to experts.

    That is a class called a router or gating; what a block with `experts` has as its gate, router or wg; and a class
    that takes the largest of a softmax or a sigmoid itself, and has experts.
    """
    models = Path(transformers.__file__).parent / "models"
    found: set[str] = set()
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if re.search("Router|Gating|expert", source):
            found |= {f"{path.parent.name}.{name}" for name in _routers(ast.parse(source))}
    return sorted(found)


def _routers(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        if not isinstance(node, ast.ClassDef):
            continue
        if re.search("(Router|Gating)$", node.name):
            yield node.name
        inner = list(ast.walk(node))
        calls = {n.func.attr for n in inner if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
        names = {n.attr for n in inner if isinstance(n, ast.Attribute)}
        chooses = calls & {"topk", "argmax"} and calls & {"softmax", "sigmoid"}
        if chooses and any("expert" in name for name in names):
            yield node.name
        parts = {
            n.targets[0].attr: ast.unparse(n.value.func)
            for n in inner
            if isinstance(n, ast.Assign)
            and isinstance(n.targets[0], ast.Attribute)
            and isinstance(n.value, ast.Call)
        }
        if "experts" in parts:
            yield from (parts[name] for name in ("gate", "router", "wg") if name in parts)


class Decision(NamedTuple):
    """What a router of transformers decided: dense weights `[T, C]`, which are chosen, shared experts' weights."""

    weights: Tensor
    chosen: Tensor
    shared: Tensor | None = None


def settings(spec: RouterSpec, gate: TopK.Config | None, top_k: int) -> SimpleNamespace:
    """A configuration under all names that families have for the same thing, with a row's options."""
    config = SimpleNamespace(
        hidden_size=WIDTH, intermediate_size=8, hidden_act="silu", mlp_bias=False, vocab_size=VOCAB,
        initializer_range=0.02, rms_norm_eps=1e-6, router_jitter_noise=0.01, input_jitter_noise=0.0,
        moe_jitter_eps=None, router_bias=False, router_dtype="float32", router_ignore_padding_tokens=False,
        expert_capacity=10_000, second_expert_policy="all", normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=False, moe_eval_capacity_token_fraction=0.0, use_expert_bias=True,
        zero_expert_num=getattr(spec.router, "identity_experts", 0), n_shared_experts=SHARED,
        router_hidden_size=256, ffn_hidden_size=8, ffn_act_fn={"name": "silu"},
    )  # fmt: skip
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        setattr(config, name, EXPERTS)
    for name in ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k"):
        setattr(config, name, top_k)
    if gate is None:
        return config
    grouped, scale = gate.groups > 1, gate.scale
    if hasattr(spec.router, "scale"):
        scale = spec.router.scale
    for name in ("routed_scaling_factor", "route_scale", "router_scaling_factor"):
        setattr(config, name, scale)
    config.n_group, config.topk_group = gate.groups, gate.top_groups
    config.topk_method = "group_limited_greedy" if grouped else "greedy"
    config.norm_topk_prob, config.moe_norm_min = gate.renormalize, gate.eps
    config.moe_normalize_expert_weights = gate.norm
    config.scoring_func = {"sqrt_softplus": "sqrtsoftplus"}.get(gate.scores, gate.scores)
    config.expert_selection_fn = gate.scores
    config.moe_router_logit_softcapping = gate.softcap or 0.0
    config.output_multiplier = gate.multiplier
    if gate.layer_k:
        config.moe_topk = list(gate.layer_k)
    config.ffn_config = config
    return config


def build(name: str, config: SimpleNamespace, layer: int) -> nn.Module:
    """The class's own module with random weights."""
    family, cls = name.split(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, cls)
    if cls == "JetMoeTopKGating":
        router = kind(WIDTH, EXPERTS, config.num_experts_per_tok)
    elif "layer_idx" in inspect.signature(kind).parameters:
        router = kind(config, layer_idx=layer)
    else:
        router = kind(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in (*router.parameters(), *router.buffers()):
            if part.is_floating_point():
                part.copy_(torch.randn(part.shape, generator=generator) * (0.5 if part.dim() > 1 else 0.2))
            else:
                part.copy_(torch.randint(0, EXPERTS, part.shape, generator=generator))
    return router.eval()


def selection_bias(router: nn.Module, arguments: bool) -> Tensor | None:
    """The bias that a family's choice adds to its scores; random where the block hands it to the router."""
    found = [
        part
        for name, part in (*router.named_buffers(), *router.named_parameters())
        if "correction_bias" in name or "balancing_bias" in name
    ]
    if found:
        return found[0].detach().flatten()
    if arguments:
        return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(4)) * 0.2
    return None


def takes_bias(router: nn.Module) -> bool:
    return bool(
        {"e_score_correction_bias", "expert_bias"} & set(inspect.signature(router.forward).parameters)
    )


def decide(
    name: str, router: nn.Module, x: Tensor, ids: Tensor, bias: Tensor | None, classes: int
) -> Decision:
    """Run it on `[T, d]` and read its decision."""
    cls = name.split(".")[1]
    special = _SPECIAL.get(cls)
    if special is not None:
        return special(router, x)
    arguments: list[Any] = [x]
    if takes_bias(router):
        arguments.append(bias)
    if "input_ids" in inspect.signature(router.forward).parameters:
        arguments.append(ids)
    if cls in ("AfmoeTokenChoiceRouter",):
        arguments[0] = x[None]
    return _by_shape(router(*arguments), len(x), classes)


def _by_shape(result: Any, tokens: int, classes: int) -> Decision:
    """The `[T, k]` int64 tensor among the results is the choice, the float tensor of its shape the weights."""
    (experts,) = (part for part in result if part.dtype == torch.int64)
    weights = next(part for part in result if part.is_floating_point() and part.shape == experts.shape)
    shared = [part for part in result if part.is_floating_point() and part.shape == (tokens, SHARED)]
    dense = weights.new_zeros(tokens, classes)
    chosen = torch.zeros(tokens, classes, dtype=torch.bool).scatter(1, experts, True)
    return Decision(dense.scatter_add(1, experts, weights), chosen, shared[0] if len(result) == 4 else None)


def _dbrx(block: Any, x: Tensor) -> Decision:
    weights, experts = block.route_tokens_to_experts(block.router(x))
    return _by_shape((weights, experts), len(x), EXPERTS)


class _One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def _doge(block: Any, x: Tensor) -> Decision:
    """Its experts' values become unit vectors and what they compute 1, so that its output is the weights."""
    block.act_fn = _One()
    block.down_proj.weight.data.zero_()
    block.up_embed.weight.data = torch.eye(EXPERTS, WIDTH)
    dense = torch.cat([block(token[None, None])[0][0] for token in x])[:, :EXPERTS]
    return Decision(dense, dense > 0)


def _jetmoe(router: Any, x: Tensor) -> Decision:
    _, tokens, gates, sizes, _ = router(x)
    experts = torch.arange(EXPERTS).repeat_interleave(torch.tensor(sizes))
    dense = gates.new_zeros(len(x), EXPERTS).index_put((tokens, experts), gates)
    return Decision(dense, dense > 0)


def _llama4(router: Any, x: Tensor) -> Decision:
    scores, _ = router(x)
    return Decision(scores, scores > 0)


def _nllb(router: Any, x: Tensor) -> Decision:
    _, weights, _ = router(x)
    return Decision(weights, weights > 0)


def _switch(router: Any, x: Tensor) -> Decision:
    found = {(part.shape[-1], part.is_floating_point()): part.reshape(len(x), -1) for part in router(x[None])}
    chosen, probs = found[EXPERTS, False], found[1, True]  # in another order up to 5.17
    return Decision(chosen * probs, chosen.bool())


def _zaya(router: Any, x: Tensor) -> Decision:
    below = torch.randn(1, len(x), router.router_hidden_size, generator=torch.Generator().manual_seed(6))
    _, weights, experts, _ = router(x[None], below)
    dense = weights.new_zeros(len(x), EXPERTS).scatter_add(1, experts, weights)
    return Decision(dense, dense > 0)


_SPECIAL: dict[str, Any] = {
    "DbrxFFN": _dbrx,
    "DogeCDMoE": _doge,
    "JetMoeTopKGating": _jetmoe,
    "Llama4Router": _llama4,
    "NllbMoeTop2Router": _nllb,
    "SwitchTransformersTop1Router": _switch,
    "ZayaRouter": _zaya,
}
"""Classes whose results are not a choice and its weights."""


def state_below(tokens: int) -> Tensor:
    """What `_zaya` passes in as the layer below's state."""
    return torch.randn(1, tokens, 256, generator=torch.Generator().manual_seed(6))[0]
