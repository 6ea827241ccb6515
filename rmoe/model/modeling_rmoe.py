"""The HuggingFace model around the routers: trunk, language model, classifier."""

from __future__ import annotations

from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from rmoe.compat import CACHE, attention_keywords, merge_with_config_defaults, one_cache, takes_lengths
from rmoe.errors import RequestError
from rmoe.model.auto_code import save_with_code
from rmoe.model.configuration_rmoe import RMoEConfig
from rmoe.model.head import IGNORED, LMHead, next_tokens
from rmoe.model.initialize import initialize_missing
from rmoe.model.layers import RMoEDecoderLayer, RMoESparseMoeBlock, build_norm
from rmoe.model.outputs import (
    RMoECausalLMOutputWithPast,
    RMoEModelOutputWithPast,
    RMoESequenceClassifierOutput,
)
from rmoe.model.packing import Apart, kept_apart, starts_again
from rmoe.model.recompute import NonReentrant, keep_decisions
from rmoe.routing.balance import balance_loss
from rmoe.routing.contract import RouterContext, RouterStats, Routing, State, on_device, router_stats
from rmoe.routing.noise import Noise
from rmoe.routing.router import BaseRouter, build_shared


class RMoEPreTrainedModel(NonReentrant, PreTrainedModel):
    """What the models have in common: initial values, what they support, how they are saved."""

    config: RMoEConfig
    config_class = RMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    checkpoint_context = staticmethod(keep_decisions)
    _no_split_modules = ("RMoEDecoderLayer",)
    _skip_keys_device_placement = ("cache", "past_key_values", "shared")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize_missing(module, self.config.initializer_range)
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

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As in transformers; routers that read token ids get room for the new ones too."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for router in self.routers:
            router.resize_vocabulary(self.config.vocab_size)
        return embeddings

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As in transformers; also writes the files that let `Auto...from_pretrained` find this package."""
        save_with_code(self, super().save_pretrained, Path(save_directory), args, kwargs)

    @property
    def trunk(self) -> RMoEModel:
        """The `RMoEModel` in this model."""
        return self if isinstance(self, RMoEModel) else self.model

    @property
    def routers(self) -> list[BaseRouter]:
        """The routing layers' routers, lowest first."""
        return [block.gate for block in self.blocks]

    @property
    def blocks(self) -> list[RMoESparseMoeBlock]:
        """The routing layers' router and experts, lowest first."""
        layers: list[Any] = list(self.trunk.layers[: self.config.num_hidden_layers])
        return [layer.mlp for layer in layers if not layer.is_dense]

    @torch.no_grad()
    def update_routers(self, stats: RouterStats, step: int, total_steps: int) -> None:
        """Move the routers' training-time state: biases, schedules, stages.

        Call it exactly once after each optimizer step.

        Args:
            stats: sums over all micro-batches and ranks of the step.
            step: optimizer steps done, from 1.
            total_steps: of the whole training.
        """
        for block in self.blocks:
            block.update(stats, step, total_steps)

    def set_routing_noise(self, seed: int, step: int) -> None:
        """Set the key of the routing noise; each training forward pass advances it by one from there.

        Args:
            seed: of the run (differ it by rank, or equal positions on two ranks draw equal noise).
            step: forward passes done so far.
        """
        self.trunk.routing_noise_key.fill_((seed << 32) + step)

    def balance_loss(self, outputs: RMoEModelOutputWithPast, earlier: RouterStats | None = None) -> Tensor:
        """All balance losses of a forward pass with their weights: what the models here add to the task's loss.

        For a loss of one's own: `outputs = model.trunk(ids); loss = mine(outputs) + model.balance_loss(outputs)`.

        Args:
            outputs: what `trunk` returned.
            earlier: sums over the earlier micro-batches of this optimizer step, for losses over the global batch.

        Returns:
            Scalar, float32 or wider.
        """
        assert outputs.routing is not None
        assert outputs.context is not None
        if not outputs.routing:  # a draft of the first layers may have none that route
            return outputs.last_hidden_state.new_zeros((), dtype=torch.float32)
        return balance_loss(
            self.routers,
            outputs.routing,
            outputs.context,
            self.config.router_aux_loss_coef,
            None if earlier is None else earlier.counts,
            None if outputs.router_stats is None else outputs.router_stats.counts,
        )

    def _unweighted(self, balance: Tensor | None) -> Tensor | None:
        """The balance loss in the convention of transformers' `aux_loss`, which others multiply by the coefficient."""
        coefficient = self.config.router_aux_loss_coef
        return balance / coefficient if balance is not None and coefficient else balance


class RMoEModel(RMoEPreTrainedModel):
    """The trunk: embeddings, layers, final norm. Routing state enters the first layer empty and runs up."""

    def __init__(self, config: RMoEConfig) -> None:
        super().__init__(config)
        config.check_sizes()
        config.check_router()
        _check_parallelism(config)
        spec = config.router_spec
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(RMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.router_shared = build_shared(spec, config.router_geometry(0))
        # A post-norm model ends in a norm already.
        self.norm = build_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.router_uses_noise, self.reads_sequence = spec.uses_noise, spec.router.reads_sequence
        self.register_buffer("routing_noise_key", torch.zeros((), dtype=torch.int64), persistent=False)
        self.gradient_checkpointing = False
        # Counts and biases stay float32 in a model loaded in bfloat16.
        buffers = [name for name, _ in self.named_buffers()]
        self._keep_in_fp32_modules_strict = {
            part
            for part in ("selection_bias", "temperature", "l1_weight", "default_outputs", "threshold")
            if any(part in b for b in buffers)
        }
        self.post_init()

    @property
    def uses_noise(self) -> bool:
        """Whether a forward pass of training draws random numbers."""
        return self.router_uses_noise or self.config.erc_loss_coef > 0 or self.config.competition_rate > 0

    def _require_whole_sequences(
        self, packed: bool, seen: int | Tensor, attention_mask: Any, position_ids: Any
    ) -> None:
        """Refuse what hides earlier tokens from a router that reads them, or shows it another example's.

        Raises:
            ValueError: there is a cache that holds tokens, or compiled code that cannot tell; or examples are packed.
        """
        kind = self.config.router_spec.router.kind
        unknown = torch.compiler.is_compiling() and isinstance(seen, Tensor)
        if packed or unknown or int(seen) > 0:
            raise ValueError(
                f"router {kind!r} reads a token's earlier tokens: call the model without a cache"
            )
        if self._is_packed(attention_mask, position_ids):
            raise ValueError(
                f"router {kind!r} reads a token's earlier tokens: give each example a row of its own"
            )

    def _is_packed(self, attention_mask: Any, position_ids: Tensor | None) -> bool:
        """Whether rows hold several examples: a cache would let them see each other. Compiled code cannot ask."""
        if position_ids is None or torch.compiler.is_compiling():
            return False
        return starts_again(attention_mask, position_ids)

    def _context(
        self, input_ids: Tensor | None, embeds: Tensor, attention_mask: Any, seen: int | Tensor
    ) -> RouterContext:
        batch, length = embeds.shape[:2]
        noise = None
        if self.training and torch.is_grad_enabled() and self.uses_noise:
            self.routing_noise_key += 1
            noise = Noise(self.routing_noise_key.clone())
        ids = None if input_ids is None else input_ids.reshape(-1)
        return RouterContext(batch, length, _real_tokens(attention_mask, batch, length, seen), ids, noise)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> RMoEModelOutputWithPast:
        """As any transformers decoder; the output also has the routing of every layer.

        Args:
            cache: also under its older name, `past_key_values`.
            use_cache, output_hidden_states, output_attentions, output_router_logits: None asks the configuration.
            kwargs: attention's keywords (`rmoe.compat.ATTENTION_KEYWORDS`), handed down to it.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
            TypeError: a keyword that nothing here reads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        cache = one_cache(cache, past_key_values)
        kwargs = attention_keywords(self, kwargs)
        wants_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_attention = config.output_attentions if output_attentions is None else output_attentions
        wants_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if wants_attention:
            kwargs["output_attentions"] = True  # attention that has no weights to give warns
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        new_cache = None
        if use_cache and cache is None and not self._is_packed(attention_mask, position_ids):
            cache = new_cache = DynamicCache(config=config)
        # Continuous batching packs requests into one row: its cache has no length, and its mask no padding.
        packed = cache is not None and not hasattr(cache, "get_seq_length")
        if packed and CACHE != "cache":
            # Up to transformers 5.23 attention reads such a cache by a keyword of its own.
            kwargs["cache"], cache = cache, None
        seen = 0 if cache is None or packed else cache.get_seq_length()
        if self.reads_sequence:
            self._require_whole_sequences(packed, seen, attention_mask, position_ids)
        filled = None if cache is new_cache else cache  # what a new one holds is of this call
        apart = Apart(attention_mask)
        if position_ids is None:
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + seen)[None]
        else:
            varlen = takes_lengths(config) and "cu_seq_lens_q" not in kwargs
            apart = kept_apart(attention_mask, position_ids.expand(embeds.shape[:2]), filled, varlen)
            kwargs |= apart.lengths
        causal_mask = create_causal_mask(
            config=config,
            inputs_embeds=embeds,
            attention_mask=apart.mask,
            position_ids=position_ids,
            and_mask_function=apart.same_example,
            **{CACHE: filled},
        )
        context = self._context(input_ids, embeds, None if packed else attention_mask, seen)
        hidden = self.dropout(embeds)
        rotary = self.rotary_emb(hidden, position_ids)
        state: State = ()
        routings: list[Routing] = []
        hidden_states, attentions = [], []  # kept only where they are asked for: each is `[B, S, d]` or more
        # Assisted generation lowers the number of layers: early exit.
        for layer in islice(self.layers, config.num_hidden_layers):
            if wants_hidden:
                hidden_states.append(hidden)
            hidden, state, routing, attention = layer(
                hidden,
                state,
                shared=self.router_shared,
                context=context,
                position_embeddings=rotary,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                **{CACHE: cache},
                **kwargs,
            )
            if wants_attention:
                attentions.append(attention)
            if routing is not None:
                routings.append(routing)
        hidden = self.norm(hidden)
        all_routing = on_device(routings, hidden.device)
        if context.mask is not None:
            context = context._replace(mask=context.mask.to(hidden.device))
        decoding = cache is not None and embeds.shape[1] == 1 and not self.training
        stats = (
            None if decoding or not routings else router_stats(all_routing, config.num_experts, context.mask)
        )
        return RMoEModelOutputWithPast(
            last_hidden_state=hidden,
            **{CACHE: cache},
            hidden_states=(*hidden_states, hidden) if wants_hidden else None,
            attentions=tuple(attentions)
            if wants_attention and all(a is not None for a in attentions)
            else None,
            router_logits=tuple(r.logits[:, : config.num_experts] for r in all_routing)
            if wants_logits
            else None,
            routing=all_routing,
            router_stats=stats,
            context=context,
        )


def _check_parallelism(config: RMoEConfig) -> None:
    """Refuse what needs whole experts where no device has them."""
    groups = getattr(config, "distributed_config", None)
    sizes = [getattr(groups, name, None) or 1 for name in ("tp_size", "ep_size")]
    cut = max(sizes) > 1 or bool(getattr(groups, "enable_expert_parallel", False))
    reason = config.cut_experts_misfit() if cut else None
    if reason is not None:
        raise reason


def _real_tokens(attention_mask: Any, batch: int, length: int, seen: int | Tensor) -> Tensor | None:
    """`[T]` bool, False at padding: what the mask's columns of this call say of its tokens.

    Args:
        attention_mask: `[B, past + length]`, or more columns for a cache of a fixed size; or what `generate` makes
            of it then: `[B, 1, length, size]`, whose last row sees every real token so far; one row may be all the
            batch's. None, and the masks of other shapes that users make for packed sequences, mean no padding.
        batch, length: sequences and tokens of this call. seen: tokens in the cache before it.
    """
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 2 and isinstance(seen, int):  # a slice: every decoded token comes this way
        first = max(0, min(seen, attention_mask.shape[-1] - length))
        return attention_mask[:, first : first + length].reshape(-1).bool()
    columns = torch.arange(length, device=attention_mask.device) + seen
    if attention_mask.dim() == 2:
        surplus = columns[-1] + 1 - attention_mask.shape[-1]  # a mask may lack the first of the cached tokens
        return attention_mask.index_select(-1, columns - surplus.clamp(min=0)).reshape(-1).bool()
    if attention_mask.dim() == 4 and attention_mask.shape[-1] > length:
        last = attention_mask[:, 0, -1].index_select(-1, columns)
        return (last if last.dtype == torch.bool else last == 0).expand(batch, -1).reshape(-1)
    return None


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
            RequestError: which experts a token gets depends on later tokens (expert choice), or on earlier ones that
                a cache does not hold.
        """
        self._require_generates()
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which `generate_batch` calls.

        Raises:
            RequestError: as `generate`.
        """
        self._require_generates()
        return super().init_continuous_batching(*args, **kwargs)

    def _require_generates(self) -> None:
        spec = self.config.router_spec
        if spec.gate is not None and not spec.gate.is_causal:
            raise RequestError("gate.kind", spec.gate.kind, "a causal gate, to generate text")
        if not spec.generates:
            allowed = "a router that needs no other tokens, to generate text"
            raise RequestError("router.kind", spec.router.kind, allowed)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose signature `generate` reads
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, without the tokenizers of stop strings and assistants, which it hands on to `forward`."""
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        router_stats: RouterStats | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_logits: bool = True,
        **kwargs: Any,
    ) -> RMoECausalLMOutputWithPast:
        """As any transformers causal LM; with labels, `loss = lm_loss + balance_loss`.

        Args:
            labels: `[B, S]`, shifted inside by one, -100 ignored.
            output_router_logits: return raw logits of every layer, and `aux_loss` without labels too.
            output_routing: return each layer's `Routing`.
            router_stats: sums of the earlier micro-batches of this optimizer step, for losses over the global batch.
            num_items_in_batch: predicted tokens of the whole optimizer step. The task's loss is then the sum over
                this call's tokens divided by it, and `balance_loss` enters `loss` with this call's share of them: over
                the micro-batches of a step both add up to one mean.
            output_logits: False, with labels, takes the loss a chunk of tokens at a time and returns no logits; for a
                large vocabulary they would be the largest tensor of the step. `rmoe train` asks for that; other
                trainers find logits beside the loss, as in transformers. They are computed whole all the same where
                the head is split over the vocabulary (tensor parallelism) or is not this package's (a replaced one).
            kwargs: `shift_labels`, labels `[B, S]` that are shifted already (not a named argument: Trainer would wait
                for it as for `labels`); the rest goes to the trunk.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        targets = shift_labels if labels is None or shift_labels is not None else next_tokens(labels)
        head: nn.Module = self.lm_head  # may have been replaced: by an adapter, or for another vocabulary
        logits = loss = nats = balance = None
        if targets is not None and not output_logits and isinstance(head, LMHead) and head.gives_loss:
            nats = head(hidden, targets, num_items_in_batch)
        else:
            logits = head(hidden)
            if targets is not None:
                nats = self.loss_function(
                    logits,
                    labels,
                    self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=targets,
                )
        if targets is not None or outputs.router_logits is not None:
            balance = self.balance_loss(outputs, router_stats)
        if targets is not None and nats is not None and balance is not None:
            balance = balance.to(nats)
            loss = nats + balance * _share(targets.ne(IGNORED), num_items_in_batch, nats.device)
        return RMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=self._unweighted(balance),
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            lm_loss=nats,
            balance_loss=balance,
            routing=outputs.routing if output_routing else None,
            router_stats=outputs.router_stats,
        )


def _share(counts: Tensor, of: Tensor | int | None, device: torch.device) -> Tensor | int:
    """The part of an optimizer step's items that this call has: all of them where nobody counted the step's."""
    if of is None:
        return 1
    return counts.sum().to(device) / (of.to(device) if isinstance(of, Tensor) else of)


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
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        router_stats: RouterStats | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> RMoESequenceClassifierOutput:
        """As transformers' classifiers: `config.problem_type`, or what labels and `num_labels` say, decides the loss.

        Args:
            labels: `[B]` int64 (one class), `[B]` or `[B, num_labels]` float (regression), `[B, num_labels]` float
                of 0 and 1 (several classes at once).
            num_items_in_batch: labels of the whole optimizer step; both losses then enter `loss` with this call's
                share of them.
            kwargs: the trunk's.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = self.score(
            hidden[
                torch.arange(hidden.shape[0], device=hidden.device),
                self._ends(hidden, input_ids, attention_mask),
            ]
        )
        loss = task_loss = balance = None
        if labels is not None or outputs.router_logits is not None:
            balance = self.balance_loss(outputs, router_stats)
        if labels is not None and balance is not None:
            pooled = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            task_loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=pooled, config=self.config
            )
            balance = balance.to(task_loss)
            # Trainer counts a batch's labels, which with several for an example are more than its examples.
            share = _share(labels.ne(IGNORED), num_items_in_batch, task_loss.device)
            loss = (task_loss + balance) * share
        return RMoESequenceClassifierOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            task_loss=task_loss,
            balance_loss=balance,
            aux_loss=self._unweighted(balance),
            routing=outputs.routing if output_routing else None,
            router_stats=outputs.router_stats,
        )

    def _ends(self, hidden: Tensor, input_ids: Tensor | None, attention_mask: Any) -> Tensor:
        """`[B]`, position of each sequence's last real token; padding may stand on either side.

        A mask `[B, S]` says what is real; without one every token but `config.pad_token_id`, as in transformers;
        without that, every token.
        """
        # Of what a cache holds there are no hidden states; masks of other shapes say who sees whom.
        said = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
        real: Tensor | None = attention_mask[:, -hidden.shape[1] :] if said else None
        if real is None and input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        if real is None:
            return positions[-1:].expand(hidden.shape[0])
        return (positions * (real != 0).to(hidden.device)).argmax(-1)
