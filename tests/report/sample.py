"""A comparison and an analysis of invented models: every measure present, names and tokens hostile."""

from __future__ import annotations

import functools
import math

import numpy as np

from rmoe.compare.summary import summarise
from rmoe.results import analysis as schema
from rmoe.results.comparison import Summary
from rmoe.results.rows import ResultRow, Timing
from rmoe.results.run import Curve
from tests.compare.rows import changed, row

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>"
LAYERS, EXPERTS, CHOSEN = 6, 8, 2


def sample_rows(routers: tuple[str, ...] = ("smoe", "rmoe", "rmoe-np"), seeds: int = 3) -> list[ResultRow]:
    """Result rows with curves, whose figures are drawn from a fixed generator."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        common = 1.74 + rng.normal(0, 0.01)
        for index, router in enumerate(routers):
            final = common - 0.008 * index + rng.normal(0, 0.003)
            steps = list(range(0, 401, 20))
            noise = rng.normal(0, 0.004, len(steps)).tolist()
            curves = {
                "val": Curve(
                    unit="bits_per_byte",
                    step=steps,
                    value=[final + noise[s // 20] + 3.2 * math.exp(-s / 90) for s in steps],
                ),
                "aux_loss": Curve(unit="nats", step=steps, value=[0.012 - 1e-5 * s / 2 for s in steps]),
            }
            timing = Timing(seconds_per_1k_steps=88.0 + index, peak_mib=612.0 + index, steps=20, rounds=3)
            one = row(router, seed, final, test=final + 0.02, timing=timing if seed == 0 else None)
            rows.append(changed(one, curves=curves))
    return rows


def sample_summary(**more) -> Summary:
    return summarise(
        sample_rows(**more),
        preset="quick",
        baseline="smoe",
        descriptions={
            "smoe": "linear router",
            "rmoe": "GRU over layers",
            "rmoe-np": f"state not passed {HOSTILE}",
        },
        notes=[f"a note {HOSTILE}"],
    )


TEXT = (
    'def greet(name: str) -> None:\n    """Say hello."""\n    print(f"Hello, {name}!")\n\n\n'
    "class Router:\n\tpass\n" + "for layer in layers:\n    state = layer(hidden, state)\n" * 4
)


def sample_model(name: str, seed: int, sharp: float) -> schema.ModelAnalysis:
    rng = np.random.default_rng(seed)
    n = 20_000
    edges = np.linspace(0, math.log(EXPERTS), 41)
    entropies = [rng.beta(4 + layer, sharp, n) * math.log(EXPERTS) for layer in range(LAYERS)]
    mi = rng.uniform(0.02, 0.05, (LAYERS, LAYERS)) + 0.25 / (
        1 + np.abs(np.subtract.outer(np.arange(LAYERS), np.arange(LAYERS)))
    )
    mi = (mi + mi.T) / 2
    load = rng.dirichlet(np.full(EXPERTS, 20 / sharp), LAYERS)
    tokens = [*TEXT, HOSTILE, "\\xff", "é"]
    return schema.ModelAnalysis(
        **insights(np.random.default_rng(seed), LAYERS, EXPERTS, [HOSTILE, " ", "\n", "def", "é"], n),
        name=name,
        summary="an invented model",
        layers=LAYERS,
        experts=EXPERTS,
        experts_per_token=CHOSEN,
        layer_names=[f"model.layers.{i}.mlp" for i in range(LAYERS)],
        mi_digitised=schema.PairMeasure(values=(0.6 * mi).tolist(), chance=(0.1 * mi).tolist(), n=n),
        mi_chosen=schema.PairMeasure(values=mi.tolist(), n=n),
        entropy=schema.LayerHistogram(
            edges=edges.tolist(), counts=[np.histogram(e, edges)[0].tolist() for e in entropies], n=n
        ),
        entropy_mean=_measure([float(e.mean()) for e in entropies], n),
        inner_balance=_measure(rng.uniform(1.1, 3.0, LAYERS), n),
        outer_balance=_measure(rng.uniform(0.5, 0.9, LAYERS), n),
        frequency=load.tolist(),
        frequency_n=n,
        load_imbalance=_measure((load.max(1) * EXPERTS), n),
        drop_ratio=schema.DropRatio(
            capacity_factor=[1.0, 1.25, 1.5, 2.0],
            values=[[0.1 / f**3] * LAYERS for f in (1.0, 1.25, 1.5, 2.0)],
            overall=[0.1 / f**3 for f in (1.0, 1.25, 1.5, 2.0)],
            window_tokens=2048,
        ),
        similarity=schema.Similarity(
            values=rng.uniform(0.1, 0.2, LAYERS).tolist(), random_init=[0.02] * LAYERS
        ),
        router_weights=schema.RouterWeights(
            norm=rng.uniform(1, 2, LAYERS).tolist(), std=rng.uniform(0.02, 0.05, LAYERS).tolist()
        ),
        gradient_split=schema.GradientSplit(
            step=[100, 200, 400],
            language_model=rng.uniform(0.01, 0.02, (3, LAYERS)).tolist(),
            balance=rng.uniform(0.001, 0.002, (3, LAYERS)).tolist(),
            language_model_cut=rng.uniform(0.005, 0.01, (3, LAYERS)).tolist(),
            recurrent=rng.uniform(0.002, 0.004, (3, LAYERS)).tolist(),
            tokens=2048,
        ),
        coactivation=schema.Coactivation(
            within=None,
            across=rng.dirichlet(np.ones(EXPERTS**2), LAYERS - 1).reshape(-1, EXPERTS, EXPERTS).tolist(),
            n=n,
        ),
        paths=schema.Paths(
            top=[
                schema.ExpertPath(experts=rng.integers(0, EXPERTS, LAYERS).tolist(), share=0.02 / (r + 1))
                for r in range(20)
            ],
            distinct=4321,
            n=n,
        ),
        saturation=schema.Saturation(
            from_step=[100, 200], to_step=[200, 400], values=rng.uniform(0.5, 0.9, (2, LAYERS)).tolist(), n=n
        ),
        over_training=[
            schema.OverTraining(
                name="gate_entropy",
                unit="nats",
                definition="Mean gate entropy on validation text.",
                step=[100, 200, 400],
                values=rng.uniform(0.8, 1.6, (3, LAYERS)).tolist(),
            )
        ],
        tokens=[_token(text, rng) for text in tokens],
        top_tokens=[
            [
                [
                    schema.TopToken(text=t, count=100 - 9 * i, share=0.2 - 0.018 * i)
                    for i, t in enumerate([HOSTILE, " ", "\n", "e", "(", "\\xe2", "self", "=", "\t", "0"])
                ]
                for _ in range(EXPERTS)
            ]
            for _ in range(LAYERS)
        ],
    )


def large_model(
    layers: int = 48, experts: int = 128, chosen: int = 8, n: int = 30_000
) -> schema.ModelAnalysis:
    """A model of Qwen3-30B-A3B's shape with a random router: nothing is sparse, as hard to pack as it gets."""
    rng = np.random.default_rng(7)
    edges = np.linspace(0, math.log(experts), 101)
    entropies = rng.normal(np.linspace(3.2, 4.4, layers)[:, None], 0.1, (layers, n))
    mi = rng.uniform(0.01, 0.05, (layers, layers)) + np.eye(layers)
    mi = (mi + mi.T) / 2
    load = rng.dirichlet(np.full(experts, 5.0), layers)
    pairs = rng.poisson(load[:-1, :, None] * load[1:, None, :] * n * chosen**2) / n
    within = rng.poisson(load[:, :, None] * load[:, None, :] * n * chosen**2)
    within = (np.triu(within, 1) + np.triu(within, 1).transpose(0, 2, 1)) / n
    weights = -np.sort(-rng.dirichlet(np.ones(chosen), (256, layers)).astype(np.float32))
    choices = rng.permuted(np.tile(np.arange(experts), (256, layers, 1)), axis=-1)[..., :chosen]
    vocabulary = [f"t{i:03d}" for i in range(256)]
    counts = -np.sort(-rng.integers(5, 200, (layers, experts, 12)))
    totals = rng.integers(1500, 2300, (layers, experts))
    top = rng.permuted(np.tile(np.arange(256), (layers, experts, 1)), axis=-1)[..., :12]
    return schema.ModelAnalysis(
        **insights(rng, layers, experts, vocabulary, n),
        name="large",
        summary="an invented large model",
        layers=layers,
        experts=experts,
        experts_per_token=chosen,
        layer_names=[f"model.layers.{i}.mlp" for i in range(layers)],
        mi_digitised=schema.PairMeasure(values=(0.6 * mi).tolist(), chance=(0.1 * mi).tolist(), n=n),
        mi_chosen=schema.PairMeasure(values=mi.tolist(), n=n),
        entropy=schema.LayerHistogram(
            edges=edges.tolist(), counts=[np.histogram(e, edges)[0].tolist() for e in entropies], n=n
        ),
        entropy_mean=_measure(entropies.mean(1), n),
        inner_balance=_measure(rng.uniform(1.1, 3.0, layers), n),
        outer_balance=_measure(rng.uniform(0.5, 0.9, layers), n),
        frequency=load.tolist(),
        frequency_n=n,
        load_imbalance=_measure(load.max(1) * experts, n),
        drop_ratio=schema.DropRatio(
            capacity_factor=[1.0, 1.25, 1.5, 2.0],
            values=(
                0.1 / np.array([[1.0], [1.25], [1.5], [2.0]]) ** 3 * rng.uniform(0.5, 1.5, layers)
            ).tolist(),
            overall=[0.1 / f**3 for f in (1.0, 1.25, 1.5, 2.0)],
            window_tokens=4096,
        ),
        similarity=schema.Similarity(
            values=rng.uniform(0.1, 0.2, layers).tolist(), random_init=[0.02] * layers
        ),
        router_weights=schema.RouterWeights(
            norm=rng.uniform(1, 2, layers).tolist(), std=rng.uniform(0.02, 0.05, layers).tolist()
        ),
        gradient_split=schema.GradientSplit(
            step=[0],
            language_model=rng.uniform(0.01, 0.02, (1, layers)).tolist(),
            balance=rng.uniform(0.001, 0.002, (1, layers)).tolist(),
            language_model_cut=None,
            tokens=4096,
        ),
        coactivation=schema.Coactivation(within=within.tolist(), across=pairs.tolist(), n=n),
        paths=schema.Paths(
            top=[
                schema.ExpertPath(experts=rng.integers(0, experts, layers).tolist(), share=1 / n)
                for _ in range(20)
            ],
            distinct=n,
            n=n,
        ),
        tokens=[
            schema.Token(text=vocabulary[t], experts=choices[t].tolist(), weights=weights[t].tolist())
            for t in range(256)
        ],
        top_tokens=[
            [
                [
                    schema.TopToken(text=vocabulary[t], count=c, share=float(c / totals[layer, expert]))
                    for t, c in zip(top[layer, expert], counts[layer, expert].tolist(), strict=True)
                ]
                for expert in range(experts)
            ]
            for layer in range(layers)
        ],
    )


def insights(rng: np.random.Generator, layers: int, experts: int, words: list[str], n: int) -> dict:
    """Measures of load, prediction and place, of one model."""
    load = np.sort(rng.dirichlet(np.full(experts, 5.0), layers))[:, ::-1] * experts
    hottest = [m for m in (1, 2, 4, 8, 16, 32, 64, 128) if m <= experts]
    positions = rng.integers(0, n, (layers, experts, 8))
    positions[0, 0] = -1
    return {
        "load": schema.LoadSummary(
            quantiles=np.quantile(load, [0, 0.05, 0.5, 0.95, 1], axis=1).T.tolist(),
            dead=[0] * layers,
            max_violation=(load.max(1) - 1).tolist(),
            n=n,
        ),
        "coverage": schema.Coverage(
            hottest=hottest, values=[[float(row[:m].sum() / experts) for m in hottest] for row in load], n=n
        ),
        "contexts": schema.Contexts(
            vocabulary=words,
            text=rng.integers(0, len(words), n).tolist(),
            positions=positions.tolist(),
            weights=(-np.sort(-rng.uniform(0.1, 1, positions.shape))).astype(np.float32).tolist(),
        ),
        "flips": schema.Flips(
            other="in bf16", values=rng.uniform(0, 0.05, layers).tolist(), any_layer=0.3, n=n
        ),
        "predictability": schema.Predictability(
            own_router=rng.uniform(0.3, 0.8, layers - 1).tolist(),
            at_its_own_input=[None, *[1.0] * (layers - 2)],
            chance=[8 / experts] * (layers - 1),
            probe=rng.uniform(0.5, 0.9, layers - 1).tolist(),
            state_probe=[None] * (layers - 1),
            n=n,
        ),
        "balance": schema.BalanceAudit(
            model=1.1,
            switch=rng.uniform(1, 1.3, layers).tolist(),
            gradient=rng.uniform(0, 0.1, layers).tolist(),
            tokens=n,
        ),
        "contributions": schema.Contributions(
            sources=["embedding", *(f"layer {layer}" for layer in range(layers))],
            values=[
                [*rng.normal(0.1, 0.1, row + 2).tolist(), *[None] * (layers - row - 1)]
                for row in range(layers)
            ],
            state=[None, *rng.normal(0.2, 0.1, layers - 1).tolist()],
            advantage=rng.uniform(0.5, 1.5, layers).tolist(),
            n=n,
        ),
        "regret": schema.Regret(
            own=[None, *rng.normal(0.02, 0.01, layers - 1).tolist()],
            own_error=[None, *[0.01] * (layers - 1)],
            later=[None, *rng.normal(0, 0.01, layers - 1).tolist()],
            better=[None, *rng.uniform(0.3, 0.6, layers - 1).tolist()],
            exchanges=[0, *[64] * (layers - 1)],
        ),
        "saliency": [[None, *rng.uniform(0, 2, experts - 1).tolist()] for _ in range(layers)],
    }


def _measure(values, n: int) -> schema.LayerMeasure:
    return schema.LayerMeasure(values=[float(v) for v in values], overall=float(np.mean(values)), n=n)


def _token(text: str, rng: np.random.Generator) -> schema.Token:
    weights = np.sort(rng.dirichlet(np.ones(CHOSEN), LAYERS))[:, ::-1]
    experts = [rng.permutation(EXPERTS)[:CHOSEN].tolist() for _ in range(LAYERS)]
    return schema.Token(text=text, experts=experts, weights=weights.tolist())


def sample_analysis() -> schema.Analysis:
    return schema.Analysis(
        text=schema.TextInfo(name="some text", sha256="a" * 64, tokens=20_000),
        models=[sample_model("smoe", 1, 4.0), sample_model("rmoe", 2, 2.0), sample_model("rmoe-np", 3, 3.0)],
        notes=["Mutual information on 20,000 evenly spaced tokens."],
    )


@functools.cache
def large_analysis() -> schema.Analysis:
    text = schema.TextInfo(name="some text", sha256="a" * 64, tokens=30_000)
    return schema.Analysis(text=text, models=[large_model()])
