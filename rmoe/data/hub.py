"""HuggingFace datasets as text. `datasets` is an ingest front end only: nothing of it stays in a prepared corpus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rmoe.data.config import SplitName
from rmoe.data.text import SplitTexts, Text, join
from rmoe.errors import RequestError
from rmoe.places import PREFIX, expand

# What datasets call the three splits, best name first.
_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def open_dataset(path: str, field: str, whole: bool = False) -> SplitTexts | Text:
    """The text of a dataset.

    Args:
        path: `hf:NAME` or `hf:NAME:CONFIG`; NAME is a hub name or a folder written by `save_to_disk`.
        field: the column that holds the text.
        whole: the text is for evaluation alone.

    Returns:
        Its own three splits where it has them; else its `train` split, or its only one. With `whole` its test split,
        else its validation split, else its only one. The name says which of several it is.

    Raises:
        RequestError: `datasets` is missing, the dataset cannot be loaded, or has no such column or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise RequestError(
            "data.path", path, "hf:... with the extra `data`: pip install 'rmoe[data]'"
        ) from error
    folder = expand(path.removeprefix(PREFIX), "data.path")
    name, _, config = path.removeprefix(PREFIX).partition(":")
    try:
        loaded = (
            datasets.load_from_disk(str(folder))
            if folder.is_dir()
            else datasets.load_dataset(name, config or None)
        )
    except Exception as error:  # the hub, the network, the builder: each has its own family of errors
        raise RequestError("data.path", path, f"a dataset that can be loaded ({error})") from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    for found, rows in splits.items():
        if field not in rows.column_names:
            raise RequestError(
                "data.text_field", field, f"a column of {found}: {', '.join(rows.column_names)}"
            )
    named = {ours: next((n for n in names if n in splits), None) for ours, names in _NAMES.items()}
    if all(named.values()) and not whole:
        return SplitTexts(
            path, {ours: _column(ours, splits[theirs], field) for ours, theirs in named.items() if theirs}
        )
    if len(splits) == 1:
        return _column(path, next(iter(splits.values())), field)
    wanted = (named["test"] or named["valid"]) if whole else named["train"]
    if wanted is None:
        allowed = "`test` or `validation`" if whole else "`train`"
        raise RequestError(
            "data.path", path, f"a dataset with a split {allowed} (it has {', '.join(splits)})"
        )
    return _column(f"{path} ({wanted})", splits[wanted], field)


def _column(name: str, rows: Any, field: str) -> Text:
    def documents() -> Iterator[list[bytes]]:
        for batch in rows.select_columns([field]).iter(batch_size=1000):
            for text in batch[field]:
                if not isinstance(text, str):
                    raise RequestError(
                        "data.text_field", field, f"a column of text (found {type(text).__name__})"
                    )
                yield [text.encode()]

    return Text(name, lambda: join(documents()))
