"""What can be asked of an analysis: which text, how much of it, and which measures. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import tyro

from rmoe.errors import RequestError

MEASURES = {
    "load": "share of assignments per expert, its spread, dead experts, coverage, what a capacity limit drops",
    "coactivation": "experts chosen together, in a layer and from one to the next",
    "paths": "the most frequent paths of first choices",
    "mutual-information": "between layers, of scores and of first choices",
    "confidence": "gate entropy, inner and outer balance",
    "tokens": "tokens that an expert takes most, and the token explorer",
    "contexts": "where in the text each expert has its largest weights",
    "weights": "similarity of experts, norm of routers",
    "gradients": "the router's gradient by part of the loss, on --gradient-tokens",
    "predictability": "the next layer's choice from the input and the state of the router below",
    "saliency": "REAP's saliency of each expert; runs every expert once more",
    "balance": "the model's own balance loss beside Switch's, and its gradient, on --gradient-tokens",
    "regret": "the loss if the next expert had been chosen; runs 64 rows of the text for each layer",
    "contributions": "what speaks for the chosen experts: the layers below, the recurrent state",
}
OF_CHOICES = ("load", "coactivation", "paths", "mutual-information", "tokens")
"""What needs only who was chosen: measured of a trace."""

NOT_BY_DEFAULT = ("predictability", "saliency", "balance", "regret", "contributions")
WHOLE_MODEL = ("gradients", *NOT_BY_DEFAULT)
"""What needs all layers at once: not measured of a streamed model."""

DEFAULT_MEASURES = tuple(name for name in MEASURES if name not in NOT_BY_DEFAULT)


def require_measures(names: Collection[str], allowed: Collection[str]) -> None:
    """Check a choice of measures.

    Raises:
        RequestError: it is empty, or has one that is not allowed.
    """
    if not names or not set(names) <= set(allowed):
        wrong = next((name for name in names if name not in allowed), "")
        raise RequestError("--measures", wrong, ", ".join(allowed))


@dataclass(frozen=True)
class TextOptions:
    """Which text is read, and how much of it.

    Attributes:
        data: a text, as for training; default the test split of the Python standard library's source.
        tokens: at most so many tokens of the text, from its start.
        sequence_length: tokens per block; default 512, or the model's longest if that is less.
        split: which part of the text; default all of it.
    """

    data: str | None = None
    tokens: int = 131_072
    sequence_length: int | None = None
    split: Literal["whole", "train", "valid", "test"] | None = None


@dataclass(frozen=True)
class AnalysisOptions:
    """How much is looked at. No value in the file depends on `batch_size`, beyond rounding.

    Attributes:
        batch_size: blocks per forward pass.
        gradient_tokens: tokens, in whole blocks, for the router's gradient split and the balance audit; 0 leaves them
            out.
        explored_tokens: tokens kept for the token explorer.
        measures: what is measured, of `MEASURES`.
        check: first silence a few experts of each layer, one at a time, on 128 tokens, and see that exactly the tokens
            said to use them change; a model that is read wrongly is refused.
    """

    batch_size: int = 8
    gradient_tokens: int = 2048
    explored_tokens: int = 256
    measures: tyro.conf.Suppress[tuple[str, ...]] = DEFAULT_MEASURES  # the command line's is one text
    check: bool = True

    def __post_init__(self) -> None:
        require_measures(self.measures, MEASURES)
        for name, least in (("batch_size", 1), ("gradient_tokens", 0), ("explored_tokens", 0)):
            value = getattr(self, name)
            if value < least:
                raise RequestError(name, value, f"at least {least}")
