"""`rmoe zoo`: every named router. Imports torch only to measure costs for `--markdown`."""

from __future__ import annotations

import json as jsonlib
from dataclasses import replace
from typing import Any

import tyro

from rmoe.errors import RequestError
from rmoe.routing import describe
from rmoe.routing.zoo import ZOO, ZooRow, find


def run(name: tyro.conf.Positional[str] = "", *, json: bool = False, markdown: bool = False) -> None:
    """List every named router: its stages, where it comes from, what it carries from layer to layer.

    Args:
        name: of one router: prints its card, with what the probes measured of it.
        json: print one JSON object, name -> summary, source, stages, what it carries and needs, and its spec.
        markdown: print the table of docs/zoo.md, with parameters, FLOPs and the initial scale of the logits at the
            paper's medium size.
    """
    if json and markdown:
        raise RequestError("--json", True, "without --markdown")
    if name:
        if json or markdown:
            raise RequestError("--json" if json else "--markdown", True, "without a router's name")
        print(_card(name))
    elif json:
        print(jsonlib.dumps({name: _described(row) for name, row in ZOO.items()}, indent=2))
    elif markdown:
        print(_markdown())
    else:
        width = max(map(len, ZOO))
        for name, row in ZOO.items():
            carried = describe.carries(row.spec)
            carry = "" if carried == "-" else f"; carries {carried}"
            print(f"{name:<{width}}  {row.summary} [{row.source}]\n{'':<{width}}  {_stages(row)}{carry}")


def _card(name: str) -> str:
    """What a router is and, where the package carries its probe results, what it can do."""
    row = find(name)
    facts = {
        "": f"{row.summary} [{row.source}]",
        "stages": _stages(row),
        "equation": describe.equation(row.spec),
        "balance": describe.balance(row.spec),
        "carries": describe.carries(row.spec),
        "needs": describe.needs(row),
    }
    lines = [
        name,
        *(f"  {label:<9} {value}".rstrip() if label else f"  {value}" for label, value in facts.items()),
    ]

    from rmoe.report.probes import cards  # scipy: not for the list

    carried = cards.packaged()
    measured = cards.text(carried, name) if carried is not None else None
    return "\n".join([*lines, "", measured or f"no probe results: rmoe probe --routers {name} makes them"])


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
