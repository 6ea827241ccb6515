"""The scale of the raw logits before step 0: measured on one fixed batch, and set where `initial_logit_std` asks.

A scorer drawn with one standard deviation gives logits that grow with the model's width, and how sharp the gate starts
moves the loss by more than most routers do. So it is measured in every run. The measure is the sample standard
deviation over experts, as a root mean square over tokens: what is common to all experts changes no decision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rmoe.data.blocks import BlockDataset
from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.results.run import InitialLogits
from rmoe.routing.contract import logit_variance
from rmoe.training.evaluation import inference

FIELD = "training.initial_logit_std"
MOST_TOKENS = 4096
TOLERANCE = 1e-3
MOST_PASSES = 20


def fixed_batch(blocks: BlockDataset) -> Tensor:
    """Blocks at equal distances over a split, the same for every seed and router: `[N, S]`, at most `MOST_TOKENS`."""
    count = min(len(blocks), max(1, MOST_TOKENS // blocks.sequence_length))
    return torch.stack([blocks[index * len(blocks) // count]["input_ids"] for index in range(count)])


def start_at(model: RMoEForCausalLM, ids: Tensor, target: float | None) -> InitialLogits | None:
    """Bring every layer's logits to a standard deviation, and measure before and after.

    Layers that share a scorer are brought to the target together (root mean square over them). A router that adds
    other scores to its scorer's (residual scores) has its scorer's own brought there.

    Args:
        model: with its initial weights.
        ids: `[N, S]`, from `fixed_batch`.
        target: None leaves the weights as they were drawn.

    Returns:
        What was measured; None for routers that have no scorer.

    Raises:
        RequestError: `target` cannot be reached.
    """
    if target is not None:
        require_scale(model, target)
    if not all(hasattr(router, "scorer") for router in model.routers):
        return None
    drawn = measure(model, ids)
    if target is not None:
        _rescale(model, ids, target)
    start = drawn if target is None else measure(model, ids)
    return InitialLogits(drawn=drawn, start=start, tokens=ids.numel())


def require_scale(model: RMoEForCausalLM, target: float) -> None:
    """Check that every router's logits can be scaled.

    Raises:
        RequestError: naming the stage that has no scale.
    """
    for router in model.routers:
        scorer, kind = getattr(router, "scorer", None), router.spec.scorer
        if scorer is None or kind is None:
            raise RequestError(
                FIELD, target, f"None with router.kind {router.spec.router.kind}: it has no scorer"
            )
        if _scaled_by(model, scorer) is None:
            raise RequestError(FIELD, target, f"None with scorer.kind {kind.kind}: it has no scale")


def measure(model: RMoEForCausalLM, ids: Tensor) -> list[float]:
    """Standard deviation of each layer's raw logits, as the gate gets them, `[L]`."""
    with inference(model):
        stats = model(input_ids=ids, use_cache=False).router_stats
    return (stats.logit_variance.double() / stats.tokens).sqrt().tolist()


def _rescale(model: RMoEForCausalLM, ids: Tensor, target: float) -> None:
    """Repeated, since a layer's scale moves what the layers above read, a little."""
    for _ in range(MOST_PASSES):
        variances: dict[int, list[float]] = {}
        modules: dict[int, Any] = {}
        for router, variance in zip(model.routers, _own_variances(model, ids), strict=True):
            module = _scaled_by(model, router.scorer)
            modules[id(module)] = module
            variances.setdefault(id(module), []).append(variance)
        factors = {
            key: target / (sum(own) / len(own)) ** 0.5 for key, own in variances.items() if sum(own) > 0
        }
        if len(factors) < len(variances):
            raise RequestError(FIELD, target, "None: the logits of a layer have no spread to scale")
        if all(abs(factor - 1) < TOLERANCE for factor in factors.values()):
            return
        for key, factor in factors.items():
            try:
                modules[key].rescale(factor)
            except ValueError as error:
                raise RequestError(FIELD, target, f"a smaller value ({error})") from None
    raise RequestError(
        FIELD, target, f"a value that {MOST_PASSES} passes of scaling reach within {TOLERANCE:.1%}"
    )


def _own_variances(model: RMoEForCausalLM, ids: Tensor) -> list[float]:
    """Mean variance over experts of what each layer's scorer gives, lowest layer first."""
    found: list[float] = []

    def note(_module: nn.Module, _arguments: Any, logits: Tensor) -> None:
        found.append(float(logit_variance(logits).double().mean()))

    scorers: list[Any] = [router.scorer for router in model.routers]
    handles = [scorer.register_forward_hook(note) for scorer in scorers]
    try:
        with inference(model):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _scaled_by(model: RMoEForCausalLM, scorer: Any) -> nn.Module | None:
    shared = model.trunk.router_shared
    module: nn.Module | None = scorer.scaled_by(None if shared is None else shared.scorer)
    return module
