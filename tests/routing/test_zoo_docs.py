"""The zoo's table in docs is what the code says, and a router from outside the package obeys the contract."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from experiments.zoo_page.ideas import IDEAS, OPTIONS, WITHOUT
from experiments.zoo_page.page import PAGE, markdown
from experiments.zoo_page.shipped import WITHOUT_ROW, rows_of_classes
from experiments.zoo_page.table import measured
from rmoe.cli.main import main
from rmoe.cli.zoo import TABLE
from rmoe.errors import RequestError
from rmoe.model import RMoEConfig
from rmoe.routing import ZOO, ZooRow, register, resolve

ROOT = Path(__file__).parents[2]


def test_table_is_current() -> None:
    """`python -m experiments.zoo_page` mends both files. What they say is checked below, not here."""
    found = measured()
    found["routers"] = {n: row for n, row in found["routers"].items() if not n.startswith("distance")}
    assert json.loads(json.dumps(found)) == json.loads(TABLE.read_text())
    assert markdown(found) + "\n" == PAGE.read_text()


def tables(header: str) -> list[list[str]]:
    """The cells of all tables of docs/zoo.md with this first column, without their headers."""
    found, inside = [], False
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == header:
            inside = True
        elif inside and not line.startswith("|---"):
            found.append(cells)
    return found


COLUMNS = ("what sets it apart", "source", "parameters", "FLOPs / token", "initial logit std", "needs")


def table() -> dict[str, dict[str, str]]:
    """docs/zoo.md: name -> column -> text."""
    return {row[0].strip("`"): dict(zip(COLUMNS, row[1:], strict=True)) for row in tables("name")}


def packaged() -> dict[str, dict]:
    """The table that `rmoe zoo` prints from: name -> what it says."""
    return json.loads(TABLE.read_text())["routers"]


def test_table_has_every_row_and_its_source() -> None:
    rows = table()
    assert sorted(rows) == sorted(name for name in ZOO if not name.startswith("distance"))
    assert len(tables("name")) == len(rows), "a row is in two families"
    for name, row in rows.items():
        assert (row["what sets it apart"], row["source"]) == (ZOO[name].summary, ZOO[name].source)


def test_every_idea_has_rows_and_names_only_rows() -> None:
    named = [name for idea in IDEAS for name in idea.names.split()]
    assert len(named) == len(set(named))
    assert set(named) <= ZOO.keys()
    assert {row["idea"] for row in packaged().values()} == {idea.title for idea in IDEAS}


def test_the_families_of_transformers_are_in_the_page() -> None:
    shown = {f"{family}.{name}": rows for family, name, rows, *_ in tables("family")}
    assert shown.keys() == rows_of_classes().keys() | WITHOUT_ROW.keys()
    for name, rows in rows_of_classes().items():
        assert shown[name] == ", ".join(f"`{row}`" for row in rows)


def test_options_and_what_has_no_row_are_in_the_page() -> None:
    fields = {name for each in OPTIONS for name in each.setting.partition(":")[0].split(", ")}
    assert fields <= {field.name for field in dataclasses.fields(RMoEConfig)}
    assert [row[0].strip("`") for row in tables("setting")] == [each.setting for each in OPTIONS]
    assert [row[0] for row in tables("mechanism")] == [each.name for each in WITHOUT]
    assert all(len(row) == 3 and all(row) for row in tables("mechanism"))


def test_a_card_has_the_equation_and_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "longcat"]) == 0
    said = capsys.readouterr().out
    assert "f = x; s = G f; 4 experts are x; g = top_k(softmax(s))" in said
    assert "linear > top_k(renormalize=False, scale=6.0) > staged(identity_experts=4)" in said


@pytest.mark.parametrize("name", sorted(ZOO))
def test_options_in_the_table_are_those_that_differ(name: str) -> None:
    """From the specs' JSON: each option that is not its mechanism's default, and nothing else."""
    spec = resolve(name).to_dict()
    wanted = []
    for stage in ("recurrence", "scorer", "temperature", "gate", "router"):
        data = spec[stage]
        if data is None or data["kind"] == "none":
            continue
        default = getattr(resolve(name), stage).from_dict({"kind": data["kind"]}).to_dict()
        options = {k: v for k, v in data.items() if v != default[k]}
        kind = data["kind"]
        if stage == "recurrence" and "cell" in data:
            kind = data["cell"]
            options = {"p": data["width"]} | {k: v for k, v in options.items() if k not in ("cell", "width")}
            if kind == "identity":
                options.pop("carry")  # it can carry nothing
        if kind in ("staged", "temperature") and not options:
            continue
        shown = ", ".join(f"{k}={v}" for k, v in options.items())
        wanted.append(f"{kind}({shown})" if shown else kind)
    assert " > ".join(packaged()[name]["stages"].values()) == " > ".join(wanted)


# By hand, from the papers: L = 8 layers, d = 352, E = 16, k = 2 (or the row's own), V = 256, p = 128.
L, D, E, V, P = 8, 352, 16, 256, 128
GRU = 6 * P * P
COSTS = {  # name: parameters, multiply-adds per token
    "smoe": (L * E * D, L * E * D),
    "smoe-mlp": (L * (D * 256 + 256 + 256 * E), L * (D * 256 + 256 * E)),
    "cosine-moe": (L * (E * D + 1), L * E * D),
    "xmoe": (L * (16 * D + 16 * E + 1), L * (16 * D + 16 * E)),
    "hyper-moe": (L * (D + 256 * D + 256 + 257 * E * (D + 1)), L * E * D),  # the generated router only
    "rmoe": (L * (D * P + P * E) + GRU + 6 * P, L * (D * P + GRU + P * E)),
    "rmoe-np": (L * (D * P + P * E) + GRU + 6 * P, L * (D * P + GRU + P * E)),
    "rmoe-sproj": (D * P + L * P * E + GRU + 6 * P, L * (D * P + GRU + P * E)),
    "rmoe-lstm": (L * (D * P + P * E) + 8 * P * P + 8 * P, L * (D * P + 8 * P * P + P * E)),
    "rmoe-residual": (L * (D * P + (D + P) * E) + GRU + 6 * P, L * (D * P + GRU + (D + P) * E)),
    "low-rank-norm": (L * (D * P + P + P * E), L * (D * P + P * E)),
    "noisy-topk": (2 * L * E * D, L * E * D),  # the noise map is for training
    "random-smoe": (L * E * D, L * E * D),
    "eda": (
        L * (D * 256 + 256 + 256 + 2 * (256 * 256 + 256) + 256 * (E + 1)) + (L - 1) * 256,
        L * (D * 256 + 2 * 256 * 256 + 256 * (E + 1)),
    ),
    "path-moe": (L // 2 * E * D, L * E * D),
    "omni-router": (E * D, L * E * D),
    "gpt-oss": (L * (E * D + E), L * E * D),
    "dynmoe": (L * (E * D + E + 1), L * E * D),  # thresholds and a temperature
    "blockffn": (L * (E * D + E), L * E * D),  # the norm's factors
    "gemma-4": (L * (E * D + D + E), L * E * D),
    "doge": (L * 8 * D, L * 8 * D),  # 4 + 4 keys
    "longcat": (L * (E + 4) * D, L * (E + 4) * D),
    "moepp-experts": (L * ((E + 4) * D + 2 * 2 * D + 2 * D), L * ((E + 4) * D + 2 * 2 * D + 2 * D)),
    "inkling": (L * ((E + 2) * D + 1), L * (E + 2) * D),
    "deepseek-v4-table": (L * E * D, L * E * D),
    "hash": (0, 0),
    "stable-moe": (L * (E * D + V * 50 + 50 * E), L * (E * D + 50 * E)),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_from_the_sizes(name: str) -> None:
    parameters, products = COSTS[name]
    row = table()[name]
    assert (row["parameters"], row["FLOPs / token"]) == (f"{parameters:,}", f"{2 * products:,}")


SAID = {  # name: equation, balance, carries, needs
    "smoe": ("f = x; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "-", "-"),
    "smoe-topk-softmax": ("f = x; s = G f; g = softmax(top_k(s))", "load_balance", "-", "-"),
    "smoe-mlp-mi": (
        "f = x; s = G GELU(W f + b); g = top_k(softmax(s))", "mutual_information", "-", "noise in training",
    ),
    "cosine-moe": ("f = x; s = cos(f, e) / t; g = top_k(softmax(s)) / sum", "load_balance", "-", "-"),
    "xmoe": ("f = x; s = cos(W f, e) / t; g = top_k(softmax(s)) / sum", "load_balance", "-", "-"),
    "xmoe-reference": ("f = x; s = W f . unit(e) / t; g = top_k(softmax(s)) / sum", "load_balance", "-", "-"),
    "rmoe": ("h = GRU(P x, h); f = h; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "h [128]", "-"),
    "rmoe-np": ("h = GRU(P x, 0); f = h; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "-", "-"),
    "rmoe-detach": (
        "h = GRU(P x, h); f = h; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "h [128] (detached)", "-",
    ),
    "rmoe-np-r0.5": (
        "h = GRU(P x, 0); f = h; s = G f; s_i = G_i f_i + a G_{i-1} f_{i-1}; g = top_k(softmax(s)) / sum",
        "load_balance", "scores [E]", "-",
    ),
    "rmoe-lstm": ("h = LSTM(P x, h); f = h; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "h, c [128]", "-"),
    "rmoe-norm": (
        "h = GRU(P x, h); f = norm(h); s = G f; g = top_k(softmax(s)) / sum", "load_balance", "h [128]", "-",
    ),
    "rmoe-residual": (
        "h = GRU(P x, h); f = [x; h]; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "h [128]", "-",
    ),
    "low-rank": ("h = P x; f = h; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "-", "-"),
    "smoe-entropy": (
        "f = x; s = G f; s / T; g = top_k(softmax(s)) / sum", "load_balance", "-", "update after each step",
    ),
    "smoe-annealed": (
        "f = x; s = G f; s / T; g = top_k(softmax(s)) / sum", "load_balance", "-", "update after each step",
    ),
    "switch": (
        "f = x; s = G f; g = top_k(softmax(s))", "load_balance, capacity 1.25", "-", "k = 1, tokens of a call compete, noise in training",
    ),
    "hash": ("n = table[token]", "-", "-", "token ids"),
    "stable-moe": (
        "y = a E(x) + (1 - a) x, a = sig(x . c)", "-", "-", "k = 1, token ids, update after each step",
    ),
    "smoe-dropout": ("f = x; s = G f; g = top_k(softmax(s)) / sum", "-", "-", "update after each step"),
    "expert-choice": (
        "f = x; s = G f; g = top_C over tokens of softmax(s)", "-", "-", "whole batch: cannot generate",
    ),
    "remoe": ("f = x; s = G f; g = ReLU(s)", "-", "-", "update after each step"),
    "dynmoe": (
        "f = x; s = cos(f, e) / t; g = 1/k where sig(s) > sig(b), b learned", "diverse_simple", "-", "-",
    ),
    "blockffn": (
        "f = x; s = G f; g = norm(ReLU(s))", "activation_locality, chunk_sparsity", "-", "-",
    ),
    "deepseek-v3": (
        "f = x; s = G f; g = top_k(sig(s)) / sum", "sequence_balance, bias 0.001", "-", "update after each step",
    ),
    "deepseek-v3-groups": (
        "f = x; s = G f; g = top_k(sig(s)) in the top 2 groups / sum", "sequence_balance, bias 0.001", "-",
        "update after each step",
    ),
    "eda": (
        "h = P x + a * h; f = h; s = MLP(norm(f)); g = top_k(softmax(s))", "bias 0.001", "h [256]",
        "update after each step",
    ),
    "path-moe": (
        "f = x; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "nothing; weights shared by 2 layers", "-",
    ),
    "omni-router": (
        "f = x; s = G f; g = top_k(softmax(s)) / sum", "load_balance", "nothing; weights shared by all layers", "-",
    ),
    "gpt-oss": ("f = x; s = G f + b; g = softmax(top_k(s))", "load_balance", "-", "-"),
    "gemma-4": (
        "f = x; s = G (norm(f) * c / sqrt(d)); g = a_n top_k(softmax(s)) / sum", "load_balance", "-", "-",
    ),
    "deepseek-v4-table": (
        "f = x; s = G f; n = table[token] in the first layers; g = top_k(sqrt(softplus(s))) / sum",
        "sequence_balance, bias 0.001", "-", "token ids, update after each step",
    ),
    "inkling": (
        "f = x; s = G f; [g, g_shared] = 8 a softmax(log sig([s_chosen, s_shared])); g = top_k(sig(s))",
        "bias 0.001", "-", "update after each step",
    ),
    "moge": ("f = x; s = G f; g = a_n top_k(softmax(s)), k / 2 of each group", "load_balance", "-", "k = 2"),
    "dbrx": ("f = x; s = G f; g = top_k(softmax(s)) / 2-norm", "load_balance", "-", "-"),
    "smoe-global": ("f = x; s = G f; g = top_k(softmax(s)) / sum", "load_balance, global batch", "-", "-"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_the_table_says(name: str) -> None:
    row = packaged()[name]
    assert (row["equation"], row["balance"], row["carries"], row["needs"]) == SAID[name]


def test_json_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows.keys() == ZOO.keys()
    assert {"summary", "source", "stages", "equation", "balance", "carries", "needs", "spec"} <= rows[
        "rmoe"
    ].keys()


@pytest.fixture
def plugin() -> None:
    path = ROOT / "examples" / "distance_router.py"
    spec = importlib.util.spec_from_file_location("distance_router", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["distance_router"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)


@pytest.mark.usefixtures("plugin")
def test_outside_router_trains(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.model.small import model, tokens

    for name in ("distance", "distance-rmoe"):
        net = model(router=name)
        net(tokens(), labels=tokens()).loss.backward()
        centres = net.routers[0].scorer.centres
        assert (centres.grad != 0).any()
        assert torch.isfinite(centres.grad).all()
    for name in ("distance", "distance-rmoe"):
        del ZOO[name]


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a,b", "a b", "a\n", "", "a\\b"])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="allowed: a name of letters, digits"):
        register(name, ZOO["smoe"])
    assert name not in ZOO


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(RequestError, match="router is 'smoe'; allowed: a name that is not taken"):
        register("smoe", ZooRow(resolve("rmoe"), "x", "y"))
