"""The zoo by family of idea: what its page is ordered by."""

from __future__ import annotations

from typing import NamedTuple

from rmoe.routing.spec import RouterSpec


class Idea(NamedTuple):
    """One family of rows.

    Attributes:
        title: as the page has it.
        text: what its rows have in common.
        names: the rows, separated by blanks. A row that no idea names goes where `of` puts it.
    """

    title: str
    text: str
    names: str = ""


SCORES = Idea(
    "Scores",
    "How a token is compared with the experts: a linear map, an MLP, angles, a generated or low-rank map. Then top-k.",
    """
    smoe smoe-topk-softmax smoe-mlp smoe-mlp-mi random-smoe cosine-moe cosine-moe-tutel xmoe-8 xmoe xmoe-32
    xmoe-reference hyper-moe low-rank low-rank-norm stable-moe-onestage smoe-entropy smoe-annealed
    """,
)
STATE = Idea(
    "A state over depth",
    "RMoE, its ablations, and linear states: the router of a layer reads what the routers below have read.",
    """
    rmoe rmoe-std002 rmoe-np rmoe-detach rmoe-truncated-2 rmoe-truncated-3 rmoe-sproj rmoe-rnn rmoe-lstm rmoe-p256
    rmoe-p512 rmoe-rnn-p256 rmoe-residual rmoe-norm rmoe-full-softmax rmoe-p256-full-softmax rmoe-bias rmoe-sigmoid
    xmoe-gru-8 xmoe-gru xmoe-gru-32
    gated-linear gated-linear-np gated-linear-detach eda eda-linear eda-linear-detach rmoe-quantile
    """,
)
BETWEEN = Idea(
    "Other ties between layers",
    "Scores, choices or weights of one layer that another one uses: RMoE's rivals.",
    """
    rmoe-np-r0.5 rmoe-np-r1.0 rmoe-np-r0.5-detach-r rmoe-np-r1.0-detach-r path-moe omni-router moepp-residual moepp
    acmoe mcf-moe pre-gated
    """,
)
CHOICE = Idea(
    "Choosing otherwise",
    "Not the k best scores of each token: noise, capacity, thresholds, tables, experts that choose.",
    """
    switch gshard gshard-sampled noisy-topk sparsemixer hash stable-moe smoe-dropout expert-choice remoe
    smoe-capacity top-p expert-threshold adamoe dynmoe blockffn
    """,
)
BALANCE = Idea(
    "Balance",
    "What keeps experts equally busy, on one and the same router.",
    "smoe-bias smoe-global smoe-z smoe-sequence smoe-similarity quantile-balance",
)
SHIPPED = Idea(
    "What ships",
    "Routers of released models, each equal bit for bit to transformers' own code where there is any (last table).",
    """
    olmoe granite gpt-oss privacy-filter deepseek-v2 deepseek-v3 deepseek-v3-groups deepseek-v4 deepseek-v4-table
    mistral-4 axk2 gemma-4 longcat moepp-experts llama-4 inkling kolibri laguna muse-spark flint ernie lfm2 dbrx doge
    hunyuan moge
    """,
)
BASELINES = Idea(
    "Baselines",
    "What routing is measured against: none at all, and one that learns nothing.",
    "dense uniform",
)
IDEAS = (SCORES, STATE, BETWEEN, CHOICE, BALANCE, SHIPPED, BASELINES)


def of(name: str, spec: RouterSpec, carried: str) -> Idea:
    """The family of a row: the one that names it, else by what it carries from layer to layer, and how it balances."""
    for idea in IDEAS:
        if name in idea.names.split():
            return idea
    if carried != "-":
        return BETWEEN
    return CHOICE if spec.balance.described() in ("-", "", "load_balance") else BALANCE


class Option(NamedTuple):
    """What a model can have beside any router that allows it, by fields of its configuration."""

    setting: str
    summary: str
    source: str


OPTIONS = (
    Option(
        "dense_gradients: densemixer",
        "experts that a token did not choose teach the router as if they had been computed",
        "DenseMixer's code",
    ),
    Option(
        "dense_gradients: default",
        "an expert that was not chosen gives the moving average of its outputs",
        "Default MoE, 2504.12463",
    ),
    Option(
        "erc_loss_coef, erc_alpha",
        "each expert is to answer its own vector in the router more strongly than any other's",
        "ERC loss, 2512.23447",
    ),
    Option(
        "competition_rate, competition_loss_coef",
        "on some passes the experts that answer most are chosen, and teach the router",
        "CompeteSMoE, 2505.13380",
    ),
)


class Without(NamedTuple):
    """A published mechanism that has no row, and why."""

    name: str
    source: str
    why: str


WITHOUT = (
    Without(
        "Autonomy of experts",
        "2501.13074",
        "no router: the norm of an expert's own first product is its score. Router and experts share no matrix here",
    ),
    Without(
        "Chain of experts",
        "2506.18945",
        "a layer's experts are visited several times, each time by a router of its own. A layer has one router here",
    ),
    Without("EMO", "-", "no source gives the rule by which a document's experts are chosen"),
    Without(
        "Inkling-2's loop",
        "transformers",
        "layers run several times and get a message from the pass before. Its router is `deepseek-v3`",
    ),
    Without("MoUE", "-", "only an abstract could be read"),
)
