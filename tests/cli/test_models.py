"""MODEL on the command line: links, wrong folders, wrong kinds of model, homes that cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rmoe.cli.main import main
from rmoe.data.encode import byte_tokenizer
from rmoe.model import RMoEConfig, RMoEForCausalLM, RMoEForSequenceClassification

SIZES = {
    "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`; `classifier`; `small`, with fewer rows than bytes; `links`, to `model`; a text; a task."""
    root = tmp_path_factory.mktemp("models")
    RMoEForCausalLM(RMoEConfig(vocab_size=320, **SIZES)).save_pretrained(root / "model")
    RMoEForSequenceClassification(RMoEConfig(vocab_size=320, **SIZES)).save_pretrained(root / "classifier")
    RMoEForCausalLM(RMoEConfig(vocab_size=128, **SIZES)).save_pretrained(root / "small")
    (root / "links").mkdir()
    for name in ("model", "classifier", "small"):
        byte_tokenizer().save_pretrained(root / name)
    for path in (root / "model").iterdir():
        (root / "links" / path.name).symlink_to(path)
    (root / "text.txt").write_text("some words\n" * 50)
    (root / "tasks.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    return root


VERBS = {
    "eval": ["--data=text.txt", "--context=32"],
    "generate": ["--prompt=x", "--max-new-tokens=1"],
    "serve": ["--port=0"],
    "analyze": ["--data=text.txt", "--out=new", "--sequence-length=32"],
    "finetune": ["--data=tasks.jsonl", "--out=new"],
}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("classifier", "MODEL is 'classifier'; allowed: a language model, not RMoEForSequenceClassification"),
        ("small", "allowed: one "),
        ("modle", "MODEL is 'modle'; allowed: an existing folder (did you mean model?)"),
        ("runs/modle", "MODEL is 'runs/modle'; allowed: an existing folder, or hf:runs/modle for"),
    ],
)
def test_a_wrong_model_is_one_line_and_nothing_is_written(
    verb: str,
    model: str,
    said: str,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if verb == "serve":
        pytest.importorskip("fastapi", reason="needs the extra `serve`")
    monkeypatch.chdir(models)
    before = sorted(models.rglob("*"))
    line = refused(capsys, verb, model, *VERBS[verb])
    assert said in line
    if model == "small":
        assert line.startswith("error: tokenizer is ")
        assert "128" in line
    assert sorted(models.rglob("*")) == before


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_folder_of_links(
    verb: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    said = []
    for model in ("model", "links"):
        assert main([verb, model, *VERBS[verb]]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("verb", ["eval", "analyze"])
def test_the_way_out_of_a_read_only_home_works(
    verb: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "home").write_text("a file, so that nobody can write below it, root neither")
    monkeypatch.delenv("RMOE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    argv = [verb, "model", *(a.replace("new", str(tmp_path / "out")) for a in VERBS[verb])]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "to go on: set the environment variable RMOE_CACHE to a folder that can be written" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("RMOE_CACHE", str(tmp_path / "cache"))
    assert main(argv) == 0


def test_no_home_at_all(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.chdir(models)
    for name in ("RMOE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert "RMOE_CACHE is None; allowed: a folder" in refused(capsys, "eval", "model", "--data=text.txt")


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--data=text.txt"],
        ["compare", "--routers=smoe", "--data=text.txt"],
        ["finetune", "model", "--data=tasks.jsonl"],
        ["graft", "model"],
        ["analyze", "model", "--data=text.txt"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_folder_that_cannot_be_written(
    argv: list[str], models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    assert "--out is 'text.txt/new'; allowed: a folder that can be written" in refused(
        capsys, *argv, f"--out=text.txt{os.sep}new"
    )


def test_commas_in_the_path_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rmoe.evaluation")
    from rmoe.evaluation import parse_benchmarks

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,piqa=b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text("")
    comma, plain = tmp_path / "a,piqa=b.jsonl", tmp_path / "c.jsonl"
    found = parse_benchmarks("arc_easy=~/a,piqa=b.jsonl,gsm8k=~/c.jsonl")
    assert list(found.items()) == [("arc_easy", comma), ("gsm8k", plain)]
    found = parse_benchmarks("x, gsm8k=~/c.jsonl ,y")
    assert list(found.items()) == [("x", None), ("gsm8k", plain), ("y", None)]
