"""How layers work together: mutual information, co-activation, paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from rmoe.report.charts.chart import Chart, Selector, Style, axis, layer_axis, numbered_axis
from rmoe.report.charts.shared import Having, Line, Looks, heat_maps, layer_lines, line, token_count
from rmoe.results.analysis import (
    Coactivation,
    Contributions,
    Flips,
    Matrix,
    PairMeasure,
    Paths,
    Predictability,
    Regret,
)

SECTION = "Across layers"


def mi_digitised(having: Having[PairMeasure], looks: Looks) -> Iterator[Chart]:
    return _mutual_information(
        having,
        "mi-digitised",
        "Cross-layer mutual information, the paper's measure",
        "For each token, the two layers' gate probabilities are put into 100 equal bins on [0, 1], and the mutual "
        "information of the two bin sequences (one entry per expert) is taken; then the mean over tokens (Fig. 3). It "
        "rises with any likeness in the shape of the two distributions.",
    )


def mi_chosen(having: Having[PairMeasure], looks: Looks) -> Iterator[Chart]:
    return _mutual_information(
        having,
        "mi-chosen",
        "Cross-layer mutual information of the chosen experts",
        "Mutual information between the first-choice expert of one layer and that of another, over tokens, with the "
        "bias of finite samples taken off. What knowing one layer's choice tells of the other's.",
    )


def _mutual_information(having: Having[PairMeasure], id: str, title: str, definition: str) -> Iterator[Chart]:
    # The diagonal is a layer with itself, its entropy: it would flatten the scale of everything else.
    shown = [(m.name, _without_diagonal(pair.values)) for m, pair in having]
    by_chance = [(f"{m.name}, by chance", _without_diagonal(p.chance)) for m, p in having if p.chance]
    shown += by_chance
    off = [v for _, values in shown for row in values for v in row if v is not None]
    if not off:  # one layer: no pair
        return
    relabelled = " “By chance”: the same with each layer's experts relabelled at random." if by_chance else ""
    panels = heat_maps(
        shown,
        columns=min(len(having), 3) if len(having) > 1 else len(shown),  # by chance stands below, or beside
        across=layer_axis(max(len(values) for _, values in shown), constrain="domain"),
        colour={"cmin": min(0.0, *off), "cmax": max(off), "colorbar": {"title": {"text": "nats"}}},
        hover="layers %{y} and %{x}: %{z:.4f} nats",
    )
    yield Chart(
        id=id,
        section=SECTION,
        title=title,
        definition=f"{definition}{relabelled} The diagonal is left blank.",
        unit="nats",
        sample=token_count([pair.n for _, pair in having]),
        **panels.figure(),
    )


def _without_diagonal(values: Matrix) -> list[list[float | None]]:
    return [[None if a == b else value for b, value in enumerate(row)] for a, row in enumerate(values)]


def coactivation(having: Having[Coactivation], looks: Looks) -> Iterator[Chart]:
    """One pair of neighbouring layers of every model side by side; the reader chooses which."""
    percent = {
        m.name: [[[100 * v for v in row] for row in pair] for pair in c.across] for m, c in having if c.across
    }
    if not percent:
        return
    pairs = max(map(len, percent.values()))
    middle = (min(map(len, percent.values())) - 1) // 2  # of the shallowest, so that every model shows one
    experts = max(len(across[middle]) for across in percent.values())
    panels = heat_maps(
        [(name, across[middle]) for name, across in percent.items()],
        columns=3,
        across=numbered_axis("expert in the next layer", experts),
        down=numbered_axis("expert", experts, autorange="reversed"),
        colour={"cmin": 0, "colorbar": {"title": {"text": "%"}, "ticksuffix": "%"}},
        hover="expert %{y}, then %{x}: %{z:.3g}% of tokens",
    )
    yield Chart(
        id="coactivation",
        section=SECTION,
        title="Experts chosen one after the other",
        definition="Share of tokens sent to one expert in a layer and to another in the next. A few bright cells: "
        "experts of the two layers work in pairs. The CSV has every pair of neighbouring layers.",
        unit="% of tokens",
        sample=token_count([c.n for _, c in having if c.across]),
        choice=Selector(
            "layers",
            [f"layer {layer} to {layer + 1}" for layer in range(pairs)],
            middle,
            "z",
            list(percent.values()),
        ),
        **panels.figure(),
    )


def paths(having: Having[Paths], looks: Looks) -> Iterator[Chart]:
    having = [(m, paths) for m, paths in having if paths.top]
    if not having:
        return
    data = []
    for index, (m, paths) in enumerate(having):
        sums = list(accumulate(path.share for path in paths.top))
        drawn = line(m.name, range(1, len(sums) + 1), sums, looks[m.name], index)
        drawn["text"] = [_in_lines(path.experts) for path in paths.top]
        drawn["hovertemplate"] = "%{y:.1%} of tokens in the %{x} commonest paths, the last %{text}"
        data.append(drawn)
    distinct = "; ".join(
        f"{m.name} {'' if paths.is_exact else 'at least '}{paths.distinct:,}" for m, paths in having
    )
    yield Chart(
        id="paths",
        section=SECTION,
        title="Commonest expert paths",
        definition="A token's path is its first-choice expert in every layer. Share of tokens that take "
        f"one of the commonest paths. Distinct paths seen: {distinct}.",
        unit="share of tokens",
        sample=token_count([paths.n for _, paths in having]),
        data=data,
        layout={
            "xaxis": axis("number of commonest paths"),
            "yaxis": axis("share of tokens", tickformat=".2~p", rangemode="tozero"),
        },
    )


def _in_lines(path: Sequence[int], at_most: int = 16) -> str:
    """A path for a label, broken where it is long."""
    parts = [path[i : i + at_most] for i in range(0, len(path), at_most)]
    return "<br>→".join("→".join(map(str, part)) for part in parts)


def predictability(having: Having[Predictability], looks: Looks) -> Iterator[Chart]:
    """What one layer's input says of the next layer's choice."""
    lines = {
        "own_router": ("", "solid"),
        "at_its_own_input": (", at its own input", "dash"),
        "probe": (", linear probe", "dashdot"),
        "state_probe": (", linear probe of the state", "longdash"),
        "chance": (", by chance", "dot"),
    }
    data = []
    for index, (m, p) in enumerate(having):
        for field, (said, dash) in lines.items():
            values = getattr(p, field) or []
            if any(value is not None for value in values):
                look = Style(looks[m.name].colour, dash)
                data.append(line(f"{m.name}{said}", range(1, len(values) + 1), values, look, index))
    yield Chart(
        id="predictability",
        section=SECTION,
        title="How much of a layer's choice is known one layer earlier",
        definition="Recall of the chosen experts, when the layer's own router matrix reads the input of the router "
        "below: mean over tokens of |predicted and chosen| / k. At its own input: what the matrix alone can reach. "
        "Linear probes, fitted on the first half of the text and tested on the second, read the same input, or the "
        "recurrent state that the router below passes on.",
        unit="share of chosen experts",
        sample=token_count([p.n for _, p in having]),
        data=data,
        layout={
            "xaxis": layer_axis(max(len(p.chance) for _, p in having)),
            "yaxis": axis("recall", range=[0, 1.03]),
            "hovermode": "x unified",
        },
        height=420,
        wide=True,
    )


def contributions(having: Having[Contributions], looks: Looks) -> Iterator[Chart]:
    """A row for each routed layer: what speaks for the experts that it chooses."""
    most = max(len(c.sources) for _, c in having)  # the embedding, and the layers
    shown = [(m.name, _with_state(c, most)) for m, c in having]
    known = [v for _, rows in shown for row in rows for v in row if v is not None]
    step = max(1, most // 8)
    # Where not every layer is named, none beside the two words.
    layers = range(most - 1) if step == 1 else range(step, most - 1 - step // 2, step)
    places = [0, *(layer + 1 for layer in layers), most]
    names = ["emb", *map(str, layers), "state"]
    panels = heat_maps(
        shown,
        columns=2,
        across=axis("from", tickmode="array", tickvals=places, ticktext=names, range=[-0.5, most + 0.5]),
        colour={"cmin": min(0.0, *known), "cmax": max(known), "colorbar": {"title": {"text": "logits"}}},
        hover="layer %{y}, from %{x}: %{z:.3g}",
    )
    yield Chart(
        id="contributions",
        section=SECTION,
        title="What speaks for the chosen experts",
        definition="The mean logit of a token's chosen experts less the mean of all, split over what adds to it: "
        "the embedding (emb), each layer below (in a row's own column its attention), the recurrent state; the CSV "
        "numbers them from 0. Exact, with the norm's scale held fixed; blank where a router is not linear in the "
        "residual stream. For RMoE's own routers the state's part is what is lost with an empty state.",
        unit="logits",
        sample=token_count([c.n for _, c in having]),
        **panels.figure(),
    )


def _with_state(found: Contributions, width: int) -> list[list[float | None]]:
    """Rows of so many sources, and the state behind them."""
    return [
        [*row, *[None] * (width - len(row)), state]
        for row, state in zip(found.values, found.state, strict=True)
    ]


def flips(having: Having[Flips], looks: Looks) -> Iterator[Chart]:
    anywhere = "; ".join(f"{m.name} and {f.other} {f.any_layer:.2%}" for m, f in having)
    yield layer_lines(
        "flips",
        SECTION,
        "Flips: tokens routed otherwise by a second model",
        "Share of tokens whose set of chosen experts differs between the two models, or the two precisions. In at "
        f"least one layer: {anywhere}.",
        "share of tokens",
        token_count([f.n for _, f in having]),
        [(f"{m.name} and {f.other}", f.values, looks[m.name], {}) for m, f in having],
    )


def regret(having: Having[Regret], looks: Looks) -> Iterator[Chart]:
    series: list[Line] = []
    for m, r in having:
        bars = {"error_y": {"type": "data", "array": r.own_error, "thickness": 1}}
        series.append((m.name, r.own, looks[m.name], bars))
        series.append((f"{m.name}, later tokens", r.later, Style(looks[m.name].colour, "dot"), {}))
    yield layer_lines(
        "regret",
        SECTION,
        "What the next expert would have cost",
        "Mean change of the loss where one token's weakest chosen expert is exchanged for the most probable of the "
        "others and all other routes stay; for its own next token (bars: standard error), and summed over the "
        "later tokens of its block. Above 0: the choice was right.",
        "nats",
        f"{max(max(r.exchanges) for _, r in having):,} exchanges a layer",
        series,
    )
