"""Every fast path against float64 on the CPU, on the device at hand; each check says its error and what is allowed."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.routing.contract import RouterContext
from rmoe.routing.options import Geometry
from rmoe.routing.router import build_router, build_shared
from rmoe.routing.zoo import resolve

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "pre-norm SwiGLU": {"mlp_gated": True, "hidden_act": "silu"},
    "post-norm ReLU": {
        "norm_position": "post", "norm_type": "layernorm", "mlp_gated": False, "hidden_act": "relu",
    },
}  # fmt: skip
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the norm. bfloat16 rounds to 0.4 %, and a few such errors add up."""
ROUTERS = ("smoe", "rmoe", "rmoe-lstm", "eda")


@dataclass(frozen=True)
class Check:
    """`error`: the largest relative error of a tensor's norm; None where it could not be computed, and why."""

    name: str
    error: float | None
    allowed: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.allowed


def run_checks(device: str, compiled: bool) -> list[Check]:
    """All without `torch.compile`, or those through it. What fails to run is a failed check, and the others go on."""
    checks: list[Check] = []

    def check(name: str, allowed: float, error: Callable[[], float]) -> None:
        try:
            checks.append(Check(name, error(), allowed))
        except Exception as problem:
            traceback.print_exc()
            checks.append(
                Check(name, None, allowed, " ".join(f"{type(problem).__name__}: {problem}".split())[:200])
            )

    if compiled:
        variants: dict[str, dict[str, Any]] = {"compiled": {"compiled": True, "chunked": True}}
    else:
        variants = {
            "as it is": {}, "loss in chunks": {"chunked": True},
            "activation checkpointing": {"checkpointing": True},
        }  # fmt: skip
        check_parts(check, device)
    for architecture, choice in ARCHITECTURES.items():
        for variant, options in variants.items():
            name = f"model, loss and gradients, {architecture}, float32, {variant}"
            check(name, 1e-4, lambda c=choice, o=options: model_error(c, device, **o))
    name = f"decoding in a static cache{', compiled' if compiled else ''}, float32"
    check(name, 1e-4, lambda: decode_error(device, compiled))
    return checks


def check_parts(check: Callable[[str, float, Callable[[], float]], None], device: str) -> None:
    """Experts and routers by themselves."""
    for architecture, choice in ARCHITECTURES.items():
        for dtype, bound in BOUNDS.items():
            for path in experts_paths(device, dtype):
                for load in LOADS:
                    name = f"experts, {path}, {architecture}, {_name(dtype)}, {load}"
                    check(
                        name,
                        bound,
                        lambda c=choice, p=path, t=dtype, w=load: experts_error(c, p, t, w, device),
                    )
    for router in ROUTERS:
        check(f"router {router}, float32", 1e-5, lambda r=router: router_error(r, device))


def experts_paths(device: str, dtype: torch.dtype) -> list[str]:
    """What can be asked for. transformers' grouped_mm is for bfloat16 on a GPU."""
    paths = ["auto", "sorted_mm", "batched_mm", "eager"]
    return paths if device == "cuda" and dtype != torch.bfloat16 else [*paths, "grouped_mm"]


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest error of a tensor's norm, over that norm."""
    assert got.keys() == want.keys()
    errors = []
    for name, exact in want.items():
        difference = got[name].detach().cpu().double() - exact.detach().double()
        errors.append(float(difference.norm() / exact.detach().double().norm().clamp(min=1e-30)))
    return max(errors)


# --- experts --------------------------------------------------------------------------------------

E, K, D, WIDTH = 6, 2, 40, 24
LOADS: dict[str, Callable[[int], Tensor]] = {
    "random": lambda t: torch.rand(t, E, generator=torch.Generator().manual_seed(3)).topk(K, -1).indices,
    "uneven, one empty": lambda t: torch.stack((torch.zeros(t).long(), 1 + torch.arange(t) % (E - 2)), -1),
}


def experts_error(
    architecture: dict[str, Any], path: str, dtype: torch.dtype, load: str, device: str
) -> float:
    """Output and every gradient, of 37 tokens with one decision; the reference reads the same rounded numbers."""
    built = _model(architecture, "smoe", path).model.layers[0].mlp.experts.to(dtype)
    reference = copy.deepcopy(built).double()
    reference.config = copy.copy(built.config)
    reference.config._experts_implementation = "eager"
    got = _experts_pass(built.to(device), load, dtype, dtype, device)
    return relative_error(got, _experts_pass(reference, load, dtype, torch.float64, "cpu"))


def _experts_pass(
    experts: nn.Module, load: str, rounded: torch.dtype, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def drawn(width: int) -> Tensor:
        return torch.randn(37, width, generator=generator).to(rounded).to(device, dtype)

    x, weights, index = drawn(D).requires_grad_(), drawn(K).abs().requires_grad_(), LOADS[load](37).to(device)
    out = experts(x, index, weights)
    out.backward(drawn(D))
    found = {"out": out, "x": x.grad, "weights": weights.grad}
    return found | {name: parameter.grad for name, parameter in experts.named_parameters()}


# --- routers --------------------------------------------------------------------------------------


def router_error(name: str, device: str) -> float:
    """Logits and probabilities of three layers, and every gradient."""
    got, want = (_router_pass(name, t, d) for t, d in ((torch.float32, device), (torch.float64, "cpu")))
    return relative_error(got, want)


def _router_pass(name: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    spec, layers, generator = resolve(name), 3, torch.Generator().manual_seed(1)
    geometries = [Geometry(D, E, K, num_layers=layers, layer_index=i) for i in range(layers)]
    shared = build_shared(spec, geometries[0])
    modules = nn.ModuleList(build_router(spec, geometry) for geometry in geometries)
    everything = nn.ModuleList([modules, *([] if shared is None else [shared])])
    for parameter in everything.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    everything.to(device, dtype)
    hidden = torch.randn(37, D, generator=generator).to(device, dtype).requires_grad_()
    state: tuple[Tensor, ...] = ()
    found: dict[str, Tensor] = {}
    for i, router in enumerate(modules):
        routing, state = router(hidden, state, shared, RouterContext(1, 37))
        found |= {f"logits {i}": routing.logits, f"probs {i}": routing.probs}
    sum(value.double().square().sum() for value in found.values()).backward()
    gradients = {n: p.grad for n, p in everything.named_parameters() if p.grad is not None}
    return found | {"hidden": hidden.grad} | gradients


# --- the model ------------------------------------------------------------------------------------


def _model(architecture: dict[str, Any], router: str, experts: str) -> RMoEForCausalLM:
    config = RMoEConfig(
        vocab_size=72, hidden_size=D, num_attention_heads=4, num_hidden_layers=3, moe_intermediate_size=WIDTH,
        num_experts=E, num_experts_per_tok=K, router=router, initializer_range=0.1, **architecture,
    )  # fmt: skip
    model = RMoEForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)
    initialize(model, 0)
    return model


def model_error(
    architecture: dict[str, Any],
    device: str,
    chunked: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
) -> float:
    """Loss and every gradient of a small `rmoe` model."""
    ids = torch.randint(0, 72, (3, 29), generator=torch.Generator().manual_seed(0))

    def run(model: RMoEForCausalLM, ids: Tensor, **options: Any) -> dict[str, Tensor]:
        model.train()
        loss = (torch.compile(model) if compiled and options else model)(
            input_ids=ids, labels=ids, use_cache=False, **options
        ).loss
        loss.backward()
        return {"loss": loss, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    model = _model(architecture, "rmoe", "auto").to(device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    got = run(model, ids.to(device), output_logits=not chunked)
    return relative_error(got, run(_model(architecture, "rmoe", "eager").double(), ids))


@torch.no_grad()
def decode_error(device: str, compiled: bool) -> float:
    """Logits of five tokens decoded one by one, against one pass over all."""
    ids = torch.randint(0, 72, (2, 12), generator=torch.Generator().manual_seed(0))
    exact = _model(ARCHITECTURES["pre-norm SwiGLU"], "rmoe", "eager").double().eval()(input_ids=ids).logits
    model = _model(ARCHITECTURES["pre-norm SwiGLU"], "rmoe", "auto").to(device).eval()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    cache, found = StaticCache(config=model.config, max_cache_len=16), {}
    model(input_ids=ids[:, :7].to(device), past_key_values=cache, use_cache=True)
    for i in range(7, 12):
        position = torch.full((2, 1), i, device=device)
        step = forward(
            input_ids=ids[:, i : i + 1].to(device),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        found[str(i)] = step.logits[:, 0].clone()
    return relative_error(found, {name: exact[:, int(name)] for name in found})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
