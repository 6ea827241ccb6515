"""Hostile inputs: no traceback shown, no hang, one line, nothing written outside the output folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rmoe.cli.main import main
from rmoe.errors import RequestError
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.state import read_state
from tests.torture.conftest import AMOUNT
from tests.torture.hostile import KINDS, Case, Inputs

EXAMPLES = 20  # of each of the kinds: 220 in all
SECONDS = 60.0


@pytest.fixture(scope="module")
def inputs(finished: Path, text: Path) -> Inputs:
    return Inputs(finished, text)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def carry_out(case: Case) -> tuple[int, str]:
    """(exit status, what was shown)."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        if case.arguments[0] == "_checkpoints":
            return look_at_checkpoints(Path(case.arguments[1])), shown.getvalue()
        return main(case.arguments), shown.getvalue()


def look_at_checkpoints(run: Path) -> int:
    """What resuming does first; a checkpoint that does not verify must not be handed on."""
    from rmoe.training.run_folder import fingerprint, read_run

    store = CheckpointStore(run, fingerprint(read_run(run)))
    found = store.newest_valid(lambda folder: read_state(folder) and None)
    return 0 if found is not None else 1


def attempt(seed: int, kind_index: int, inputs: Inputs) -> str:
    """One malformed input; returns its kind."""
    with tempfile.TemporaryDirectory() as place:
        folder, here = Path(place) / "inside", Path(place) / "here"
        folder.mkdir()
        here.mkdir()
        (Path(place) / "witness").write_text("untouched")
        case = KINDS[kind_index](random.Random(seed), inputs, folder)
        outside = listing(inputs.run) | {"witness": (0, (Path(place) / "witness").stat().st_mtime_ns)}
        begun = time.monotonic()
        with contextlib.chdir(here):
            status, shown = carry_out(case)
        assert time.monotonic() - begun < SECONDS, (seed, case)
        assert status in (0, 1, 2), (seed, case, status)
        assert "Traceback" not in shown, (seed, case, shown)
        errors = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert len(errors) <= 1, (seed, case, shown)
        assert status != 2 or len(errors) == 1, (seed, case, shown)
        assert "\x1b[2J" not in shown, (seed, case)
        after = listing(inputs.run) | {"witness": (0, (Path(place) / "witness").stat().st_mtime_ns)}
        assert after == outside, (seed, case)
        assert {p.name for p in Path(place).iterdir()} == {"inside", "here", "witness"}, (seed, case)
        assert not list(here.iterdir()), (seed, case)
    return case.kind


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[kind.__name__ for kind in KINDS])
def test_malformed(kind, inputs, note):
    @hypothesis_settings(
        max_examples=EXAMPLES if AMOUNT.everything else 20,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        attempt(seed, kind, inputs)

    check()
    note(kind=f"malformed: {KINDS[kind].__name__}")


@pytest.mark.slow
@pytest.mark.skipif(not AMOUNT.fuzz_seconds, reason="RMOE_TORTURE=normal or full")
def test_fuzzer(inputs, note, capsys):
    """As above with new seeds, for as long as there is time."""
    begun, tried = time.monotonic(), 0
    seed = int(os.environ.get("RMOE_TORTURE_SEED", "0"))
    while time.monotonic() - begun < AMOUNT.fuzz_seconds:
        attempt(seed + tried, tried % len(KINDS), inputs)
        tried += 1
    note(kind="fuzzer", tried=tried, seconds=time.monotonic() - begun)
    with capsys.disabled():
        print(f"\nfuzzer: {tried} inputs in {time.monotonic() - begun:.0f} s")


def test_layers_without_end_do_not_hang(inputs, tmp_path):
    """Found by the fuzzer."""
    import rmoe

    model = Path(shutil.copytree(inputs.run / "model", tmp_path / "model"))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', f'"num_hidden_layers": {2**63}')
    )
    with pytest.raises(RequestError, match="num_hidden_layers"):
        rmoe.load(model)


def test_no_pickle_is_opened(inputs, tmp_path, capsys):
    """A MODEL argument never opens one, whatever it is called."""
    model = Path(shutil.copytree(inputs.run / "model", tmp_path / "model"))
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (model / name).write_bytes(bomb)
    assert main(["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"]) == 0
    (model / "model.safetensors").unlink()
    assert main(["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"]) == 2
    assert "a pickle, which can run code when read" in capsys.readouterr().err
    (model / "model.safetensors").write_bytes(bomb)
    assert main(["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"]) == 2
    assert not (tmp_path / "ran").exists()


def test_an_index_cannot_name_files_elsewhere(inputs, tmp_path):
    import rmoe

    model = Path(shutil.copytree(inputs.run / "model", tmp_path / "model"))
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for target in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (model / "model.safetensors.index.json").write_text(
            f'{{"weight_map": {{"lm_head.weight": "{target}"}}}}'
        )
        with pytest.raises(RequestError, match="a file in the folder"):
            rmoe.load(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folders_own_code_is_neither_run_nor_offered(file, inputs, tmp_path, capsys, monkeypatch):
    """Found by the fuzzer: without a word from us transformers asks on the terminal whether to run it."""
    model = Path(shutil.copytree(inputs.run / "model", tmp_path / "model"))
    for path in model.glob("*.py"):
        path.unlink()
    (model / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    settings = json.loads((model / file).read_text())
    names = ("AutoConfig", "AutoModelForCausalLM") if file == "config.json" else ("AutoTokenizer",)
    settings["auto_map"] = {
        name: "hostile.X" if name != "AutoTokenizer" else [None, "hostile.X"] for name in names
    }
    settings["model_type" if file == "config.json" else "tokenizer_class"] = "hostile"
    (model / file).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    status = main(["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"])
    assert not (tmp_path / "ran").exists()
    assert status == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("error: ")


@pytest.mark.parametrize("seed", [(1122, 0), (1005965, 3), (7156, 6), (16714, 5)])
def test_what_the_fuzzer_found(seed, inputs):
    attempt(*seed, inputs)
