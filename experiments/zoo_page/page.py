"""The zoo's table as the page docs/zoo.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def markdown(table: dict[str, Any]) -> str:
    """The page, from the table that `rmoe zoo` prints from."""
    sizes = table["sizes"]
    lines = [
        "# The zoo",
        "",
        f"{len(table['routers'])} routers by family of idea. `rmoe zoo NAME` prints a row's equation, stages, balance",
        "and state, and what the probes measured of it. How to add a row: [add-a-router.md](add-a-router.md).",
        "",
        "Made by `python -m experiments.zoo_page`; a test compares this file with the code. Parameters and FLOPs are",
        f"those of all routers of the medium model ({sizes['num_layers']} layers, d = {sizes['hidden_size']}, "
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
