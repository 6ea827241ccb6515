"""What one optimizer step does, however it is cut into micro-batches."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from rmoe.data import prepare
from rmoe.routing.contract import RouterStats
from rmoe.training.accounting import StepSums, Window
from rmoe.training.build import build_model, model_config
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.learner import ModelLearner
from rmoe.training.loop import Loop
from rmoe.training.metrics import read_metrics
from rmoe.training.place import place_of
from rmoe.training.plan import StepPlan
from rmoe.training.run import make_learner
from tests.training import tiny


class Same(Dataset):
    """One block again and again: then every way to cut a batch must give the same step."""

    def __init__(self, block: dict[str, torch.Tensor]) -> None:
        self.block = block

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.block


def loop_of(config, out: Path, dataset: object = None, model: object = None) -> Loop:
    corpus = prepare(config.data, config.training.sequence_length)
    if model is None:
        model = build_model(model_config(config, corpus.vocab_size), config.training.seed)
    learner, accelerator = make_learner(model, config, out, place_of(config))
    return Loop(
        learner,
        config.training,
        replace(StepPlan.of(config), evaluate_every=None),
        accelerator,
        dataset=corpus.train if dataset is None else dataset,
        data_sha256="",
        store=CheckpointStore(out, "test"),
        in_unit=lambda split, loss: {"nats": loss},
        evaluate=lambda model: pytest.fail("no evaluation was asked for"),
    )


def quiet(config):
    """No dropout, a loud balance loss, no evaluation."""
    model = replace(config.model, hidden_dropout=0.0, attention_dropout=0.0, router_aux_loss_coef=1.0)
    return replace(config, model=model, logging=replace(config.logging, every=1, evaluate_every=1000))


def run(config, out: Path, dataset: object = None) -> Loop:
    out.mkdir()
    loop = loop_of(config, out, dataset)
    loop.run()
    return loop


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_does_not_depend_on_accumulation(text, tmp_path, micro):
    """Four equal blocks, whole or in micro-batches: same loss, same balance loss, same weights."""
    config = quiet(tiny.config(text, max_steps=3))
    block = prepare(config.data, 32).train[0]
    whole = run(config, tmp_path / "whole", Same(block))
    cut = replace(config, training=replace(config.training, micro_batch_size=micro))
    parts = run(cut, tmp_path / "parts", Same(block))
    assert parts.learner.forward_passes == 4 // micro

    a, b = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "whole", tmp_path / "parts"))
    for row, other in zip(a, b, strict=True):
        for name in ("lm_loss", "balance_loss", "grad_norm", "router_grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-4), name
        assert row["balance_loss"] > 0.5  # it is there to be multiplied
        assert other["load_imbalance"] == row["load_imbalance"]
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5), name


def test_routers_move_once_per_step_by_the_sums_of_its_micro_batches(text, tmp_path, monkeypatch):
    config = replace(
        quiet(tiny.config(text, max_steps=3, micro_batch_size=1)), router="smoe", router_option=()
    )
    out = tmp_path / "run"
    out.mkdir()
    loop = loop_of(config, out)
    calls: list[tuple[RouterStats, int, int]] = []
    noise: list[tuple[int, int]] = []
    monkeypatch.setattr(
        loop.model, "update_routers", lambda stats, step, total: calls.append((stats, step, total))
    )
    monkeypatch.setattr(loop.model, "set_routing_noise", lambda seed, step: noise.append((seed, step)))
    loop.run()
    assert [(step, total) for _, step, total in calls] == [(1, 3), (2, 3), (3, 3)]
    for stats, _, _ in calls:
        assert int(stats.tokens) == 4 * 32
        assert stats.counts.sum(-1).tolist() == [4 * 32 * 2] * 2
    assert noise == [(0, 0), (0, 4), (0, 8)]


def test_batches_are_those_of_the_stateless_order(text, tmp_path, monkeypatch):
    from rmoe.data.order import block_number

    config = quiet(tiny.config(text, max_steps=3, micro_batch_size=2))
    out = tmp_path / "run"
    out.mkdir()
    loop = loop_of(config, out)
    seen: list[torch.Tensor] = []
    compute = ModelLearner.loss

    def loss(self, batch, *others):
        seen.extend(batch["input_ids"].cpu())
        return compute(self, batch, *others)

    monkeypatch.setattr(ModelLearner, "loss", loss)
    loop.run()
    blocks = loop.dataset
    assert len(seen) == 12
    for example, ids in enumerate(seen):
        assert torch.equal(ids, blocks[block_number(len(blocks), 0, example)]["input_ids"])


def test_a_model_keeps_its_cache_setting(text, tmp_path):
    assert loop_of(tiny.config(text), tmp_path).model.config.use_cache is True


def test_transformers_own_moe_trains_too(text, tmp_path):
    """No routers of ours, a balance loss without its weight: the split is the same."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = quiet(tiny.config(text, max_steps=2, micro_batch_size=2))
    tmp_path.joinpath("run").mkdir()
    torch.manual_seed(0)
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
        )
    )  # fmt: skip
    other = loop_of(config, tmp_path / "run", model=mixtral)
    other.run()
    first = read_metrics(other.metrics.path)[0]
    assert first["balance_loss"] == pytest.approx(0.5 * 2.0, rel=0.1)  # transformers' loss counts k = 2 times
    assert first["lm_loss"] == pytest.approx(5.545, rel=0.02)  # ln 256


def test_step_sums_on_one_rank():
    sums = StepSums()
    stats = RouterStats(
        torch.tensor([[1, 3]]), torch.tensor(2), torch.tensor([0.5]), torch.tensor([0]), torch.tensor([2.0])
    )
    sums.add(torch.tensor(1.0), torch.tensor(0.25), stats)
    sums.add(torch.tensor(2.0), torch.tensor(0.25), stats)
    assert sums.finish(finite=True, stop=False) == (3.0, 0.5, True, False)
    assert sums.finish(finite=False, stop=True) == (3.0, 0.5, False, True)
    assert sums.stats is not None
    assert sums.stats.counts.tolist() == [[2, 6]]
    bad = StepSums()
    bad.add(torch.tensor(float("nan")), torch.tensor(0.0), None)
    assert bad.finish(finite=True, stop=False)[2] is False


def test_window_survives_a_checkpoint():
    import msgspec

    stats = RouterStats(
        torch.tensor([[1, 3]]), torch.tensor(2), torch.tensor([0.5]), torch.tensor([1]), torch.tensor([2.0])
    )
    window = Window()
    window.add(1.0, 0.5, 2, stats)
    window = msgspec.json.decode(msgspec.json.encode(window), type=Window)
    window.add(3.0, 0.5, 2, stats)
    window.seconds = 2.0
    assert window.row() == {
        "loss": 2.5,
        "lm_loss": 2.0,
        "balance_loss": 0.5,
        "tokens_per_s": 2.0,
        "gate_entropy": [0.25],
        "logit_std": [1.0],
        "load_imbalance": [1.5],
        "dropped": 0.25,
    }
    assert Window().row()["loss"] is None


def test_trackers_get_every_number(tmp_path):
    from accelerate.tracking import GeneralTracker

    from rmoe.training.hooks import Trackers

    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False

        def __init__(self) -> None:
            super().__init__()
            self.seen: list = []

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values) -> None:
            self.seen.append(values)

        def log(self, values, step=None, **_) -> None:
            self.seen.append((step, values))

        def finish(self) -> None:
            self.seen.append("finished")

    notes = Notes()
    hook = Trackers(Accelerator(cpu=True, log_with=[notes]), {"training.seed": 3, "plugin": (), "a.b": None})
    hook.begin(None)
    hook.log(None, {"kind": "train", "step": 5, "loss": 2.5, "load_imbalance": [1.0, 1.5], "lr": None})
    hook.log(None, {"kind": "eval", "step": 5, "split": "valid", "loss": 2.0})
    hook.end()
    assert notes.seen == [
        {"training.seed": 3, "plugin": "()", "a.b": "None"},
        (5, {"train/loss": 2.5, "train/load_imbalance/0": 1.0, "train/load_imbalance/1": 1.5}),
        (5, {"eval/loss": 2.0}),
        "finished",
    ]


def test_hooks_are_called_in_step_and_ended_after_an_error(text, tmp_path, monkeypatch):
    from rmoe.training.hooks import Hook

    class Notes(Hook):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def begin(self, loop) -> None:
            self.seen.append(f"begin {loop.step}")

        def step_begin(self, loop) -> None:
            self.seen.append(f"from {loop.step}")

        def step_end(self, loop) -> None:
            self.seen.append(f"to {loop.step}" + " ended" * loop.ended)

        def log(self, loop, row) -> None:
            self.seen.append(f"{row['kind']} {row['step']}")

        def end(self) -> None:
            self.seen.append("end")

    def watched(out: Path, fail: bool) -> list[str]:
        out.mkdir()
        notes = Notes()
        loop = loop_of(quiet(tiny.config(text, max_steps=2)), out)
        loop.hooks = [notes]
        if fail:
            monkeypatch.setattr(loop, "take_step", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loop.run()
        else:
            loop.run()
        return notes.seen

    steps = ["from 0", "to 1", "train 1", "from 1", "to 2 ended", "train 2"]
    assert watched(tmp_path / "whole", fail=False) == ["begin 0", *steps, "end"]
    assert watched(tmp_path / "failed", fail=True) == ["begin 0", "from 0", "end"]


def test_the_clock_does_not_count_hooks(text, tmp_path, monkeypatch):
    from rmoe.training.hooks import Hook

    now = [0.0]

    class Slow(Hook):
        def wait(self, *_: object) -> None:
            now[0] += 1.0

        begin = step_begin = step_end = log = wait

    monkeypatch.setattr("rmoe.training.loop.time.perf_counter", lambda: now[0])
    loop = loop_of(quiet(tiny.config(text, max_steps=2)), tmp_path)
    loop.hooks = [Slow()]
    loop.run()
    assert (now[0], loop.train_seconds) == (7.0, 0.0)


def test_nothing_of_trainer_is_imported():
    """transformers' Trainer, its arguments, state and control; callbacks for users' own Trainer stand apart."""
    import rmoe

    for path in Path(rmoe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in (module, *names):
                assert "Trainer" not in name or path.name in ("callback.py", "updates.py"), path
                assert not name.startswith(("transformers.trainer", "transformers.training_args")), path
                assert name != "TrainingArguments", path


def test_ranks_keep_their_own_buffers(tmp_path: Path) -> None:
    """DDP would give every rank the first one's key of the routing noise."""
    config = tiny.config(tmp_path)
    accelerator = make_learner(build_model(model_config(config, 64), 0), config, tmp_path, place_of(config))[
        1
    ]
    assert accelerator.ddp_handler is not None
    assert not accelerator.ddp_handler.broadcast_buffers
