"""`rmoe graft`: a recurrent router onto a pretrained MoE, and off again."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from rmoe.cli.arguments import require_unset
from rmoe.cli.models import Plugins
from rmoe.errors import one_line


def run(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    *,
    out: Path,
    router: str = "rmoe",
    width: int | None = None,
    pure: bool = False,
    seed: int = 0,
    full: bool = False,
    base: str | None = None,
    upcycle: bool = False,
    experts: int = 8,
    top_k: int = 2,
    undo: bool = False,
    keep_trained: bool = False,
    plugin: Plugins = (),
    json: bool = False,
) -> None:
    """Put a recurrent router onto a pretrained MoE, or an MoE in the place of a dense model, function unchanged.

    A graft is an adapter: OUT has the graft's own tensors and points to MODEL, which has to stay.

    Args:
        model: a model folder in safetensors, the folder of a finished run, or hf:NAME of the Hugging Face Hub; with
            --undo or --base, a grafted one.
        out: the folder to write, new or empty.
        router: a row of `rmoe zoo`; its recurrence is taken, the family's own gate scores.
        width: p, width of the router state; default the row's.
        pure: the gate reads the state alone. For training from scratch: this does change the function.
        seed: of the projectors' and the cell's initial values.
        full: write a standalone folder, with a copy of MODEL's weights.
        base: where the base of MODEL, an adapter, is now: a folder, or hf:NAME of the Hugging Face Hub. Writes an
            adapter that finds it there, or with --undo the base.
        upcycle: MODEL is dense (Llama, Mistral, Qwen2): make an RMoE model of it whose experts are copies of its MLPs.
        experts: with --upcycle, experts of each layer.
        top_k: with --upcycle, experts for each token.
        undo: write the model that MODEL was grafted from, and check that it is that, bit for bit.
        keep_trained: with --undo, the base as training has changed it.
        json: print JSON.
    """
    given = locals()
    for unread, options, where in (
        (not upcycle, ("experts", "top_k"), "without --upcycle"),
        (not undo, ("keep_trained",), "without --undo"),
        (upcycle, ("undo", "base", "width", "pure", "full"), "with --upcycle"),
        (undo, ("router", "width", "pure", "seed", "full"), "with --undo"),
        (base is not None, ("router", "width", "pure", "seed", "full"), "with --base"),
    ):
        if unread:
            require_unset(run, given, options, where)

    from rmoe.cli.models import set_up
    from rmoe.graft import GraftSpec, graft_folder, move_adapter, undo_folder, upcycle_folder
    from rmoe.places import model_folder, require_writable

    require_writable(out)
    set_up(plugin)
    model = model_folder(model)
    if upcycle:
        made = upcycle_folder(model, out, router, num_experts=experts, top_k=top_k, seed=seed)
        size = sum(p.numel() for p in made.parameters())
        said = f"{out}: rmoe, {experts} experts, {top_k} for each token, {size:,} parameters"
        print(jsonlib.dumps({"model_type": "rmoe", "parameters": size}) if json else said)
        return

    if undo:
        undone = undo_folder(model, out, keep_trained=keep_trained, base=base)
        checked = {True: "bit for bit the original", False: "base trained since", None: "original not known"}
        said = f"{out}: {undone.model_type}, {undone.removed_tensors} tensors removed, {checked[undone.verified]}"
        print(jsonlib.dumps(asdict(undone)) if json else one_line(said))
        return
    if base is not None:
        place = move_adapter(model, out, base)
        found = place.path or place.hub
        print(jsonlib.dumps({"base": found}) if json else one_line(f"{out}: an adapter of {found}"))
        return
    spec = GraftSpec.from_router(router, width=width, pure=pure, seed=seed)
    report = graft_folder(model, out, spec, full=full)
    said = (
        f"{out}: {report.model_type}, {len(report.gates)} gates, {report.added_parameters:,} parameters added"
    )
    print(jsonlib.dumps(asdict(report)) if json else one_line(said))
