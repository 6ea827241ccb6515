"""The zoo: every named router, one line each. `rmoe zoo` prints it from `zoo.json`, without torch.

A row is a name, a spec, its source, and what it is for. Variants are `vary(BASE, stage=...)` of another row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rmoe.errors import RequestError
from rmoe.routing.balance import BalanceSpec
from rmoe.routing.block_ffn import ActivationLocality, ChunkSparsity, NormedReLU
from rmoe.routing.cosine import Cosine, HalfCosine
from rmoe.routing.cross_layer import AdaptiveClustering, GatingResidual, MultiLevelContext, Previous
from rmoe.routing.fixed_routers import Dense, RoundRobin
from rmoe.routing.gate import Sigmoid, Softmax, TopK
from rmoe.routing.losses import (
    DiverseSimple,
    GateEntropy,
    LoadBalance,
    MutualInformation,
    SequenceBalance,
    SimilarityPreserving,
    ZLoss,
)
from rmoe.routing.model_routers import SharedInSoftmax, TableTopK
from rmoe.routing.model_scorers import NormedLinear, ProductKeys
from rmoe.routing.null_experts import NullBalance, NullExperts
from rmoe.routing.other_gates import ExpertChoice, ReLU, SecondExpert, SparseMixer
from rmoe.routing.quantile_balance import QuantileBalanced
from rmoe.routing.recurrence import Recurrence
from rmoe.routing.router import Router
from rmoe.routing.score_routers import NoisyTopK, ResidualScores
from rmoe.routing.scorer import MLP, EdaHead, Hypernetwork, Linear
from rmoe.routing.spec import RouterSpec, vary
from rmoe.routing.temperature import Temperature
from rmoe.routing.threshold_gates import ExpertThreshold, TopAny, TopP
from rmoe.routing.token_routers import Hash, Stable
from rmoe.routing.zero_experts import HeterogeneousBalance


@dataclass(frozen=True)
class ZooRow:
    """One named router.

    Attributes:
        spec: what it is.
        source: paper, table or equation.
        summary: what sets it apart.
        top_k: the only k it is defined for; by default that of its mechanisms, and None, the model's, where they have none.
        zero_gradient: parameters whose gradient is zero by construction, as regular expressions on their name.
        permutes: whether permuting the tokens of a batch permutes the routing, and if not, why not.
    """

    spec: RouterSpec
    source: str
    summary: str
    top_k: int | None = None
    zero_gradient: tuple[str, ...] = ()
    permutes: str = "yes"

    def __post_init__(self) -> None:
        if self.top_k is None:
            object.__setattr__(self, "top_k", self.spec.only_k)


ZOO: dict[str, ZooRow] = {}


def register(name: str, row: ZooRow) -> None:
    """Name a router, here or from outside the package.

    Raises:
        RequestError: the name is taken by another router, or cannot be a folder's: runs are named by it.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or not name.strip("."):
        raise RequestError("router", name, "a name of letters, digits, `.`, `_`, `-` and `+`")
    if name in ZOO and ZOO[name] != row:
        raise RequestError("router", name, "a name that is not taken")
    ZOO[name] = row


def resolve(router: str | Mapping[str, Any] | RouterSpec | None) -> RouterSpec:
    """The spec of a router: by its name, from its JSON form, or the spec itself.

    Raises:
        RequestError: no router has this name, or the data are no router.
    """
    if isinstance(router, RouterSpec):
        return router
    return find(router).spec if isinstance(router, str) else RouterSpec.from_dict(router)


def find(name: str) -> ZooRow:
    """The row of a named router.

    Raises:
        RequestError: no router has this name.
    """
    if name not in ZOO:
        raise RequestError("router", name, f"one of {', '.join(ZOO)}, or one that a --plugin registers")
    return ZOO[name]


def select(asked: Iterable[str]) -> tuple[str, ...]:
    """Router names without repetition; `all` is the whole zoo, `paper` the rows of the paper's tables.

    Raises:
        RequestError: no such router, or none at all.
    """
    paper = [n for n, row in ZOO.items() if "Table" in row.source and not row.source.startswith("ours")]
    groups = {"all": list(ZOO), "paper": paper}
    names = [one for name in asked for one in groups.get(name, [name])]
    if not names:
        raise RequestError("--routers", "", "names from `rmoe zoo`, separated by commas, or all, or paper")
    for name in names:
        find(name)
    return tuple(dict.fromkeys(names))


BALANCED = BalanceSpec(losses=(LoadBalance(),))
SMOE = RouterSpec(balance=BALANCED)
RMOE = vary(SMOE, recurrence=Recurrence.Config(), scorer=Linear.Config(init_std="inverse_sqrt"))
NP = vary(RMOE, recurrence={"carry": "zero"})
EDA = vary(
    SMOE, recurrence=Recurrence.Config(cell="decay", width=256, projector_bias=True), scorer=EdaHead.Config()
)
EDA_LINEAR = vary(EDA, recurrence={"normalize": True}, scorer=Linear.Config(init_std="inverse_sqrt"))
GATED = vary(RMOE, recurrence=Recurrence.Config(cell="gated_decay", normalize=True))
LOW_RANK = vary(RMOE, recurrence=Recurrence.Config(cell="identity", carry="zero"))
XMOE = vary(SMOE, scorer=Cosine.Config(width=16))
UNBALANCED = BalanceSpec()
BIAS = BalanceSpec(bias_update_rate=1e-3)
HETEROGENEOUS = BalanceSpec(losses=(HeterogeneousBalance(),))
DEEPSEEK = vary(SMOE, gate=Sigmoid.Config(), balance=replace(BIAS, losses=(SequenceBalance(),)))
QUANTILE = vary(
    SMOE, router=QuantileBalanced.Config(), gate=TopK.Config(choose_by="logits"), balance=UNBALANCED
)

UNUSED_HIDDEN = (r".*cell\.weight_hh",)
UNUSED_GATE = (r".*cell\.(weight|bias)",)
IN_ORDER = "no: experts fill up in token order"
READS_SEQUENCE = "no: a token's earlier neighbours count"


def _xmoe(width: int, recurrence: Recurrence.Config | None = None) -> RouterSpec:
    spec = vary(XMOE, scorer={"width": width})
    return spec if recurrence is None else vary(spec, recurrence=recurrence)


def _residual(scale: float, detach: bool = False) -> RouterSpec:
    return vary(NP, router=ResidualScores.Config(scale=scale, detach=detach))


_ROWS: dict[str, ZooRow] = {
    # ---- the paper's tables (arXiv:2408.06793) ----
    "smoe": ZooRow(SMOE, "Eq. 1; Table 1", "linear router, softmax then top-k, renormalised"),
    "smoe-topk-softmax": ZooRow(vary(SMOE, gate=Softmax.Config(order="topk_softmax")), "fastmoe; the paper's enwik8 runs", "softmax over the k largest logits"),
    "smoe-mlp": ZooRow(vary(SMOE, scorer=MLP.Config()), "Tables 1, 4", "two-layer router with GELU"),
    "smoe-mlp-mi": ZooRow(vary(SMOE, scorer=MLP.Config(dropout=0.1), gate=Softmax.Config(renormalize=False), balance=BalanceSpec(losses=(MutualInformation(),))), "ModuleFormer, 2306.04640", "the MLP router as ModuleFormer trains it: dropout, mutual-information loss"),
    "random-smoe": ZooRow(vary(SMOE, scorer=Linear.Config(frozen=True)), "Table 1", "linear router frozen at its random start"),
    "cosine-moe": ZooRow(vary(SMOE, scorer=Cosine.Config()), "Table 1", "cosine to expert embeddings, learned temperature"),
    "cosine-moe-tutel": ZooRow(vary(SMOE, scorer=Cosine.Config(width=256, projection_bias=True, embedding_init="normal")), "Tutel; 2405.14131", "cosine after a biased projection to 256"),
    "xmoe-8": ZooRow(_xmoe(8), "Table 2", "cosine in 8 dimensions"),
    "xmoe": ZooRow(XMOE, "Tables 1, 2; 2204.09179", "cosine in 16 dimensions, both sides normalised as the paper says"),
    "xmoe-32": ZooRow(_xmoe(32), "Table 2", "cosine in 32 dimensions"),
    "xmoe-reference": ZooRow(vary(XMOE, scorer={"normalize_tokens": False}), "torchscale's code", "XMoE as its code runs: the token side is not normalised"),
    "hyper-moe": ZooRow(vary(SMOE, scorer=Hypernetwork.Config()), "Table 1; HyperRouter, 2312.07035", "a frozen random network makes the linear router"),
    "rmoe": ZooRow(RMOE, "Eq. 4 to 6; Tables 1 to 7", "projector per layer, shared GRU over depth, p = 128"),
    "rmoe-std002": ZooRow(vary(RMOE, scorer={"init_std": 0.02}), "Eq. 4 to 6", "scorer starts at std 0.02, which starves a state bounded by 1"),
    "rmoe-np": ZooRow(NP, "Tables 4, 5", "state not passed: same parameters and FLOPs, no memory", zero_gradient=UNUSED_HIDDEN),
    "rmoe-detach": ZooRow(vary(RMOE, recurrence={"carry": "detached"}), "Table 5", "state passed without its gradient"),
    "rmoe-truncated-2": ZooRow(vary(RMOE, recurrence={"truncate_every": 2}), "asked in the paper's reviews", "the state's gradient cut every 2 layers"),
    "rmoe-truncated-3": ZooRow(vary(RMOE, recurrence={"truncate_every": 3}), "asked in the paper's reviews", "the state's gradient cut every 3 layers"),
    "rmoe-np-r0.5": ZooRow(_residual(0.5), "Table 5", "NP plus half the last layer's scores", zero_gradient=UNUSED_HIDDEN),
    "rmoe-np-r1.0": ZooRow(_residual(1.0), "Table 5", "NP plus the last layer's scores", zero_gradient=UNUSED_HIDDEN),
    "rmoe-np-r0.5-detach-r": ZooRow(_residual(0.5, detach=True), "Table 5", "r-0.5 without the residual's gradient", zero_gradient=UNUSED_HIDDEN),
    "rmoe-np-r1.0-detach-r": ZooRow(_residual(1.0, detach=True), "Table 5", "r-1.0 without the residual's gradient", zero_gradient=UNUSED_HIDDEN),
    "rmoe-sproj": ZooRow(vary(RMOE, recurrence={"projector": "shared"}), "Table 6", "one projector for all layers"),
    "rmoe-rnn": ZooRow(vary(RMOE, recurrence={"cell": "rnn"}), "Table 6", "tanh RNN cell"),
    "rmoe-lstm": ZooRow(vary(RMOE, recurrence={"cell": "lstm"}), "Table 6", "LSTM cell"),
    "rmoe-p256": ZooRow(vary(RMOE, recurrence={"width": 256}), "Table 7", "p = 256"),
    "rmoe-p512": ZooRow(vary(RMOE, recurrence={"width": 512}), "Table 7", "p = 512"),
    "rmoe-rnn-p256": ZooRow(vary(RMOE, recurrence={"cell": "rnn", "width": 256}), "Table 7", "tanh RNN cell, p = 256"),
    "xmoe-gru-8": ZooRow(_xmoe(8, Recurrence.Config()), "Table 2", "cosine in 8 dimensions of the recurrent state"),
    "xmoe-gru": ZooRow(_xmoe(16, Recurrence.Config()), "Table 2", "cosine in 16 dimensions of the recurrent state"),
    "xmoe-gru-32": ZooRow(_xmoe(32, Recurrence.Config()), "Table 2", "cosine in 32 dimensions of the recurrent state"),
    # ---- a linear state that can forget ----
    "gated-linear": ZooRow(GATED, "ours", "linear state with a data-dependent decay, normalised, linear head"),
    "gated-linear-np": ZooRow(vary(GATED, recurrence={"carry": "zero"}), "control", "the gated linear state, never passed", zero_gradient=UNUSED_GATE),
    "gated-linear-detach": ZooRow(vary(GATED, recurrence={"carry": "detached"}), "control", "the gated linear state passed without its gradient"),
    # ---- what in RMoE does it? ----
    "rmoe-residual": ZooRow(vary(RMOE, recurrence={"concat_hidden": True}), "ours", "scores [x; h]: a linear router plus the state"),
    "rmoe-norm": ZooRow(vary(RMOE, recurrence={"normalize": True}), "ours", "state RMS-normalised before scoring"),
    "rmoe-full-softmax": ZooRow(vary(RMOE, gate={"renormalize": False}), "ours; OLMoE's gate on Eq. 4 to 6", "weights are the softmax over all experts, not over the chosen"),
    "rmoe-p256-full-softmax": ZooRow(vary(RMOE, recurrence={"width": 256}, gate={"renormalize": False}), "ours; OLMoE's gate, Table 7", "the same, p = 256"),
    "low-rank": ZooRow(LOW_RANK, "control; 2601.21349", "RMoE's bottleneck alone: linear through 128 dimensions"),
    "low-rank-norm": ZooRow(vary(LOW_RANK, recurrence={"normalize": True}), "control; 2601.21349", "the bottleneck with a norm"),
    "smoe-entropy": ZooRow(vary(SMOE, temperature=Temperature.Config(target_entropy=1.5)), "control", "temperature steered to a gate entropy of 1.5 nats"),
    "smoe-annealed": ZooRow(vary(SMOE, temperature=Temperature.Config(start=2.0, end=0.5)), "control", "temperature from 2 to 0.5 over training"),
    # ---- the field ----
    "switch": ZooRow(vary(SMOE, router=Router.Config(input_jitter=0.01), gate=Softmax.Config(renormalize=False), balance=replace(BALANCED, capacity_factor=1.25)), "Switch, 2101.03961", "top-1 probability as weight, input jitter, capacity 1.25", top_k=1, permutes=IN_ORDER),
    "gshard": ZooRow(vary(SMOE, gate=SecondExpert.Config(), balance=replace(BALANCED, capacity_factor=1.0)), "GShard, 2006.16668", "top-2, the second expert kept at random", permutes=IN_ORDER),
    "gshard-sampled": ZooRow(vary(SMOE, gate=SecondExpert.Config(policy="sampled")), "GShard, 2006.16668", "top-2, the second expert drawn by Gumbel noise"),
    "noisy-topk": ZooRow(vary(SMOE, router=NoisyTopK.Config(), gate=Softmax.Config(order="topk_softmax"), balance=UNBALANCED), "Shazeer et al. 2017, 1701.06538", "learned noise, importance and load losses"),
    "hash": ZooRow(RouterSpec(router=Hash.Config(), scorer=None, gate=None), "Roller et al. 2021, 2106.04426", "a fixed table from token id to experts"),
    "stable-moe": ZooRow(RouterSpec(router=Stable.Config(), scorer=None, gate=None), "StableMoE, 2204.08396", "two stages: learn, distil into token identity, freeze"),
    "stable-moe-onestage": ZooRow(vary(SMOE, scorer=HalfCosine.Config()), "CompeteSMoE's code", "what that code calls StableMoE: half-cosine, one stage"),
    "smoe-dropout": ZooRow(vary(SMOE, scorer=Linear.Config(frozen=True), gate=Softmax.Config(start_k=1), balance=UNBALANCED), "SMoE-dropout, 2303.01610", "frozen random router, k grows from 1"),
    "expert-choice": ZooRow(vary(SMOE, gate=ExpertChoice.Config(), balance=UNBALANCED), "2202.09368", "experts choose tokens; not causal"),
    "remoe": ZooRow(vary(SMOE, gate=ReLU.Config(), balance=UNBALANCED), "ReMoE, 2412.14711", "ReLU scores, adaptive L1, no top-k"),
    "deepseek-v3": ZooRow(DEEPSEEK, "2412.19437; 2408.15664", "sigmoid, selection bias instead of a balance loss"),
    "deepseek-v3-groups": ZooRow(vary(DEEPSEEK, gate={"groups": 4, "top_groups": 2, "scale": 2.5}), "2412.19437", "the same within the best 2 of 4 groups"),
    "smoe-bias": ZooRow(vary(SMOE, balance=BIAS), "2408.15664", "softmax router balanced by a selection bias"),
    "rmoe-bias": ZooRow(vary(RMOE, balance=BIAS), "2408.15664 on Eq. 4 to 6", "RMoE balanced by a selection bias"),
    "rmoe-sigmoid": ZooRow(vary(RMOE, gate=DEEPSEEK.gate, balance=DEEPSEEK.balance), "2412.19437 on Eq. 4 to 6", "RMoE under DeepSeek-V3's gate"),
    "sparsemixer": ZooRow(vary(SMOE, gate=SparseMixer.Config(), balance=UNBALANCED), "SparseMixer-v2, 2409.12136", "sampled top-2 with its own gradient estimate"),
    "eda": ZooRow(vary(EDA, gate=Softmax.Config(renormalize=False), balance=BIAS), "ZAYA1, 2605.05365", "linear state with learned decay, MLP head, skip expert"),
    "eda-linear": ZooRow(EDA_LINEAR, "ZAYA1's state, 2605.05365", "linear state with learned decay, normalised, linear head"),
    "eda-linear-detach": ZooRow(vary(EDA_LINEAR, recurrence={"carry": "detached"}), "control", "the linear state passed without its gradient"),
    "path-moe": ZooRow(vary(SMOE, scorer=Linear.Config(shared_layers=2)), "PathMoE, 2603.18297", "two consecutive layers share a router"),
    "omni-router": ZooRow(vary(SMOE, scorer=Linear.Config(shared_layers=0)), "Omni-router, 2507.05724", "one router for all layers"),
    # ---- balancing, on the linear router ----
    "smoe-global": ZooRow(vary(SMOE, balance=replace(BALANCED, scope="global_batch")), "2501.11873", "assignment shares counted over the global batch"),
    "smoe-z": ZooRow(vary(SMOE, balance=BalanceSpec(losses=(LoadBalance(), ZLoss()))), "ST-MoE, 2202.08906", "load balance and z-loss"),
    "smoe-sequence": ZooRow(vary(SMOE, balance=BalanceSpec(losses=(SequenceBalance(weight=1e-2),))), "2412.19437", "balance within each sequence"),
    "smoe-similarity": ZooRow(vary(SMOE, balance=BalanceSpec(losses=(SimilarityPreserving(),))), "2506.14038", "router kept near orthogonal"),
    "smoe-capacity": ZooRow(vary(SMOE, balance=replace(BALANCED, capacity_factor=1.0)), "ours; the limit of Table 11", "capacity factor 1.0, the rest dropped", permutes=IN_ORDER),
    # ---- RMoE's rivals across layers, and baselines ----
    "moepp-residual": ZooRow(vary(SMOE, router=GatingResidual.Config()), "MoE++, 2410.07348", "a learned map of the last layer's scores is added; scores accumulate"),
    "moepp": ZooRow(vary(SMOE, router=GatingResidual.Config(identity_experts=1, zero_experts=1, constant_experts=2), gate=TopK.Config(renormalize=False), balance=HETEROGENEOUS), "MoE++, 2410.07348", "all of MoE++: the gating residual, and experts that compute nothing"),
    "acmoe": ZooRow(vary(SMOE, router=AdaptiveClustering.Config()), "ACMoE, 2502.15315", "features weighted by how tightly the last layer's expert clusters them"),
    "mcf-moe": ZooRow(vary(SMOE, router=MultiLevelContext.Config()), "MCF-MoE, 2026 (anonymous code)", "scores from similar earlier tokens and attention to three layers below", permutes=READS_SEQUENCE),
    "pre-gated": ZooRow(vary(SMOE, recurrence=Previous.Config()), "Pre-gated MoE, 2308.12066", "the input of the layer below decides, so that experts can be fetched early"),
    "top-p": ZooRow(vary(SMOE, gate=TopP.Config(), balance=BalanceSpec(losses=(LoadBalance(), GateEntropy()))), "2403.07652", "the fewest experts with 0.4 of the mass"),
    "adamoe": ZooRow(vary(SMOE, router=NullExperts.Config(), gate=TopK.Config(), balance=BalanceSpec(losses=(NullBalance(),))), "AdaMoE, 2406.13233", "4 choices among the experts and 8 null ones", top_k=4),
    "expert-threshold": ZooRow(vary(SMOE, gate=ExpertThreshold.Config(), balance=UNBALANCED), "Expert Threshold, 2603.11535", "an expert takes every token above its moving quantile; causal"),
    "dynmoe": ZooRow(vary(SMOE, scorer=Cosine.Config(temperature=1.0), gate=TopAny.Config(), balance=BalanceSpec(losses=(DiverseSimple(),))), "DynMoE, 2405.14297", "a learned threshold per expert, equal weights; the number of experts stays fixed, which DynMoE changes in training"),
    "blockffn": ZooRow(vary(SMOE, gate=NormedReLU.Config(), balance=BalanceSpec(losses=(ActivationLocality(), ChunkSparsity()))), "BlockFFN, 2507.08771", "normalised ReLU scores, no top-k; neighbouring tokens are taught to share experts"),
    "quantile-balance": ZooRow(QUANTILE, "kexue.fm/archives/11619; marin #3406", "the bias that would have balanced the last step, no rate"),
    "rmoe-quantile": ZooRow(vary(RMOE, router=QUANTILE.router, gate=QUANTILE.gate, balance=UNBALANCED), "marin #3406 on Eq. 4 to 6", "RMoE balanced by quantiles"),
    "dense": ZooRow(RouterSpec(router=Dense.Config(), scorer=None, gate=None), "baseline", "no routing: the dense model of equal active parameters"),
    "uniform": ZooRow(RouterSpec(router=RoundRobin.Config(), scorer=None, gate=None), "baseline", "forced balance: experts dealt out in turn, nothing learned", permutes=IN_ORDER),
}  # fmt: skip

OF_CHOSEN = Softmax.Config(order="topk_softmax", renormalize=False)
SIGMOID = TopK.Config(scores="sigmoid", eps=1e-20)
SQRT_SOFTPLUS = vary(DEEPSEEK, gate=TopK.Config(scores="sqrt_softplus", eps=1e-20, scale=1.5))

_SHIPPED: dict[str, ZooRow] = {
    # ---- what ships: routers of released models, as transformers has them ----
    "olmoe": ZooRow(vary(SMOE, gate=Softmax.Config(renormalize=False)), "OLMoE; transformers", "softmax then top-k, not renormalised"),
    "granite": ZooRow(vary(SMOE, gate=OF_CHOSEN), "Granite, Aria, JetMoE; transformers", "softmax over the k largest logits, once: no second normalisation"),
    "gpt-oss": ZooRow(vary(SMOE, scorer=Linear.Config(bias=True), gate=OF_CHOSEN), "GPT-OSS; transformers", "learned logit bias; softmax over the k largest logits"),
    "privacy-filter": ZooRow(vary(SMOE, scorer=Linear.Config(bias=True), gate=TopK.Config(weights="softmax_of_chosen", renormalize=False, scale="inverse_k")), "OpenAI Privacy Filter; transformers", "GPT-OSS's router with its weights over k"),
    "deepseek-v2": ZooRow(vary(SMOE, gate=TopK.Config(renormalize=False, groups=4, top_groups=2)), "DeepSeek-V2, 2405.04434; transformers", "softmax within the best 2 of 4 groups, a group's score its best expert's; not renormalised"),
    "mistral-4": ZooRow(vary(SMOE, gate=TopK.Config(eps=1e-20, groups=4, top_groups=2, group_score="top_2")), "Mistral 4; transformers", "softmax within the best 2 of 4 groups, a group's score the sum of its best two"),
    "deepseek-v4": ZooRow(SQRT_SOFTPLUS, "DeepSeek-V4; transformers", "sqrt(softplus) scores with a selection bias, renormalised, times 1.5"),
    "deepseek-v4-table": ZooRow(vary(SQRT_SOFTPLUS, router=TableTopK.Config()), "DeepSeek-V4; transformers", "the first 3 layers choose by a fixed table of token ids; weights are learned there too"),
    "gemma-4": ZooRow(vary(SMOE, scorer=NormedLinear.Config(), gate=TopK.Config(expert_scale=True)), "Gemma 4; transformers", "normalised and rescaled input; a learned scale per expert on the weights"),
    "longcat": ZooRow(vary(SMOE, router=Router.Config(identity_experts=4), gate=TopK.Config(renormalize=False, scale=6.0), balance=BIAS), "LongCat-Flash, 2509.01322; transformers", "4 experts more that return their input; softmax with a selection bias, not renormalised, times 6"),
    "moepp-experts": ZooRow(vary(SMOE, router=Router.Config(identity_experts=1, zero_experts=1, constant_experts=2), gate=TopK.Config(renormalize=False), balance=HETEROGENEOUS), "MoE++, 2410.07348", "an identity, a zero and two constant experts more; without MoE++'s gating residual"),
    "llama-4": ZooRow(vary(SMOE, router=Router.Config(weight_on="input"), gate=TopK.Config(scores="sigmoid", choose_by="logits", renormalize=False)), "Llama 4; transformers", "the sigmoid of the chosen logit multiplies the expert's input"),
    "inkling": ZooRow(vary(SMOE, router=SharedInSoftmax.Config(), gate=TopK.Config(scores="sigmoid", renormalize=False), balance=BIAS), "Inkling; transformers", "softmax over the chosen and the shared experts' log-sigmoid: shared experts are gated too"),
    "kolibri": ZooRow(vary(SMOE, gate=TopK.Config(scores="sigmoid", choose_by="logits", renormalize=False), balance=BIAS), "Kolibri; transformers", "chosen by logit + bias, weighted by plain sigmoid"),
    "laguna": ZooRow(vary(DEEPSEEK, gate=TopK.Config(scores="sigmoid", softcap=30.0)), "Laguna; transformers", "logits softly capped at 30, sigmoid, selection bias"),
    "muse-spark": ZooRow(vary(DEEPSEEK, gate=TopK.Config(scores="sigmoid", multiplier=0.1767766952966369, eps=1e-15)), "Muse Spark; transformers", "logits times 0.177, sigmoid, selection bias"),
    "flint": ZooRow(vary(SMOE, gate=TopK.Config(scores="sigmoid")), "Flint; Cohere 2's option; transformers", "sigmoid, renormalised, no selection bias"),
    "ernie": ZooRow(vary(SMOE, gate=TopK.Config(eps=1e-12, eps_is_floor=True), balance=BIAS), "ERNIE 4.5; transformers", "softmax with a selection bias; the weights' sum has a floor"),
    "lfm2": ZooRow(vary(DEEPSEEK, gate=TopK.Config(scores="sigmoid", eps=1e-6)), "LFM2; transformers", "sigmoid with a selection bias; 1e-6 on the weights' sum"),
    "axk2": ZooRow(vary(DEEPSEEK, gate=replace(SIGMOID, scale=2.5, groups=4, top_groups=2, group_score="top_2", outside="zero")), "A.X K2; transformers", "DeepSeek-V3 in groups, but experts of other groups score 0 and may be chosen"),
    "dbrx": ZooRow(vary(SMOE, gate=TopK.Config(norm=2.0)), "DBRX's option; transformers", "weights over their 2-norm; over their 1-norm, DBRX's default, it is smoe"),
    "doge": ZooRow(vary(SMOE, scorer=ProductKeys.Config(), gate=OF_CHOSEN), "Doge; transformers", "product keys: an expert's logit is the sum of two keys'"),
    "hunyuan": ZooRow(vary(SMOE, gate=TopK.Config(layer_k=(1, 2))), "HunYuan; transformers", "k differs by layer: 1 and 2 in turn", top_k=2),
    "moge": ZooRow(vary(SMOE, gate=TopK.Config(groups=2, group_quota=True, renormalize=False, expert_scale=True)), "Pangu Pro MoE, 2505.21411; vLLM-Ascend", "exactly k / 2 experts in each of 2 groups; weights of the softmax over all experts, times a learned factor per expert", top_k=2),
}  # fmt: skip

OWN = frozenset(_ROWS | _SHIPPED)  # the package's, not a plugin's
for _name, _row in (_ROWS | _SHIPPED).items():
    register(_name, _row)
