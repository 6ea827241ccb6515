"""`rmoe analyze`: measure the routing of a model, ours or any Hugging Face MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from rmoe.cli.models import Plugins, set_up
from rmoe.errors import one_line


def run(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    *,
    out: Path,
    data: str | None = None,
    compare_with: str | None = None,
    tokens: int = 131_072,
    sequence_length: int | None = None,
    split: Literal["whole", "train", "valid", "test"] | None = None,
    batch_size: int = 8,
    gradient_tokens: int = 4096,
    explored_tokens: int = 256,
    device: str | None = None,
    check: bool = True,
    single_file: bool = False,
    plugin: Plugins = (),
) -> None:
    """Measure the routing of a model, ours or any Hugging Face MoE.

    Args:
        model: a model folder, a run folder, or hf:NAME of the Hugging Face Hub.
        out: where analysis.json and report/index.html are written.
        data: a text, as for training; default the test split of the Python standard library's source.
        compare_with: a second model, shown beside the first; with equal tokenizer, layers and experts also how
            much of each token's routing the two share.
        tokens: at most so many tokens of the text, from its start.
        sequence_length: tokens per block; default 512, or the model's longest if that is less.
        split: which part of the text; default all of it.
        batch_size: blocks per forward pass.
        gradient_tokens: tokens for the router's gradient split; 0 leaves it out.
        explored_tokens: tokens kept for the token explorer.
        device: as torch names it; default a GPU if there is one.
        check: first silence a few experts of each layer, one at a time, on 128 tokens, and see that exactly the tokens
            said to use them change; a model that is read wrongly is refused.
        single_file: put the plotting library inside the page, so that it can be sent alone.
        plugin: modules or files (`my_router.py`) that register the routers of MODEL.
    """
    from rmoe.analysis.analyze import AnalysisOptions
    from rmoe.analysis.command import analyze_folders
    from rmoe.places import require_writable
    from rmoe.report.page import write_report
    from rmoe.results.analysis import write_analysis

    require_writable(out)
    set_up(plugin)
    options = AnalysisOptions(batch_size, gradient_tokens, explored_tokens, check)
    models = [model] if compare_with is None else [model, compare_with]
    analysis = analyze_folders(models, data, split, tokens, sequence_length, device, options)
    for note in analysis.notes:
        print(one_line(note))
    for model_analysis in analysis.models:
        if model_analysis.check is not None:
            print(one_line(f"{model_analysis.name}: reading {model_analysis.check.summary}"))
    out.mkdir(parents=True, exist_ok=True)
    write_analysis(out / "analysis.json", analysis)
    page = write_report(out / "report", None, analysis, single_file)
    print(
        one_line(f"{out / 'analysis.json'}, {page}: {analysis.text.tokens:,} tokens of {analysis.text.name}")
    )
