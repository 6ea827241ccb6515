"""What a checkpoint holds: complete, fitting, or refused before anything is loaded."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rmoe.data import prepare
from rmoe.training import state as contents
from rmoe.training.accounting import Window
from rmoe.training.build import build_model, model_config
from rmoe.training.checkpoint import Damaged
from rmoe.training.storage import Whole
from tests.training import tiny

OPTIMIZER_NAME = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def model(text):
    config = tiny.config(text)
    return build_model(model_config(config, prepare(config.data, 32).vocab_size), seed=0)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of a whole checkpoint's files, to be damaged behind the manifest's back."""
    return Path(shutil.copytree(finished / "checkpoints" / "checkpoint-18", tmp_path / "checkpoint"))


def edit(name: str, change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def edit_state(**changes):
    def damage(folder: Path) -> None:
        state = msgspec.structs.replace(contents.read_state(folder), **changes)
        contents.write_state(folder, state)

    return damage


def text_file(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


M, O, S = contents.MODEL, contents.OPTIMIZER, contents.STATE
HEAD = "lm_head.weight"
DAMAGE = {
    "missing weight": (edit(M, lambda t: t.pop(HEAD)), "model.safetensors: lm_head.weight is missing"),
    "extra weight": (
        edit(M, lambda t: t.update(x=torch.ones(1))),
        "model.safetensors: x is not in this model",
    ),
    "other shape": (
        edit(M, lambda t: t.update({HEAD: torch.ones(3, 3)})),
        r"lm_head.weight has shape \[3, 3\]",
    ),
    "other dtype": (edit(M, lambda t: t.update({HEAD: t[HEAD].half()})), "lm_head.weight is F16"),
    "model not safetensors": (text_file(M, "hello"), "model.safetensors: "),
    "moments of another model": (
        edit(O, lambda t: t.update({"a.b/exp_avg": torch.ones(1)})),
        "a.b is no trained",
    ),
    "moment of another shape": (
        edit(O, lambda t: t.update({f"{OPTIMIZER_NAME}/exp_avg": torch.ones(2)})),
        r"down_proj/exp_avg has shape \[2\]",
    ),
    "optimizer not safetensors": (text_file(O, ""), "optimizer.safetensors: "),
    "state not JSON": (text_file(S, "{"), "training_state.json: "),
    "state a list": (text_file(S, "[]"), "training_state.json: "),
    "state of another version": (edit_state(schema_version=7), "has version 7, not 1"),
    "a parameter without a group": (edit_state(param_groups=[]), "is without optimizer state"),
    "a group of another model": (
        lambda folder: edit_state(
            param_groups=[*contents.read_state(folder).param_groups, {"params": ["q"]}]
        )(folder),
        "q is not trained here",
    ),
}


def check(folder: Path, model) -> None:
    Whole(model).check(folder, contents.read_state(folder))


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused_before_loading(folder, model, kind):
    damage, reason = DAMAGE[kind]
    damage(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Damaged, match=reason):
        check(folder, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_whole_one_is_accepted(folder, model):
    check(folder, model)


def test_tied_weights_have_one_name_and_stay_tied(tmp_path, text):
    from rmoe.model import RMoEConfig

    def build(seed: int):
        return build_model(
            RMoEConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, tie_word_embeddings=True), seed
        )

    saved, loaded = build(0), build(1)
    contents.save_tensors(tmp_path / contents.MODEL, contents.unique_tensors(saved))
    assert "lm_head.weight" not in load_file(tmp_path / M)
    Whole(loaded).load_model(tmp_path)
    assert torch.equal(loaded.lm_head.weight, saved.model.embed_tokens.weight)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_optimizer_comes_back_bit_for_bit(tmp_path, model):
    def optimizer() -> torch.optim.Optimizer:
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        return torch.optim.AdamW(
            [{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.1, fused=True
        )

    first = optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    first.step()
    contents.save_tensors(tmp_path / contents.MODEL, contents.unique_tensors(model))
    contents.save_tensors(tmp_path / contents.OPTIMIZER, contents.optimizer_tensors(first, model))
    groups = contents.group_settings(first, model)
    groups = msgspec.json.decode(msgspec.json.encode(groups))  # the way it goes to disk and back

    second = optimizer()
    state = contents.TrainingState(
        step=1, seed=0, data_sha256="", batch_size=1, sequence_length=1, skipped_batches=0, train_seconds=0.0,
        pending=Window(), scheduler={}, param_groups=groups, optimizer_tensors=3 * 4, host_random=[],
    )  # fmt: skip
    Whole(model).load_optimizer(tmp_path, state, second)
    assert [{k: v for k, v in g.items() if k != "params"} for g in second.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in first.param_groups
    ]
    for parameter in model.parameters():
        for slot, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][slot], value), slot

    fewer = msgspec.structs.replace(state, param_groups=[{"params": groups[0]["params"]}])
    for wrong, reason in ((fewer, "without optimizer state"), (state, "optimizer tensors, not 12")):
        with pytest.raises(Damaged, match=reason):
            Whole(model).check(tmp_path, wrong)


def test_random_generators_come_back(tmp_path):
    host, tensors = contents.capture_random(torch.device("cpu"))
    contents.save_random(tmp_path, [{"cpu": torch.zeros(8, dtype=torch.uint8)}, tensors])
    host = msgspec.json.decode(msgspec.json.encode(host), type=contents.HostRandom)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    expected = draw()
    draw()
    contents.restore_random(host, contents.load_random(tmp_path, rank=1), torch.device("cpu"))
    assert draw() == expected
    assert contents.load_random(tmp_path, rank=2) == {}
