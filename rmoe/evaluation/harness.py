"""lm-evaluation-harness through its Python API, with tasks from its own datasets or from local files."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from rmoe.errors import RequestError, RunError, one_line
from rmoe.evaluation.local_tasks import LOCAL, local_task
from rmoe.places import expand


def parse_benchmarks(text: str) -> dict[str, Path | None]:
    """Read `--tasks`: names separated by commas, each with `=FILE` if its data is local.

    >>> parse_benchmarks("hellaswag,piqa=valid.jsonl")
    {'hellaswag': None, 'piqa': PosixPath('valid.jsonl')}

    Raises:
        RequestError: empty, or a name twice.
    """
    found: list[tuple[str, Path | None]] = []
    parts = text.split(",")
    while parts:
        name, separator, file = parts.pop(0).partition("=")
        if not separator:
            found += [(name.strip(), None)] if name.strip() else []
            continue
        # A comma may be part of the path: the longest text that names a file is one.
        joined = [",".join([file, *parts[:count]]).strip() for count in range(len(parts) + 1)]
        paths = [expand(path, "--tasks") for path in joined]
        count = max((count for count, path in enumerate(paths) if path.is_file()), default=0)
        found.append((name.strip(), paths[count]))
        del parts[:count]
    benchmarks = dict(found)
    if not found or len(benchmarks) < len(found):
        raise RequestError("--tasks", text, "different names separated by commas, as arc_easy,piqa=FILE")
    return benchmarks


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: Any,
    benchmarks: Mapping[str, Path | None],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    samples: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on benchmark tasks.

    Args:
        benchmarks: tasks of the harness, each with its file; None where its data comes from the Hugging Face Hub.
        limit: only so many items of each task.
        num_fewshot: examples in the prompt; None is the task's own number.
        max_length: tokens of context; None is the model's.
        samples: keep each item's prompt and the model's answer.

    Returns:
        The harness's own result: `results`, `configs`, `versions`, `n-shot`, ...

    Raises:
        RequestError: the harness is not installed, a task does not exist, or a local file is bad.
        RunError: a task's data could not be fetched.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RequestError("--tasks", "lm_eval", "pip install 'rmoe[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    remote = [name for name, file in benchmarks.items() if file is None]
    manager = TaskManager(include_defaults=bool(remote))
    for name in remote:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3) or sorted(LOCAL)
            raise RequestError("--tasks", name, f"a task of the harness, such as {', '.join(near)}")
    with TemporaryDirectory(prefix="rmoe-tasks-") as folder:
        tasks: list[Any] = [
            name if file is None else local_task(name, file, Path(folder), num_fewshot)
            for name, file in benchmarks.items()
        ]
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=8)
        try:
            with redirect_stdout(sys.stderr):  # the harness prints; stdout is for the result
                results: dict[str, Any] = simple_evaluate(
                    model=language_model,
                    tasks=tasks,
                    task_manager=manager,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    log_samples=samples,
                    bootstrap_iters=1000,
                    verbosity="ERROR",
                )
        except (OSError, ConnectionError) as error:
            if not remote:
                raise
            what = f"the data of {', '.join(remote)} could not be fetched: {one_line(str(error))[:200]}"
            local = f"with a network, or from a file: --tasks {remote[0]}=FILE"
            raise RunError(what, "nothing was written", local) from error
    return results
