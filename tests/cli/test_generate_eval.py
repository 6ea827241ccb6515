"""`rmoe generate` and `rmoe eval` on the model of a short run."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmoe.cli import main as cli
from rmoe.data.encode import word_tokenizer
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rmoe.training.run import train

    folder = tmp_path_factory.mktemp("run")
    train(tiny.config(tiny.text(folder), max_steps=10), folder / "run", progress=False)
    return folder / "run"


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main([str(argument) for argument in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_generate_goes_on_with_the_prompt(capsys, run):
    said = output(capsys, "generate", run, "--prompt", "import os", "--max-new-tokens", "8")
    assert said.startswith("import os")
    assert said == output(capsys, "generate", run / "model", "--prompt", "import os", "--max-new-tokens", "8")

    for asked, said in (
        (["--top-p", "0.5"], "--top-p is 0.5; allowed: unset with --temperature 0"),
        (["--seed", "3"], "--seed is 3; allowed: unset with --temperature 0"),
        (
            ["--seed", str(10**20), "--temperature", "1"],
            "--seed is 100000000000000000000; allowed: 0 or more",
        ),
    ):
        assert cli.main(["generate", str(run), "--prompt", "x", *asked]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["generate", str(run), "--prompt", "a\udcff"]) == 2
    assert "allowed: a text in UTF-8" in capsys.readouterr().err

    draw = ["generate", run, "--prompt", "x", "--max-new-tokens", "12", "--temperature", "1.5", "--seed"]
    assert output(capsys, *draw, "1") == output(capsys, *draw, "1") != output(capsys, *draw, "2")


def test_all_tokens_can_be_drawn_where_nothing_else_is_asked(capsys, run, drawn_from):
    output(capsys, "generate", run, "--prompt", "x", "--max-new-tokens", "2", "--temperature", "1")
    assert min(drawn_from, default=0) > 200  # transformers' own default: the 50 likeliest


PLUGIN = """
from rmoe.routing.scorer import Linear


class Borrowed(Linear):
    class Config(Linear.Config):
        kind = "borrowed"
"""


def test_a_model_whose_router_a_plugin_registers(capsys, tmp_path):
    """As its user meets it: made elsewhere, read by a process that has not seen the plugin."""
    (tmp_path / "borrowed.py").write_text(PLUGIN)
    make = f"""
from rmoe.data.encode import byte_tokenizer
from rmoe.model import RMoEConfig, RMoEForCausalLM
from rmoe.routing.zoo import resolve, vary
from rmoe.training.build import load_plugins
import sys

load_plugins(({str(tmp_path / "borrowed.py")!r},))
kind = next(m for name, m in sys.modules.items() if name.startswith("rmoe_plugin_")).Borrowed
config = RMoEConfig(
    vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=4,
    moe_intermediate_size=8, router=vary(resolve("smoe"), scorer=kind.Config()).to_dict(),
)
RMoEForCausalLM(config).save_pretrained({str(tmp_path / "model")!r})
byte_tokenizer().save_pretrained({str(tmp_path / "model")!r})
"""
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True)
    generate = ["generate", str(tmp_path / "model"), "--prompt", "a", "--max-new-tokens", "1"]
    assert cli.main(generate) == 2
    assert "scorer.kind is 'borrowed'" in capsys.readouterr().err
    assert output(capsys, *generate, "--plugin", tmp_path / "borrowed.py").startswith("a")


def test_a_checkpoint_is_a_model_too(run):
    import rmoe

    model = rmoe.load(run / "checkpoints" / "checkpoint-10")
    final = rmoe.load(run / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), final.parameters(), strict=True))


@pytest.mark.parametrize("overlap", [1, 8])
def test_eval_counts_every_byte_once(capsys, run, tmp_path, overlap):
    """Against a loop that predicts each byte from the block it falls into."""
    import rmoe

    raw = b"def main(argv):\n    return len(argv) # \xc3\xa9\n" * 5
    (tmp_path / "text.txt").write_bytes(raw)
    arguments = ["eval", run, "--data", tmp_path / "text.txt", "--overlap", overlap]
    figures = json.loads(output(capsys, *arguments, "--json"))
    model = rmoe.load(run / "model")

    nats, done, stride = 0.0, 1, 32 - overlap
    tokens = torch.tensor(list(raw))
    for block in range(math.ceil((len(raw) - 32) / stride) + 1):
        start = min(block * stride, len(raw) - 32)
        with torch.no_grad():
            logp = model(tokens[None, start : start + 32]).logits[0].log_softmax(-1)
        for target in range(done, start + 32):
            nats -= float(logp[target - start - 1, tokens[target]])
        done = start + 32
    assert done == len(raw) == figures["bytes"] == figures["tokens"]
    loss = nats / (len(raw) - 1)
    assert figures["loss_nats_per_token"] == pytest.approx(loss, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)
    assert figures["perplexity_per_token"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert f"{overlap} to 31 tokens before it" in figures["context"]
    assert f"{figures['bits_per_byte']:.4f} bits per byte" in output(capsys, *arguments)


def test_a_text_shorter_than_the_context_is_one_pass(capsys, run, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"import this")
    figures = json.loads(output(capsys, "eval", run, "--data", tmp_path / "text.txt", "--json"))
    assert figures["tokens"] == 11
    assert "10 tokens before it" in figures["context"]


def test_a_model_that_gives_nan_has_no_figures(capsys, run, tmp_path):
    import rmoe

    model = rmoe.load(run / "model")
    for weights in model.parameters():
        weights.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    for file in (run / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words " * 9)
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--json"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: the loss of {tmp_path / 'model'} on text.txt is nan; saved: nothing")
    assert said.err.count("\n") == 1


def test_a_model_of_words_has_no_bits_per_byte(capsys, tmp_path):
    """Untrained, on a text of which it knows no word: one token stands for any number of bytes."""
    from rmoe.data.encode import word_tokenizer
    from rmoe.model import RMoEConfig, RMoEForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "moe_intermediate_size": 4}
    RMoEForCausalLM(RMoEConfig(vocab_size=4, num_experts=2, **sizes)).save_pretrained(tmp_path / "model")
    word_tokenizer({"<unk>": 0, "<eos>": 1, "<|pad|>": 2, "a": 3}).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("unheard-of words " * 9)
    arguments = ["eval", tmp_path / "model", "--data", tmp_path / "text.txt"]
    assert json.loads(output(capsys, *arguments, "--json"))["bits_per_byte"] is None
    said = output(capsys, *arguments)
    assert said.startswith("perplexity ")
    assert "bits" not in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["generate", "{run}", "--prompt", ""], "--prompt is ''"),
        (["generate", "{run}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["generate", "{run}", "--prompt", "x", "--temperature", "-1"], "--temperature is -1.0"),
        (["generate", "{run}"], "--prompt"),
        (["eval", "{run}", "--data", "nowhere.txt"], "nowhere.txt"),
        (["eval", "{run}", "--data", "{text}", "--context", "1"], "--context is 1"),
        (["eval", "{run}", "--data", "{text}", "--overlap", "32"], "overlap is 32"),
        (
            ["eval", "{run}", "--data", "{text}", "--context", "99999999"],
            "--context is 99999999; allowed: at most",
        ),
        (
            ["eval", "{run}", "--data", "{text}", "--limit", "3"],
            "--limit is 3; allowed: unset without --tasks",
        ),
        (["eval", "{run}", "--data", "{text}", "--num-fewshot", "0"], "--num-fewshot is 0"),
        (
            ["eval", "{run}", "--tasks", "piqa", "--overlap", "4"],
            "--overlap is 4; allowed: unset without --data",
        ),
    ],
)
def test_wrong_requests(capsys, monkeypatch, run, argv, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = [token.format(run=run, text=run.parent / "text.txt") for token in argv]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert said in err


def test_unfinished_or_without_tokenizer(capsys, run, tmp_path):
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    assert cli.main(["generate", str(tmp_path / "cut"), "--prompt", "x"]) == 2
    assert "a finished run" in capsys.readouterr().err

    checkpoint = next((run / "checkpoints").glob("checkpoint-*"))  # its tokenizer is that of the run's model
    assert output(capsys, "generate", checkpoint, "--prompt", "import", "--max-new-tokens", "2")
    assert output(capsys, "eval", checkpoint, "--data", run.parent / "text.txt", "--context", "64")

    shutil.copytree(run / "model", tmp_path / "whole")
    (tmp_path / "whole" / "checkpoints").mkdir()
    assert output(capsys, "generate", tmp_path / "whole", "--prompt", "import", "--max-new-tokens", "2")

    shutil.copytree(run / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    assert cli.main(["generate", str(tmp_path / "model"), "--prompt", "x"]) == 2
    assert "with its tokenizer" in capsys.readouterr().err

    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    assert cli.main(["generate", str(tmp_path / "model"), "--prompt", "x"]) == 2
    assert "a pickle" in capsys.readouterr().err


def test_a_metric_without_a_standard_error_is_printed(capsys, monkeypatch, run):
    """The harness writes "N/A" where it has none."""
    figures = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "word_perplexity,none": 9.0,
        "f1,none": 0.25,
    }
    results = {"results": {"x": figures | {"f1_stderr,none": 0.125}}}
    monkeypatch.setattr("rmoe.evaluation.run_benchmarks", lambda *_, **__: results)
    monkeypatch.setattr("rmoe.evaluation.parse_benchmarks", lambda tasks: [tasks])
    said = output(capsys, "eval", run, "--tasks", "x")
    assert said == "x: acc 0.5000, word_perplexity 9.0000, f1 0.2500 ± 0.1250\n"


def test_tasks_as_json_are_json(capsys, monkeypatch, run):
    figures = {"acc,none": float("nan"), "ppl,none": float("inf"), "f1,none": 0.5, "at": Path("a")}
    monkeypatch.setattr("rmoe.evaluation.run_benchmarks", lambda *_, **__: {"results": {"x": figures}})
    monkeypatch.setattr("rmoe.evaluation.parse_benchmarks", lambda tasks: [tasks])
    said = output(capsys, "eval", run, "--tasks", "x", "--json")
    assert "NaN" not in said
    assert "Infinity" not in said
    expected = {"acc,none": None, "ppl,none": None, "f1,none": 0.5, "at": "a"}
    assert json.loads(said) == {"results": {"x": expected}}


def test_serve_names_what_is_wrong(capsys, run):
    pytest.importorskip("fastapi", reason="needs the extra `serve`")
    assert cli.main(["serve", str(run), "--host", "no such host.invalid", "--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: --host is 'no such host.invalid'; allowed: an address of this machine (")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(run), "--port", port, "--device", "cpu"]) == 2
    assert f"error: --port is {port}; allowed: a free port of 127.0.0.1" in capsys.readouterr().err


def test_a_prompt_of_no_tokens_is_refused(capsys, run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "words")
    for file in (tmp_path / "words").glob("tokenizer*"):
        file.unlink()
    word_tokenizer({"<unk>": 0, "<eos>": 1, "a": 2}).save_pretrained(tmp_path / "words")
    assert cli.main(["generate", str(tmp_path / "words"), "--prompt", " "]) == 2
    assert "--prompt is ' '; allowed: a text of one token or more" in capsys.readouterr().err
