"""The decoder layer: attention, router, experts. Attention, RoPE and RMSNorm are transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention

from rmoe.compat import accept_empty_slots
from rmoe.errors import RequestError
from rmoe.model.competition import compete, drawn
from rmoe.model.configuration_rmoe import RMoEConfig
from rmoe.model.coupling import erc_loss
from rmoe.model.dense_gradients import DefaultOutputs, densemixer
from rmoe.model.experts import EXPERTS
from rmoe.model.norm import RMSNorm
from rmoe.routing.contract import RouterContext, RouterStats, Routing, State, dispatched_experts
from rmoe.routing.initial import Initialized, Initializer, normal
from rmoe.routing.router import SharedRouter, build_router, without_autocast


def build_norm(config: RMoEConfig) -> nn.Module:
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class _Experts(Initialized):
    """Weights of all experts as 3-D tensors, and the plain path: a loop over the experts that were hit.

    The decorated classes below let transformers put grouped_mm, batched_mm or a vendor's kernel in its place.
    """

    gated: bool
    _is_expert_parallel: bool
    _apply_gate: Callable[[Tensor], Tensor]

    def __init__(self, config: RMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_built_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.initializer_range = config.initializer_range
        first = 2 * self.intermediate_dim if self.gated else self.intermediate_dim
        weight = nn.Parameter(torch.empty(self.num_experts, first, self.hidden_dim))
        self.register_parameter("gate_up_proj" if self.gated else "up_proj", weight)
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def initializers(self) -> dict[str, Initializer]:
        start = normal(self.initializer_range)
        return dict.fromkeys(("gate_up_proj", "up_proj", "down_proj"), start)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`sum_n g_n E_n(x)`: `[T, d]`, `[T, K]` int64, `[T, K]` -> `[T, d]`; index `E` is an empty slot."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            inner = self.one(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, inner.to(out.dtype))
        return out

    def first_weights(self) -> Tensor:
        """`[E, I, d]`: the gate matrices, or where there are none the only ones before the activation."""
        first: Tensor = getattr(self, "gate_up_proj" if self.gated else "up_proj")
        return first[:, : self.intermediate_dim]

    def one(self, expert: int, x: Tensor) -> Tensor:
        """`E_n(x)` of one expert, unweighted: `[*, d]` -> `[*, d]`."""
        # Not get_parameter: under PEFT it is computed from the base's and an adapter's.
        first = getattr(self, "gate_up_proj" if self.gated else "up_proj")[expert]
        inner = nn.functional.linear(x, first.to(x.dtype))
        inner = self._apply_gate(inner) if self.gated else self.act_fn(inner)
        return nn.functional.linear(inner, self.down_proj[expert].to(x.dtype))


@use_experts_implementation(experts_interface=EXPERTS, has_gate=True)
class GatedExperts(_Experts):
    """`W_down (act(W_gate x) * W_up x)` (SwiGLU with silu)."""

    gated = True


@use_experts_implementation(experts_interface=EXPERTS, has_gate=False)
class UngatedExperts(_Experts):
    """`W_down act(W_up x)` (the enwik8 model, with ReLU)."""

    gated = False


class DenseMLP(nn.Module):
    """A dense layer's MLP, or the shared experts as one MLP of their joint width."""

    def __init__(self, config: RMoEConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False) if config.mlp_gated else None
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, weights: Tensor | None = None) -> Tensor:
        """`[*, d]` -> `[*, d]`.

        Args:
            weights: `[*, S]`, of each of the `S` experts that share the width; None is 1.
        """
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(hidden_states))
        else:
            inner = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        if weights is not None:
            inner = inner.unflatten(-1, (weights.shape[-1], -1)) * weights.to(inner.dtype)[..., None]
            inner = inner.flatten(-2)
        return self.down_proj(inner)


class RMoESparseMoeBlock(nn.Module):
    """Experts, their shared companions, and the layer's router as `gate`, which the decoder layer calls."""

    def __init__(self, config: RMoEConfig, layer_index: int) -> None:
        super().__init__()
        spec = config.router_spec
        self.gate = build_router(spec, config.router_geometry(layer_index))
        self.experts: Any = (GatedExperts if config.mlp_gated else UngatedExperts)(config)
        self.num_built_experts = self.experts.num_experts
        if spec.leaves_empty_slots:
            accept_empty_slots(self.experts)
        self.densemixer = config.dense_gradients == "densemixer"
        sizes = self.num_built_experts, config.hidden_size
        self.default_outputs = DefaultOutputs(*sizes) if config.dense_gradients == "default" else None
        width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = DenseMLP(config, width) if width else None
        self.weighs_inputs = spec.router.weighs_inputs
        self.config = config

    def forward(
        self,
        hidden_states: Tensor,
        routing: Routing,
        mask: Tensor | None = None,
        observed: list[Tensor] | None = None,
    ) -> Tensor:
        """Mix the experts' outputs (Eq. 1, 6: they read `x`, not the state).

        Args:
            hidden_states: `[B, S, d]`.
            routing: the decision for its tokens.
            mask: `[T]` bool, False at padding; None is no padding.
            observed: gets, in training, the sums that the experts' default outputs are made of. Others' engines take
                the block's one result for its output.

        Returns:
            `[B, S, d]`.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, d]
        experts = dispatched_experts(routing, self.num_built_experts)
        if self.experts.num_experts < self.num_built_experts:
            # Expert parallelism left a part of them here. It sends every slot to an expert: an empty one, of weight 0.
            experts = experts.masked_fill(experts >= self.num_built_experts, 0)
        weights = routing.weights.to(flat.dtype)
        if self.default_outputs is None:
            mix = self._weighed_inputs if self.weighs_inputs else self.experts
            out = mix(flat, experts, weights)
        else:
            out = self._with_defaults(flat, experts, weights, routing, mask, observed)
        if self.densemixer and torch.is_grad_enabled():
            out = out + densemixer(self.experts, flat, routing)
        if routing.passthrough is not None:
            out = out + routing.passthrough[:, None].to(flat.dtype) * flat
        if routing.added is not None:
            out = out + routing.added.to(flat.dtype)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat, routing.shared_weights)
        return out.view_as(hidden_states)

    def in_training(
        self, x: Tensor, routing: Routing, shared: SharedRouter | None, context: RouterContext | None
    ) -> Routing:
        """The router's decision as the options of training make it: by competition, and with the ERC loss.

        A pass without gradients is none of training, though a model that samples between steps may be in that mode.

        Args:
            x: `[T, d]`, what the experts read.

        Raises:
            RequestError: the experts are wrapped, as PEFT's `target_parameters` does.
        """
        if not (self.training and torch.is_grad_enabled()):
            return routing
        config = self.config  # read now: a schedule may set these
        if config.erc_loss_coef == 0 and config.competition_rate == 0:
            return routing
        if not isinstance(self.experts, _Experts):
            name = "erc_loss_coef" if config.erc_loss_coef else "competition_rate"
            allowed = f"0 with experts in a {type(self.experts).__name__}"
            raise RequestError(name, getattr(config, name), allowed)
        noise = None if context is None else context.noise
        if noise is not None:  # a stream that no router draws from
            geometry = self.gate.geometry
            noise = noise.for_layer(geometry.num_layers + geometry.layer_index)
        with without_autocast(x.device.type):
            if noise is not None and config.competition_rate and drawn(config.competition_rate, noise):
                mask = None if context is None else context.mask
                routing = compete(self.experts, x, routing, mask, config.competition_loss_coef)
            if config.erc_loss_coef == 0:
                return routing
            matrix = self.gate.experts_matrix(shared)
            assert matrix is not None  # the configuration has checked it
            vectors = matrix[: self.num_built_experts].to(torch.promote_types(matrix.dtype, torch.float32))
            loss = erc_loss(vectors, self.experts.first_weights(), config.erc_alpha, noise)
        return routing.with_penalty(config.erc_loss_coef * loss.to(routing.probs.dtype))

    def _with_defaults(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        routing: Routing,
        mask: Tensor | None,
        observed: list[Tensor] | None,
    ) -> Tensor:
        assert self.default_outputs is not None
        added = self.default_outputs(x, routing)
        if not self.training:
            return self.experts(x, experts, weights) + added
        # Each choice as a token of its own: its output is needed by itself.
        ones, slots = torch.ones_like(weights).view(-1, 1), experts.reshape(-1, 1)
        each = self.experts(x.repeat_interleave(experts.shape[1], 0), slots, ones).view(*experts.shape, -1)
        if observed is not None:
            observed.append(self.default_outputs.observe(each.detach(), experts, mask))
        mixed = torch.einsum("tkd,tk->td", each, weights.to(each.dtype)).to(x.dtype)
        return mixed + added

    @torch.no_grad()
    def update(self, stats: RouterStats, step: int, total_steps: int) -> None:
        """Move the layer's training-time state, once per optimizer step."""
        self.gate.update_all(stats, step, total_steps)
        if self.default_outputs is not None:
            self.default_outputs.update(self.gate.layer_index, stats, step, total_steps)

    def _weighed_inputs(self, flat: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """`sum_n E_n(g_n x)`: every assignment is a row of its own."""
        rows = (weights[..., None] * flat[:, None]).flatten(0, 1)  # [T * K, d]
        out = self.experts(rows, experts.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
        return out.view(*experts.shape, -1).sum(1)


class RMoEDecoderLayer(GradientCheckpointingLayer):
    """One layer. The router's state comes in beside the hidden states and leaves beside them."""

    def __init__(self, config: RMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)  # type: ignore[arg-type]
        self.is_dense = layer_idx < config.first_k_dense_replace
        if self.is_dense:
            assert config.intermediate_size is not None  # __post_init__ has set it
            self.mlp: Any = DenseMLP(config, config.intermediate_size)
        else:
            self.mlp = RMoESparseMoeBlock(config, layer_idx - config.first_k_dense_replace)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.pre_norm = config.norm_position == "pre"
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        router_state: State,
        shared: SharedRouter | None = None,
        context: RouterContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, State, Routing | None, Tensor | None]:
        """`[B, S, d]` and the state from below -> the same for above, the decision, attention weights if computed.

        Pre-norm: `x + f(norm(x))`. Post-norm: `norm(x + f(x))`. `kwargs` are attention's, passed down as they are.
        """
        attention_input = self.input_layernorm(hidden_states) if self.pre_norm else hidden_states
        attended, attention = self.self_attn(hidden_states=attention_input, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states if self.pre_norm else self.input_layernorm(hidden_states)

        x = self.post_attention_layernorm(hidden_states) if self.pre_norm else hidden_states
        routing = None
        if self.is_dense:
            mixed = self.mlp(x)
        else:
            flat = x.reshape(-1, x.shape[-1])
            routing, router_state = self.mlp.gate(flat, router_state, shared=shared, context=context)
            routing = self.mlp.in_training(flat, routing, shared, context)
            observed: list[Tensor] = []
            mixed = self.mlp(x, routing, None if context is None else context.mask, observed)
            if observed:
                seen = observed[0]
                if routing.observed is not None:
                    seen = torch.cat((routing.observed.to(seen.dtype), seen))
                routing = routing._replace(observed=seen)
        hidden_states = hidden_states + self.dropout(mixed)
        hidden_states = hidden_states if self.pre_norm else self.post_attention_layernorm(hidden_states)
        return hidden_states, router_state, routing, attention
