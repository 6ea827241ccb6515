"""Wrong requests to `rmoe compare`: one line, status 2, nothing written."""

from __future__ import annotations

import pytest

from rmoe.cli.main import main

WSD = ["--training.schedule", "wsd"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [*WSD, "--lengths", "50", "200"],
            "--lengths is '50 200'; allowed: 1 to 159: a branch ends before its run",
        ),
        (
            ["--lengths", "50", "100"],
            "--lengths is '50 100'; allowed: given with --training.schedule wsd, not cosine",
        ),
        (["--max-seeds", "5"], "--max-seeds is 5; allowed: left out without --until-decided"),
        (["--until-decided"], "--max-seeds is None; allowed: a number, with --until-decided"),
        (
            ["--until-decided", "--seeds", "1", "--max-seeds", "4"],
            "--seeds is 1; allowed: 2 or more with --until",
        ),
        (["--match-logits", "0"], "training.initial_logit_std is 0.0; allowed: above 0"),
        (["--gate", "no-such-folder"], "no-such-folder/comparison.json is"),
        (
            [*WSD, "--training.branch-points", "40", "900"],
            "training.branch_points is '900'; allowed: steps of the",
        ),
        (["--timing-rounds", "-1"], "--timing-rounds is -1; allowed: 0 or more"),
        (["--analysis-tokens", "-1"], "--analysis-tokens is -1; allowed: 0 or more"),
        (["--margin", "nan"], "--margin is nan; allowed: 0 or more, and finite"),
        (["--engine.hours", "0.001"], "engine.hours is 0.001; allowed: 1/60, which is a minute, or more"),
        (["--training.average", "1"], "training.average is 1; allowed: 0, which is off, or 2 or more"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--preset", "quick", "--routers", "smoe,rmoe", "--out", "out", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_a_router_without_a_scale_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {i * 7919 % 101}\n" for i in range(3000)))
    asked = ["--routers", "smoe,stable-moe-onestage", "--match-logits", "1", "--data.path", "text.txt"]
    assert main(["compare", "--preset", "quick", "--out", "out", *asked]) == 2
    err = capsys.readouterr().err
    assert err == (
        "error: training.initial_logit_std is 1.0; allowed: None with scorer.kind half_cosine: it has no scale\n"
    )
    assert not (tmp_path / "out").exists()
