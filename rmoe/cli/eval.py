"""`rmoe eval`: how well a model predicts a text, and how it does on benchmark tasks."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
from pathlib import Path

from rmoe.cli.arguments import require_unset
from rmoe.cli.models import Model, Plugins, open_model
from rmoe.errors import RequestError, RunError


def run(
    model: Model,
    *,
    data: str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    context: int | None = None,
    overlap: int = 1,
    plugin: Plugins = (),
    json: bool = False,
) -> None:
    """Bits per byte and perplexity of a model on a whole text, or benchmark tasks of lm-evaluation-harness.

    Of a dataset (hf:NAME) the test split counts, else the validation split. A model of words has no bits per byte:
    its `<unk>` stands for any of them.

    Args:
        data: a text file, a folder of texts, a .gz, .jsonl, .csv or .parquet of text, or hf:NAME.
        tasks: names separated by commas, `arc_easy,hellaswag`; with a local file in the place of the task's own
            data, `arc_easy=FILE` (arc_easy, arc_challenge, piqa, lambada_openai, lambada_standard, gsm8k).
        limit: with --tasks, only so many items of each.
        num_fewshot: with --tasks, examples in the prompt; default the task's own number.
        context: tokens of one forward pass; default what the model was trained with, at most 4096 and the whole text.
        overlap: tokens each pass repeats from the one before, so that every token is predicted from at least so
            many; 1 is the cheapest and the harshest.
        json: print one JSON object; with --tasks in the harness's own format.
    """
    given = locals()
    if (data is None) == (tasks is None):
        raise RequestError("--data", data, "a text, or --tasks: one of the two")
    if context is not None and context < 2:
        raise RequestError("--context", context, "2 or more")
    if tasks is not None:
        require_unset(run, given, ("overlap",), "without --data")
        _benchmarks(model, plugin, tasks, limit, num_fewshot, context, json)
    elif data is not None:
        require_unset(run, given, ("limit", "num_fewshot"), "without --tasks")
        _text(model, plugin, data, context, overlap, json)


def _benchmarks(
    model: Path,
    plugin: Plugins,
    tasks: str,
    limit: int | None,
    num_fewshot: int | None,
    context: int | None,
    json: bool,
) -> None:
    if limit is not None and limit < 1:
        raise RequestError("--limit", limit, "1 or more")
    if num_fewshot is not None and num_fewshot < 0:
        raise RequestError("--num-fewshot", num_fewshot, "0 or more")

    from rmoe.evaluation import parse_benchmarks, run_benchmarks

    benchmarks = parse_benchmarks(tasks)
    language_model, tokenizer, _ = open_model(model, plugin)
    results = run_benchmarks(
        language_model,
        tokenizer,
        benchmarks,
        limit=limit,
        num_fewshot=num_fewshot,
        max_length=context,
    )
    if json:
        # Python writes NaN and Infinity, which are no JSON.
        plain = jsonlib.loads(jsonlib.dumps(results, default=str), parse_constant=lambda name: None)
        print(jsonlib.dumps(plain, indent=2, allow_nan=False))
        return
    for task, figures in results["results"].items():
        said = []
        for name, value in figures.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = figures.get(name.replace(",", "_stderr,"))  # "N/A" where the harness has none
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                said.append(f"{name.removesuffix(',none')} {value:.4f}{spread}")
        print(f"{task}: {', '.join(said)}")


def _text(model: Path, plugin: Plugins, data: str, context: int | None, overlap: int, json: bool) -> None:
    from rmoe.data import DataConfig, prepare
    from rmoe.training.evaluation import evaluate

    language_model, tokenizer, folder = open_model(model, plugin)
    corpus = prepare(DataConfig(path=data, tokenizer=tokenizer.name_or_path, split="whole"), 2)
    tokens = corpus.manifest.splits["test"].tokens
    if context is None:
        context = min(getattr(language_model.config, "max_position_embeddings", 4096), 4096, tokens)
    if context > tokens:
        raise RequestError("--context", context, f"at most {tokens}, the tokens of the text")
    corpus = dataclasses.replace(corpus, sequence_length=context)
    evaluation = evaluate(language_model, corpus.blocks("test", overlap))
    if not math.isfinite(evaluation.loss):
        what = f"the loss of {folder} on {corpus.manifest.source.name} is {evaluation.loss}"
        raise RunError(what, "nothing", "a model that gives finite logits")
    split = corpus.manifest.splits["test"]
    figures = {
        "bits_per_byte": None if corpus.unit == "perplexity" else corpus.in_unit("test", evaluation.loss),
        "perplexity_per_token": math.exp(min(evaluation.loss, 700.0)),
        "loss_nats_per_token": evaluation.loss,
        "tokens": split.tokens,
        "bytes": split.bytes,
        "context": evaluation.context,
        "model": str(folder),
        "data": corpus.manifest.source.name,
    }
    if json:
        print(jsonlib.dumps(figures, indent=2))
        return
    bits = "" if figures["bits_per_byte"] is None else f"{figures['bits_per_byte']:.4f} bits per byte, "
    print(
        f"{bits}perplexity {figures['perplexity_per_token']:.3f} per token "
        f"over {split.tokens:,} tokens ({split.bytes:,} bytes); each predicted from {evaluation.context}"
    )
