"""Rows to summary: which sweep point is judged, what the sentence says, what is kept out."""

from __future__ import annotations

import pytest

from rmoe.compare.summary import band, chosen_sweep, summarise, sweep_points
from rmoe.errors import RequestError
from rmoe.results.rows import ResultRow, Timing
from rmoe.results.run import Curve, Hardware
from tests.compare.rows import changed, row


def grid(offset: float, seeds: int = 3):
    base = [1.70, 1.74, 1.69, 1.72][:seeds]
    wobble = [0.0003, -0.0002, 0.0001, 0.0][:seeds]
    return [row("smoe", s, b, test=b) for s, b in enumerate(base)] + [
        row("rmoe", s, b + offset + w, test=b + offset + w)
        for s, (b, w) in enumerate(zip(base, wobble, strict=True))
    ]


def test_the_verdict_names_difference_interval_and_seeds():
    summary = summarise(grid(-0.03), preset="small", baseline="smoe")
    assert summary.verdict.startswith(
        "rmoe minus smoe is −0.0299 bits per byte on the test split (95% interval −0.0306 to −0.0293"
    )
    assert summary.verdict.endswith("3 paired seeds): better.")
    assert [r.router for r in summary.routers] == ["rmoe", "smoe"]  # best first
    assert summary.routers[1].difference is None


def test_one_seed_gives_no_verdict_and_says_so():
    summary = summarise(grid(-0.03, seeds=1), preset="small", baseline="smoe")
    assert summary.verdict.startswith("One seed gives no verdict: rmoe minus smoe is −0.0297")
    assert summary.routers[0].difference.verdict == "one seed: no verdict"
    assert any("one seed ranks nothing" in note for note in summary.notes)
    assert summary.routers[0].test.sd is None


def test_each_router_is_judged_at_its_own_learning_rate():
    rows = []
    for seed in (0, 1):
        for lr, smoe, rmoe in ((1e-3, 1.70, 1.80), (3e-3, 1.75, 1.68)):
            test = {"smoe": 1.9 if lr == 1e-3 else None, "rmoe": 1.85 if lr == 3e-3 else None}
            rows += [
                row("smoe", seed, smoe + seed / 100, test=test["smoe"], sweep={"learning_rate": lr}),
                row("rmoe", seed, rmoe + seed / 100, test=test["rmoe"], sweep={"learning_rate": lr}),
            ]
    assert chosen_sweep(sweep_points(rows)) == {
        "smoe": {"learning_rate": 1e-3},
        "rmoe": {"learning_rate": 3e-3},
    }
    summary = summarise(rows, preset="small", baseline="smoe")
    judged = next(r for r in summary.routers if r.router == "rmoe")
    assert judged.difference.split == "test"
    assert judged.difference.mean == pytest.approx(-0.05)
    assert len(summary.sweep_points) == 4


def test_a_learning_rate_that_loses_a_run_is_not_chosen():
    rows = [
        row("smoe", 0, 1.5, sweep={"learning_rate": 1e-2}),
        row("smoe", 1, None, sweep={"learning_rate": 1e-2}, status="failed"),
        row("smoe", 0, 1.7, sweep={"learning_rate": 1e-3}),
        row("smoe", 1, 1.7, sweep={"learning_rate": 1e-3}),
    ]
    assert chosen_sweep(sweep_points(rows)) == {"smoe": {"learning_rate": 1e-3}}


def test_without_every_test_figure_validation_is_compared():
    rows = grid(-0.03)
    rows[0] = row("smoe", 0, 1.70, test=None)
    summary = summarise(rows, preset="small", baseline="smoe")
    assert "on the validation split" in summary.verdict
    assert "Compared on the validation split, as there is no test value of 1 run of smoe." in summary.notes


def test_another_router_without_a_test_figure_does_not_move_the_rest_to_validation():
    rows = [*grid(-0.03), *(row("xmoe", seed, 1.5, test=None) for seed in range(3))]
    summary = summarise(rows, preset="small", baseline="smoe")
    assert "on the test split" in summary.verdict
    assert [r.router for r in summary.routers if r.difference is not None] == ["rmoe"]
    assert "Left out of the differences, as there is no test value: 3 runs of xmoe." in summary.notes


def test_a_router_without_a_pair_so_far_is_one_of_those_compared():
    alone, planned = (
        next(r for r in summarise(grid(-0.0003), "small", "smoe", planned=n).routers if r.router == "rmoe")
        for n in (1, 2)
    )
    assert planned.difference.p_holm == 2 * alone.difference.p_holm


def test_failed_runs_are_left_out_and_named():
    rows = [*grid(-0.03), row("rmoe", 3, None, status="failed")]
    summary = summarise(rows, preset="small", baseline="smoe")
    rmoe = next(r for r in summary.routers if r.router == "rmoe")
    assert (rmoe.finished, rmoe.failed) == (3, 1)
    assert "rmoe-seed3 failed and is left out: loss is NaN at step 3" in summary.notes


def test_a_router_with_one_pair_does_not_hide_the_verdicts_of_the_others():
    rows = [*grid(-0.03), row("xmoe", 0, 1.5, test=1.5)]
    rows += [row("xmoe", seed, None, status="failed") for seed in (1, 2)]
    verdict = summarise(rows, preset="small", baseline="smoe").verdict
    assert verdict.startswith("Of 2 routers against smoe: ")
    assert "1 better" in verdict
    assert "1 one seed, no verdict" in verdict
    assert "; the lowest with more than one pair is rmoe with −0.0299 bits" in verdict


def test_two_corpora_and_nothing_finished_are_refused():
    with pytest.raises(RequestError, match="one corpus"):
        summarise([row("smoe", 0, 1.7), row("rmoe", 0, 1.7, corpus_sha256="b" * 64)], "small", "smoe")
    with pytest.raises(RequestError, match="none finished"):
        summarise([row("smoe", 0, None, status="failed")], "small", "smoe")
    with pytest.raises(RequestError, match="--baseline is 'xmoe'; allowed: rmoe, smoe"):
        summarise([row("smoe", 0, 1.7), row("rmoe", 0, 1.6)], "small", "xmoe")


def test_bands_hold_the_steps_all_seeds_share():
    one = Curve(unit="nats", step=[1, 2, 3], value=[3.0, 2.0, 1.0])
    two = Curve(unit="nats", step=[2, 3], value=[4.0, 2.0])
    joined = band([one, two])
    assert (joined.step, joined.mean, joined.low, joined.high, joined.n) == (
        [2, 3],
        [3.0, 1.5],
        [2.0, 1.0],
        [4.0, 2.0],
        2,
    )


def test_timing_is_blank_unless_a_run_was_timed_alone():
    rows = grid(-0.03)
    assert all(r.timing is None for r in summarise(rows, "small", "smoe").routers)
    timing = Timing(seconds_per_1k_steps=30.0, peak_mib=400.0, steps=20, rounds=3)
    rows[0] = row("smoe", 0, 1.70, test=1.70, timing=timing)
    assert next(r.timing for r in summarise(rows, "small", "smoe").routers if r.router == "smoe") == timing


def started(scale: float, router: str, seed: int = 0):
    from rmoe.results.run import InitialLogits, LayerCurve

    return changed(
        row(router, seed, 1.7, test=1.7),
        initial_logits=InitialLogits(drawn=[0.1, 0.1], start=[scale, scale], tokens=4096),
        layer_curves={"logit_std": LayerCurve(unit="std", step=[10, 20], value=[[scale, 1.0], [2.0, seed]])},
    )


@pytest.mark.parametrize(("later", "warned"), [(1.49, False), (1.51, True), (0.66, True), (0.67, False)])
def test_routers_that_leave_one_scale_are_warned_about(later, warned):
    """Means over layers and seeds count, at the step where the arms are furthest apart."""
    from rmoe.results.run import Curve

    def logged(router: str, at_20: float):
        run = started(1.0, router)
        curve = Curve(unit="std", step=[10, 20, 30], value=[1.0, at_20, 1.1])
        return changed(run, curves={**run.result.curves, "logit_std": curve})

    rows = [logged("smoe", 1.0), logged("rmoe", later), row("hash", 0, 1.9)]
    notes = [n for n in summarise(rows, preset="small", baseline="smoe").notes if "leave it" in n]
    assert len(notes) == warned
    if warned:
        assert "After step 20 the raw logits of " in notes[0]
        low, high = sorted((("smoe", 1.0), ("rmoe", later)), key=lambda arm: arm[1])
        said = f"{low[0]} have a standard deviation of {low[1]:.2g}, those of {high[0]} {high[1]:.2g}."
        assert said in notes[0]


@pytest.mark.parametrize(("other", "warned"), [(1.49, False), (1.51, True), (0.66, True), (0.67, False)])
def test_routers_that_start_at_different_scales_are_warned_about(other, warned):
    rows = [started(1.0, "smoe"), started(other, "rmoe"), row("hash", 0, 1.9)]
    summary = summarise(rows, preset="small", baseline="smoe")
    notes = [note for note in summary.notes if "start at different scales" in note]
    assert bool(notes) is warned
    if warned:
        low, high = ("smoe", "rmoe") if other > 1 else ("rmoe", "smoe")
        assert f"The raw logits of {low} have" in notes[0]
        assert f"those of {high} {max(1.0, other):.2g}." in notes[0]
    assert {r.router: r.initial_logit_std for r in summary.routers} == {
        "smoe": 1.0,
        "rmoe": pytest.approx(other),
        "hash": None,
    }


def test_the_scale_is_in_the_table_and_by_layer_in_the_report():
    from rmoe.report.charts.comparison import comparison_charts
    from rmoe.report.page import styles
    from rmoe.report.table import markdown

    summary = summarise([started(1.0, "smoe", 0), started(1.0, "smoe", 1)], preset="small", baseline="smoe")
    assert "initial logit std (before step 0)" in markdown(summary)
    assert "| 1.00 |" in markdown(summary)
    chart = next(
        c for c in comparison_charts(summary, styles(["smoe"], "smoe")) if c.id == "layers-logit_std-smoe"
    )
    assert chart.data[0]["z"] == [[1.0, 2.0], [1.0, 0.5]]  # by layer, mean over the two seeds
    assert chart.data[0]["x"] == [10, 20]


def test_runs_of_two_versions_of_the_code_are_said():
    import msgspec

    older, newer = row("smoe", 0, 1.7), row("rmoe", 0, 1.7)
    newer = changed(newer, versions=msgspec.structs.replace(newer.result.versions, code="0.2.0"))
    notes = summarise([older, newer], preset="small", baseline="smoe").notes
    assert "The runs were made by 2 versions of the code: 0.1.0, 0.2.0." in notes
    assert not any(
        "versions of the code" in n for n in summarise(grid(-0.03), preset="", baseline="smoe").notes
    )


@pytest.mark.parametrize(
    ("machines", "cpus", "begun", "lost"),
    [
        (("a", "a"), ("x", "x"), ("1", "1"), None),
        (("a", "b"), ("x", "x"), ("1", "1"), "timed on another machine than smoe"),
        (("a", "a"), ("x", "y"), ("1", "1"), "timed on another machine than smoe"),
        ((None, "a"), ("test", "test"), (None, None), None),  # an earlier release said no machine
        (("a", "a"), ("x", "x"), ("1", "2"), "not timed together with smoe"),
        (("a", "a"), ("x", "x"), (None, "2"), "not timed together with smoe"),
    ],
)
def test_times_of_unlike_machines_or_phases_share_no_column(machines, cpus, begun, lost):
    def timed(router: str, machine: str | None, cpu: str, begun: str | None) -> ResultRow:
        hardware = Hardware(cpu=cpu, cores=2, threads=1, memory_gib=4.0)
        own = {} if machine is None else {"machine": machine, "hardware": hardware, "begun": begun}
        return row(
            router, 0, 1.7, timing=Timing(seconds_per_1k_steps=1.0, peak_mib=1.0, steps=8, rounds=1, **own)
        )

    names = "smoe", "rmoe"
    rows = [timed(*one) for one in zip(names, machines, cpus, begun, strict=True)]
    summary = summarise(rows, preset="small", baseline="smoe")
    assert {r.router for r in summary.routers if r.timing} == ({"smoe"} if lost else {"smoe", "rmoe"})
    said = [note for note in summary.notes if note.startswith("No time and memory for ")]
    assert len(said) == bool(lost)
    assert all(note.startswith(f"No time and memory for rmoe: {lost}. ") for note in said)


def _timed(router: str, seed: int, val: float, begun: str | None, rate: float | None = None) -> ResultRow:
    own = {"machine": "m", "hardware": Hardware(cpu="x", cores=2, threads=1, memory_gib=4.0), "begun": begun}
    timing = Timing(seconds_per_1k_steps=5.0, peak_mib=1.0, steps=24, rounds=3, **own) if begun else None
    return row(
        router, seed, val, test=val, sweep={} if rate is None else {"learning_rate": rate}, timing=timing
    )


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(  # a second seed moved the baseline's choice, and both were timed again
            [
                _timed("smoe", 0, 2.00, "A", 1e-3),
                _timed("rmoe", 0, 2.00, "B", 1e-3),
                _timed("smoe", 0, 2.01, "B", 3e-3),
                _timed("rmoe", 0, 2.05, None, 3e-3),
                _timed("smoe", 1, 2.10, None, 1e-3),
                _timed("rmoe", 1, 2.00, None, 1e-3),
                _timed("smoe", 1, 2.01, None, 3e-3),
                _timed("rmoe", 1, 2.05, None, 3e-3),
            ],
            id="sweep",
        ),
        pytest.param(
            [_timed(name, 5, 2.0, "A") for name in ("smoe", "rmoe")]
            + [_timed(name, 0, 2.0, "B") for name in ("smoe", "rmoe", "np")],
            id="an earlier seed",
        ),
        pytest.param(  # smoe-seed0 failed at first
            [
                _timed("smoe", 1, 2.0, "A"),
                _timed("smoe", 0, 2.0, "B"),
                _timed("rmoe", 0, 2.0, "B"),
                _timed("rmoe", 1, 2.0, None),
            ],
            id="a failed run",
        ),
    ],
)
def test_times_are_those_of_the_runs_that_come_first_now(rows):
    summary = summarise(rows, preset="small", baseline="smoe")
    assert {r.timing.begun for r in summary.routers if r.timing} == {"B"}
    assert all(r.timing for r in summary.routers)
    assert not [note for note in summary.notes if note.startswith("No time and memory")]


def test_pairs_that_failed_are_not_pairs_saved():
    spread = [2.0 + wobble for wobble in (-0.01, 0.012, 0.001, 0.0, 0.02, -0.02, 0.01, -0.01)]
    rows = [row("smoe", s, 2.0, test=2.0) for s in range(8)] + [
        row("rmoe", s, v, test=v) for s, v in enumerate(spread[:3])
    ]
    failed = [row("rmoe", s, None, status="failed") for s in range(3, 8)]
    worse = [row("np", s, 3.0 + v / 1000, test=3.0 + v / 1000) for s, v in enumerate(spread[:5])]
    summary = summarise([*rows, *failed, *worse], "small", "smoe", looks=(5, 8))
    assert any(note.endswith("Pairs not needed: 3 of 16.") for note in summary.notes)
