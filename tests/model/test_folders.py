"""Model folders: what is read, what is refused, and in one line why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM, RMoEForSequenceClassification, initialize
from rmoe.model.auto_code import AUTO_MAP, write_auto_code
from rmoe.model.loading import load
from rmoe.model.weights import (
    INDEX,
    WEIGHTS,
    digest,
    layout_digest,
    open_weights,
    read_json,
    sample_digest,
    tensor_sha256,
    write_index,
)
from tests.model.small import config, model, tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model(router="smoe", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(data))


def shard(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file(
            {n: tensors[n] for n in part}, folder / f"part-{number}.safetensors", metadata={"format": "pt"}
        )
    (folder / WEIGHTS).unlink()
    files = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": files, "metadata": {}}))
    return tensors


def test_load_gives_what_was_saved(folder: Path) -> None:
    saved, loaded = model(router="smoe", num_hidden_layers=2), load(folder)
    assert type(loaded) is RMoEForCausalLM
    assert not loaded.training
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert load(str(folder), dtype=torch.float64).lm_head.weight.dtype == torch.float64
    saved.bfloat16().save_pretrained(folder)
    assert load(folder).lm_head.weight.dtype == torch.bfloat16
    assert load(folder, dtype="float32").lm_head.weight.dtype == torch.float32


def test_fields_are_changed_on_the_way(folder: Path) -> None:
    changed = load(folder, router_aux_loss_coef=0.5, norm_topk_prob=False, experts_implementation="eager")
    assert changed.config.router_aux_loss_coef == 0.5
    assert changed.config.router_spec.gate.renormalize is False  # what follows from a field follows
    assert changed.config._experts_implementation == "eager"
    assert load(folder).config.router_spec.gate.renormalize is True
    assert load(folder, router="olmoe").config.router_spec.gate.renormalize is False
    with pytest.raises(
        RequestError, match=r"router_aux_los is 0\.5; allowed: a field of the rmoe configuration"
    ):
        load(folder, router_aux_los=0.5)
    with pytest.raises(RequestError, match="num_experts_per_tok is 9"):
        load(folder, num_experts_per_tok=9)
    with pytest.raises(
        RequestError, match="hidden_size is 'wide'; allowed: a value that the rmoe configuration"
    ):
        load(folder, hidden_size="wide")


def test_what_is_not_saved_starts_anew(tmp_path: Path) -> None:
    net = model(router="noisy-topk", num_hidden_layers=2).train()
    net.set_routing_noise(3, 5)
    net.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert int(loaded.model.routing_noise_key) == 0
    ids = tokens(1, 5)
    assert (loaded(ids).logits - net.eval()(ids).logits).abs().max() < 1e-5  # rotary frequencies too


def test_load_takes_the_class_that_was_saved(tmp_path: Path, folder: Path) -> None:
    net = RMoEForSequenceClassification(config(num_labels=3))
    initialize(net, 0)
    net.save_pretrained(tmp_path / "classifier")
    loaded = load(tmp_path / "classifier")
    assert type(loaded) is RMoEForSequenceClassification
    assert (loaded(tokens()).logits - net.eval()(tokens()).logits).abs().max() < 1e-6
    for architectures in (None, [], ["NobodysModel"]):
        change(folder, architectures=architectures)
        assert type(load(folder)) is RMoEForCausalLM


@pytest.mark.parametrize(("removed", "shown"), [(1, 1), (3, 3), (4, 3), (5, 3)])
def test_missing_weights_are_named(folder: Path, removed: int, shown: int) -> None:
    tensors = load_file(folder / WEIGHTS)
    gone = sorted(n for n in tensors if "proj" in n)[:removed]
    save_file(
        {n: t for n, t in tensors.items() if n not in gone}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    rest = f" and {removed - shown} more" if removed > shown else ""
    with pytest.raises(RequestError) as caught:
        load(folder)
    assert str(caught.value).endswith(f"missing_keys: {', '.join(gone[:shown])}{rest}")


def test_weights_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"stranger": torch.zeros(2)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RequestError, match="unexpected_keys: stranger"):
        load(folder)
    save_file(tensors | {"lm_head.weight": torch.zeros(2, 2)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"model is .*lm_head\.weight|files that make a model"):
        load(folder)
    change(folder, num_experts="many")
    with pytest.raises(RequestError, match="a model folder or a model of the Hub"):
        load(folder)
    change(folder, num_experts=5, num_experts_per_tok=9)
    with pytest.raises(RequestError, match="num_experts_per_tok is 9"):  # its own words, not wrapped
        load(folder)


def test_shards_are_one_model(folder: Path) -> None:
    whole = digest(open_weights(folder).tensors())
    tensors = shard(folder)
    weights = open_weights(folder)
    assert weights.files == ("part-0.safetensors", "part-1.safetensors")
    assert [*weights.names(weights.files[0]), *weights.names(weights.files[1])] != []
    found = dict(weights.tensors())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert dict(weights.tensors("part-1.safetensors")).keys() == set(weights.names("part-1.safetensors"))
    assert digest(weights.tensors()) == whole
    assert digest({"a": torch.zeros(2)}.items()) != digest({"a": torch.zeros(2, 1)}.items())
    assert digest({"a": torch.zeros(2)}.items()) != digest({"b": torch.zeros(2)}.items())
    assert digest({"a": torch.zeros(2)}.items()) != digest({"a": torch.zeros(1, dtype=torch.float64)}.items())
    write_index(weights)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"] == {n: f"part-{i % 2}.safetensors" for i, n in enumerate(sorted(tensors))}
    assert (folder / INDEX).read_text().endswith("}\n")
    assert torch.equal(load(folder).lm_head.weight, tensors["lm_head.weight"])


def test_hash_of_a_tensor_is_that_of_its_bytes() -> None:
    for tensor in (
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor(3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.zeros(0),
    ):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tensor_sha256(tensor) == hashlib.sha256(raw).hexdigest()
    assert tensor_sha256(torch.zeros(1, requires_grad=True)) == tensor_sha256(torch.zeros(1))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"not safetensors at all")


def outside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": f"../{WEIGHTS}"}}))


def lost(folder: Path) -> None:
    shard(folder)
    (folder / "part-1.safetensors").unlink()


def odd_index(text: str):  # type: ignore[no-untyped-def]
    def damage(folder: Path) -> None:
        nothing(folder)
        (folder / INDEX).write_text(text)

    return damage


DAMAGE = {
    "no config": (no_config, r"allowed: a folder with config\.json"),
    "pickle": (pickled, r"this one has pytorch_model\.bin, a pickle, which can run code when read"),
    "nothing": (nothing, "this one has no weights"),
    "garbage": (garbage, "a safetensors file"),
    "outside": (outside, "a file in the folder of the model.safetensors.index.json"),
    "lost": (lost, r"part-1\.safetensors'?; allowed: a file in the folder"),
    "index not JSON": (odd_index("{"), "a JSON file"),
    "index a list": (odd_index("[]"), "a JSON object"),
    "no map": (odd_index("{}"), "an index with a weight_map"),
    "empty map": (odd_index('{"weight_map": {}}'), "an index with a weight_map"),
    "map a list": (odd_index('{"weight_map": ["a"]}'), "an index with a weight_map"),
    "file a number": (odd_index('{"weight_map": {"a": 3}}'), "an index with a weight_map"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    for read in (open_weights, load):
        with pytest.raises(RequestError, match=message):
            read(folder)


def test_json_must_be_an_object(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for data in (b"3", b"[" * 100_000, b"\xff\xfe", b""):
        path.write_bytes(data)
        with pytest.raises(RequestError, match="a JSON"):
            read_json(path)
    path.write_bytes(b'{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_auto_code_is_added_to_a_configuration(tmp_path: Path) -> None:
    """Nothing else of it changes, non-ASCII text included; one key a line, in order, so that diffs stay small."""
    (tmp_path / "config.json").write_text('{"b": "naïve", "a": 1}', encoding="utf-8")
    write_auto_code(tmp_path, {"code.py": "# é\n"}, {"AutoModel": "code.Model"})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": 1, "b": "naïve", "auto_map": {"AutoModel": "code.Model"}}
    assert [line.split('"')[1] for line in text.splitlines()[1:3]] == ["a", "auto_map"]
    assert text.endswith("}\n")
    assert (tmp_path / "code.py").read_text(encoding="utf-8") == "# é\n"
    write_auto_code(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"] == AUTO_MAP
    for value in AUTO_MAP.values():
        module, name = value.split(".")
        assert name in (tmp_path / f"{module}.py").read_text()


def test_only_the_main_process_writes_the_code(tmp_path: Path) -> None:
    net = model(router="smoe", num_hidden_layers=2)
    net.save_pretrained(tmp_path / "a", is_main_process=True)
    assert (tmp_path / "a" / "modeling_rmoe.py").exists()
    (tmp_path / "b").mkdir()
    net.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b" / "modeling_rmoe.py").exists()


def test_sample_digest_reads_the_ends_and_two_blocks_between(tmp_path: Path) -> None:
    """Of a tensor above 1 MiB four blocks of 4 KiB, of a smaller one all; the files' split does not matter."""
    limit, block = 1 << 20, 1 << 12
    big = torch.arange(limit + 5000, dtype=torch.int64).to(torch.uint8)
    tensors = {"big": big, "small": torch.zeros(limit, dtype=torch.uint8), "other": torch.ones(3)}
    (tmp_path / "config.json").write_text("{}")

    def digests(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        return sample_digest(open_weights(tmp_path)), layout_digest(open_weights(tmp_path))

    def flipped(name: str, at: int) -> dict[str, torch.Tensor]:
        tensor = tensors[name].clone()
        tensor[at] += 1
        return tensors | {name: tensor}

    whole = digests(tensors)
    last = big.numel() - block
    for start in (0, last // 3, 2 * last // 3, last):
        for at in (start, start + block - 1):
            sample, layout = digests(flipped("big", at))
            assert sample != whole[0], at
            assert layout == whole[1]
        for at in (start - 1, start + block):
            if 0 <= at < big.numel():
                assert digests(flipped("big", at)) == whole
    for name, at in (("small", 0), ("small", limit - 1), ("small", limit // 2), ("other", 1)):
        assert digests(flipped(name, at))[0] != whole[0]
    assert digests(tensors | {"other": torch.ones(1, 3)})[1] != whole[1]
    assert digests(tensors | {"other": torch.ones(3, dtype=torch.float64)})[1] != whole[1]
    (tmp_path / WEIGHTS).unlink()
    for number, names in enumerate((("big",), ("other", "small"))):
        save_file({n: tensors[n] for n in names}, tmp_path / f"part-{number}.safetensors")
    files = {"big": "part-0.safetensors", "small": "part-1.safetensors", "other": "part-1.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    assert (sample_digest(open_weights(tmp_path)), layout_digest(open_weights(tmp_path))) == whole
