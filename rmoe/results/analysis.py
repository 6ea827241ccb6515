"""`analysis.json`: what `rmoe.analysis` measured, and the only place the report takes routing metrics from.

Written by `rmoe analyze` (one model) and `rmoe compare` (one model per router). Every measure is optional:
the report shows a chart only when its data exist. `L` layers with a router, `E` experts, `k` chosen per
token. Layers are numbered from 0, by position among the layers that have a router. Definitions stand in each
field's comment; the tables and figures named are those of arXiv:2408.06793.

In the file, nested lists of `PACKED_FROM` entries or more are packed (`rmoe.results.packed`), without loss:
`read_analysis` gives the numbers that were measured. Version 1 had no packed lists; it is read too.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from rmoe.errors import RequestError
from rmoe.records import NOT_JSON, Record, atomic_write, indented, version_of
from rmoe.results.packed import pack, unpack

ANALYSIS_VERSION = 2
PACKED_FROM = 4096
"""Entries; shorter lists stay as they are, to be read by anybody."""

Matrix: TypeAlias = list[list[float]]


class TextInfo(Record, frozen=True, kw_only=True):
    """The text the routing was measured on."""

    name: str
    sha256: str
    tokens: int


class PairMeasure(Record, frozen=True, kw_only=True):
    """An L x L measure between layers, in nats, from `n` tokens; symmetric."""

    values: Matrix  # [L][L]
    chance: Matrix | None = None  # [L][L] what layers that agree only by chance would show; None: zero
    n: int


class LayerHistogram(Record, frozen=True, kw_only=True):
    """One histogram per layer on shared edges: `counts[l][j]` tokens in `[edges[j], edges[j + 1])`."""

    edges: list[float]  # [B + 1]
    counts: list[list[int]]  # [L][B]
    n: int


class LayerMeasure(Record, frozen=True, kw_only=True):
    """One value per layer, and over all layers together, from `n` tokens."""

    values: list[float]  # [L]
    overall: float
    n: int


class LoadSummary(Record, frozen=True, kw_only=True):
    """How loads spread over a layer's experts, as multiples of the mean load, from `n` tokens."""

    quantiles: Matrix  # [L][5]: smallest, 5th percentile, median, 95th percentile, largest
    dead: list[int]  # [L] experts that no token chose
    max_violation: list[float]  # [L] MaxVio: (largest load - mean load) / mean load
    n: int


class Coverage(Record, frozen=True, kw_only=True):
    """Share of a layer's assignments that its m most chosen experts take, from `n` tokens."""

    hottest: list[int]  # [M] m
    values: Matrix  # [L][M]
    n: int


class Contexts(Record, frozen=True, kw_only=True):
    """Where in the text each expert has its largest weights. A context is the text around a position."""

    vocabulary: list[str]  # text of each different token
    text: list[int]  # [n] the whole text as indices into `vocabulary`
    positions: list[list[list[int]]]  # [L][E][C] largest weight first, -1 beyond an expert's last
    weights: list[Matrix]  # [L][E][C]


class Flips(Record, frozen=True, kw_only=True):
    """How often two models, or one in two precisions, choose different experts for the same tokens."""

    other: str  # the second model's name
    values: list[float]  # [L] share of tokens whose set of experts differs
    any_layer: float  # share of tokens with a difference in at least one layer
    n: int


class Predictability(Record, frozen=True, kw_only=True):
    """Recall of layer l + 1's choice from what layer l's router reads: mean over tokens of |predicted & chosen| / k."""

    own_router: list[float | None]  # [L - 1] layer l + 1's scorer matrix on the input of layer l's router
    at_its_own_input: list[
        float | None
    ]  # [L - 1] the same matrix on its own input: what it can reach at most
    chance: list[float]  # [L - 1] k / E
    probe: list[float | None] | None = None  # [L - 1] a linear probe of that input
    state_probe: list[float | None] | None = None  # [L - 1] of the state that layer l passes on
    n: int


class DropRatio(Record, frozen=True, kw_only=True):
    """Share of assignments beyond `capacity = capacity_factor * T * k / E` per expert (Table 11)."""

    capacity_factor: list[float]  # [C]
    values: Matrix  # [C][L]
    overall: list[float]  # [C]
    window_tokens: int  # T: the tokens that share one capacity


class Similarity(Record, frozen=True, kw_only=True):
    """Mean cosine over expert pairs (Fig. 5), and the same at random initialisation (the reference line)."""

    values: list[float]  # [L]
    random_init: list[float] | None  # [L]


class RouterWeights(Record, frozen=True, kw_only=True):
    """Frobenius norm and standard deviation of the scorer's matrix G_i (Fig. 11)."""

    norm: list[float]  # [L]
    std: list[float]  # [L]


class GradientSplit(Record, frozen=True, kw_only=True):
    """Gradient norm of the router's parameters, from each part of the loss alone (Table 11).

    One entry per training step measured; a model analysed once has one entry.
    """

    step: list[int]  # [S]
    language_model: Matrix  # [S][L] from the language-model loss alone
    balance: Matrix | None  # [S][L] from the balance loss alone; None: the model has none
    language_model_cut: Matrix | None  # [S][L] from the language-model loss with the recurrent path cut
    recurrent: Matrix | None = None  # [S][L] norm of the difference of those two gradients
    shared: list[float] | None = (
        None  # [S] norm over parameters shared by all layers (the cell), from both parts
    )
    tokens: int  # tokens in the batch each entry was measured on


class BalanceAudit(Record, frozen=True, kw_only=True):
    """The model's own balance loss beside Switch's (`E sum_i f_i P_i`, 1: even), both without coefficient."""

    model: float | None  # `aux_loss` of a call as in training; None: as configured, it returns none
    switch: list[float]  # [L]
    gradient: list[float] | None  # [L] norm of the gradient of `model` by the router's parameters
    tokens: int


class Contributions(Record, frozen=True, kw_only=True):
    """What speaks for the chosen experts: the mean of their logits less the mean of all, and the sources of that."""

    sources: list[
        str
    ]  # [J] the embedding, and the layers of the stack; of a row's own layer it is the attention
    values: list[
        list[float | None]
    ]  # [L][J] None above the row's layer, and where a row cannot be told exactly
    state: list[float | None]  # [L] the recurrent state's part; None without one
    advantage: list[float]  # [L]
    n: int


class Regret(Record, frozen=True, kw_only=True):
    """Change of the loss, in nats, where a token's k-th expert is exchanged for the (k+1)-th; above 0: worse."""

    own: list[float | None]  # [L] mean change for the token's own next token; None: no exchange was possible
    own_error: list[float | None]  # [L] standard error of `own`
    later: list[float | None]  # [L] mean change of the sum over the later tokens of its block
    better: list[float | None]  # [L] share of exchanges that lower own and later together
    exchanges: list[int]  # [L]


class Coactivation(Record, frozen=True, kw_only=True):
    """How often two experts are chosen for one token, as a share of tokens.

    `within[l][a][b]`: experts a and b both in layer l (diagonal: chosen at all).
    `across[l][a][b]`: expert a in layer l and b in layer l + 1.
    """

    within: list[Matrix] | None  # [L][E][E]
    across: list[Matrix] | None  # [L - 1][E][E]
    n: int


class ExpertPath(Record, frozen=True, kw_only=True):
    """One path of first-choice experts through all layers, and the share of tokens that take it."""

    experts: list[int]  # [L]
    share: float


class Paths(Record, frozen=True, kw_only=True):
    """The most frequent paths, most frequent first, of `distinct` paths taken by `n` tokens.

    Where there were more paths than are counted, `is_exact` is False: `distinct` and shares are then lower bounds.
    """

    top: list[ExpertPath]
    distinct: int
    n: int
    is_exact: bool = True


class Saturation(Record, frozen=True, kw_only=True):
    """Routing stability between checkpoints: mean share of a token's chosen experts that stay the same."""

    from_step: list[int]  # [S]
    to_step: list[int]  # [S]
    values: Matrix  # [S][L]
    n: int


class Token(Record, frozen=True, kw_only=True):
    """One token of the explored text; `experts` holds what was chosen, largest weight first."""

    text: str  # as shown; bytes that are no text are written as \\xNN
    experts: list[list[int]]  # [L][k]
    weights: Matrix  # [L][k]


class TopToken(Record, frozen=True, kw_only=True):
    """A token an expert takes often: `count` assignments, `share` of all its assignments."""

    text: str
    count: int
    share: float


class ExpertCheck(Record, frozen=True, kw_only=True):
    """One expert was silenced: what changed."""

    layer: str
    expert: int
    said: int  # tokens said to use it
    missed: int  # of those, how many did not change
    extra: int  # tokens that changed, but should not
    # Mean over its tokens of |y - y'| / |y| of the block's output (largest entries); 0 without any.
    change: float

    @property
    def passed(self) -> bool:
        """No other token changed, and of its own at most 5% did not: a small part of a sum is rounded away."""
        return self.extra == 0 and self.missed <= 0.05 * self.said


class ReadingCheck(Record, frozen=True, kw_only=True):
    """Whether the routing was read correctly: experts silenced one at a time on a short text."""

    passed: bool
    summary: str  # the verdict in a sentence
    tokens: int
    experts: list[ExpertCheck]


class OverTraining(Record, frozen=True, kw_only=True):
    """A per-layer measure recorded while training. Earlier releases wrote it; now it is in the run's `layer_curves`."""

    name: str
    unit: str
    definition: str
    step: list[int]  # [S]
    values: Matrix  # [S][L]


class ModelAnalysis(Record, frozen=True, kw_only=True):
    """Everything measured on one model. `name` (a router's, or a folder's) is unique in the file."""

    name: str
    summary: str  # what it is, in a phrase
    layers: int
    experts: int
    experts_per_token: int
    layer_names: list[str]  # [L], as in the model
    check: ReadingCheck | None = None  # None: not asked for
    mi_digitised: PairMeasure | None = (
        None  # the paper's: 100 equal bins on [0, 1], per token, averaged (Fig. 3)
    )
    mi_chosen: PairMeasure | None = None  # between the first-choice experts of two layers, bias-corrected
    entropy: LayerHistogram | None = None  # gate entropy in nats (Fig. 4)
    entropy_mean: LayerMeasure | None = None
    inner_balance: LayerMeasure | None = None  # median top-1 / top-2 score (Table 8)
    outer_balance: LayerMeasure | None = None  # median sum of the selected scores (Table 8)
    frequency: Matrix | None = None  # [L][E] share of assignments (Fig. 12)
    frequency_n: int = 0  # tokens behind `frequency`
    load_imbalance: LayerMeasure | None = None  # largest share over mean share: E * max_n f_n
    load: LoadSummary | None = None
    coverage: Coverage | None = None
    contexts: Contexts | None = None
    flips: Flips | None = None
    predictability: Predictability | None = None
    # [L][E] REAP's mean of weight times norm of output; None without tokens
    saliency: list[list[float | None]] | None = None
    drop_ratio: DropRatio | None = None
    similarity: Similarity | None = None
    router_weights: RouterWeights | None = None
    gradient_split: GradientSplit | None = None
    balance: BalanceAudit | None = None
    regret: Regret | None = None
    contributions: Contributions | None = None
    coactivation: Coactivation | None = None
    paths: Paths | None = None
    saturation: Saturation | None = None
    over_training: list[OverTraining] = msgspec.field(default_factory=list)
    tokens: list[Token] | None = None  # consecutive, the same text for every model in the file
    top_tokens: list[list[list[TopToken]]] | None = None  # [L][E][...], most taken first


class Analysis(Record, frozen=True, kw_only=True):
    """The file."""

    schema_version: int = ANALYSIS_VERSION
    text: TextInfo
    models: list[ModelAnalysis]
    notes: list[str] = msgspec.field(default_factory=list)


def write_analysis(path: Path, analysis: Analysis) -> None:
    """Write `analysis.json`, whole or not at all."""
    tree = pack(msgspec.to_builtins(analysis), PACKED_FROM)
    with atomic_write(path, alone=False) as staged:
        staged.write_bytes(indented(tree))


def read_analysis(path: Path) -> Analysis:
    """Read `analysis.json`, of this version or the one before.

    Raises:
        RequestError: it is absent, of another version, or not such a file.
    """
    try:
        data = path.read_bytes()
        version_of(data, str(path), 1, ANALYSIS_VERSION)
        fields = {
            name: unpack(value) for name, value in msgspec.json.decode(data, type=dict[str, Any]).items()
        }
        return msgspec.convert(fields | {"schema_version": ANALYSIS_VERSION}, Analysis)
    except RequestError:
        raise
    except (OSError, ValueError, *NOT_JSON) as error:
        raise RequestError(str(path), str(error), f"a {path.name} written by rmoe") from error
