"""`rmoe analyze`: measure the routing of a model, ours or any Hugging Face MoE."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rmoe.analysis.options import DEFAULT_MEASURES, MEASURES, OF_CHOICES, AnalysisOptions, TextOptions
from rmoe.cli.arguments import GIVEN, names, require_unset
from rmoe.cli.models import Plugins, set_up
from rmoe.errors import RequestError, one_line

# What tells the folder of probes, of a comparison, of a run or a model: a report there is not for this one to replace.
_OF_OTHERS = ("results.jsonl", "comparison.json", "config.json")
_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None,
    *,
    out: Path,
    trace: str | None = None,
    experts: int | None = None,
    experts_per_token: int | None = None,
    text: Annotated[TextOptions, tyro.conf.arg(name="")] = TextOptions(),  # noqa: B008  frozen
    compare_with: str | None = None,
    options: Annotated[AnalysisOptions, tyro.conf.arg(name="")] = AnalysisOptions(),  # noqa: B008  frozen
    device: str | None = None,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    measures: str | None = None,
    stream: bool = False,
    hidden_states: Literal["auto", "memory", "disk"] = "auto",
    single_file: bool = False,
    plugin: Plugins = (),
) -> None:
    """Measure the routing of a model, ours or any Hugging Face MoE.

    Args:
        model: a model folder, a run folder, or hf:NAME of the Hugging Face Hub. Beside --trace: whose it is.
        out: where analysis.json and report/index.html are written.
        trace: measure recorded routing instead: of `rmoe trace`, vLLM, SGLang, Megatron-LM or llama.cpp.
        experts: E, for a trace that does not say it.
        experts_per_token: k, for a trace that does not say it.
        text: see `TextOptions`.
        options: see `AnalysisOptions`.
        compare_with: a second model, shown beside the first; with equal tokenizer, layers and experts also how
            much of each token's routing the two share.
        device: as torch names it; default a GPU if there is one.
        dtype: that the model is loaded in, with --compare-with the second model; default that of its files.
            `--compare-with MODEL --dtype bf16` shows how often the choice flips.
        measures: what is measured, separated by commas: load, coactivation, paths, mutual-information, confidence,
            tokens, contexts, weights, gradients, predictability, saliency, balance, regret, contributions; default all
            but the last five; `all` for all. Beside --trace: load, coactivation, paths, mutual-information, tokens;
            default these.
        stream: read the model layer by layer, with one layer in memory; done unasked for a checkpoint larger than the
            free memory. A run that was killed is resumed by the same command.
        hidden_states: where they are between two layers of a streamed model; default the disk if they take more than
            a quarter of the free memory.
        single_file: put the plotting library inside the page, so that it can be sent alone.
    """
    given = locals()
    if trace is None:
        require_unset(run, given, ("experts", "experts_per_token"), "without --trace: the model says it")
    else:
        where = "with --trace, which has its own text and routing"
        require_unset(run, given, ("compare_with", "device", "dtype", "stream", "hidden_states"), where)
        require_unset(TextOptions, vars(text), vars(text), where)
        unread = ("batch_size", "gradient_tokens", "explored_tokens", "check")
        require_unset(AnalysisOptions, vars(options), unread, where)

    from rmoe.analysis.command import Streaming, analyze_folders, analyze_trace_file
    from rmoe.places import require_writable
    from rmoe.report.page import write_report
    from rmoe.results.analysis import write_analysis
    from rmoe.results.engine_traces import Given

    require_writable(out)
    if any((out / file).is_file() for file in _OF_OTHERS):
        raise RequestError("--out", str(out), "a new folder, or one of an earlier analysis")
    set_up(plugin)
    if trace is not None:
        chosen = OF_CHOICES if measures in (None, "all") else names(measures)
        analysis = analyze_trace_file(trace, model, Given(experts, experts_per_token), chosen)
    else:
        if model is None:
            raise RequestError("MODEL", None, "a model folder, or --trace FILE")
        every = DEFAULT_MEASURES if measures is None else tuple(MEASURES)
        chosen = every if measures in (None, "all") else names(measures)
        options = replace(options, measures=chosen)
        for option, value, readers in (
            ("--gradient-tokens", options.gradient_tokens, ("gradients", "balance")),
            ("--explored-tokens", options.explored_tokens, ("tokens",)),
        ):
            if option in GIVEN.get() and value and not {*readers} & {*chosen}:
                raise RequestError(option, value, f"unset unless --measures has {' or '.join(readers)}")
        streaming = Streaming(
            out / "stream",
            stream,
            hidden_states,
            lambda progress: print(one_line(str(progress)), file=sys.stderr),
        )
        models = [model] if compare_with is None else [model, compare_with]
        analysis = analyze_folders(models, text, device, options, streaming, _DTYPES[dtype])
    for note in analysis.notes:
        print(one_line(note))
    for model_analysis in analysis.models:
        if model_analysis.check is not None:
            print(one_line(f"{model_analysis.name}: reading {model_analysis.check.summary}"))
    out.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        (out / "stream").rmdir()
    write_analysis(out / "analysis.json", analysis)
    page = write_report(out / "report", None, analysis, single_file)
    print(
        one_line(f"{out / 'analysis.json'}, {page}: {analysis.text.tokens:,} tokens of {analysis.text.name}")
    )
