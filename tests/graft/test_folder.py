"""Graft and undo from the command line, and every request they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import rmoe
from rmoe.cli.main import main
from rmoe.errors import RequestError
from rmoe.graft import GraftSpec, graft, graft_folder, keep_originals, routed_stack, undo_folder
from rmoe.graft.files import GRAFT_WEIGHTS, ORIGINALS
from rmoe.model.weights import ADAPTER, digest, open_weights
from rmoe.routing.recurrence import Recurrence
from tests.graft.conftest import SPEC, at_work, grafted
from tests.graft.tiny_families import TOKENS, tiny_model
from tests.reload import assert_reloaded


@pytest.fixture
def original(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refused command line."""
    assert main(["graft", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--experts", "4"], "--experts is 4; allowed: unset without --upcycle"),
        (["--top-k", "1"], "--top-k is 1; allowed: unset without --upcycle"),
        (["--keep-trained"], "--keep-trained is True; allowed: unset without --undo"),
        (["--undo", "--upcycle"], "--undo is True; allowed: unset with --upcycle"),
        (["--upcycle", "--pure"], "--pure is True; allowed: unset with --upcycle"),
        (["--undo", "--router", "rmoe-lstm"], "--router is 'rmoe-lstm'; allowed: unset with --undo"),
        (["--undo", "--full"], "--full is True; allowed: unset with --undo"),
        (["--base", "there", "--width", "4"], "--width is 4; allowed: unset with --base"),
    ],
)
def test_options_that_nothing_reads(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, str(tmp_path), *argv, "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("form", [[], ["--full"]], ids=["adapter", "standalone"])
def test_graft_then_undo(
    form: list[str], original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (original / "tokenizer_config.json").write_text("{}")
    out, back = tmp_path / "grafted", tmp_path / "back"
    options = ["--router", "rmoe-lstm", "--width", "4", "--json", *form]
    assert main(["graft", str(original), *options, "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model_type"] == "qwen3_moe"
    assert report["gates"] == [f"model.layers.{i}.mlp.gate" for i in range(4)]
    assert report["added_parameters"] == 4 * (2 * 32 * 4) + (2 * 16 * 4 + 2 * 16)
    assert (out / "tokenizer_config.json").is_file()
    assert (out / "graft.safetensors").is_file() == (not form)
    assert (out / "model-base.safetensors").is_file() == bool(form)
    assert json.loads((out / "config.json").read_text())["rmoe_graft"]["recurrence"]["cell"] == "lstm"

    assert main(["graft", "--undo", str(out), "--out", str(back)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in back.iterdir()} == {
        p.name: p.read_bytes() for p in original.iterdir()
    }


@pytest.mark.parametrize("kind", ["link", "here", "plain"])
def test_an_empty_folder_that_is_there_is_filled(
    kind: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to one, and the shell's own, cannot be replaced; nor can a mount."""
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(place)
    out = {"link": tmp_path / "link", "here": Path(), "plain": place}[kind]
    graft_folder(original, out, SPEC)
    assert_reloaded(rmoe.load(place), rmoe.load(out), TOKENS)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    assert undo_folder(place, tmp_path / "back").verified is True


@pytest.mark.slow
def test_a_program_without_rmoe_refuses_a_grafted_folder(original: Path, tmp_path: Path) -> None:
    graft_folder(original, tmp_path / "out", SPEC)
    program = (
        f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'out')!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["graft_folder", "save_pretrained"])
def test_trusting_its_code_loads_it_where_rmoe_is_installed(
    original: Path, tmp_path: Path, saved_by: str
) -> None:
    graft_folder(original, tmp_path / "out", SPEC)
    if saved_by == "save_pretrained":
        rmoe.load(tmp_path / "out").save_pretrained(tmp_path / "again")
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "again").rename(tmp_path / "out")
    program = (
        "from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "print(type(model).__name__, sum('router_offset' in n for n in model.state_dict()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["GraftedQwen3MoeForCausalLM", "8"]


def test_other_tasks_of_the_family_load_with_the_graft(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    grafted().save_pretrained(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
    model = rmoe.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(trunk(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)
        assert torch.equal(classifier.model(TOKENS).last_hidden_state, trunk(TOKENS).last_hidden_state)


def test_undo_notices_a_trained_base(tmp_path: Path, original: Path) -> None:
    graft_folder(original, tmp_path / "grafted", SPEC)
    model = rmoe.load(tmp_path / "grafted")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1.5)
        model.model.layers[2].mlp.gate.weight.add_(1.0)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(RequestError, match="keep-trained"):
        undo_folder(tmp_path / "trained", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert undo_folder(tmp_path / "trained", tmp_path / "back", keep_trained=True).verified is False
    assert torch.equal(
        rmoe.load(tmp_path / "back").state_dict()["model.layers.2.mlp.gate.weight"],
        model.state_dict()["model.layers.2.mlp.gate.weight"],
    )

    kept = keep_originals(tmp_path / "grafted", tmp_path / "trained")
    assert kept == len(load_file(tmp_path / "trained" / ORIGINALS)) == 8 + 1  # on disk experts are one by one
    assert undo_folder(tmp_path / "trained", tmp_path / "exact").verified is True
    before, after = (load_file(p / "model.safetensors") for p in (original, tmp_path / "exact"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # With the originals beside it the trained base is still to be had.
    assert undo_folder(tmp_path / "trained", tmp_path / "base", keep_trained=True).verified is False
    kept_base = rmoe.load(tmp_path / "base").state_dict()
    trained = model.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in kept_base.items())


def test_undo_brings_back_tensors_that_transformers_does_not_load(tmp_path: Path, original: Path) -> None:
    """As the extra prediction layer of DeepSeek-V3 and GLM-4.5, which their model classes pass over."""
    tensors = load_file(original / "model.safetensors") | {"model.layers.61.extra": torch.ones(3)}
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    graft_folder(original, tmp_path / "grafted", SPEC)
    model, report = type(grafted()).from_pretrained(tmp_path / "grafted", output_loading_info=True)
    assert report["unexpected_keys"] == {"model.layers.61.extra"}
    model.save_pretrained(tmp_path / "trained")
    assert keep_originals(tmp_path / "grafted", tmp_path / "trained") == 1
    assert undo_folder(tmp_path / "trained", tmp_path / "back").verified is True
    assert digest(open_weights(tmp_path / "back").tensors()) == digest(open_weights(original).tensors())


def test_a_graft_in_memory_leaves_the_callers_configuration_alone() -> None:
    model = tiny_model("olmoe")
    config = model.config
    graft(model, SPEC)
    assert not hasattr(config, "rmoe_graft")
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_pure_reads_the_state_alone() -> None:
    """The gate's input is the offset, in `pure`, and the block's input plus the offset otherwise."""
    for pure in (True, False):
        model = at_work(
            graft(tiny_model("olmoe"), GraftSpec(recurrence=Recurrence.Config(width=8), pure=pure))
        )
        gate = model.model.layers[0].mlp.gate
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            offset, _ = gate.router_offset(x, (), model.model.router_cell)
            logits = gate(x)[0]
            expected = (offset if pure else x + offset) @ gate.weight.T
        torch.testing.assert_close(logits, expected)


def test_pure_starts_with_experts_that_differ() -> None:
    model = graft(tiny_model("olmoe"), GraftSpec(recurrence=Recurrence.Config(width=8), pure=True))
    with torch.no_grad():
        scores = model(TOKENS, output_router_logits=True).router_logits[0]
    assert scores.std(dim=1).min() > 0


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm", "decay", "gated_decay", "identity"])
@pytest.mark.parametrize("projector", ["layer", "shared"])
def test_every_recurrence(cell: str, projector: str, tmp_path: Path) -> None:
    plain = tiny_model("qwen3_moe")
    spec = GraftSpec(
        recurrence=Recurrence.Config(
            cell=cell,
            projector=projector,
            width=8,
            normalize=True,
            carry="zero" if cell == "identity" else "passed",
        )
    )
    with torch.no_grad():
        before = plain(TOKENS).logits
        model = graft(plain, spec)
        assert torch.equal(model(TOKENS).logits, before)
        model.save_pretrained(tmp_path)
        assert_reloaded(rmoe.load(tmp_path), model, TOKENS)


def test_same_seed_same_graft_other_seed_another() -> None:
    def projector(seed: int) -> torch.Tensor:
        model = graft(tiny_model("olmoe"), GraftSpec(recurrence=Recurrence.Config(width=8), seed=seed))
        return model.state_dict()["model.layers.1.mlp.gate.router_offset.recurrence.projector.weight"]

    assert torch.equal(projector(5), projector(5))
    assert not torch.equal(projector(5), projector(6))


# --- requests that are wrong: one line, status 2, nothing written --------------------------------------------------


def test_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    said = refused(capsys, str(tmp_path / "dense"), "--out", str(tmp_path / "out"))
    assert "llama" in said
    assert "no experts" in said
    assert not (tmp_path / "out").exists()


def test_an_unsupported_family(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp = tmp_path / "model"
    tmp.mkdir()
    config = AutoConfig.for_model(
        "switch_transformers",
        d_model=16,
        d_kv=4,
        d_ff=8,
        num_layers=2,
        num_heads=2,
        vocab_size=96,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=2,
    )
    config.architectures = ["SwitchTransformersForConditionalGeneration"]
    config.save_pretrained(tmp)
    save_file({"weight": torch.zeros(1)}, tmp / "model.safetensors")
    assert "one stack of routed layers" in refused(capsys, str(tmp), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("width", ["0", "-3"])
def test_a_width_that_is_not_positive(original: Path, capsys: pytest.CaptureFixture[str], width: str) -> None:
    out = original.parent / "out"
    assert "--width" in refused(capsys, str(original), "--out", str(out), "--width", width)
    assert not out.exists()


def test_a_folder_without_weights(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (original / "model.safetensors").unlink()
    assert "no weights" in refused(capsys, str(original), "--out", str(original.parent / "out"))


def test_a_pickle(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (original / "model.safetensors").unlink()
    torch.save({}, original / "pytorch_model.bin")
    said = refused(capsys, str(original), "--out", str(original.parent / "out"))
    assert "pytorch_model.bin" in said
    assert "pickle" in said
    with pytest.raises(RequestError, match="pickle"):
        rmoe.load(original)


def test_a_file_that_only_calls_itself_safetensors(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({}, original / "model.safetensors")
    assert "a safetensors file" in refused(capsys, str(original), "--out", str(original.parent / "out"))


def test_an_index_that_points_outside(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(original / "model.safetensors", original.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "elsewhere" in refused(capsys, str(original), "--out", str(original.parent / "out"))


def test_a_router_without_recurrence(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--router is 'smoe'" in refused(capsys, str(original), "--out", "x", "--router", "smoe")
    assert "--router is 'rmoe-residual'" in refused(
        capsys, str(original), "--out", "x", "--router", "rmoe-residual"
    )


def test_an_output_that_is_there(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "new or empty" in refused(capsys, str(original), "--out", str(original))


def test_twice(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graft_folder(original, original.parent / "once", SPEC)
    assert "without a graft" in refused(
        capsys, str(original.parent / "once"), "--out", str(original.parent / "twice")
    )
    with pytest.raises(RequestError, match="without a graft"):
        graft(grafted(), SPEC)


def test_undo_of_what_is_no_graft(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rmoe graft" in refused(capsys, "--undo", str(original), "--out", str(original.parent / "out"))


@pytest.mark.parametrize("file", [GRAFT_WEIGHTS, ADAPTER])
def test_a_missing_weight_is_no_warning(original: Path, tmp_path: Path, file: str) -> None:
    graft_folder(original, tmp_path / "grafted", SPEC, full=file == GRAFT_WEIGHTS)
    weights = load_file(tmp_path / "grafted" / file)
    del weights["model.router_cell.cell.weight_hh"]
    save_file(weights, tmp_path / "grafted" / file)
    with pytest.raises(RequestError, match=r"missing_keys: model\.router_cell\.cell\.weight_hh"):
        rmoe.load(tmp_path / "grafted")


def test_gates_are_found_where_a_family_has_them() -> None:
    stack = routed_stack(tiny_model("jamba"))
    assert [layer.gate_name for layer in stack] == [f"model.layers.{i}.feed_forward.router" for i in (1, 3)]
    assert {layer.stack for layer in stack} == {"model.layers"}


@pytest.mark.parametrize("full", [True, False])
def test_undo_of_one_shard_with_an_index_names_files_that_are_there(full: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("olmoe").save_pretrained(base)
    shard = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / shard)
    names = load_file(base / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    graft_folder(base, tmp_path / "grafted", SPEC, full=full)
    assert undo_folder(tmp_path / "grafted", tmp_path / "again").verified is True
    named = set(
        json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert all((tmp_path / "again" / name).is_file() for name in named)
    assert {file.name for file in (tmp_path / "again").glob("*.safetensors")} == named
    assert (tmp_path / "again" / shard).read_bytes() == (base / shard).read_bytes()
