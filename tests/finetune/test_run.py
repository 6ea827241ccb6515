"""Whole fine-tuning runs: what changes, what does not, what is saved, what resumes."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import rmoe
from rmoe.cli.main import main
from rmoe.data.encode import byte_tokenizer
from rmoe.errors import RequestError, RunError
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.run import FinetuneResult, finetune
from rmoe.graft import undo_folder
from rmoe.graft.base import Base
from rmoe.graft.folder import is_graft_tensor
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.model.weights import ADAPTER, open_weights, read_json, tensor_sha256
from rmoe.training.loop import Loop
from rmoe.training.metrics import read_metrics
from tests.finetune.conftest import instructions, write_lines
from tests.host import host_program
from tests.torchrun import torchrun

FAST: dict[str, Any] = {
    "batch_size": 4,
    "sequence_length": 512,
    "learning_rate": 1e-2,
    "device": "cpu",
    "threads": 1,
}


def tune(source: Path, data: Path, out: Path, resume: bool = False, **options: Any) -> FinetuneResult:
    return finetune(source, data, out, FinetuneConfig(**FAST | options), progress=False, resume=resume)


def own_hashes(folder: Path) -> dict[str, str]:
    return {name: tensor_sha256(tensor) for name, tensor in open_weights(folder).tensors()}


def hashes(folder: Path) -> dict[str, str]:
    """Of all tensors of the model; an adapter's stand before its base's."""
    base = Base.of_config(read_json(folder / "config.json"), str(folder))
    return (own_hashes(Path(str(base.path))) if base else {}) | own_hashes(folder)


def changed(before: Path, after: Path) -> set[str]:
    one, other = hashes(before), hashes(after)
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def joined_hashes(folder: Path) -> dict[str, str]:
    return {name: tensor_sha256(tensor) for name, tensor in rmoe.load(folder).state_dict().items()}


def is_gate(name: str) -> bool:
    return ".mlp.gate." in name and not is_graft_tensor(name)


def test_the_recipe_is_the_papers() -> None:
    run = FinetuneConfig().run_config(52_000).training
    assert (run.max_steps, run.batch_size, run.learning_rate) == (1219, 128, 2e-5)
    assert (run.warmup_steps, run.schedule, run.weight_decay, run.min_learning_rate) == (
        37,
        "cosine",
        0.0,
        0.0,
    )


@pytest.mark.parametrize(
    ("sequences", "processes", "micro", "expected"),
    [
        (24, 1, None, (3, 24, None)),
        (24, 1, 16, (5, 16, 16)),  # a step is whole micro-batches
        (5, 2, 4, (4, 4, 2)),
        (1, 2, None, (2, 2, None)),  # each process has something to do
        (128, 1, 64, (3, 128, 64)),
    ],
)
def test_a_step_has_no_more_sequences_than_there_are(
    sequences: int, processes: int, micro: int | None, expected: tuple[int, int, int | None]
) -> None:
    run = FinetuneConfig(micro_batch_size=micro).run_config(sequences, processes).training
    assert (run.max_steps, run.batch_size, run.micro_batch_size) == expected
    assert run.warmup_steps == 1


def test_the_defaults_train_on_a_small_file(models: Path, alpaca: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(epochs=1.0, device="cpu", threads=1)
    with host_program():
        result = finetune(models / "rmoe", alpaca, tmp_path / "out", config, progress=False)
    assert result.steps == 1
    assert any("experts" in name for name in changed(models / "rmoe", Path(result.model)))


@pytest.mark.parametrize("name", ["rmoe", "olmoe", "grafted"])
def test_it_learns(name: str, models: Path, alpaca: Path, tmp_path: Path) -> None:
    result = tune(models / name, alpaca, tmp_path / "out", valid=alpaca, epochs=8.0)
    losses = [
        row["lm_loss"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if row["kind"] == "train"
    ]
    assert losses[-1] < 0.6 * losses[0]
    assert result.scores["answer_loss_nats"] < losses[0]
    assert (result.examples, result.left_out) == (24, 0)
    model = rmoe.load(result.model)
    assert model.dtype == (torch.float32 if name == "rmoe" else torch.bfloat16)


@pytest.mark.parametrize("train", ["router", "router+gate"])
def test_training_the_router_alone_leaves_every_other_tensor(
    train: str, models: Path, alpaca: Path, tmp_path: Path
) -> None:
    result = tune(models / "grafted", alpaca, tmp_path / "out", train=train, epochs=2.0)
    differ = changed(models / "grafted", Path(result.model))
    assert {name for name in differ if not is_graft_tensor(name)} == (
        {name for name in hashes(models / "grafted") if is_gate(name)} if train == "router+gate" else set()
    )
    assert any("router_cell" in name for name in differ)
    assert any(name.endswith("router_offset.B") for name in differ)

    assert undo_folder(Path(result.model), tmp_path / "undone").verified is True
    assert changed(models / "olmoe", tmp_path / "undone") == set()


@pytest.mark.parametrize("train", ["router", "router+gate", "all"])
def test_training_an_adapter_saves_an_adapter(train: str, models: Path, alpaca: Path, tmp_path: Path) -> None:
    """The same model as from a standalone folder; its own tensors are the graft's and each of the base's that moved."""
    result = tune(models / "adapter", alpaca, tmp_path / "out", train=train, epochs=2.0)
    whole = tune(models / "grafted", alpaca, tmp_path / "whole", train=train, epochs=2.0)
    trained = Path(result.model)
    assert joined_hashes(trained) == joined_hashes(Path(whole.model))
    weights = open_weights(trained)
    own = own_hashes(trained)
    assert weights.files == (ADAPTER,)
    moved = {name for name in changed(models / "grafted", Path(whole.model)) if not is_graft_tensor(name)}
    assert {name for name in own if not is_graft_tensor(name)} == moved
    assert bool(moved) == (train != "router")

    assert undo_folder(trained, tmp_path / "undone").verified is True
    assert changed(models / "olmoe", tmp_path / "undone") == set()
    assert undo_folder(trained, tmp_path / "kept", keep_trained=True).verified is (train == "router")
    assert changed(models / "olmoe", tmp_path / "kept") == moved

    again = tune(trained, alpaca, tmp_path / "again", train="router", epochs=1.0)
    assert own_hashes(Path(again.model)).keys() == own.keys()


@pytest.mark.parametrize("name", ["rmoe", "grafted"])
@pytest.mark.parametrize("freeze", ["none", "router", "router+cell"])
def test_freezing(freeze: str, name: str, models: Path, alpaca: Path, tmp_path: Path) -> None:
    result = tune(models / name, alpaca, tmp_path / "out", freeze=freeze, epochs=2.0)
    differ = changed(models / name, Path(result.model))
    layers = {n for n in hashes(models / name) if ".mlp.gate." in n}
    cell = {n for n in hashes(models / name) if ".router_shared." in n or ".router_cell." in n}
    assert layers
    assert cell
    if freeze == "none":
        assert differ & layers
    else:
        assert not differ & layers
    if freeze == "router+cell":
        assert not differ & cell
    elif name == "rmoe":  # under a frozen graft whose B is zero the cell has no gradient
        assert differ & cell
    assert any("experts" in n for n in differ)


@pytest.mark.parametrize("freeze", ["none", "router+cell"])
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("rmoe", "adapter")), "grafted"]
)
def test_lora(name: str, freeze: str, models: Path, alpaca: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    result = tune(models / name, alpaca, tmp_path / "out", freeze=freeze, lora_rank=2, epochs=2.0)
    total = sum(p.numel() for p in rmoe.load(models / name).parameters())
    assert 0 < result.trained_parameters < total
    differ = changed(models / name, Path(result.model))
    assert any("experts" in n for n in differ)
    assert any("q_proj" in n for n in differ)
    assert any(".mlp.gate." in n for n in differ) == (freeze == "none")
    merged, start = rmoe.load(result.model), rmoe.load(models / name)
    assert merged.dtype == start.dtype
    adapted = peft.PeftModel.from_pretrained(start, tmp_path / "out" / "adapter").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            merged(tokens).logits.float(), adapted(input_ids=tokens).logits.float(), rtol=0.05, atol=0.05
        )


class Killed(BaseException):
    """Ends a run the way a kill does: nothing is saved for it."""


@pytest.mark.parametrize(
    "name", ["olmoe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rmoe", "grafted", "adapter"))]
)
def test_a_killed_run_goes_on_bit_for_bit(
    name: str, models: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the experts it has trained: transformers' own resume drops them for OLMoE and other fused families."""
    whole = tune(models / name, alpaca, tmp_path / "whole", epochs=3.0)
    assert whole.steps > 4
    end_step, seen = Loop.end_step, []

    def kill(self: Loop) -> None:
        seen.append(1)
        if len(seen) == 4:
            raise Killed
        end_step(self)

    monkeypatch.setattr(Loop, "end_step", kill)
    with pytest.raises(Killed):
        tune(models / name, alpaca, tmp_path / "killed", epochs=3.0)
    monkeypatch.undo()
    assert list((tmp_path / "killed" / "checkpoints").iterdir())
    tune(models / name, alpaca, tmp_path / "killed", resume=True, epochs=3.0)
    assert changed(Path(whole.model), tmp_path / "killed" / "model") == set()
    assert any("experts" in n for n in changed(models / name, Path(whole.model)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--lora-rank", "2"]], ids=["full", "lora"])
def test_two_processes_publish_one_model(
    options: list[str], models: Path, alpaca: Path, tmp_path: Path
) -> None:
    """Under torchrun: each takes its part of a batch, one saves; the result is that of one process."""
    out = tmp_path / "out"
    request = [str(models / "rmoe"), "--data", str(alpaca), "--valid", str(alpaca), "--out", str(out)]
    steps = ["--epochs", "4", "--batch-size", "4", "--learning-rate", "0.01", "--sequence-length", "512"]
    command = ["-m", "rmoe.cli.main", "finetune", *request, *steps, "--device", "cpu", *options]
    for more in ([], ["--resume"]):
        done = torchrun(*command, *more)
        assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    rank, settings = (2 if options else 0), {"epochs": 4.0, "sequence_length": 512}
    alone = tune(models / "rmoe", alpaca, tmp_path / "alone", valid=alpaca, lora_rank=rank, **settings)
    assert result["scores"] == pytest.approx(alone.scores, abs=1e-4)
    assert changed(models / "rmoe", out / "model")
    assert (out / "adapter").exists() == bool(options)
    assert not (out / "staging").exists()


def test_another_request_is_not_resumed(models: Path, alpaca: Path, tmp_path: Path) -> None:
    tune(models / "rmoe", alpaca, tmp_path / "out", epochs=1.0)
    with pytest.raises(RequestError, match="learning_rate"):
        tune(models / "rmoe", alpaca, tmp_path / "out", resume=True, epochs=1.0, learning_rate=0.5)
    with pytest.raises(RequestError, match="--out"):
        tune(models / "rmoe", alpaca, tmp_path / "out", epochs=1.0)


def test_a_request_of_a_version_with_fewer_settings_is_the_same_request(
    models: Path, alpaca: Path, tmp_path: Path
) -> None:
    tune(models / "rmoe", alpaca, tmp_path / "out", epochs=1.0)
    request = json.loads((tmp_path / "out" / "finetune.json").read_text())
    del request["config"]["gradient_checkpointing"]
    (tmp_path / "out" / "finetune.json").write_text(json.dumps(request))
    again = tune(models / "rmoe", alpaca, tmp_path / "out", resume=True, epochs=1.0)
    assert again.model == str(tmp_path / "out" / "model")
    with pytest.raises(RequestError, match="gradient_checkpointing is True; allowed: False"):
        tune(models / "rmoe", alpaca, tmp_path / "out", resume=True, epochs=1.0, gradient_checkpointing=True)


def test_from_the_command_line(
    models: Path, alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "finetune",
        str(models / "grafted"),
        "--data",
        str(alpaca),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main([*argv, "--train", "router", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(tmp_path / "out" / "model")
    assert result["trained_parameters"] == 3 * 2 * 8 * 32 + 2 * 3 * (8 * 8 + 8)


# --- requests that are wrong: one line, status 2, nothing written --------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], out: Path, *argv: str) -> str:
    assert main(["finetune", *argv, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not out.exists()
    return line


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "Say it", "input": ""}, "output"),
        ({"instruction": "Say it", "input": "", "output": "  "}, "`output` is empty"),
        ({"instruction": 3, "output": "yes"}, "instruction"),
    ],
)
def test_a_wrong_line_is_named(
    row: dict[str, Any], said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [*instructions(2), row])
    line = refused(capsys, tmp_path / "out", str(models / "rmoe"), "--data", str(data))
    assert "bad.jsonl line 3" in line
    assert said in line


def test_what_does_not_go_together(
    models: Path, alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", ("--data", str(alpaca))
    both = refused(capsys, out, str(models / "rmoe"), *data, "--train", "router", "--freeze", "router")
    assert "--train" in both
    assert "--train" in refused(capsys, out, str(models / "olmoe"), *data, "--train", "router")
    assert "--batch-size" in refused(capsys, out, str(models / "olmoe"), *data, "--batch-size", "0")
    for option, value in (("--epochs", "0"), ("--epochs", "inf"), ("--epochs", "nan"), ("--lora-alpha", "0")):
        assert option in refused(capsys, out, str(models / "olmoe"), *data, option, value)


def test_a_model_without_tokenizer_or_weights(
    models: Path, alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(models / "rmoe", bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(capsys, tmp_path / "out", str(bare), "--data", str(alpaca))
    (bare / "model.safetensors").unlink()
    assert "no weights" in refused(capsys, tmp_path / "out", str(bare), "--data", str(alpaca))


def test_a_model_with_a_table_of_positions(
    models: Path, alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's: no sequence may be longer; its maps are no `Linear`, so LoRA has nothing to be put on."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=320,
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=256,
            eos_token_id=256,
        )
    )
    model.save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    capsys.readouterr()  # its progress bar
    out, given = tmp_path / "out", (str(tmp_path / "gpt2"), "--data", str(alpaca))
    assert "--sequence-length is 512; allowed: at most 256" in refused(capsys, out, *given)
    short = (*given, "--sequence-length", "256")
    assert "--lora-rank is 2; allowed: 0" in refused(capsys, out, *short, "--lora-rank", "2")
    assert main(["finetune", *short, "--epochs", "1", "--out", str(out)]) == 0


@pytest.mark.parametrize("lora", [0, 2])
def test_a_frozen_router_keeps_its_biases(lora: int, alpaca: Path, tmp_path: Path) -> None:
    """They are moved by no gradient; an adapter would not save where they went."""
    settings = RMoEConfig(
        vocab_size=320, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_experts=4, router="smoe-bias"
    )  # fmt: skip
    start = RMoEForCausalLM(settings)
    initialize(start, 0)
    start.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    found = {}
    for freeze in ("none", "router"):
        result = tune(tmp_path / "base", alpaca, tmp_path / freeze, freeze=freeze, lora_rank=lora, epochs=2.0)
        tuned = rmoe.load(result.model)
        found[freeze] = any(
            bool(b.abs().sum()) for name, b in tuned.named_buffers() if "selection_bias" in name
        )
        if lora:
            peft = pytest.importorskip("peft")
            base = rmoe.load(tmp_path / "base")
            adapted = peft.PeftModel.from_pretrained(base, tmp_path / freeze / "adapter").eval()
            ids = torch.arange(40)[None]
            with torch.no_grad():
                torch.testing.assert_close(tuned(ids).logits, adapted(input_ids=ids).logits)
    assert found == {"none": True, "router": False}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_alpha": 16}, "--lora-alpha is 16; allowed: unset without --lora-rank"),
        ({"epochs": 1e308}, "--epochs is 1e+308; allowed: above 0, at most 1,000,000"),
        ({"task": "classification", "packing": False}, "--packing is False; allowed: left out with --task"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        FinetuneConfig(**options)


@pytest.mark.parametrize(
    "name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"]
)
def test_sharding_by_accelerate_is_refused(
    name: str, models: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(RequestError, match=f"{name} is 'true'; allowed: unset: ask for"):
        tune(models / "rmoe", alpaca, tmp_path / "out", epochs=1)
    assert not (tmp_path / "out" / "model").exists()


def test_a_full_disk_is_one_line_that_says_what_is_saved(
    models: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rmoe.training.metrics.MetricsLog.append", full)
    with pytest.raises(
        RunError, match=r"could not write .*No space left on device.*free disk space, then --resume"
    ):
        tune(models / "rmoe", alpaca, tmp_path / "out", epochs=1)
