"""A graft as an adapter: joined with its base, and only with its base."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import rmoe
from rmoe.cli.main import main
from rmoe.data.encode import byte_tokenizer
from rmoe.errors import RequestError
from rmoe.graft import graft, graft_folder, move_adapter, save_adapter, undo_folder
from rmoe.graft.folder import is_graft_tensor
from rmoe.model import weights as weight_files
from rmoe.model.weights import ADAPTER, layout_digest, open_weights, sample_digest
from tests.graft.conftest import SPEC, at_work
from tests.graft.tiny_families import TOKENS, tiny_model
from tests.reload import assert_reloaded, assert_same_tensors

GATE = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "base"
    tiny_model("qwen3_moe").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path) -> Path:
    """An adapter beside its base."""
    graft_folder(base, base.parent / "adapter", SPEC)
    return base.parent / "adapter"


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a model in one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: edit(tensors[name])}, path, metadata={"format": "pt"})


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- what is in the folder, and who opens it ---------------------------------------------------------------------


def test_it_holds_no_copy_of_the_base(base: Path, adapter: Path) -> None:
    assert [p.name for p in adapter.rglob("*.safetensors")] == [ADAPTER]
    assert all(map(is_graft_tensor, open_weights(adapter).names(ADAPTER)))
    assert (adapter / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    config = json.loads((adapter / "config.json").read_text())
    original = json.loads((base / "config.json").read_text())
    assert {name: config[name] for name in original if name not in ("model_type", "architectures")} == {
        name: value for name, value in original.items() if name not in ("model_type", "architectures")
    }
    pointer = config["rmoe_graft"]["base"]
    assert (pointer["path"], pointer["relative"], pointer["hub"]) == (str(base), "../base", None)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "standalone"])
@pytest.mark.parametrize(
    "first", ["", "import rmoe\n", "import rmoe.graft\n"], ids=["alone", "rmoe", "graft"]
)
def test_transformers_opens_both_forms(base: Path, tmp_path: Path, first: str, full: bool) -> None:
    graft_folder(base, tmp_path / "out", SPEC, full=full)
    trusts = "" if "graft" in first else ", trust_remote_code=True"
    program = (
        f"{first}from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'out')!r}{trusts})\n"
        "print(type(model).__name__, sum('router_offset' in n for n in model.state_dict()))\n"
        f"import torch; torch.save(model.state_dict(), {str(tmp_path / 'state')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["GraftedQwen3MoeForCausalLM", "8"]
    expected = rmoe.load(tmp_path / "out").state_dict()
    found = torch.load(tmp_path / "state")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_auto_classes_open_it(adapter: Path) -> None:
    model = rmoe.load(adapter)
    assert_reloaded(AutoModelForCausalLM.from_pretrained(adapter), model, TOKENS)
    assert_reloaded(type(model).from_pretrained(adapter), model, TOKENS)
    assert_reloaded(AutoModelForCausalLM.from_pretrained(adapter.parent, subfolder="adapter"), model, TOKENS)
    trunk = AutoModel.from_pretrained(adapter)
    classifier = AutoModelForSequenceClassification.from_pretrained(adapter, num_labels=3, pad_token_id=0)
    assert_same_tensors(trunk, model.model)
    assert_same_tensors(classifier.model, model.model)
    assert model.name_or_path == model.config.name_or_path == str(adapter)
    assert rmoe.load(adapter, router_aux_loss_coef=0.5).config.router_aux_loss_coef == 0.5
    assert rmoe.load(adapter, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_generation_starts_from_the_same_defaults(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text('{"max_new_tokens": 7, "top_k": 3, "do_sample": true}')
    for full in (False, True):
        graft_folder(base, tmp_path / str(full), SPEC, full=full)
    joined, whole = rmoe.load(tmp_path / "False"), rmoe.load(tmp_path / "True")
    assert joined.generation_config.top_k == 3
    assert joined.generation_config == whole.generation_config


def test_by_names_of_the_hub(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and adapter in the Hub's cache; an adapter made from there points to the base's name and commit."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def cached(name: str, commit: str, head: str) -> Path:
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(head)
        (repository / "snapshots").mkdir()
        return repository / "snapshots" / commit

    expected = rmoe.load(adapter)
    commit = hashlib.sha1(b"base", usedforsecurity=False).hexdigest()
    source = cached("org/base", commit, head="0" * 40)  # main has moved on since
    shutil.copytree(base, source)
    graft_folder(source, tmp_path / "made", SPEC)
    pointer = json.loads((tmp_path / "made" / "config.json").read_text())["rmoe_graft"]["base"]
    assert (pointer["hub"], pointer["revision"]) == ("org/base", commit)
    assert str(tmp_path) not in json.dumps(pointer)

    shutil.copytree(tmp_path / "made", cached("org/adapter", "1" * 40, head="1" * 40))
    loaders = (rmoe.load, AutoModelForCausalLM.from_pretrained, type(expected).from_pretrained)
    for load in loaders:
        model = load("org/adapter", **({} if load == rmoe.load else {"cache_dir": cache}))
        assert_reloaded(model, expected, TOKENS)
        assert (model.name_or_path, model.graft_place) == ("org/adapter", source)
    moved = rmoe.load(adapter, base=source)
    assert_reloaded(moved, expected, TOKENS)

    (cache / "models--org--base").rename(cache / "gone")
    with pytest.raises(RequestError, match="base is 'org/base'; allowed: a model in the Hub cache"):
        rmoe.load("org/adapter")


# --- where the base is -------------------------------------------------------------------------------------------


def test_a_base_that_moved(base: Path, adapter: Path, tmp_path: Path) -> None:
    expected = rmoe.load(adapter)
    base.parent.rename(tmp_path / "together")  # found from the adapter
    adapter = tmp_path / "together" / "adapter"
    assert_reloaded(rmoe.load(adapter), expected, TOKENS)

    base = (tmp_path / "together" / "base").rename(tmp_path / "alone")
    with pytest.raises(RequestError, match=r"base is .*the base has moved"):
        rmoe.load(adapter)
    assert_reloaded(rmoe.load(adapter, base=base), expected, TOKENS)
    assert_reloaded(AutoModelForCausalLM.from_pretrained(adapter, base=base), expected, TOKENS)
    assert undo_folder(adapter, tmp_path / "undone", base=base).verified is True
    assert files(tmp_path / "undone") == files(base)

    assert main(["graft", str(adapter), "--base", str(base), "--out", str(tmp_path / "moved")]) == 0
    assert_reloaded(rmoe.load(tmp_path / "moved"), expected, TOKENS)
    assert files(tmp_path / "moved").keys() == files(adapter).keys()


def test_the_sample_is_checked_at_each_load_and_all_bytes_on_request(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SAMPLE_WHOLE", 600)
    monkeypatch.setattr(weight_files, "SAMPLE_BLOCK", 64)
    adapter = tmp_path / "adapter"
    graft_folder(base, adapter, SPEC)  # a gate has 8 x 32 x 4 = 1,024 bytes

    def bump(at: int) -> None:
        def edit(gate: torch.Tensor) -> torch.Tensor:
            gate.view(-1)[at] += 1.0
            return gate

        change(base, GATE, edit)

    bump(20)  # bytes 80 to 83, in no block
    rmoe.load(adapter)
    for refused in (
        lambda: rmoe.load(adapter, verify=True),
        lambda: AutoModelForCausalLM.from_pretrained(adapter, verify=True),
        lambda: undo_folder(adapter, tmp_path / "undone"),
        lambda: move_adapter(adapter, tmp_path / "moved", base),
    ):
        with pytest.raises(RequestError, match="base_sha256 differs"):
            refused()
    assert not (tmp_path / "undone").exists()
    assert not (tmp_path / "moved").exists()
    bump(255)  # the last four bytes
    with pytest.raises(RequestError, match="sample_sha256 differs"):
        rmoe.load(adapter)


def test_digests_are_of_tensors_not_of_files(base: Path, tmp_path: Path) -> None:
    model = rmoe.load(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="9KB")
    one, many = open_weights(base), open_weights(tmp_path / "shards")
    assert len(many.files) > 1
    assert layout_digest(one) == layout_digest(many)
    assert sample_digest(one) == sample_digest(many)
    graft_folder(base, tmp_path / "adapter", SPEC)
    rmoe.load(tmp_path / "adapter", base=tmp_path / "shards", verify=True)


def test_the_sample_against_a_plain_reading(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SAMPLE_WHOLE", 1000)
    monkeypatch.setattr(weight_files, "SAMPLE_BLOCK", 100)
    each = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        data = tensor.numpy().tobytes()
        last = len(data) - 100
        parts = [data[at : at + 100] for at in (0, last // 3, 2 * last // 3, last)]
        each[name] = hashlib.sha256(data if len(data) <= 1000 else b"".join(parts)).hexdigest()
    expected = hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()
    assert sample_digest(open_weights(base)) == expected


# --- saving ------------------------------------------------------------------------------------------------------


def test_save_pretrained_writes_a_standalone_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = at_work(rmoe.load(adapter))
    model.save_pretrained(tmp_path / "standalone")
    model.save_pretrained(adapter)  # also over the adapter
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path / "random")
    shutil.rmtree(base)
    for folder in (tmp_path / "standalone", adapter):
        assert_reloaded(rmoe.load(folder), model, TOKENS)
        assert undo_folder(folder, tmp_path / f"of-{folder.name}").verified is True
    rmoe.load(tmp_path / "random")


def test_a_model_made_from_an_adapters_configuration_is_whole(adapter: Path, tmp_path: Path) -> None:
    config = type(rmoe.load(adapter)).config_class.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "random")
    assert "base" in config.rmoe_graft  # the caller's own stays as it is
    assert_reloaded(rmoe.load(tmp_path / "random"), model, TOKENS)


def test_save_adapter_of_a_model_in_memory(base: Path, tmp_path: Path) -> None:
    model = at_work(graft(rmoe.load(base), SPEC))
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.gate").weight.add_(1.0)
    with pytest.raises(RequestError, match="base is None"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tiny_model("olmoe").save_pretrained(tmp_path / "olmoe")
    with pytest.raises(RequestError, match="allowed: a qwen3_moe model; model_type of this one is olmoe"):
        save_adapter(model, tmp_path / "out", base=tmp_path / "olmoe")
    assert not (tmp_path / "out").exists()
    save_adapter(model, tmp_path / "out", base=base)
    names = open_weights(tmp_path / "out").names(ADAPTER)
    assert [name for name in names if not is_graft_tensor(name)] == [GATE]
    assert_reloaded(rmoe.load(tmp_path / "out", verify=True), model, TOKENS)
    assert undo_folder(tmp_path / "out", tmp_path / "undone").verified is True
    assert files(tmp_path / "undone") == files(base)
    assert undo_folder(tmp_path / "out", tmp_path / "kept", keep_trained=True).verified is False
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert kept.keys() == before.keys()
    assert [name for name in kept if not torch.equal(kept[name], before[name])] == [GATE]
    assert torch.equal(kept[GATE], model.state_dict()[GATE])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_another_dtype_in_memory_is_no_change_of_the_base(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_model("qwen3_moe", dtype=stored).save_pretrained(tmp_path / "base")
    graft_folder(tmp_path / "base", tmp_path / "adapter", SPEC)
    other = torch.float32 if stored == torch.bfloat16 else torch.bfloat16
    model = at_work(rmoe.load(tmp_path / "adapter", dtype=other))
    save_adapter(model, tmp_path / "again")
    assert all(map(is_graft_tensor, open_weights(tmp_path / "again").names(ADAPTER)))
    assert_reloaded(rmoe.load(tmp_path / "again"), model, TOKENS)


def test_a_base_that_changed_under_a_loaded_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = rmoe.load(adapter)
    change(base, GATE, lambda gate: gate + 1)
    with pytest.raises(RequestError, match="sample_sha256 differs"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- requests that are wrong: one line, status 2, nothing written ------------------------------------------------


def no_base(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)


def other_values(base: Path, adapter: Path) -> None:
    change(base, GATE, lambda gate: gate + 1)


def other_shape(base: Path, adapter: Path) -> None:
    change(base, GATE, lambda gate: gate[:, :-1].contiguous())


def other_family(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)
    tiny_model("olmoe").save_pretrained(base)


def grafted_base(base: Path, adapter: Path) -> None:
    shutil.copytree(adapter, base.parent / "copy")
    shutil.rmtree(base)
    (base.parent / "copy").rename(base)


def cut(base: Path, adapter: Path) -> None:
    data = (adapter / ADAPTER).read_bytes()
    (adapter / ADAPTER).write_bytes(data[:-100])


def no_tensors(base: Path, adapter: Path) -> None:
    (adapter / ADAPTER).unlink()


def damaged_pointer(base: Path, adapter: Path) -> None:
    config = json.loads((adapter / "config.json").read_text())
    config["rmoe_graft"]["base"]["path"] = 3
    (adapter / "config.json").write_text(json.dumps(config))


DAMAGES = {
    no_base: "the base has moved",
    other_values: "sample_sha256 differs",
    other_shape: "layout_sha256 differs",
    other_family: "model_type of this one is olmoe",
    grafted_base: "without a graft",
    cut: "graft.safetensors",
    no_tensors: "no weights",
    damaged_pointer: "rmoe_graft.base",
}


def refused(capsys: pytest.CaptureFixture[str], out: Path, *argv: str) -> str:
    assert main([*argv, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not out.exists()
    return line


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_adapter_or_base(
    damage: Callable[[Path, Path], None],
    base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    damage(base, adapter)
    said = DAMAGES[damage]
    with pytest.raises(RequestError, match=said):
        rmoe.load(adapter)
    assert said in refused(capsys, tmp_path / "out", "graft", str(adapter), "--undo")
    assert said in refused(capsys, tmp_path / "out", "finetune", str(adapter), "--data", str(data))
    if damage != no_base:
        assert said in refused(capsys, tmp_path / "out", "graft", str(adapter), "--base", str(base))


def test_an_adapter_in_the_place_of_a_base(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "without a graft" in refused(capsys, out, "graft", str(adapter))
    assert "without a graft" in refused(capsys, out, "graft", str(adapter), "--full")
    assert "without a graft" in refused(capsys, out, "graft", str(adapter), "--base", str(adapter))
    with pytest.raises(RequestError, match="without a graft"):
        rmoe.load(adapter, base=adapter)


def test_a_base_where_there_is_none_to_give(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graft_folder(base, tmp_path / "standalone", SPEC, full=True)
    for folder in (base, tmp_path / "standalone"):
        argv = ("graft", str(folder), "--base", str(base))
        assert "--base" in refused(capsys, tmp_path / "out", *argv)
        for options in ({"base": base}, {"verify": True}):
            with pytest.raises(RequestError, match="base is"):
                rmoe.load(folder, **options)
    undo = ("graft", str(tmp_path / "standalone"), "--undo", "--base", str(base))
    assert "--base" in refused(capsys, tmp_path / "out", *undo)
    missing = ("graft", str(tmp_path / "standalone"), "--base", str(tmp_path / "nowhere"))
    assert "--base" in refused(capsys, tmp_path / "out", *missing)


def test_a_base_in_another_hub_cache_is_found_by_its_path(base: Path, tmp_path: Path) -> None:
    """Such a folder has a Hub cache's layout and is not in this process's."""
    source = tmp_path / "models--org--base" / "snapshots" / ("a" * 40)
    shutil.copytree(base, source)
    graft_folder(source, tmp_path / "made", SPEC)
    pointer = json.loads((tmp_path / "made" / "config.json").read_text())["rmoe_graft"]["base"]
    assert (pointer["path"], pointer["hub"]) == (str(source), None)
    assert rmoe.load(tmp_path / "made").graft_place == source
