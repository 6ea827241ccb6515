"""The options of every built-in mechanism, stage by stage. Imports no torch: the modules that carry them out
stand in the file that each `implementation` names, with their equations and sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rmoe.routing.spec import (
    GateSpec,
    Geometry,
    LossSpec,
    RecurrenceSpec,
    RouterKind,
    ScorerSpec,
    require,
)

# ---- recurrence ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoRecurrence(RecurrenceSpec):
    """The scorer reads the hidden state itself: every router of Eq. 1."""

    kind = "none"
    implementation = "rmoe.routing.recurrence:NoRecurrence"
    equation = "f = x"

    has_shared: ClassVar[bool] = False

    def features(self, geometry: Geometry) -> int:
        return geometry.hidden_size


@dataclass(frozen=True, kw_only=True)
class Recurrence(RecurrenceSpec):
    """Project to `width`, then one step of a cell: Eq. 4 and 5.

    Attributes:
        cell: "gru", "rnn", "lstm" are shared by all layers; "decay" is `x' + a * h` with a vector `a` per layer
            (ZAYA1's EDA, arXiv:2605.05365); "gated_decay" is `x' + z * h` where `z` depends on `x'` and `h`, its
            weights per layer; "identity" has no memory: a low-rank linear router.
        width: `p`.
        projector: one per layer, or one shared by all (Table 6, S-proj).
        projector_bias: the public code has none; EDA has one.
        carry: the state of the layer below is "passed"; "detached" (its values without their gradient); or
            "zero" (NP: same parameters and FLOPs, no memory).
        truncate_every: cut the gradient of the state that enters every n-th layer (n, 2n, ...), so that it runs
            through at most n layers; 1 is "detached"; None never.
        normalize: RMSNorm of the state before it is scored; the state itself is carried as it is.
        concat_hidden: score `[x; h]` instead of `h`.
    """

    kind = "cell"
    implementation = "rmoe.routing.recurrence:Recurrence"

    cell: Literal["gru", "rnn", "lstm", "decay", "gated_decay", "identity"] = "gru"
    width: int = 128
    projector: Literal["layer", "shared"] = "layer"
    projector_bias: bool = False
    carry: Literal["passed", "detached", "zero"] = "passed"
    truncate_every: int | None = None
    normalize: bool = False
    concat_hidden: bool = False

    def check(self) -> None:
        self.positive("width", "truncate_every")
        ok = self.truncate_every is None or self.carry == "passed"
        require(
            ok, "recurrence.truncate_every", self.truncate_every, "null unless recurrence.carry is 'passed'"
        )
        memoryless = self.cell == "identity" and self.carry != "zero"
        require(not memoryless, "recurrence.carry", self.carry, "'zero' with cell 'identity'")

    @property
    def equation(self) -> str:  # type: ignore[override]
        gated = "z = sig(W [norm(P x); norm(h)] + b); h = P x + z * h"
        steps = {"decay": "h = P x + a * h", "gated_decay": gated, "identity": "h = P x"}
        step = steps.get(self.cell, f"h = {self.cell.upper()}(P x, {'0' if self.carry == 'zero' else 'h'})")
        read = "norm(h)" if self.normalize else "h"
        return f"{step}; f = {f'[x; {read}]' if self.concat_hidden else read}"

    @property
    def cell_is_shared(self) -> bool:
        return self.cell in ("gru", "rnn", "lstm")

    @property
    def has_shared(self) -> bool:
        return self.cell_is_shared or self.projector == "shared"

    def features(self, geometry: Geometry) -> int:
        return self.width + (geometry.hidden_size if self.concat_hidden else 0)


# ---- scorer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Linear(ScorerSpec):
    """`G h`.

    Attributes:
        bias: fastmoe's router has one, transformers' have none.
        init_std: of the normal initialisation; None is the model's own; "inverse_sqrt" is `features^-1/2`,
            which a state bounded by 1 needs.
        frozen: kept at its random initialisation (RandomSMoE).
        shared_layers: how many consecutive layers use the same weights: 1, each its own; 0, all of them.
    """

    kind = "linear"
    implementation = "rmoe.routing.scorer:Linear"
    equation = "s = G f"

    bias: bool = False
    init_std: float | Literal["inverse_sqrt"] | None = None
    frozen: bool = False
    shared_layers: int = 1

    def check(self) -> None:
        if not isinstance(self.init_std, str):
            self.positive("init_std")
        require(self.shared_layers >= 0, "scorer.shared_layers", self.shared_layers, "0 or more")


@dataclass(frozen=True, kw_only=True)
class MLP(ScorerSpec):
    """Two-layer perceptron (SMoE-MLP; ModuleFormer, 2306.04640)."""

    kind = "mlp"
    implementation = "rmoe.routing.scorer:MLP"
    equation = "s = G GELU(W f + b)"

    width: int = 256
    dropout: float = 0.0

    @property
    def uses_noise(self) -> bool:
        return self.dropout > 0

    def check(self) -> None:
        self.positive("width")
        require(0 <= self.dropout < 1, "scorer.dropout", self.dropout, "0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Cosine(ScorerSpec):
    """Cosine similarity to expert embeddings over a learned temperature (XMoE, CosineMoE).

    Attributes:
        width: project to so many dimensions first; None compares the features themselves.
        projection_bias: of that projection.
        normalize_tokens: "paper" normalises both sides; torchscale's code only the embeddings (False).
        embedding_init: "orthogonal" (gain 0.32, XMoE) or "normal" (std 0.01, Tutel).
        temperature: initial divisor of the cosine, learned as its logarithm and kept above 0.01.
    """

    kind = "cosine"
    implementation = "rmoe.routing.scorer:Cosine"

    width: int | None = None
    projection_bias: bool = False
    normalize_tokens: bool = True
    embedding_init: Literal["orthogonal", "normal"] = "orthogonal"
    temperature: float = 0.5

    @property
    def equation(self) -> str:  # type: ignore[override]
        read = "W f" if self.width else "f"
        return f"s = cos({read}, e) / t" if self.normalize_tokens else f"s = {read} . unit(e) / t"

    def check(self) -> None:
        self.positive("width", "temperature")


@dataclass(frozen=True, kw_only=True)
class Hypernetwork(ScorerSpec):
    """A frozen random network turns one trained embedding into a linear router (HyperRouter, 2312.07035)."""

    kind = "hypernetwork"
    implementation = "rmoe.routing.scorer:Hypernetwork"
    equation = "[G, b] = M(e); s = G f + b"

    width: int = 256

    def check(self) -> None:
        self.positive("width")


@dataclass(frozen=True, kw_only=True)
class EdaHead(ScorerSpec):
    """ZAYA1's head: RMSNorm, Linear, GELU, Linear, GELU, Linear to `E + 1` classes, the last one "skip"."""

    kind = "eda_head"
    implementation = "rmoe.routing.scorer:EdaHead"
    equation = "s = MLP(norm(f))"

    skip_class: bool = True
    norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class HalfCosine(ScorerSpec):
    """`x . c / |c|`: the token side is not normalised. What CompeteSMoE's code calls StableMoE."""

    kind = "half_cosine"
    implementation = "rmoe.routing.scorer:HalfCosine"
    equation = "s = f . unit(c)"


# ---- gate ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Softmax(GateSpec):
    """Softmax top-k, Eq. 1.

    Attributes:
        order: "softmax_topk" (the paper's Eq. 1) or "topk_softmax" (fastmoe, the enwik8 runs): the weights are
            then a softmax over the k chosen logits.
        renormalize: divide the k weights by their sum (the public code does; without effect on topk_softmax).
        start_k: k grows linearly from this over training (SMoE-dropout); None holds it.
    """

    kind = "softmax"
    implementation = "rmoe.routing.gate:Softmax"
    takes_bias: ClassVar[bool] = True

    order: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    renormalize: bool = True
    start_k: int | None = None

    @property
    def leaves_empty_slots(self) -> bool:  # type: ignore[override]
        return self.start_k is not None

    @property
    def equation(self) -> str:  # type: ignore[override]
        if self.order == "topk_softmax":
            return "g = softmax(top_k(s))"
        return "g = top_k(softmax(s))" + (" / sum" if self.renormalize else "")

    def check(self) -> None:
        self.positive("start_k")

    def check_geometry(self, geometry: Geometry) -> None:
        k = geometry.top_k
        ok = self.start_k is None or self.start_k <= k
        require(ok, "gate.start_k", self.start_k, f"1 to num_experts_per_tok ({k})")


@dataclass(frozen=True, kw_only=True)
class Sigmoid(GateSpec):
    """DeepSeek-V3's gate (2412.19437): sigmoid scores, top-k of score plus bias, weights without the bias.

    Attributes:
        renormalize: divide the chosen scores by their sum (plus 1e-20).
        scale: multiplies the weights (`routed_scaling_factor`).
        groups: experts are in so many equal groups; a token chooses within its `top_groups` best, a group's
            score being the sum of its two best experts'. 1 is no limit.
    """

    kind = "sigmoid"
    implementation = "rmoe.routing.gate:Sigmoid"
    takes_bias: ClassVar[bool] = True
    leaves_empty_slots: ClassVar[bool] = False

    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1

    @property
    def equation(self) -> str:  # type: ignore[override]
        within = f" in the top {self.top_groups} groups" if self.groups > 1 else ""
        return f"g = top_k(sig(s)){within}" + (" / sum" if self.renormalize else "")

    def check(self) -> None:
        self.positive("scale", "groups", "top_groups")
        require(
            self.top_groups <= self.groups, "gate.top_groups", self.top_groups, f"1 to groups ({self.groups})"
        )

    def check_geometry(self, geometry: Geometry) -> None:
        experts, k = geometry.num_experts, geometry.top_k
        require(
            experts % self.groups == 0, "gate.groups", self.groups, f"a divisor of num_experts ({experts})"
        )
        per_group = experts // self.groups
        wide = self.groups == 1 or per_group >= 2
        require(wide, "gate.groups", self.groups, f"at most num_experts / 2 ({experts // 2})")
        reach = self.top_groups * per_group
        require(k <= reach, "num_experts_per_tok", k, f"at most the {reach} experts of gate.top_groups")


@dataclass(frozen=True, kw_only=True)
class SecondExpert(GateSpec):
    """GShard's top-2 (2006.16668): in training the second expert is kept at random.

    Attributes:
        policy: "random": kept with probability `min(1, 2 g_2)`; "sampled": always kept, and chosen by Gumbel
            noise among the rest.
    """

    kind = "second_expert"
    implementation = "rmoe.routing.gate:SecondExpert"
    equation = "g = top_2(softmax(s)), the second at random"
    uses_noise = True

    policy: Literal["random", "sampled"] = "random"

    def check_geometry(self, geometry: Geometry) -> None:
        require(geometry.top_k == 2, "num_experts_per_tok", geometry.top_k, "2 with gate second_expert")


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(GateSpec):
    """Each expert takes its best `ceil(T k / E)` tokens (2202.09368). Not causal: refuses to generate."""

    kind = "expert_choice"
    implementation = "rmoe.routing.gate:ExpertChoice"
    equation = "g = top_C over tokens of softmax(s)"
    is_causal: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class ReLU(GateSpec):
    """ReMoE (2412.14711): `ReLU(logits)`, no top-k; an adaptive L1 weight steers the mean number of experts to k.

    Attributes:
        start_weight: lambda at the start.
        growth: lambda is multiplied by this while sparsity is below `1 - k/E`, and divided by it above.
    """

    kind = "relu"
    implementation = "rmoe.routing.gate:ReLU"
    equation = "g = ReLU(s)"

    start_weight: float = 1e-8
    growth: float = 1.2

    def check(self) -> None:
        self.positive("start_weight")
        require(self.growth > 1, "gate.growth", self.growth, "above 1")


@dataclass(frozen=True, kw_only=True)
class SparseMixer(GateSpec):
    """SparseMixer-v2 (2409.12136), as in Phi-3.5-MoE: k = 2, sampled in training, a custom backward."""

    kind = "sparsemixer"
    implementation = "rmoe.routing.gate:SparseMixer"
    equation = "g = sampled top_2, masked softmax"
    uses_noise = True
    leaves_empty_slots: ClassVar[bool] = False

    jitter: float = 0.01

    def check(self) -> None:
        self.positive("jitter")

    def check_geometry(self, geometry: Geometry) -> None:
        require(geometry.top_k == 2, "num_experts_per_tok", geometry.top_k, "2 with gate sparsemixer")


# ---- router ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Staged(RouterKind):
    """Recurrence, scorer, gate.

    Attributes:
        input_jitter: in training the router's input is multiplied by U(1 - e, 1 + e) (Switch, 2101.03961).
    """

    kind = "staged"
    implementation = "rmoe.routing.router:Router"

    input_jitter: float = 0.0

    @property
    def uses_noise(self) -> bool:
        return self.input_jitter > 0

    def check(self) -> None:
        require(0 <= self.input_jitter < 1, "router.input_jitter", self.input_jitter, "0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ResidualScores(Staged):
    """Adds the raw scores of the layer below, `G_i h_i + a G_{i-1} h_{i-1}` (Table 5, r-0.5 and r-1.0)."""

    kind = "residual_scores"
    implementation = "rmoe.routing.router:ResidualScores"
    equation = "s_i = G_i f_i + a G_{i-1} f_{i-1}"

    scale: float = 0.5
    detach: bool = False


@dataclass(frozen=True, kw_only=True)
class NoisyTopK(Staged):
    """Shazeer et al. 2017 (1701.06538): learned Gaussian noise on the logits, importance and load losses."""

    kind = "noisy_topk"
    implementation = "rmoe.routing.router:NoisyTopK"
    equation = "s + N(0, 1) (softplus(W f) + 0.01)"
    uses_noise = True

    importance_weight: float = 0.1
    load_weight: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Hash(RouterKind):
    """A fixed random table from token id to k experts, the same on every run (Roller et al. 2021)."""

    kind = "hash"
    implementation = "rmoe.routing.token_routers:Hash"
    equation = "n = table[token]"
    uses_scorer = False
    uses_gate = False
    needs_token_ids = True

    table_seed: int = 0

    def check_geometry(self, geometry: Geometry) -> None:
        require(
            geometry.vocab_size > 0,
            "router.kind",
            self.kind,
            "a model that knows its token ids (vocab_size > 0)",
        )


@dataclass(frozen=True, kw_only=True)
class Stable(RouterKind):
    """StableMoE (Dai et al. 2022) in its two stages, top-1.

    Attributes:
        stage1_share: share of training after which the distilled router takes over, frozen.
        embedding_width: of the distilled router's word embeddings.
        balance_weight, distill_weight: of the two losses of stage 1.
    """

    kind = "stable"
    implementation = "rmoe.routing.token_routers:Stable"
    equation = "y = a E(x) + (1 - a) x, a = sig(x . c)"
    uses_scorer = False
    uses_gate = False
    needs_token_ids = True

    stage1_share: float = 0.1
    embedding_width: int = 50
    balance_weight: float = 0.3
    distill_weight: float = 1.0

    def check(self) -> None:
        self.positive("embedding_width")
        require(0 < self.stage1_share < 1, "router.stage1_share", self.stage1_share, "above 0, below 1")

    def check_geometry(self, geometry: Geometry) -> None:
        require(geometry.top_k == 1, "num_experts_per_tok", geometry.top_k, "1 with router stable")
        require(
            geometry.vocab_size > 0,
            "router.kind",
            self.kind,
            "a model that knows its token ids (vocab_size > 0)",
        )


# ---- losses ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoadBalance(LossSpec):
    """`E sum_n f_n P_n` per layer (Switch). `count`: "assignments", `f` sums to 1 (divided by k); "tokens", to k."""

    kind = "load_balance"
    implementation = "rmoe.routing.balance:load_balance"

    count: Literal["assignments", "tokens"] = "assignments"


@dataclass(frozen=True, kw_only=True)
class ZLoss(LossSpec):
    """`mean(logsumexp(logits)^2)` (ST-MoE, 2202.08906)."""

    kind = "z"
    implementation = "rmoe.routing.balance:z_loss"

    weight: float | None = 1e-3


@dataclass(frozen=True, kw_only=True)
class SequenceBalance(LossSpec):
    """DeepSeek-V3's sequence-wise loss: the load-balance product within each sequence, then the mean."""

    kind = "sequence_balance"
    implementation = "rmoe.routing.balance:sequence_balance"

    weight: float | None = 1e-4


@dataclass(frozen=True, kw_only=True)
class MutualInformation(LossSpec):
    """ModuleFormer's `-MI(expert; token) = -(H(mean p) - mean H(p))` (2306.04640)."""

    kind = "mutual_information"
    implementation = "rmoe.routing.balance:mutual_information"

    weight: float | None = 1e-3


@dataclass(frozen=True, kw_only=True)
class SimilarityPreserving(LossSpec):
    """`|| R^T R - I ||_1 / E^2` on the scorer's expert vectors (2506.14038)."""

    kind = "similarity_preserving"
    implementation = "rmoe.routing.balance:similarity_preserving"

    weight: float | None = 1e-2
