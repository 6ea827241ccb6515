"""The token explorer's data: each token's path of experts per model, and what each expert takes most."""

from __future__ import annotations

from typing import Any

from rmoe.results.analysis import Analysis


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
                "top": [
                    [[[top.text, top.count, top.share] for top in expert] for expert in layer]
                    for layer in model.top_tokens or []
                ],
            }
            for model in having
            if [token.text for token in model.tokens or []] == texts
        ],
    }
