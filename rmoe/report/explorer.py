"""The token explorer's data: each token's path of experts per model, and what each expert takes most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmoe.results.analysis import Analysis, Contexts, Matrix, ModelAnalysis, TopToken


def explorer_data(analysis: Analysis) -> dict[str, Any] | None:
    """What the page's explorer reads; None where no model's tokens were recorded.

    Models that recorded another text than the first cannot be laid beside it and are left out.
    """
    having = [model for model in analysis.models if model.tokens]
    if not having:
        return None
    texts = [token.text for token in having[0].tokens or []]
    return {
        "text": analysis.text.name,
        "tokens": texts,
        "models": [
            {
                "name": model.name,
                "summary": model.summary,
                "experts": model.experts,
                "layers": model.layers,
                "chosen": [token.experts for token in model.tokens or []],
                "weights": [_shown(token.weights) for token in model.tokens or []],
                "top": {
                    "text": _of_top(model, lambda top: top.text),
                    "count": _of_top(model, lambda top: top.count),
                    "total": [[_total(expert) for expert in layer] for layer in model.top_tokens or []],
                },
                "contexts": _contexts(model.contexts),
            }
            for model in having
            if [token.text for token in model.tokens or []] == texts
        ],
    }


def _of_top(model: ModelAnalysis, get: Callable[[TopToken], Any]) -> list[list[list[Any]]]:
    """Something of each token that an expert takes most, [L][E][...]."""
    return [[[get(top) for top in expert] for expert in layer] for layer in model.top_tokens or []]


def _total(top: list[TopToken]) -> int:
    """All of an expert's assignments, of which `share` is a part."""
    return round(top[0].count / top[0].share) if top else 0


def _shown(weights: Matrix) -> Matrix:
    """To the three digits that the page shows of a weight."""
    return [[round(weight, 3) for weight in row] for row in weights]


def _contexts(contexts: Contexts | None) -> dict[str, Any] | None:
    """The text, and where in it each expert has its largest weights."""
    if contexts is None:
        return None
    return {
        "vocabulary": contexts.vocabulary,
        "text": contexts.text,
        "positions": contexts.positions,
        "weights": [_shown(layer) for layer in contexts.weights],
    }
