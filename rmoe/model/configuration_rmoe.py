"""`RMoEConfig`: transformers' standard names, and the router as one nested key."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from rmoe.compat import CACHE_NAMES
from rmoe.errors import RequestError
from rmoe.routing.options import Geometry
from rmoe.routing.spec import RouterSpec, vary
from rmoe.routing.zoo import resolve


def _expert_parallel_plan() -> dict[str, str]:
    """transformers 5.17 dispatches at the router, 5.23 at the experts, and each refuses the other's name."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    known = set(ALL_PARALLEL_STYLES.keys())
    projections = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
    }
    dispatch = "ep_dispatch_experts" if "ep_dispatch_experts" in known else "moe_tp_experts"
    return projections | {"layers.*.mlp.experts": dispatch}


def _renormalising(spec: RouterSpec, norm_topk_prob: bool) -> RouterSpec:
    """The router with that option of its gate, where its gate has it."""
    return vary(spec, gate={"renormalize": norm_topk_prob}) if hasattr(spec.gate, "renormalize") else spec


MOST_LAYERS = 10_000
"""Layers are built one by one: a damaged `config.json` that asks for 2**63 of them must not hang."""
LEARNED = ("prelu", "xielu")  # activations with parameters, for which no initial value is defined


@strict
class RMoEConfig(PreTrainedConfig):
    """Configuration of an RMoE model.

    The published architectures are both configurations of it. Pre-training (0.91B): `norm_position="pre"`,
    `norm_type="rmsnorm"`, `hidden_act="silu"`, `mlp_gated=True`. enwik8 and WikiText-103: `norm_position="post"`,
    `norm_type="layernorm"`, `hidden_act="relu"`, `mlp_gated=False`; RoPE stands in for that model's learned
    relative positions and there are no cached segments: a deviation.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: `d`.
        intermediate_size: width of dense layers; None is `num_experts_per_tok * moe_intermediate_size`.
        moe_intermediate_size: width of one expert.
        num_hidden_layers: layers, dense ones included.
        first_k_dense_replace: how many of the first layers are dense.
        num_attention_heads, num_key_value_heads, head_dim: attention; None means as many key-value heads as heads,
            and `hidden_size / num_attention_heads`.
        num_experts, num_experts_per_tok: `E` and `k`.
        num_shared_experts: experts of `moe_intermediate_size` that every token visits, unweighted.
        hidden_act, mlp_gated: `W_down (act(W_gate x) * W_up x)`, or `W_down act(W_up x)` when not gated.
        norm_position: "pre" or "post" the residual addition.
        norm_type: "rmsnorm" or "layernorm".
        hidden_dropout: on the embedding and on what attention and MLP add to the stream.
        attention_dropout: on attention weights.
        router: a `RouterSpec`, the name of a zoo row, or a spec as a dict; stored as the dict.
        norm_topk_prob: whether the k weights are divided by their sum. None lets the router decide; a value is
            written into the router's gate, where that gate has the option. The two say one thing, also where one of
            them is set later: the last that was set decides.
        router_aux_loss_coef: weight of those balance losses that name none (the load-balance loss).
        dense_gradients: how experts that a token did not choose teach the router: None, not at all; "densemixer", as
            if all had been computed; "default", by a moving average of their outputs, which is also added to the
            layer's (Default MoE). Not with tensor or expert parallelism. Read when the model is built.
        erc_loss_coef: weight of the expert-router coupling loss, see `rmoe.model.coupling`; the mean over layers is
            added in training. For routers whose scores are a product with the hidden state itself. Not with tensor
            or expert parallelism.
        erc_alpha: 0 to 1: how much of its answer to its own vector an expert may give to another's.
        competition_rate: 0 to 1: the share of training forward passes on which a layer's experts choose themselves
            and teach the router, see `rmoe.model.competition`. For routers that choose k of the E experts for every
            token. Not with dense gradients, tensor or expert parallelism.
        competition_loss_coef: weight of the router's loss on such passes.
        output_router_logits: return each layer's raw logits. The balance loss does not depend on it.

    Raises:
        RequestError: sizes or router that cannot work, naming the field.
    """

    model_type = "rmoe"
    # Trainer's predictions are what is left: logits, and hidden states or attentions if asked for.
    keys_to_ignore_at_inference = [  # noqa: RUF012 (Trainer adds a list to it)
        *CACHE_NAMES,
        *(
            "lm_loss",
            "task_loss",
            "balance_loss",
            "aux_loss",
            "router_logits",
            "routing",
            "router_stats",
            "context",
        ),
    ]
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012 (transformers' own form)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.up_proj": "colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int | None = None
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 0
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    mlp_gated: bool = True
    norm_position: str = "pre"
    norm_type: str = "rmsnorm"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    router: str | dict | RouterSpec | None = "rmoe"
    norm_topk_prob: bool | None = None
    dense_gradients: str | None = None
    erc_loss_coef: float | int = 0.0
    erc_alpha: float | int = 1.0
    competition_rate: float | int = 0.0
    competition_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            heads, width = self.num_attention_heads, self.hidden_size
            if heads > 0 and width % heads:
                allowed = f"a divisor of hidden_size ({width}), or give head_dim"
                raise RequestError("num_attention_heads", heads, allowed)
            self.head_dim = width // max(heads, 1)
        if self.intermediate_size is None:
            self.intermediate_size = self.num_experts_per_tok * self.moe_intermediate_size
        self.check_sizes()
        self._resolve_router()
        self.base_model_tp_plan = self.without_absent(type(self).base_model_tp_plan)  # type: ignore[misc]
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        resolved = isinstance(self.__dict__.get("router"), dict)
        checked = ("router", "erc_loss_coef", "competition_rate", "dense_gradients", "norm_topk_prob")
        if not resolved or name not in checked:
            super().__setattr__(name, value)
            return
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
            if name == "router":
                self._take_router(resolve(value))
            elif name != "norm_topk_prob":
                self.check_router()
            elif value is not None:
                self._take_router(_renormalising(self.router_spec, value))
        except BaseException:  # what is refused does not stay
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _take_router(self, spec: RouterSpec) -> None:
        """Store a router, and what follows from it; not through `__setattr__`, which calls this."""
        router = spec.to_dict()
        norm = self.__dict__.get("norm_topk_prob")
        self.__dict__["router"] = router
        self.__dict__["norm_topk_prob"] = (router["gate"] or {}).get("renormalize", norm)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers. A gate that was edited in place says what is saved."""
        values: dict[str, Any] = super().to_dict()
        gate = values["router"]["gate"] if isinstance(values.get("router"), dict) else None
        if gate is not None and "renormalize" in gate:
            values["norm_topk_prob"] = gate["renormalize"]
        return values

    def check_sizes(self) -> None:
        """Refuse what cannot work: on construction, and when a model is built, for fields that were set since.

        Raises:
            RequestError: naming the field.
        """
        positive = (
            "vocab_size",
            "hidden_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "num_key_value_heads",
            "num_experts",
            "num_experts_per_tok",
            "intermediate_size",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise RequestError(name, getattr(self, name), "1 or more")
        not_negative = ("num_shared_experts", "initializer_range", "rms_norm_eps", "router_aux_loss_coef")
        for name in (*not_negative, "erc_loss_coef", "competition_loss_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RequestError(name, getattr(self, name), "0 or more, and finite")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise RequestError(
                "pad_token_id", self.pad_token_id, f"0 to below vocab_size ({self.vocab_size})"
            )
        if self.num_hidden_layers > MOST_LAYERS:
            raise RequestError("num_hidden_layers", self.num_hidden_layers, f"1 to {MOST_LAYERS}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups is None or heads % groups:
            raise RequestError("num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
        if self.head_dim is None or self.head_dim % 2:
            raise RequestError("head_dim", self.head_dim, "an even number (rotary embeddings come in pairs)")
        dense, layers = self.first_k_dense_replace, self.num_hidden_layers
        if not 0 <= dense < layers:
            raise RequestError("first_k_dense_replace", dense, f"0 to below num_hidden_layers ({layers})")
        for name, allowed in (("norm_position", ("pre", "post")), ("norm_type", ("rmsnorm", "layernorm"))):
            if getattr(self, name) not in allowed:
                raise RequestError(name, getattr(self, name), " or ".join(map(repr, allowed)))
        if self.dense_gradients not in (None, "densemixer", "default"):
            raise RequestError("dense_gradients", self.dense_gradients, "null, 'densemixer' or 'default'")
        for name in ("erc_alpha", "competition_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(name, getattr(self, name), "0 to 1")
        if self.hidden_act not in ACT2FN or self.hidden_act in LEARNED:
            fixed = ", ".join(name for name in ACT2FN if name not in LEARNED)
            raise RequestError("hidden_act", self.hidden_act, f"one of {fixed}")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(name, getattr(self, name), "0 to below 1")

    def _resolve_router(self) -> None:
        spec = resolve(self.router)
        if self.norm_topk_prob is not None:
            spec = _renormalising(spec, self.norm_topk_prob)
        self._take_router(spec)
        self.check_router()

    def check_router(self) -> None:
        """Refuse what cannot work with the router: on construction, and when a model is built.

        Raises:
            RequestError: naming the field.
        """
        spec = self.router_spec
        spec.check_geometry(self.router_geometry(0))
        mixes = spec.router.uses_gate and not spec.router.weighs_inputs
        if self.dense_gradients is not None and not mixes:
            allowed = f"null with router {spec.router.kind}, which does not weigh what experts give"
            raise RequestError("dense_gradients", self.dense_gradients, allowed)
        linear = spec.scorer is not None and spec.scorer.kind == "linear"
        compared = linear and spec.recurrence.kind == "none" and spec.router.scores_hidden
        if self.erc_loss_coef and not compared:
            allowed = (
                "0 with this router: it has no vector that it compares with the hidden state, for each expert"
            )
            raise RequestError("erc_loss_coef", self.erc_loss_coef, allowed)
        if self.competition_rate:
            self._check_competition(spec, mixes)
        weighed = spec.router.shared_classes
        if weighed and self.num_shared_experts not in (0, weighed):
            allowed = f"0 or {weighed}, with router {spec.router.kind}"
            raise RequestError("num_shared_experts", self.num_shared_experts, allowed)

    def _check_competition(self, spec: RouterSpec, mixes: bool) -> None:
        if not mixes or spec.leaves_empty_slots or spec.router.shared_classes:
            allowed = f"0 with this router ({spec.router.kind}): not every token has k of the E experts"
            raise RequestError("competition_rate", self.competition_rate, allowed)
        # A pass that competes has no use for the one, and would steer the other by the affinities.
        for field, set_ in (
            ("gate.expert_scale", getattr(spec.gate, "expert_scale", False)),
            ("temperature.target_entropy", spec.temperature.target_entropy is not None),
        ):
            if set_:
                raise RequestError("competition_rate", self.competition_rate, f"0 with {field}")
        if self.dense_gradients is not None:
            raise RequestError("competition_rate", self.competition_rate, "0 with dense_gradients")

    def cut_experts_misfit(self) -> RequestError | None:
        """Why experts cannot be cut up or spread over devices (tensor or expert parallelism); None: they can."""
        for name, off in (("dense_gradients", None), ("erc_loss_coef", 0), ("competition_rate", 0)):
            value = getattr(self, name)
            if value != off:
                allowed = f"{'null' if off is None else off} with tensor or expert parallelism"
                return RequestError(name, value, f"{allowed}: no device has all of an expert, or all experts")
        return None

    def without_absent(self, plan: dict[str, str]) -> dict[str, str]:
        """A parallel plan without rules for parameters that this model's experts lack: transformers warns of them."""
        absent = ".experts.up_proj" if self.mlp_gated else ".experts.gate_up_proj"
        return {rule: style for rule, style in plan.items() if not rule.endswith(absent)}

    @property
    def router_spec(self) -> RouterSpec:
        """The router as a spec; the same one as long as `router` is the same."""
        return resolve(self.router)

    @property
    def num_moe_layers(self) -> int:
        """`L`: layers that route."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def num_built_experts(self) -> int:
        """Experts that each routing layer really has: `num_experts`, but for the dense baseline."""
        return self.router_spec.router.built_experts(self.router_geometry(0))

    def router_geometry(self, layer_index: int) -> Geometry:
        """The sizes that the router of the `layer_index`-th routing layer is built for."""
        return Geometry(
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            num_layers=self.num_moe_layers,
            layer_index=layer_index,
            vocab_size=self.vocab_size,
            initializer_range=self.initializer_range,
        )


RMoEConfig.base_model_ep_plan = _expert_parallel_plan()
