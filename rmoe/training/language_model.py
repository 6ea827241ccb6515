"""A language model and its tokenizer, as every verb that reads or writes text needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from rmoe.errors import RequestError, one_line
from rmoe.model.loading import load


def load_language_model(folder: Path, *, device: str | None = None) -> PreTrainedModel:
    """`rmoe.load`, for a model that predicts tokens.

    Raises:
        RequestError: as `rmoe.load`; or it is a classifier, or a model without a head.
    """
    model = load(folder, device=device)
    if not model.can_generate():
        raise RequestError("MODEL", str(folder), f"a language model, not {type(model).__name__}")
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved beside a model.

    Raises:
        RequestError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some damage shows itself only in use
        return tokenizer
    except Exception as error:  # a damaged file makes the tokenizers library raise what it likes
        said = one_line(str(error))[:200]
        raise RequestError("MODEL", str(folder), f"a model folder with its tokenizer ({said})") from error


def require_rows(model: PreTrainedModel, tokenizer: Any, folder: Path, *others: int | None) -> None:
    """Check that the model's embedding has a row for every id that the tokenizer gives a text.

    Args:
        others: ids that are used beside the text's own, an end or padding.

    Raises:
        RequestError: it has not.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max([ids_of_text(tokenizer) - 1, *(other for other in others if other is not None)])
    if highest >= rows:
        allowed = f"one whose ids are below {rows}, the rows of the embedding of {type(model).__name__}"
        raise RequestError("tokenizer", f"{folder} with ids up to {highest}", allowed)


def ids_of_text(tokenizer: Any) -> int:
    """One more than the highest id a text can have. Special tokens count unless the tokenizer splits them."""
    hidden = set(tokenizer.all_special_tokens) if getattr(tokenizer, "split_special_tokens", False) else set()
    return 1 + max(
        (number for token, number in tokenizer.get_vocab().items() if token not in hidden), default=0
    )
