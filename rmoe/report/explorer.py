"""The token explorer's data: each token's path of experts per model, and what each expert takes most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rmoe.results.analysis import Analysis, ModelAnalysis, TopToken


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
                "weights": [token.weights for token in model.tokens or []],
                "top": {
                    "text": _of_top(model, lambda top: top.text),
                    "count": _of_top(model, lambda top: top.count),
                    # Shown to three digits; single precision halves what the page has to hold.
                    "share": _of_top(model, lambda top: float(np.float32(top.share))),
                },
            }
            for model in having
            if [token.text for token in model.tokens or []] == texts
        ],
    }


def _of_top(model: ModelAnalysis, get: Callable[[TopToken], Any]) -> list[list[list[Any]]]:
    """Something of each token that an expert takes most, [L][E][...]."""
    return [[[get(top) for top in expert] for expert in layer] for layer in model.top_tokens or []]
