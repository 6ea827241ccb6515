"""A recomputed layer takes the experts of the forward pass, even where it would now choose others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from tests.model.small import model, tokens

# One of each way to choose: top-k, with groups, argmax and a coin, thresholds, sorting over tokens, a capacity limit.
ROUTERS = (
    "rmoe", "deepseek-v3", "gshard", "sparsemixer", "remoe", "expert-choice", "smoe-capacity", "noisy-topk"
)  # fmt: skip


def experts_asked(router: str, **options: object) -> tuple[list[Tensor], list[Tensor], bool]:
    """Of each layer, the experts of the forward pass and of the recomputation, whose gates see other inputs; and
    whether all gradients are finite."""
    net = model(router=router, experts="sorted_mm").train()
    net.gradient_checkpointing_enable(dict(options))
    asked: list[Tensor] = []
    disturbance = torch.zeros(39, 36)
    for layer in net.model.layers:
        if not layer.is_dense:
            layer.mlp.gate.register_forward_pre_hook(
                lambda gate, inputs: (inputs[0] + disturbance, *inputs[1:])
            )
            layer.mlp.experts.register_forward_pre_hook(
                lambda experts, inputs: asked.append(inputs[1].clone())
            )
    out = net(tokens(), labels=tokens())
    layers = len(asked)
    disturbance.normal_(generator=torch.Generator().manual_seed(1))
    out.loss.backward()
    assert layers == 2
    assert len(asked) == 4
    finite = all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    return asked[:layers], asked[: layers - 1 : -1], finite  # the last layer is recomputed first


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_are_those_of_the_forward_pass(router: str) -> None:
    first, again, finite = experts_asked(router)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert finite


@pytest.mark.parametrize("router", ["rmoe", "remoe"])
def test_without_it_they_are_not(router: str) -> None:
    """The disturbance is one that matters."""
    first, again, _ = experts_asked(router, context_fn=noop_context_fn)
    assert not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
