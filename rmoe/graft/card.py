"""The cards of grafted and upcycled models: what was added to which base."""

from __future__ import annotations

from pathlib import Path

from rmoe.graft.spec import GraftSpec
from rmoe.model.card import ModelCard, stated_license
from rmoe.places import display_name

_LOAD = "import rmoe\n\nmodel = rmoe.load(folder)"


def graft_card(
    source: Path, model_type: str, gates: int, added_parameters: int, spec: GraftSpec
) -> ModelCard:
    """The card of an adapter.

    Args:
        source: the folder of the base; the licence its card states is passed on.
        model_type: the base's family.
        gates: how many gates read the state.
        added_parameters: cell, projectors and `B`s.
        spec: the graft.
    """
    start = (
        "Its gates read the recurrent state alone, so it does not compute what its base computes."
        if spec.pure
        else "Before training it computes what its base computes, bit for bit."
    )
    return ModelCard(
        title=f"{display_name(source)}-graft",
        summary=f"A recurrent router grafted onto {display_name(source)}. {start}",
        load=f"{_LOAD}  # finds its base by the place and digest in config.json",
        base=display_name(source),
        license=stated_license(source),
        tables={
            "Router": {
                "family": model_type,
                "recurrence": f"{spec.recurrence.cell}, p = {spec.recurrence.width}",
                "gates": gates,
                "parameters added": f"{added_parameters:,}",
                "seed": spec.seed,
            }
        },
    )


def upcycling_card(source: Path, router: str, num_experts: int, top_k: int, parameters: int) -> ModelCard:
    """The card of an RMoE model whose experts are copies of a dense model's MLPs."""
    return ModelCard(
        title=f"{display_name(source)}-upcycled",
        summary=(
            f"{display_name(source)} as a Mixture-of-Experts model (arXiv:2212.05055): each expert starts as a copy of "
            "its layer's MLP. Before training it computes what the dense model computes."
        ),
        load=_LOAD,
        base=display_name(source),
        license=stated_license(source),
        tables={
            "Model": {
                "router": router,
                "experts": f"{num_experts}, {top_k} per token",
                "parameters": f"{parameters:,}",
            }
        },
    )
