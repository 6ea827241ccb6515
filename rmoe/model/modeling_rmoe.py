"""The HuggingFace model around the routers: trunk, language model, classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from rmoe.errors import RequestError
from rmoe.model.configuration_rmoe import RMoEConfig
from rmoe.model.head import LMHead, lm_loss
from rmoe.model.initialize import initializers_of, own_tensors
from rmoe.model.layers import RMoEDecoderLayer, build_norm
from rmoe.model.outputs import (
    RMoECausalLMOutputWithPast,
    RMoEModelOutputWithPast,
    RMoESequenceClassifierOutput,
)
from rmoe.model.recompute import keep_decisions
from rmoe.model.sharing import write_auto_code
from rmoe.routing.balance import balance_loss
from rmoe.routing.contract import RouterContext, RouterStats, Routing, State, router_stats
from rmoe.routing.noise import CounterNoise
from rmoe.routing.router import BaseRouter, build_shared


class RMoEPreTrainedModel(PreTrainedModel):
    """What the models have in common: initial values, what they support, how they are saved."""

    config: RMoEConfig
    config_class = RMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("RMoEDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ("selection_bias", "temperature", "l1_weight")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        rules = initializers_of(module, self.config.initializer_range)
        for name, tensor in own_tensors(module, rules):
            if not getattr(tensor, "_is_hf_initialized", False):
                rules[name](tensor, None)
        if isinstance(module, RMoEModel):
            module.routing_noise_key.zero_()
        elif isinstance(module, LlamaRotaryEmbedding):  # not saved, so lost when built on the meta device
            super()._init_weights(module)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for the experts' decorator in the source of this file; ours is in layers.py."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, but the default is `auto` (`rmoe.model.experts.choose_experts`)."""
        return str(super().get_correct_experts_implementation(requested_experts or "auto"))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """As in transformers, but never reentrant: that form silently loses the balance losses' gradient.

        Routing decisions are kept, not made again (`rmoe.model.recompute`); `context_fn` among the kwargs overrides it.

        Raises:
            RequestError: `use_reentrant=True`.
        """
        options = {
            "use_reentrant": False,
            "context_fn": keep_decisions,
            **(gradient_checkpointing_kwargs or {}),
        }
        if options["use_reentrant"]:
            raise RequestError(
                "use_reentrant", True, "False: the reentrant form loses the balance loss's gradient"
            )
        super().gradient_checkpointing_enable(options)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """As in transformers; also writes the files that let `Auto...from_pretrained` find this package."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            write_auto_code(Path(save_directory))

    @property
    def trunk(self) -> RMoEModel:
        """The `RMoEModel` in this model."""
        return self if isinstance(self, RMoEModel) else self.model

    @property
    def routers(self) -> list[BaseRouter]:
        """The routing layers' routers, lowest first."""
        layers: list[Any] = list(self.trunk.layers)
        return [layer.mlp.gate for layer in layers if not layer.is_dense]

    @torch.no_grad()
    def update_routers(self, stats: RouterStats, step: int, total_steps: int) -> None:
        """Move the routers' training-time state: biases, schedules, stages.

        Call it exactly once after each optimizer step.

        Args:
            stats: sums over all micro-batches and ranks of the step.
            step: optimizer steps done, from 1.
            total_steps: of the whole training.
        """
        for router in self.routers:
            router.update_all(stats, step, total_steps)

    def set_routing_noise(self, seed: int, step: int) -> None:
        """Set the key of the routing noise; each training forward pass advances it by one from there.

        Args:
            seed: of the run (differ it by rank, or equal positions on two ranks draw equal noise).
            step: forward passes done so far.
        """
        self.trunk.routing_noise_key.fill_((seed << 32) + step)

    def _balance_loss(self, outputs: RMoEModelOutputWithPast, earlier: RouterStats | None) -> Tensor:
        assert outputs.routing is not None
        assert outputs.context is not None
        return balance_loss(
            self.routers,
            outputs.routing,
            self.trunk.router_shared,
            outputs.context,
            self.config.router_aux_loss_coef,
            None if earlier is None else earlier.counts,
            None if outputs.router_stats is None else outputs.router_stats.counts,
        )


class RMoEModel(RMoEPreTrainedModel):
    """The trunk: embeddings, layers, final norm. Routing state enters the first layer empty and runs up."""

    def __init__(self, config: RMoEConfig) -> None:
        super().__init__(config)
        spec = config.router_spec
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(RMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.router_shared = build_shared(spec, config.router_geometry(0))
        # A post-norm model ends in a norm already.
        self.norm = build_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.uses_noise = spec.uses_noise
        self.register_buffer("routing_noise_key", torch.zeros((), dtype=torch.int64), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    def _context(self, input_ids: Tensor | None, embeds: Tensor, attention_mask: Any) -> RouterContext:
        batch, length = embeds.shape[:2]
        mask = None
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            mask = attention_mask[:, -length:].reshape(-1).bool()  # with a cache the mask covers the past too
        noise = None
        if self.training and self.uses_noise:
            self.routing_noise_key += 1
            noise = CounterNoise(self.routing_noise_key.clone())
        ids = None if input_ids is None else input_ids.reshape(-1)
        return RouterContext(batch, length, mask, ids, noise)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> RMoEModelOutputWithPast:
        """As any transformers decoder; the output also has the routing of every layer.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
            RequestError: a cache with a router that is not causal.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + seen)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        context = self._context(input_ids, embeds, attention_mask)
        hidden = self.dropout(embeds)
        rotary = self.rotary_emb(hidden, position_ids)
        state: State = ()
        routings: list[Routing] = []
        hidden_states, attentions = [hidden], []
        for layer in self.layers:
            hidden, state, routing, attention = layer(
                hidden,
                state,
                shared=self.router_shared,
                context=context,
                position_embeddings=rotary,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                **kwargs,
            )
            hidden_states.append(hidden)
            attentions.append(attention)
            if routing is not None:
                routings.append(routing)
        hidden = self.norm(hidden)
        hidden_states[-1] = hidden
        all_routing = tuple(routings)
        decoding = past_key_values is not None and embeds.shape[1] == 1 and not self.training
        stats = None if decoding else router_stats(all_routing, self.config.num_experts, context.mask)
        return RMoEModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(routing.logits for routing in all_routing),
            routing=all_routing,
            router_stats=stats,
            context=context,
        )


class RMoEForCausalLM(RMoEPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: RMoEConfig) -> None:
        super().__init__(config)
        self.model = RMoEModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            RequestError: the router is not causal (expert choice): which experts a token gets would depend on
                tokens not yet generated.
        """
        if not self.config.router_spec.is_causal:
            gate = self.config.router_spec.gate
            raise RequestError("gate.kind", gate.kind if gate else None, "a causal gate, to generate text")
        return super().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        router_stats: RouterStats | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        output_logits: bool = True,
        **kwargs: Any,
    ) -> RMoECausalLMOutputWithPast:
        """As any transformers causal LM; with labels, `loss = lm_loss + aux_loss`.

        Args:
            labels: `[B, S]`, shifted inside by one, -100 ignored. shift_labels: `[B, S]`, already shifted.
            output_routing: return each layer's `Routing`.
            router_stats: sums of the earlier micro-batches of this optimizer step, for losses over the global batch.
            num_items_in_batch: predicted tokens of the whole optimizer step; the loss is then a sum over them.
            output_logits: False, with labels, takes the loss a chunk of tokens at a time and returns no logits; for a
                large vocabulary they would be the largest tensor of the step. `rmoe train` asks for that; other
                trainers find logits beside the loss, as in transformers. They are computed whole all the same where
                the head is split over the vocabulary (tensor parallelism) or is not this package's (a replaced one).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        wants_loss = labels is not None or shift_labels is not None
        head: nn.Module = self.lm_head  # may have been replaced: by an adapter, or for another vocabulary
        logits = loss = nats = aux_loss = None
        if wants_loss and not output_logits and isinstance(head, LMHead) and head.gives_loss:
            nats = lm_loss(head, hidden, labels, shift_labels, num_items_in_batch)
        else:
            logits = head(hidden)
            if wants_loss:
                nats = self.loss_function(
                    logits,
                    labels,
                    self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=shift_labels,
                )
        if nats is not None:
            aux_loss = self._balance_loss(outputs, router_stats).to(nats.dtype)
            loss = nats + aux_loss
        wants_logits = (
            self.config.output_router_logits if output_router_logits is None else output_router_logits
        )
        return RMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if wants_logits else None,
            lm_loss=nats,
            routing=outputs.routing if output_routing else None,
            router_stats=outputs.router_stats,
        )


class RMoEForSequenceClassification(RMoEPreTrainedModel):
    """A label per sequence, read from its last real token."""

    def __init__(self, config: RMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RMoEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_routing: bool = False,
        router_stats: RouterStats | None = None,
        **kwargs: Any,
    ) -> RMoESequenceClassifierOutput:
        """`labels` `[B]` int64. Without an attention mask the last token of each row is read."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if attention_mask is None:
            last = hidden[:, -1]
        else:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            ends = (positions * attention_mask.to(positions.dtype)).argmax(
                -1
            )  # padding may stand on either side
            last = hidden[torch.arange(hidden.shape[0], device=hidden.device), ends]
        logits = self.score(last)
        loss = task_loss = aux_loss = None
        if labels is not None:
            task_loss = F.cross_entropy(logits.float(), labels)
            aux_loss = self._balance_loss(outputs, router_stats).to(task_loss.dtype)
            loss = task_loss + aux_loss
        return RMoESequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            task_loss=task_loss,
            aux_loss=aux_loss,
            routing=outputs.routing if output_routing else None,
            router_stats=outputs.router_stats,
        )
