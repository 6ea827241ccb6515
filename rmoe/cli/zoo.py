"""`rmoe zoo`: every named router. Imports torch only to measure costs for `--markdown`."""

from __future__ import annotations

import json as jsonlib
from dataclasses import replace
from typing import Any

from rmoe.errors import RequestError
from rmoe.routing import describe
from rmoe.routing.zoo import ZOO, ZooRow


def run(*, json: bool = False, markdown: bool = False) -> None:
    """List every named router: its stages, where it comes from, what it carries from layer to layer.

    Args:
        json: print one JSON object, name -> summary, source, stages, what it carries and needs, and its spec.
        markdown: print the table of docs/zoo.md, with parameters, FLOPs and the initial scale of the logits at the
            paper's medium size.
    """
    if json and markdown:
        raise RequestError("--json", True, "without --markdown")
    if json:
        print(jsonlib.dumps({name: _described(row) for name, row in ZOO.items()}, indent=2))
    elif markdown:
        print(_markdown())
    else:
        width = max(map(len, ZOO))
        for name, row in ZOO.items():
            carried = describe.carries(row.spec)
            carry = "" if carried == "-" else f"; carries {carried}"
            print(f"{name:<{width}}  {row.summary} [{row.source}]\n{'':<{width}}  {_stages(row)}{carry}")


def _stages(row: ZooRow) -> str:
    return " > ".join(describe.stages(row.spec).values())


def _described(row: ZooRow) -> dict[str, Any]:
    return {
        "summary": row.summary,
        "source": row.source,
        "stages": describe.stages(row.spec),
        "equation": describe.equation(row.spec),
        "balance": describe.balance(row.spec),
        "carries": describe.carries(row.spec),
        "needs": describe.needs(row),
        "spec": row.spec.to_dict(),
    }


def _markdown() -> str:
    from rmoe.model.logit_scale import initial_logit_std
    from rmoe.routing.cost import MEDIUM, router_cost

    lines = [
        "# The zoo",
        "",
        "Made by `rmoe zoo --markdown`; a test compares this file with the code. Parameters and FLOPs are those of all",
        f"routers of the medium model ({MEDIUM.num_layers} layers, d = {MEDIUM.hidden_size}, {MEDIUM.num_experts} "
        f"experts, top-{MEDIUM.top_k} or the row's own k, vocabulary {MEDIUM.vocab_size}), frozen parameters",
        "included; FLOPs are two per multiply-add of a forward pass, counted on real calls. The initial logit std",
        "is that of the raw logits over experts before training, on inputs of unit scale: rows that differ in it are",
        "compared fairly only with `rmoe compare --match-logits`.",
        "How to add a row: [add-a-router.md](add-a-router.md).",
        "",
        "| name | what sets it apart | stages | equation | balance | source "
        "| parameters | FLOPs / token | initial logit std | carries | needs |",
        "|---|---|---|---|---|---|---:|---:|---:|---|---|",
    ]
    for name, row in ZOO.items():
        geometry = replace(MEDIUM, top_k=row.top_k or MEDIUM.top_k)
        cost, scale = router_cost(row.spec, geometry), initial_logit_std(row.spec, geometry)
        cells = [
            f"`{name}`",
            row.summary,
            _stages(row),
            f"`{describe.equation(row.spec)}`",
            describe.balance(row.spec),
            row.source,
            f"{cost.parameters:,}",
            f"{cost.flops_per_token:,}",
            "-" if scale is None else f"{scale:.2g}",
            describe.carries(row.spec),
            describe.needs(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
