"""What a model needs, read off the model itself: it is built and run with tensors that have shapes but no data.

The model is traced at as many routing layers as its router's reach and one more, and again at one more (and with one
dense layer, if it has any), and at one and two sequences. Layers above the reach are alike, so what a deeper model and
a larger micro-batch need follows by adding; nothing here knows what is inside an attention block or a router.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from rmoe.compat import FakeTensorMode, grouped_products_in_python, storage_key
from rmoe.errors import RequestError, one_line
from rmoe.model import RMoEConfig, RMoEForCausalLM, count_parameters
from rmoe.results import run as results

_ATTENTION = "rmoe_planned"


class Parameters(results.Parameters, frozen=True, kw_only=True):
    """Numbers of parameters: those of a finished run, and more.

    Attributes:
        experts: of all routed experts.
        shared_router: the part of `router` that belongs to the model and not to a layer.
        embedding: of the embedding; equal to `head` and counted once in `total` when they are tied.
        head: of the output matrix.
        tensor_parallel: of the other matrices that tensor parallelism splits (attention's projections).
        layers: of each decoder layer, lowest first.
        layer: the largest decoder layer's, which FSDP gathers at a time.
        layer_experts: those of `layer` that are routed experts'.
    """

    experts: int
    shared_router: int
    embedding: int
    head: int
    tensor_parallel: int
    layers: list[int]
    layer: int
    layer_experts: int


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps from forward to backward; `fixed` does not grow with the number of sequences.

    Attributes:
        layer: of one decoder layer above the router's reach (the mean over routing and dense ones), per sequence.
        ends: of embedding, last norm and loss, per sequence, less what layers within the router's reach keep less.
        fixed: the output matrix's gradient, which is taken with the loss; low-precision copies of weights under
            autocast, position tables; for the whole model.
        boundary: what enters one layer, per sequence: the hidden states and the router's state.
        state: the router's part of `boundary`.
    """

    layer: float
    ends: float
    fixed: float
    boundary: float
    state: float


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token, by torch's counter, attention over the full square of the sequence.

    Attributes:
        forward: of one forward pass.
        training: forward and backward.
        router: of all routers, of one forward pass.
    """

    forward: float
    training: float
    router: float


@dataclass(frozen=True)
class Needs:
    """All that a plan has to know about a model."""

    parameters: Parameters
    activations: Activations
    flops: Flops


def needs_of(config: RMoEConfig, sequence_length: int, bf16: bool) -> Needs:
    """Trace a model.

    Args:
        config: of any size: no weights are allocated.
        sequence_length: tokens per sequence.
        bf16: run under bfloat16 autocast, as training does on a GPU; else in float32.

    Raises:
        RequestError: the router needs to see data to know its shapes, or layers draw whether they compete.
    """
    if config.competition_rate:
        allowed = "0 in a plan: which layers compete in a pass is drawn while training"
        raise RequestError("model.competition_rate", config.competition_rate, allowed)
    try:
        return Needs(
            parameters_of(config),
            activations_of(config, sequence_length, bf16),
            flops_of(config, sequence_length),
        )
    except RuntimeError as error:  # data-dependent shapes
        said = one_line(str(error))[:200]
        raise RequestError(
            "router", config.router_spec.router.kind, f"a router that runs without data ({said})"
        ) from error


# --- parameters ----------------------------------------------------------------------------------


def parameters_of(config: RMoEConfig) -> Parameters:
    """Count, on the meta device."""
    with torch.device("meta"):
        model = RMoEForCausalLM(config)
    layers = [dict(layer.named_parameters()) for layer in model.model.layers]
    largest = max(layers, key=_size)
    attention = [
        p for name, p in model.named_parameters() if ".self_attn." in name and name.endswith("weight")
    ]
    shared = model.model.router_shared
    embedding = model.model.embed_tokens.weight.numel()
    return Parameters(
        **count_parameters(model),
        experts=sum(_size(_experts_of(layer)) for layer in layers),
        shared_router=0 if shared is None else _size(dict(shared.named_parameters())),
        embedding=embedding,
        head=model.lm_head.weight.numel(),
        tensor_parallel=sum(p.numel() for p in attention),
        layers=[_size(layer) for layer in layers],
        layer=_size(largest),
        layer_experts=_size(_experts_of(largest)),
    )


def _size(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters.values())


def _experts_of(layer: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.items() if name.startswith("mlp.experts.")}


# --- deeper models from shallow ones ---------------------------------------------------------------


def _by_depth(
    config: RMoEConfig, measure: Callable[[RMoEConfig], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What is measured of the whole model, and of its layers together, as if each were one above the router's reach."""

    def at(routing: int, dense: int) -> np.ndarray:
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers, shallow.first_k_dense_replace = routing + dense, dense
        return measure(shallow)

    few = min(config.router_spec.router.reach + 1, config.num_moe_layers)
    base = at(few, 0)
    routing = at(few + 1, 0) - base
    dense = at(few, 1) - base if config.first_k_dense_replace else np.zeros_like(base)
    layers = config.num_moe_layers * routing + config.first_k_dense_replace * dense
    return base - few * routing + layers, layers


# --- activations ---------------------------------------------------------------------------------


def activations_of(config: RMoEConfig, length: int, bf16: bool) -> Activations:
    """Solve `saved = (c + sum of layers) + batch * (ends + sum of layers)` from a few small models."""

    def measure(shallow: RMoEConfig) -> np.ndarray:
        """What grows with the batch, what does not; of one sequence what enters the last layer, and the state in it."""
        (one, boundary, state), (two, *_) = (_saved(shallow, batch, length, bf16) for batch in (1, 2))
        return np.array([two - one, 2 * one - two, boundary, state])

    whole, layers = _by_depth(config, measure)
    growing, fixed, boundary, state = whole.tolist()
    of_layers, *_ = layers.tolist()
    return Activations(of_layers / config.num_hidden_layers, growing - of_layers, fixed, boundary, state)


def _saved(config: RMoEConfig, batch: int, length: int, bf16: bool) -> tuple[int, int, int]:
    """Bytes of the distinct storages that a forward pass saves for backward, without the parameters' own.

    Returns:
        All of them, what enters the last layer, and the router's state in that.
    """
    storages: dict[int, tuple[Any, int]] = {}
    entering: list[tuple[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key not in own:
            storages[key] = (storage, storage.nbytes())  # kept alive: an address may not come twice
        return tensor

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden, state = args[:2]
        entering.append((_bytes(hidden), sum(map(_bytes, state))))

    with _fake_model(config) as model:
        own = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        model.model.layers[-1].register_forward_pre_hook(look)
        ids = torch.zeros(batch, length, dtype=torch.int64)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(input_ids=ids, labels=ids, use_cache=False, output_logits=False)  # as `rmoe train` does
    hidden, state = entering[0]
    return sum(size for _, size in storages.values()), hidden + state, state


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- floating-point operations -------------------------------------------------------------------


def flops_of(config: RMoEConfig, length: int) -> Flops:
    """As torch counts: through batched_mm and eager attention, whose products it sees (grouped_mm counts as 0)."""
    whole, _ = _by_depth(config, lambda shallow: _counted(shallow, length))
    return Flops(*(whole / length).tolist())


def _counted(config: RMoEConfig, length: int) -> np.ndarray:
    """FLOPs of one sequence: forward, forward and backward, the routers' forward."""
    with _fake_model(config, "eager", "batched_mm") as model:
        ids = torch.zeros(1, length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            forward = counter.get_total_flops()
            by_module = counter.get_flop_counts()
            router = sum(
                sum(counts.values()) for name, counts in by_module.items() if name.endswith(".mlp.gate")
            )
            loss.backward()
            return np.array([forward, counter.get_total_flops(), router])


# --- running without data ------------------------------------------------------------------------


@contextmanager
def _fake_model(
    config: RMoEConfig, attention: str = _ATTENTION, experts: str = "grouped_mm"
) -> Iterator[RMoEForCausalLM]:
    """The model in training mode, its tensors without data, for as long as the context lasts."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(grouped_products_in_python())  # it keeps the same tensors
        stack.enter_context(mock.patch("torch.bincount", _bincount))
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=attention, experts_implementation=experts
        )
        yield model.train()


def _bincount(values: Tensor, minlength: int) -> Tensor:
    """Its result's shape depends on data, which there is none of; routing counts have `minlength` bins."""
    return torch.zeros(minlength, dtype=torch.int64)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Fused causal attention without a mask tensor, as sdpa and flash run in training: it keeps no square."""
    groups = module.num_key_value_groups
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
