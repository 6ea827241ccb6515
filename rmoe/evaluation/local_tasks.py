"""Local task files in the harness: its own task configuration, with the data taken from a file instead.

Prompts, answers, filters and metrics are those of the harness's YAML. Only where the data comes from is changed, and
the file's items are written under the column names which that YAML reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import structs

from rmoe.data.tasks import MultipleChoice, Passage, Question, Task, read_tasks
from rmoe.errors import RequestError


def _arc(item: Any) -> dict[str, Any]:
    letters = [chr(ord("A") + index) for index in range(len(item.choices))]
    choices = {"text": item.choices, "label": letters}
    return {"question": item.question, "choices": choices, "answerKey": letters[item.label]}


def _piqa(item: Any) -> dict[str, Any]:
    if len(item.choices) != 2:
        raise RequestError(
            "--tasks", f"piqa with {len(item.choices)} choices to {item.question!r:.60}", "two choices"
        )
    return {"goal": item.question, "sol1": item.choices[0], "sol2": item.choices[1], "label": item.label}


# task -> kind of its file's lines, and a line as that task's columns
LOCAL: dict[str, tuple[type[Task], Callable[[Any], dict[str, Any]]]] = {
    "arc_easy": (MultipleChoice, _arc),
    "arc_challenge": (MultipleChoice, _arc),
    "piqa": (MultipleChoice, _piqa),
    "lambada_openai": (Passage, structs.asdict),
    "lambada_standard": (Passage, structs.asdict),
    "gsm8k": (Question, structs.asdict),
}

_FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "lambada_openai": "lambada",
    "lambada_standard": "lambada",
}


def local_task(name: str, file: Path, folder: Path, num_fewshot: int | None = None) -> dict[str, Any]:
    """The harness's configuration of a task over a local file.

    Args:
        file: JSON lines; see `rmoe.data.tasks`.
        folder: where the items are written under the task's column names, and cached.
        num_fewshot: examples in the prompt; None is the task's own number.

    Raises:
        RequestError: no local form of this task, a bad line (named), or fewer lines than the prompts take.
    """
    if name not in LOCAL:
        raise RequestError("--tasks", f"{name}={file}", f"a file for one of {', '.join(LOCAL)}")
    kind, columns = LOCAL[name]
    rows = [columns(item) for item in read_tasks(file, kind, field="--tasks")]
    shipped = _shipped(name)
    shots = (shipped.get("num_fewshot") or 0) if num_fewshot is None else num_fewshot
    if shots and len(rows) <= shots:
        allowed = f"a file of {shots + 1} lines or more, or --num-fewshot below {len(rows)}"
        raise RequestError("--tasks", f"{name}={file} of {len(rows)} lines, with {shots} examples", allowed)
    written = folder / f"{name}.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return shipped | {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(written)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        # Few-shot examples come from the same file; the harness leaves out the item that is asked.
        "fewshot_split": "test",
    }


def _shipped(name: str) -> dict[str, Any]:
    """The task's YAML as the installed harness ships it."""
    import lm_eval.tasks
    import yaml

    package = Path(lm_eval.tasks.__file__).parent
    text = (package / _FOLDERS.get(name, name) / f"{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config
