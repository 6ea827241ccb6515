"""The promises made for each family, on its tiny random model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import rmoe
from rmoe.graft import graft, graft_folder, save_adapter, undo_folder
from rmoe.graft.attach import CELL, OFFSET
from rmoe.graft.folder import is_graft_tensor
from rmoe.model.weights import ADAPTER, open_weights, tensor_sha256
from tests.graft.conftest import SPEC, at_work
from tests.graft.tiny_families import PROMISED, TOKENS, tiny_inputs, tiny_model, try_family
from tests.reload import assert_reloaded

PROMPT = TOKENS[:, :5]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", PROMISED)
def test_outputs_are_bit_identical_at_the_start(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = logits(model)
    after = logits(graft(copy.deepcopy(model), SPEC))
    assert (before - after).abs().max().item() == 0.0
    assert torch.equal(before, after)


@pytest.mark.parametrize("model_type", PROMISED)
def test_first_gradient_reaches_b_only_second_the_cell_and_projectors(model_type: str) -> None:
    model = graft(tiny_model(model_type), SPEC)
    parameters = {name: p for name, p in model.named_parameters() if is_graft_tensor(name)}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    start = logits(model)
    # Many tokens: Phi-MoE's sparse mixer gives a gradient only to tokens whose two best experts nearly tie.
    tokens = torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(0))

    def step() -> set[str]:
        """Take one optimizer step; which graft parameters had a gradient other than zero."""
        optimizer.zero_grad()
        model(input_ids=tokens).logits.float().square().mean().backward()
        moved = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
        with torch.no_grad():  # a step whose size does not depend on the loss's scale
            for p in parameters.values():
                if p.grad is not None and p.grad.abs().max() > 0:
                    p.grad *= 0.01 / p.grad.abs().max()
        optimizer.step()
        return moved

    offsets = {name for name in parameters if name.endswith(f"{OFFSET}.B")}
    assert step() == offsets
    assert not torch.equal(logits(model), start)
    assert step() == set(parameters)


@pytest.mark.parametrize("model_type", PROMISED)
def test_greedy_generation_is_the_same_with_and_without_cache(model_type: str) -> None:
    plain = tiny_model(model_type)
    model = at_work(graft(copy.deepcopy(plain), SPEC))

    def tokens(of: PreTrainedModel, use_cache: bool) -> Tensor:
        return of.generate(PROMPT, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None)

    assert torch.equal(tokens(plain, True), tokens(plain, False)), (
        "the family itself must agree for the test to say much"
    )
    assert torch.equal(tokens(model, True), tokens(model, False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family `original` (shards, bfloat16 for every second one) and both forms of its graft.

    `grafted` is a standalone folder and `adapter` an adapter; `trained` and `retrained` are those, trained and saved.
    """
    root = tmp_path_factory.mktemp("families")
    for number, model_type in enumerate(PROMISED):
        family = root / model_type
        dtype = torch.bfloat16 if number % 2 else torch.float32
        # Loaded once before it is saved: transformers keeps some tensors in float32 whatever the rest is.
        tiny_model(model_type, dtype=dtype).save_pretrained(family / "seed")
        rmoe.load(family / "seed").save_pretrained(
            family / "original", max_shard_size="9KB" if number % 2 else "1GB"
        )
        graft_folder(family / "original", family / "grafted", SPEC, full=True)
        at_work(rmoe.load(family / "grafted")).save_pretrained(family / "trained")
        graft_folder(family / "original", family / "adapter", SPEC)
        save_adapter(at_work(rmoe.load(family / "adapter")), family / "retrained")
    return root


@pytest.mark.parametrize("form", ["grafted", "adapter"])
@pytest.mark.parametrize("model_type", PROMISED)
def test_a_grafted_folder_loads_as_the_function_it_was(model_type: str, form: str, folders: Path) -> None:
    original, model = (
        rmoe.load(folders / model_type / "original"),
        rmoe.load(folders / model_type / form),
    )
    assert model.dtype == original.dtype
    assert any(f".{OFFSET}." in name for name in model.state_dict())
    assert torch.equal(logits(original), logits(model))


@pytest.mark.parametrize("model_type", PROMISED)
def test_an_adapter_is_the_same_model_and_holds_the_grafts_tensors_alone(
    model_type: str, folders: Path
) -> None:
    for adapter, standalone in (("adapter", "grafted"), ("retrained", "trained")):
        weights = open_weights(folders / model_type / adapter)
        own = set(weights.names(ADAPTER))
        assert weights.files == (ADAPTER,)
        assert own
        assert all(map(is_graft_tensor, own))
        joined, whole = (
            rmoe.load(folders / model_type / adapter),
            rmoe.load(folders / model_type / standalone),
        )
        assert_reloaded(joined, whole, TOKENS)
        assert joined.generation_config == whole.generation_config


def test_save_then_load_in_a_fresh_process(folders: Path) -> None:
    here = {t: tensor_sha256(logits(rmoe.load(folders / t / "trained"))) for t in PROMISED}
    program = (
        "import json, sys, rmoe\n"
        "from tests.graft.test_families import logits\n"
        "from rmoe.model.weights import ADAPTER, open_weights, tensor_sha256\n"
        "root, *types = sys.argv[1:]\n"
        "print(json.dumps({t: tensor_sha256(logits(rmoe.load(f'{root}/{t}/trained'))) for t in types}))\n"
    )
    command = [sys.executable, "-c", program, str(folders), *PROMISED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(done.stdout.splitlines()[-1]) == here
    untrained = {t: tensor_sha256(logits(rmoe.load(folders / t / "grafted"))) for t in PROMISED}
    assert all(here[t] != untrained[t] for t in PROMISED)


@pytest.mark.parametrize("model_type", PROMISED)
@pytest.mark.parametrize("state", ["grafted", "trained", "adapter", "retrained"])
def test_undo_gives_the_original_back(model_type: str, state: str, folders: Path, tmp_path: Path) -> None:
    report = undo_folder(folders / model_type / state, tmp_path / "undone")
    assert report.verified is True
    assert report.removed_tensors > 0
    original, undone = folders / model_type / "original", tmp_path / "undone"
    if state != "trained":  # file for file, byte for byte
        assert {p.name: p.read_bytes() for p in undone.iterdir()} == {
            p.name: p.read_bytes() for p in original.iterdir()
        }
    before, after = rmoe.load(original).state_dict(), rmoe.load(undone).state_dict()
    assert list(before) == list(after)
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)


def test_the_list_says_why_not() -> None:
    olmoe = try_family("olmoe")
    assert olmoe.read
    assert olmoe.graft
    two_stacks = try_family("nllb-moe")
    assert not two_stacks.graft
    assert "one stack" in two_stacks.note


def test_the_cell_belongs_to_the_backbone() -> None:
    model = graft(tiny_model("olmoe"), SPEC)
    owners = {name.rpartition(f"{CELL}.")[0] for name, _ in model.named_parameters() if f"{CELL}." in name}
    assert owners == {"model."}
