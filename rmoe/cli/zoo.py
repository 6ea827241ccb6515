"""`rmoe zoo`: every named router, from the table that the package carries: no torch, and an answer at once.

`python -m rmoe.cli.zoo` makes the table anew, and docs/zoo.md from it; a test compares both with the code.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from rmoe.errors import RequestError
from rmoe.records import atomic_write

TABLE = Path(__file__).parents[1] / "routing" / "zoo.json"
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def run(name: tyro.conf.Positional[str] = "", *, json: bool = False, markdown: bool = False) -> None:
    """List every named router: its stages, where it comes from, what it carries from layer to layer.

    Args:
        name: of one router: prints its card, with what the probes measured of it.
        json: print one JSON object, name -> summary, source, stages, what it carries and needs, its cost at the paper's
            medium size, and its spec.
        markdown: print the table of docs/zoo.md, with parameters, FLOPs and the initial scale of the logits at the
            paper's medium size.
    """
    if json and markdown:
        raise RequestError("--json", True, "without --markdown")
    if name and (json or markdown):
        raise RequestError("--json" if json else "--markdown", True, "without a router's name")
    table = jsonlib.loads(TABLE.read_text(encoding="utf-8"))
    if name:
        print(_card(name, table))
    elif json:
        print(jsonlib.dumps(table["routers"], indent=2))
    elif markdown:
        print(_markdown(table))
    else:
        width = max(map(len, table["routers"]))
        for name, row in table["routers"].items():
            carry = "" if row["carries"] == "-" else f"; carries {row['carries']}"
            print(
                f"{name:<{width}}  {row['summary']} [{row['source']}]\n{'':<{width}}  {_stages(row)}{carry}"
            )


def measured() -> dict[str, Any]:
    """The table as the code has it: every row described, built and measured at the paper's medium size."""
    from rmoe.model.logit_scale import initial_logit_std
    from rmoe.routing import describe, ideas, shipped
    from rmoe.routing.cost import MEDIUM, router_cost
    from rmoe.routing.zoo import ZOO

    rows = {}
    for name, row in ZOO.items():
        geometry = replace(MEDIUM, top_k=row.top_k or MEDIUM.top_k)
        cost, scale = router_cost(row.spec, geometry), initial_logit_std(row.spec, geometry)
        rows[name] = describe.row(row) | {
            "idea": ideas.of(name, row).title,
            "parameters": cost.parameters,
            "flops_per_token": cost.flops_per_token,
            "initial_logit_std": None if scale is None else float(f"{scale:.2g}"),
        }
    sizes = ("num_layers", "hidden_size", "num_experts", "top_k", "vocab_size")
    return {
        "sizes": {name: getattr(MEDIUM, name) for name in sizes},
        "ideas": {idea.title: idea.text for idea in ideas.IDEAS},
        "routers": rows,
        "options": [option._asdict() for option in ideas.OPTIONS],
        "without": [mechanism._asdict() for mechanism in ideas.WITHOUT],
        "transformers": {"release": shipped.RELEASE, "classes": shipped.table()},
    }


def _card(name: str, table: dict[str, Any]) -> str:
    """What a router is and, where the package carries its probe results, what it can do."""
    if name not in table["routers"]:
        raise RequestError("router", name, f"one of {', '.join(table['routers'])}")
    row = table["routers"][name]
    facts = {"": f"{row['summary']} [{row['source']}]", "stages": _stages(row)}
    facts |= {label: row[label] for label in ("equation", "balance", "carries", "needs")}
    lines = [
        name,
        *(f"  {label:<9} {value}".rstrip() if label else f"  {value}" for label, value in facts.items()),
    ]

    from rmoe.report.probes import cards  # scipy: not for the list

    carried = cards.packaged()
    measured = cards.text(carried, name) if carried is not None else None
    return "\n".join([*lines, "", measured or f"no probe results: rmoe probe --routers {name} makes them"])


def _stages(row: dict[str, Any]) -> str:
    return " > ".join(row["stages"].values())


def _markdown(table: dict[str, Any]) -> str:
    sizes = table["sizes"]
    lines = [
        "# The zoo",
        "",
        f"{len(table['routers'])} routers by family of idea. `rmoe zoo NAME` prints a row's equation, stages, balance",
        "and state, and what the probes measured of it. How to add a row: [add-a-router.md](add-a-router.md).",
        "",
        "Made by `python -m rmoe.cli.zoo`; a test compares this file with the code. Parameters and FLOPs are those of",
        f"all routers of the medium model ({sizes['num_layers']} layers, d = {sizes['hidden_size']}, "
        f"{sizes['num_experts']} experts, top-{sizes['top_k']} or the row's own k, vocabulary {sizes['vocab_size']}),",
        "frozen parameters included; FLOPs are two per multiply-add of a forward pass, counted on real calls. The",
        "initial logit std is that of the raw logits over experts before training, on inputs of unit scale: rows that",
        "differ in it are compared fairly only with `rmoe compare --match-logits`.",
    ]
    for title, text in table["ideas"].items():
        rows = {name: row for name, row in table["routers"].items() if row["idea"] == title}
        lines += ["", f"## {title}", "", text, "", *_rows(rows)]
    lines += ["", *_options(table["options"]), "", *_without(table["without"])]
    return "\n".join([*lines, "", *_families(table["transformers"])])


def _rows(rows: dict[str, Any]) -> list[str]:
    """The table of one family of ideas."""
    lines = [
        "| name | what sets it apart | source | parameters | FLOPs / token | initial logit std | needs |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        scale = row["initial_logit_std"]
        cost = (
            f"{row['parameters']:,} | {row['flops_per_token']:,} | {'-' if scale is None else f'{scale:.2g}'}"
        )
        lines.append(f"| `{name}` | {row['summary']} | {row['source']} | {cost} | {row['needs']} |")
    return lines


def _options(options: list[dict[str, str]]) -> list[str]:
    """The table of what a model can have beside its router."""
    lines = [
        "## Options of the model",
        "",
        "Beside a row: fields of `RMoEConfig`, and options of `rmoe train` with `--model.` in front. What dense",
        "gradients cost is in [performance.md](performance.md).",
        "",
        "| setting | what it does | source |",
        "|---|---|---|",
    ]
    return lines + [f"| `{each['setting']}` | {each['summary']} | {each['source']} |" for each in options]


def _without(mechanisms: list[dict[str, str]]) -> list[str]:
    """The table of published mechanisms that have no row."""
    lines = ["## Without a row", "", "| mechanism | source | why |", "|---|---|---|"]
    return lines + [f"| {each['name']} | {each['source']} | {each['why']} |" for each in mechanisms]


def _families(transformers: dict[str, Any]) -> list[str]:
    """The table of transformers' router classes."""
    lines = [
        "## The routers of transformers' models",
        "",
        f"Every class of transformers {transformers['release']} that routes tokens to experts, found in its source,",
        "and the row that it is. With the same random weights the row chooses the same experts, with weights equal bit",
        "for bit in float32 and gradients to 1e-6 (`tests/routing/test_shipped.py`). Where a family asks `topk` for no",
        "order, both sides take the order of the scores: how a sum rounds depends on it. A class with several rows is",
        "each of them at some of its options. A class without a row or a reason fails the test.",
        "",
        "| family | class | row | note |",
        "|---|---|---|---|",
    ]
    keys = ("family", "class", "rows", "note")
    return lines + [
        f"| {' | '.join(str(entry[key]) for key in keys)} |".replace("  ", " ")
        for entry in transformers["classes"]
    ]


if __name__ == "__main__":
    _table = measured()
    with atomic_write(TABLE) as _staged:
        _staged.write_text(jsonlib.dumps(_table, indent=1) + "\n", encoding="utf-8")
    with atomic_write(PAGE) as _staged:
        _staged.write_text(_markdown(_table) + "\n", encoding="utf-8")
