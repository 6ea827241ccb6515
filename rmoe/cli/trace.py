"""`rmoe trace`: write down which experts a model sends each token to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from rmoe.analysis.options import TextOptions
from rmoe.cli.models import Plugins, set_up
from rmoe.errors import RequestError, one_line


def run(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    *,
    out: Path,
    text: Annotated[TextOptions, tyro.conf.arg(name="")] = TextOptions(),  # noqa: B008  frozen
    batch_size: int = 8,
    device: str | None = None,
    format: Literal["rmoe", "vllm"] = "rmoe",
    plugin: Plugins = (),
) -> None:
    """Write down which experts a model sends each token to.

    Args:
        model: a model folder, a run folder, or hf:NAME of the Hugging Face Hub.
        out: the file to write, `.safetensors` unless the format is vllm: expert ids [tokens, layers, k], token ids,
            and what they belong to.
        text: see `TextOptions`.
        batch_size: blocks per forward pass.
        device: as torch names it; default a GPU if there is one.
        format: rmoe, a safetensors file that `rmoe analyze --trace` reads; or vllm, JSON lines as vLLM's server
            returns them.
    """
    from rmoe.analysis.command import trace_folder
    from rmoe.places import require_writable
    from rmoe.results.engine_traces import write_vllm
    from rmoe.results.trace import write_trace

    if out.is_dir():
        raise RequestError("--out", str(out), "a file")
    if format == "rmoe" and out.suffix != ".safetensors":
        raise RequestError("--out", str(out), "a name that ends in .safetensors: analyze knows it by that")
    if batch_size < 1:
        raise RequestError("--batch-size", batch_size, "at least 1")
    require_writable(out.absolute().parent)
    set_up(plugin)
    trace = trace_folder(model, text, batch_size, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    if format == "vllm":
        write_vllm(out, trace)
    else:
        write_trace(out, trace)
    count, layers, slots = trace.experts.shape
    print(one_line(f"{out}: {count:,} tokens x {layers} layers x {slots} experts"))
