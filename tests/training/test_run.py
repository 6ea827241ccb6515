"""Whole runs: what they write, that they repeat, that they go on bit for bit after anything."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

import rmoe
from rmoe import records
from rmoe.compare.evaluate import evaluate_test, measure_routing
from rmoe.data import prepare
from rmoe.errors import RequestError, RunError
from rmoe.records import write_record
from rmoe.training import state as contents
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.disk import bytes_of_a_run
from rmoe.training.environment import hardware
from rmoe.training.evaluation import evaluate
from rmoe.training.learner import ModelLearner
from rmoe.training.loop import Loop
from rmoe.training.metrics import read_metrics
from rmoe.training.place import Ranks, place_of
from rmoe.training.run import Stopped, read_result, train
from rmoe.training.run_folder import RunRecord, locked, read_run, refuse_used, require_same
from tests.host import host_program
from tests.training import tiny


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


class Crash(Exception):
    """Stands for a kill: nothing of ours catches it."""


def crash_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the run die inside the step after `step`, with its checkpoints so far on disk."""
    begin = Loop.begin_step

    def begin_step(self: Loop) -> None:
        if self.step == step:
            raise Crash
        begin(self)

    monkeypatch.setattr(Loop, "begin_step", begin_step)


def interrupted(config, out: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    with monkeypatch.context() as patched:
        crash_after(patched, step)
        with pytest.raises(Crash):
            train(config, out, progress=False)


def test_what_a_run_writes(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model",
        "result.json",
        "run.lock",
    ]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "checkpoint-18",
        "checkpoint-20",
    ]
    files = {path.name for path in finished.rglob("*") if path.is_file()}
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert "training_args.bin" not in files

    record = read_run(finished)
    assert record.config["training"]["max_steps"] == tiny.STEPS
    assert record.router_spec["recurrence"]["width"] == 16
    assert record.versions.code
    assert record.versions.libraries["torch"] == torch.__version__
    assert record.hardware.threads == 1

    result = read_result(finished)
    assert result.steps == tiny.STEPS
    assert result.tokens == tiny.STEPS * 4 * 32
    assert result.corpus.unit == "bits_per_byte"
    assert 0 < result.val < 8
    assert 0 < result.test < 9
    assert result.context.startswith("1 to 31 tokens before it")
    assert "the first 8 of" in result.context
    assert result.parameters.router == 2 * (32 * 16 + 16 * 4) + 2 * 3 * 16 * 16 + 2 * 3 * 16
    assert result.parameters.non_embedding < result.parameters.total
    assert {"val", "train_lm_loss", "aux_loss", "gate_entropy", "load_imbalance"} <= set(result.curves)
    assert result.routing is not None
    assert all(abs(sum(layer) - 1) < 1e-9 for layer in result.routing.load)


def test_the_host_program_has_its_own_settings_again(text, tmp_path):
    run = tmp_path / "run"
    config = tiny.config(text, max_steps=2, warmup_steps=0).with_setting("checkpoints.every", 1)
    with host_program():
        train(config, run, progress=False)
    with host_program():
        evaluate_test(config, run)
    with host_program():
        measure_routing(config, run, "smoe", 32)


def test_a_warm_up_that_takes_the_whole_run_is_said(text, tmp_path, capsys):
    train(tiny.config(text, max_steps=1, warmup_steps=1), tmp_path / "run", progress=False)
    said = "a warm-up of 1 steps in a run of 1: the rate does not reach its peak"
    assert said in capsys.readouterr().err


def test_a_gpu_that_was_not_used_is_not_the_hardware(finished, text, tmp_path, monkeypatch):
    def beside_a_gpu(*asked):
        # For this call alone: torch built with CUDA would look for the GPU.
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
            return hardware(*asked)

    monkeypatch.setattr("rmoe.training.run.hardware", beside_a_gpu)
    result = train(tiny.config(text, max_steps=1, warmup_steps=0), tmp_path / "run", progress=False)
    assert result.hardware.accelerator is None
    assert beside_a_gpu(1).accelerator == beside_a_gpu(1, "cuda").accelerator == "a GPU"


@pytest.mark.parametrize(
    ("has", "precision", "bf16"), [(True, "auto", True), (False, "auto", False), (True, "fp32", False)]
)
def test_emulated_bfloat16_is_none(text, monkeypatch, has, precision, bf16):
    """As `torch.cuda` answers on a GPU before Ampere: yes, unless asked without emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation
    )
    alone = SimpleNamespace(num_processes=1, process_index=0)
    monkeypatch.setattr("rmoe.training.place.PartialState", lambda cpu: alone)
    assert place_of(tiny.config(text, device="cuda", precision=precision)).bf16 is bf16
    if not has:
        with pytest.raises(RequestError, match="this GPU has no bfloat16"):
            place_of(tiny.config(text, device="cuda", precision="bf16"))


def test_ranks_without_a_block_take_part_in_evaluation(finished, text, monkeypatch):
    """Of two blocks and four processes: the last has none, and its sums are zero."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    model, blocks = rmoe.load(finished / "model"), prepare(tiny.config(text).data, 32).valid
    parts = [evaluate(model, blocks, limit=2, ranks=Ranks(4, rank)) for rank in range(4)]
    whole = evaluate(model, blocks, limit=2)
    assert [part.targets for part in parts] == [31, 31, 0, 0]
    assert sum(part.nats for part in parts) == pytest.approx(whole.nats)


def test_metrics_rows(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train_rows] == [3, 6, 9, 12, 15, 18, 20]
    for row in train_rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + row["balance_loss"])
        assert row["balance_loss"] == pytest.approx(0.01, rel=0.5)
        assert len(row["gate_entropy"]) == len(row["load_imbalance"]) == 2
        assert all(0 < value <= 1.3863 for value in row["gate_entropy"])  # ln 4
        assert all(1 <= value <= 4 for value in row["load_imbalance"])
        assert row["tokens"] == row["step"] * 4 * 32
        assert row["tokens_per_s"] > 0
        assert row["peak_mib"] > 10
        assert 0 < row["router_grad_norm"] <= row["grad_norm"]
        assert row["bits_per_byte"] == pytest.approx(row["lm_loss"] / 0.6931, rel=1e-2)
    judged = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in judged] == list(range(2, 21, 2))
    assert all(row["tokens"] == 8 * 31 and row["split"] == "valid" and row["context"] for row in judged)
    assert judged[-1]["loss"] < judged[0]["loss"]


def test_at_least_ten_checkpoints(text, tmp_path, monkeypatch):
    saved = []
    staged = CheckpointStore.staged
    monkeypatch.setattr(
        CheckpointStore, "staged", lambda self, step: (saved.append(step), staged(self, step))[1]
    )
    config = tiny.config(text, max_steps=25)
    train(
        replace(config, checkpoints=replace(config.checkpoints, every=10)), tmp_path / "run", progress=False
    )
    assert saved == [*range(2, 25, 2), 25]


def test_the_same_run_gives_the_same_bits(text, finished, tmp_path):
    train(tiny.config(text), tmp_path / "again", progress=False)
    assert tiny.weights(tmp_path / "again") == tiny.weights(finished)


def test_no_memory_is_read_before_it_is_written(text, finished, tmp_path, monkeypatch):
    """Where torch fills it with NaN, a run has the bits of one where it does not."""
    monkeypatch.setattr("rmoe.training.place.FILL_UNINITIALIZED", True)
    train(tiny.config(text), tmp_path / "filled", progress=False)
    assert tiny.weights(tmp_path / "filled") == tiny.weights(finished)


def test_another_seed_gives_others(text, finished, tmp_path):
    train(tiny.config(text, seed=1), tmp_path / "other", progress=False)
    assert tiny.weights(tmp_path / "other") != tiny.weights(finished)


def test_evaluating_more_often_changes_nothing(text, finished, tmp_path):
    config = tiny.config(text)
    config = replace(config, logging=replace(config.logging, evaluate_every=1, evaluate_blocks=3))
    train(config, tmp_path / "often", progress=False)
    assert tiny.weights(tmp_path / "often") == tiny.weights(finished)


@pytest.mark.parametrize("step", [1, 10, 19])
def test_resume_is_exact(text, finished, tmp_path, monkeypatch, capsys, step):
    """At step 1 there is no checkpoint yet; at 10 it has just been written; at 19 it is a step old."""
    out = tmp_path / "run"
    interrupted(tiny.config(text), out, monkeypatch, step)
    capsys.readouterr()
    train(tiny.config(text), out, resume=True, progress=False)
    err = capsys.readouterr().err
    newest = step - step % 2
    assert (f"at step {newest} of 20" in err) if newest else ("starting at step 0" in err)
    assert tiny.weights(out) == tiny.weights(finished)

    timed = ("tokens_per_s", "peak_mib")
    rows, whole = (read_metrics(folder / "metrics.jsonl") for folder in (out, finished))
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole
    ]


@pytest.mark.parametrize("router", ["smoe-bias", "noisy-topk", slow("smoe-annealed"), slow("remoe")])
def test_resume_carries_what_routers_move_in_training(text, tmp_path, monkeypatch, router):
    """Selection biases, routing noise, schedules, penalties: state that no optimizer holds."""
    config = replace(tiny.config(text, max_steps=12, micro_batch_size=2), router=router, router_option=())
    train(config, tmp_path / "whole", progress=False)
    interrupted(config, tmp_path / "cut", monkeypatch, 7)
    train(config, tmp_path / "cut", resume=True, progress=False)
    assert tiny.weights(tmp_path / "cut") == tiny.weights(tmp_path / "whole")


def test_resume_of_a_finished_run_says_so_and_does_nothing(text, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = train(tiny.config(text), finished, resume=True, progress=False)
    assert result == read_result(finished)
    assert "is finished already" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {finished / "run.lock"}


def test_resume_after_a_kill_between_training_and_result(text, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    result = train(tiny.config(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(finished)
    assert result.val == read_result(finished).val
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in finished.iterdir())


def test_resume_without_a_run_starts_one(text, finished, tmp_path, capsys):
    train(tiny.config(text), tmp_path / "new", resume=True, progress=False)
    assert "starting at step 0" in capsys.readouterr().err
    assert tiny.weights(tmp_path / "new") == tiny.weights(finished)


def test_a_damaged_checkpoint_is_skipped_and_the_run_still_exact(
    text, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    interrupted(tiny.config(text), out, monkeypatch, 13)
    os.truncate(out / "checkpoints" / "checkpoint-12" / "optimizer.safetensors", 100)
    capsys.readouterr()
    train(tiny.config(text), out, resume=True, progress=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "skipped checkpoint-12: size mismatch: optimizer.safetensors"
    assert lines[1].endswith("at step 10 of 20")
    assert tiny.weights(out) == tiny.weights(finished)


def test_going_on_on_another_machine_is_said(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    interrupted(tiny.config(text), out, monkeypatch, 9)
    begun = read_run(out)
    elsewhere = msgspec.structs.replace(begun.hardware, accelerator="a GPU")
    write_record(out / "config.json", msgspec.structs.replace(begun, hardware=elsewhere))
    capsys.readouterr()
    train(tiny.config(text), out, resume=True, progress=False)
    said = f"begun on a GPU, going on on {begun.hardware.cpu}: rounding may differ, and so may the run's bits"
    assert capsys.readouterr().err.splitlines()[0] == said


def test_all_checkpoints_damaged_starts_at_0_and_says_so(text, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    interrupted(tiny.config(text), out, monkeypatch, 9)
    for folder in (out / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    capsys.readouterr()
    train(tiny.config(text), out, resume=True, progress=False)
    err = capsys.readouterr().err
    assert err.count("no manifest.json\n") == 2
    assert "starting at step 0" in err
    assert tiny.weights(out) == tiny.weights(finished)


# --- what ends a run early -----------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Make the loss of some steps (counted from 1) NaN or infinite."""
    begin, compute = Loop.begin_step, ModelLearner.loss
    now = [0]

    def begin_step(self: Loop) -> None:
        now[0] = self.step + 1
        begin(self)

    def loss(self, batch, tokens, sums):
        found = compute(self, batch, tokens, sums)
        return found * value if now[0] in steps else found

    monkeypatch.setattr(Loop, "begin_step", begin_step)
    monkeypatch.setattr(ModelLearner, "loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_batch_is_left_out(text, tmp_path, monkeypatch, capsys, value):
    out = tmp_path / "run"
    poisoned(monkeypatch, {5}, value)
    result = train(tiny.config(text, max_skipped_batches=1, max_steps=10), out, progress=False)
    assert result.skipped_batches == 1
    assert "left out the batch of step 5" in capsys.readouterr().err
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "skipped"] == [5]
    assert all(row["loss"] is not None for row in rows if row["kind"] == "train")


def test_a_bad_batch_moves_nothing(text, tmp_path, monkeypatch):
    """Weights, optimizer and router state after the skipped step are those before it."""
    out = tmp_path / "run"
    config = replace(tiny.config(text, max_steps=10), router="smoe-bias", router_option=())
    poisoned(monkeypatch, {5}, float("nan"))
    interrupted(config, out, monkeypatch, 5)
    before, after = (out / "checkpoints" / f"checkpoint-{step}" for step in (4, 5))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert tiny.sha256(before / name) == tiny.sha256(after / name), name


def test_too_many_bad_batches_stop_the_run_with_everything_saved(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    config = tiny.config(text, max_skipped_batches=2)
    with monkeypatch.context() as patched:
        poisoned(patched, {5, 7, 8, 9}, float("nan"))
        with pytest.raises(RunError) as caught:
            train(config, out, progress=False)
    assert "not finite in 3 batches by step 8" in str(caught.value)
    assert "saved: checkpoint-8" in str(caught.value)
    tensors = contents.load_file(out / "checkpoints" / "checkpoint-8" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())

    with pytest.raises(RunError, match="not finite in 3 batches by step 8"):
        train(config, out, resume=True, progress=False)
    assert not (out / "model").exists()
    result = train(
        replace(config, training=replace(config.training, max_skipped_batches=5)), out, resume=True
    )
    assert result.steps == tiny.STEPS
    assert result.skipped_batches == 3


def test_the_space_asked_for_holds_the_averaged_weights_too(text, tmp_path):
    out, config = tmp_path / "run", tiny.config(text, max_steps=4, average=2, average_every=1)
    train(config, out, progress=False)
    saved, model = (
        sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        for folder in (out / "checkpoints" / "checkpoint-4", out / "model")
    )
    needed = bytes_of_a_run(rmoe.load(out / "model"), keep=2, average=True)
    assert needed == pytest.approx(3 * saved + model, rel=0.1)


def test_disk_full_in_mid_run(text, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    write = contents.save_tensors

    def full(path, tensors, **metadata):
        if path.parent.name == "checkpoint-8" and path.name == contents.OPTIMIZER:
            raise OSError(28, "No space left on device")
        return write(path, tensors, **metadata)

    with monkeypatch.context() as patched:
        patched.setattr(contents, "save_tensors", full)
        with pytest.raises(RunError, match=r"could not save checkpoint-8.*saved: checkpoint-6"):
            train(tiny.config(text), out, progress=False)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    train(tiny.config(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(finished)


def test_disk_full_at_the_final_model(text, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    sync = records.sync
    with monkeypatch.context() as patched:

        def full(path: Path) -> None:
            if "staging" in path.parts:
                raise OSError(28, "No space left on device")
            sync(path)

        patched.setattr(records, "sync", full)
        with pytest.raises(RunError, match=r"could not save .*model.*saved: checkpoint-20"):
            train(tiny.config(text), out, progress=False)
    assert not (out / "model").exists()
    assert not (out / "result.json").exists()
    train(tiny.config(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(finished)


def test_asked_to_stop_it_saves_and_goes_on_exactly(text, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    begin = Loop.begin_step

    def begin_step(self: Loop) -> None:
        begin(self)
        self.stop_requested = self.step == 6

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "begin_step", begin_step)
        with pytest.raises(Stopped, match="stopped at step 7 of 20; saved: checkpoint-7"):
            train(tiny.config(text), out, progress=False)
    train(tiny.config(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(finished)


# --- what is refused -----------------------------------------------------------------------------


def test_a_used_folder_is_refused_and_left_alone(text, finished, tmp_path):
    before = sorted(finished.rglob("*"))
    with pytest.raises(RequestError, match="holds another run"):
        train(tiny.config(text), finished, progress=False)
    assert sorted(finished.rglob("*")) == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(RequestError, match="holds other files"):
            train(tiny.config(text), tmp_path / "mine", resume=resume, progress=False)
    assert {path.name for path in (tmp_path / "mine").iterdir()} <= {"thesis.tex", "run.lock"}

    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="allowed: a folder"):
        train(tiny.config(text), tmp_path / "file", progress=False)


@pytest.mark.parametrize("first", ["config.json", "request.json"])
def test_killed_while_its_first_file_was_written_a_run_begins_anew(tmp_path, first):
    (tmp_path / "run.lock").touch()
    (tmp_path / f"{first}.part").write_bytes(b"{")
    refuse_used(tmp_path, first)
    (tmp_path / "thesis.part").touch()
    with pytest.raises(RequestError, match="holds other files"):
        refuse_used(tmp_path, first)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 3}, "training.seed"),
        ({"batch_size": 8}, "training.batch_size"),
        ({"learning_rate": 0.5}, "training.learning_rate"),
        ({"max_steps": 30}, "training.max_steps"),
        ({"threads": 2}, "training.threads"),
    ],
)
def test_resuming_another_run_is_refused(text, finished, change, field):
    with pytest.raises(RequestError, match=f"{field} is .*as the run in .* was started with"):
        train(tiny.config(text, **change), finished, resume=True, progress=False)


def test_a_run_of_a_version_with_fewer_settings_is_the_same_run(finished, tmp_path):
    """Settings and router options that came later have their defaults, and no other value."""
    stored = read_run(finished)
    earlier = msgspec.to_builtins(stored)
    del earlier["config"]["training"]["average"], earlier["config"]["logging"]["test_blocks"]
    del earlier["model"]["router"]["router"]["constant_experts"]
    write_record(tmp_path / "config.json", msgspec.convert(earlier, RunRecord))
    require_same(tmp_path, stored)
    for record, said in (
        (changed(stored, "config", "training", "average", 2), "training.average is 2; allowed: 0"),
        (
            changed(stored, "model", "router", "router", "constant_experts", 1),
            "constant_experts is 1; allowed: 0",
        ),
    ):
        with pytest.raises(RequestError, match=said):
            require_same(tmp_path, record)


def changed(record: RunRecord, *path_and_value) -> RunRecord:
    """With another value at a path of keys."""
    *path, last, value = path_and_value
    values = msgspec.to_builtins(record)
    inner = values
    for name in path:
        inner = inner[name]
    inner[last] = value
    return msgspec.convert(values, RunRecord)


def test_resuming_on_another_text_is_refused(text, tmp_path, monkeypatch):
    other = tmp_path / "text.txt"
    other.write_bytes(text.read_bytes())
    interrupted(tiny.config(other), tmp_path / "run", monkeypatch, 5)
    other.write_bytes(text.read_bytes().replace(b"argument", b"Argument", 1))
    with pytest.raises(RequestError, match="data_sha256 is "):
        train(tiny.config(other), tmp_path / "run", resume=True, progress=False)
    # The same text elsewhere is the same text.
    train(tiny.config(text), tmp_path / "run", resume=True, progress=False)


def test_two_runs_never_write_into_one_folder(text, tmp_path):
    out = tmp_path / "run"
    with locked(out), pytest.raises(RequestError, match=f"no other run is writing to.*process {os.getpid()}"):
        train(tiny.config(text), out, progress=False)


def test_the_lock_of_a_dead_process_is_free(text, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupted(tiny.config(text), out, monkeypatch, 5)
    (out / "run.lock").write_text("process 1 on elsewhere\n")
    train(tiny.config(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(finished)


def test_an_edited_config_json_is_refused(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupted(tiny.config(text), out, monkeypatch, 5)
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(record | {"extra": 1}))
    with pytest.raises(RequestError, match=r"config\.json"):
        train(tiny.config(text), out, resume=True, progress=False)


@pytest.mark.slow
def test_compiled_training_learns_the_same(text, tmp_path):
    """`--training.compile` through inductor, with gradient accumulation, evaluation and a checkpoint on the way."""
    # Without dropout: inductor draws other masks.
    base = tiny.config(text, max_steps=6, micro_batch_size=2)
    base = replace(base, model=replace(base.model, hidden_dropout=0.0, attention_dropout=0.0))
    for name, compiled in (("plain", False), ("compiled", True)):
        config = replace(base, training=replace(base.training, compile=compiled))
        train(config, tmp_path / name, progress=False)
    plain, compiled = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "compiled")
    )
    assert compiled == pytest.approx(plain, abs=1e-4)


def wsd(text, **more):
    """The whole of what a study of initial scales asks of a run."""
    return tiny.config(
        text,
        schedule="wsd",
        branch_points=(7, 14),
        initial_logit_std=1.0,
        router_learning_rate=3e-3,
        average=3,
        average_every=2,
        **more,
    )


@pytest.fixture(scope="module")
def decayed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("wsd") / "whole"
    return out, train(wsd(text), out, progress=False)


def test_a_wsd_run_keeps_its_branch_points_and_its_average(decayed):
    out, result = decayed
    kept = {int(path.name.partition("-")[2]) for path in (out / "checkpoints").iterdir()}
    assert kept == {7, 14, 18, 20}
    rates = {row["step"]: row["lr"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"}
    assert rates[15] == 1e-3
    assert rates[18] == pytest.approx(0.75 * 1e-3)  # the second of four steps that end at 0
    assert rates[20] == pytest.approx(0.25 * 1e-3)
    assert result.averaged is not None
    assert result.averaged.steps == [16, 18, 20]
    assert result.averaged.test != result.test
    assert abs(result.averaged.test - result.test) < 0.1
    assert sum(result.test_losses.nats) / result.test_losses.targets == pytest.approx(
        result.test * 0.693147, rel=1e-3
    )
    assert len(result.test_losses.nats) == 8
    assert result.initial_logits.start == pytest.approx([1.0, 1.0], rel=2e-3)
    assert result.initial_logits.drawn != pytest.approx([1.0, 1.0], rel=0.1)
    assert {name: len(curve.value[0]) for name, curve in result.layer_curves.items()} == {
        "gate_entropy": 2,
        "logit_std": 2,
        "load_imbalance": 2,
    }


def test_the_average_is_that_of_the_weights_it_names(text, tmp_path, monkeypatch):
    """Against a float64 mean of the weights after each step, taken by hand."""
    seen = []
    end_step = Loop.end_step

    def note(self):
        end_step(self)
        if self.step in (16, 18, 20):
            seen.append({n: t.clone().double() for n, t in contents.unique_tensors(self.model).items()})
        if self.step == 20:
            seen.append({n: t.double() for n, t in self.average._mean.items()})

    monkeypatch.setattr(Loop, "end_step", note)
    train(wsd(text), tmp_path / "run", progress=False)
    *weights, mean = seen
    for name, value in mean.items():
        expected = sum(w[name] for w in weights) / len(weights)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step", [7, slow(15), 17, slow(19)])
def test_a_wsd_run_resumes_exactly(text, decayed, tmp_path, monkeypatch, step):
    whole, result = decayed
    out = tmp_path / "run"
    interrupted(wsd(text), out, monkeypatch, step)
    again = train(wsd(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(whole)
    assert again.averaged == result.averaged
    assert again.test_losses == result.test_losses
    assert again.initial_logits == result.initial_logits


def test_a_checkpoint_without_its_average_is_not_used(text, tmp_path, monkeypatch, capsys):
    from rmoe.training.checkpoint import seal

    out = tmp_path / "run"
    interrupted(wsd(text), out, monkeypatch, 19)
    newest = out / "checkpoints" / "checkpoint-18"
    run = json.loads((newest / "manifest.json").read_text())["manifest"]["run"]
    for name in ("average.safetensors", "manifest.json"):
        (newest / name).unlink()
    seal(newest, 18, run)
    train(wsd(text), out, resume=True, progress=False)
    assert "skipped checkpoint-18: average.safetensors" in capsys.readouterr().err


def test_the_routers_have_their_own_rate(text, tmp_path, monkeypatch):
    groups = []
    end_step = Loop.end_step

    def note(self):
        if self.step == 10:
            names = contents.group_names(self.optimizer, self.model)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            groups.extend(zip(rates, names, strict=True))
        end_step(self)

    monkeypatch.setattr(Loop, "end_step", note)
    train(wsd(text), tmp_path / "run", progress=False)
    rates = {name: rate for rate, names in groups for name in names}
    for name, rate in rates.items():
        routes = ".mlp.gate." in name or "router_shared" in name
        assert rate == pytest.approx(3e-3 if routes else 1e-3), name
    assert any("router_shared" in name for name in rates)


@pytest.mark.parametrize("router", ["hash", "random-smoe"])
def test_a_rate_of_routers_that_train_nothing_is_refused(text, tmp_path, router):
    config = replace(tiny.config(text, router_learning_rate=1e-2), router=router, router_option=())
    with pytest.raises(RequestError, match=r"router_learning_rate is 0.01; allowed: None with router.kind"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
