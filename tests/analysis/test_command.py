"""`rmoe analyze` from the command line to the page, and every request it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rmoe.analysis.command import run_folder, trained_steps
from rmoe.analysis.reading import choose_tokenizer
from rmoe.analysis.token_text import TokenText
from rmoe.cli.main import main
from rmoe.data.encode import byte_tokenizer, word_tokenizer
from rmoe.errors import RequestError
from rmoe.places import model_folder
from rmoe.results.analysis import read_analysis
from tests.analysis.tiny_families import COMMON, TINY
from tests.analysis.tiny_rmoe import EXPERTS, LAYERS, tiny_rmoe

TOKENS = ["--tokens", "600", "--sequence-length", "32", "--gradient-tokens", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "grüße.txt"
    path.write_text("The quick brown fox — größer als 1\u20442.\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the model with its tokenizer, and a result that names its steps."""
    run = tmp_path_factory.mktemp("runs") / "first"
    tiny_rmoe(vocab_size=320).save_pretrained(run / "model")
    byte_tokenizer().save_pretrained(run / "model")
    (run / "result.json").write_text('{"steps": 40}')
    return run


def _refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    """The one line said about a request that is wrong."""
    assert main(["analyze", *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not out.exists()
    return said


def test_a_run_folder_to_a_file_and_a_page(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["analyze", str(folder), "--data", str(text), "--out", str(out), *TOKENS]) == 0
    analysis = read_analysis(out / "analysis.json")
    (model,) = analysis.models
    assert model.name == "first"
    assert (model.layers, model.experts) == (LAYERS, EXPERTS)
    assert analysis.text.tokens == 576  # 18 whole blocks of 32
    assert analysis.text.name == f"{text.name}[:9600]"  # no more was read: 16 bytes per token
    assert analysis.notes == []
    assert model.frequency_n == 576
    assert model.gradient_split is not None
    assert model.gradient_split.step == [40]
    assert model.gradient_split.tokens == 64
    assert model.tokens is not None
    shown = "".join(token.text for token in model.tokens)
    assert shown.startswith("The quick brown fox \\xe2\\x80\\x94 gr\\xc3\\xb6\\xc3\\x9fer")
    assert "Token explorer" in (out / "report" / "index.html").read_text()
    assert "576 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("family", TINY)
def test_every_family_without_a_tokenizer_is_read_as_bytes_and_that_is_said(
    family: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TINY[family].build().save_pretrained(tmp_path / family)
    out = tmp_path / "out"
    assert main(["analyze", str(tmp_path / family), "--data", str(text), "--out", str(out), *TOKENS]) == 0
    said = capsys.readouterr().out.splitlines()
    note = f"{family} has no tokenizer files: the text is read as bytes"
    assert said[0] == note
    analysis = read_analysis(out / "analysis.json")
    assert analysis.notes == [note]
    assert analysis.models[0].layers == TINY[family].layers


def test_a_grafted_model_and_its_base_route_alike(text: Path, tmp_path: Path) -> None:
    TINY["olmoe"].build().save_pretrained(tmp_path / "base")
    assert main(["graft", str(tmp_path / "base"), "--out", str(tmp_path / "grafted")]) == 0
    out = tmp_path / "out"
    arguments = [str(tmp_path / "grafted"), "--compare-with", str(tmp_path / "base"), "--data", str(text)]
    assert main(["analyze", *arguments, "--out", str(out), *TOKENS]) == 0
    grafted, base = read_analysis(out / "analysis.json").models
    assert grafted.saturation is not None
    assert grafted.saturation.values == [[1.0] * base.layers]
    assert grafted.frequency == base.frequency
    assert grafted.mi_digitised == base.mi_digitised
    assert grafted.gradient_split is not None
    assert grafted.gradient_split.shared is not None  # the cell
    assert base.gradient_split is not None
    assert base.gradient_split.shared is None


def test_two_checkpoints(folder: Path, text: Path, tmp_path: Path) -> None:
    later = folder / "checkpoints" / "checkpoint-60"  # without a tokenizer: the run's is taken
    tiny_rmoe(seed=1, vocab_size=320).save_pretrained(later)
    out = tmp_path / "out"
    arguments = [str(later), "--compare-with", str(folder / "model"), "--data", str(text)]
    assert main(["analyze", *arguments, "--out", str(out), *TOKENS]) == 0
    analysis = read_analysis(out / "analysis.json")
    assert analysis.notes == []
    first, second = analysis.models
    assert (first.name, second.name) == ("checkpoint-60", "first")
    assert first.saturation is not None
    assert (first.saturation.from_step, first.saturation.to_step) == ([40], [60])
    assert 0 < np.mean(first.saturation.values) < 1
    assert first.tokens is not None
    assert second.tokens is not None
    assert [t.text for t in first.tokens] == [t.text for t in second.tokens]


def test_models_that_cannot_be_compared_token_by_token_are_still_reported(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words"
    tiny_rmoe(vocab_size=64).save_pretrained(words)
    vocabulary = ["<unk>", "<eos>", "<|pad|>", "The", "quick", "brown", "fox"]
    word_tokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(words)
    out = tmp_path / "out"
    arguments = [str(folder), "--compare-with", str(words), "--data", str(text)]
    assert main(["analyze", *arguments, "--out", str(out), *TOKENS]) == 0
    analysis = read_analysis(out / "analysis.json")
    assert analysis.notes == ["no routing stability between the two models: the tokenizers differ"]
    assert analysis.models[0].tokens is not None
    assert analysis.models[1].tokens is None
    assert analysis.models[1].mi_digitised is not None

    TINY["olmoe"].build().save_pretrained(tmp_path / "olmoe")
    arguments = [str(folder), "--compare-with", str(tmp_path / "olmoe"), "--data", str(text)]
    assert main(["analyze", *arguments, "--out", str(out), *TOKENS]) == 0
    notes = read_analysis(out / "analysis.json").notes
    assert notes[-1] == "no routing stability between the two models: (layers, experts) are (3, 4) and (3, 8)"


class TestRefused:
    def test_a_dense_model(self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        LlamaForCausalLM(LlamaConfig(**COMMON)).save_pretrained(tmp_path / "dense")
        said = _refused(capsys, tmp_path / "out", str(tmp_path / "dense"), "--data", str(text))
        assert "a model with MoE layers" in said

    def test_a_text_shorter_than_a_block(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        short = tmp_path / "short.txt"
        short.write_text("too short")
        said = _refused(
            capsys, tmp_path / "out", str(folder), "--data", str(short), "--sequence-length", "32"
        )
        assert "sequence_length (32)" in said

    def test_a_small_vocabulary_without_a_tokenizer(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny_rmoe(vocab_size=128).save_pretrained(tmp_path / "small")
        said = _refused(capsys, tmp_path / "out", str(tmp_path / "small"), "--data", str(text))
        assert "a vocabulary of at least 256" in said

    def test_a_tokenizer_larger_than_the_model(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny_rmoe(vocab_size=4).save_pretrained(tmp_path / "model")
        vocabulary = ["<unk>", "<eos>", "<|pad|>", "The", "quick", "brown"]
        word_tokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(tmp_path / "model")
        said = _refused(
            capsys, tmp_path / "out", str(tmp_path / "model"), "--data", str(text), "--sequence-length", "32"
        )
        assert (
            "with 6 entries'; allowed: one with at most as many entries as the model's vocabulary (4)" in said
        )

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--tokens", "10"),
            ("--sequence-length", "1"),
            ("--sequence-length", "100000"),
            ("--batch-size", "0"),
            ("--gradient-tokens", "-1"),
            ("--device", "abacus"),
            ("--data", "nowhere.txt"),
            ("--compare-with", "nowhere"),
        ],
    )
    def test_an_option_out_of_range(
        self,
        option: str,
        value: str,
        folder: Path,
        text: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        data = [] if option == "--data" else ["--data", str(text)]
        assert value in _refused(capsys, tmp_path / "out", str(folder), *data, option, value)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                ["--gradient-tokens", "64"],
                "--gradient-tokens is 64; allowed: unset unless --measures has gradients",
            ),
            (["--gradient-tokens", "2048"], "--gradient-tokens is 2048; allowed: unset unless"),
            (
                ["--explored-tokens", "9"],
                "--explored-tokens is 9; allowed: unset unless --measures has tokens",
            ),
        ],
    )
    def test_tokens_that_no_measure_reads(
        self,
        options: list[str],
        said: str,
        folder: Path,
        text: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        given = [str(folder), "--data", str(text), "--measures", "load", *options]
        assert said in _refused(capsys, tmp_path / "out", *given)

    def test_an_output_that_is_a_file(
        self, folder: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        taken = tmp_path / "taken"
        taken.write_text("mine")
        assert main(["analyze", str(folder), "--data", str(text), "--out", str(taken)]) == 2
        assert taken.read_text() == "mine"

    @pytest.mark.parametrize("file", ["results.jsonl", "comparison.json", "config.json"])
    def test_a_folder_of_another_verb(
        self, file: str, folder: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / file).touch()
        assert main(["analyze", str(folder), "--data", str(text), "--out", str(tmp_path)]) == 2
        assert "allowed: a new folder, or one of an earlier analysis" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_tokenizer_is_never_guessed_from_the_models_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    assert choose_tokenizer(str(tmp_path), 50304)[0] == "bytes"
    with pytest.raises(RequestError, match="at least 256"):
        choose_tokenizer(str(tmp_path), 255)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert choose_tokenizer(str(tmp_path), 255) == (str(tmp_path), None)


def test_steps_and_model_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert model_folder(str(folder)) == model_folder(folder / "model") == folder / "model"
    assert trained_steps(folder / "model") == 40
    assert trained_steps(Path("runs/a/checkpoints/checkpoint-1200")) == 1200
    assert trained_steps(tmp_path) == 0


def test_checkpoints_know_their_run():
    one = {run_folder(Path(p)) for p in ("r/model", "r/checkpoints/checkpoint-5", "r/checkpoint-7")}
    assert one == {Path("r").resolve()}
    assert run_folder(Path("other/checkpoint-5")) not in one


def test_tokens_that_are_no_text_are_shown_as_bytes() -> None:
    shown = TokenText(byte_tokenizer())
    assert [shown(i) for i in (0x41, 0x0A, 0xC3, 0xFF)] == ["A", "\n", "\\xc3", "\\xff"]
