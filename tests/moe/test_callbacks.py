"""Both callbacks under a plain `transformers.Trainer`."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

import rmoe
from rmoe.errors import RequestError
from rmoe.moe import Recorder, RoutingCallback
from rmoe.routing.zoo import resolve
from tests.analysis.tiny_rmoe import tiny_rmoe
from tests.graft.conftest import SPEC
from tests.graft.tiny_families import tiny_model

ROWS = torch.randint(3, 60, (24, 10), generator=torch.Generator().manual_seed(0))


def trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    arguments = {
        "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 2, "learning_rate": 1e-3, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    return Trainer(model, TrainingArguments(str(folder), **{**arguments, **settings}), train_dataset=rows)


@pytest.mark.parametrize("name", ["olmoe", "rmoe", "graft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_routing_is_logged_with_the_step(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """Without training (rate 0) the values are those of the model's own records of the step's batches."""
    model = tiny_rmoe("rmoe") if name == "rmoe" else tiny_model("olmoe")
    if name == "graft":
        model = rmoe.graft.graft(model, SPEC)
    settings = {
        "learning_rate": 0.0,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": checkpointing,
    }
    job = trainer(model, tmp_path, max_steps=2, **settings)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    job.add_callback(RoutingCallback(job, per_layer=True))
    job.train()
    (logged,) = [row for row in job.state.log_history if "routing/entropy" in row]
    assert logged["step"] == 2
    ids = torch.cat(seen[2:])  # of the second step's two micro-batches
    records = Recorder(model.eval())(ids)
    assert len(seen[2:]) - 1 == 2  # the recorder's own call is the last
    counts = torch.stack(
        [torch.bincount(r.experts.flatten(), minlength=r.num_experts) for r in records]
    ).float()
    load = counts / counts.mean(-1, keepdim=True)
    assert logged["routing/load_max"] == pytest.approx(float(load.max()))
    assert logged["routing/load_p05"] == pytest.approx(float(load.flatten().quantile(0.05)))
    assert logged["routing/dead_experts"] == float((counts == 0).sum())
    assert logged["routing/max_violation"] == pytest.approx(float((load.amax(-1) - 1).mean()))
    entropy = torch.stack([-(r.probs * r.probs.log()).sum(-1).mean() for r in records])
    assert logged["routing/entropy"] == pytest.approx(float(entropy.mean()), rel=1e-4)
    first = Recorder(model).layers[0].name
    assert logged[f"routing/{first}/entropy"] == pytest.approx(float(entropy[0]), rel=1e-4)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


@pytest.mark.parametrize("settings", [{"logging_steps": 2}, {"logging_strategy": "epoch"}])
def test_the_trainers_own_entries_stay(settings: dict[str, Any], tmp_path: Path) -> None:
    """As without the callback, and routing beside each."""
    entries = {}
    for listening in (False, True):
        job = trainer(tiny_model("olmoe"), tmp_path, max_steps=-1, num_train_epochs=2, **settings)
        if listening:
            job.add_callback(RoutingCallback(job))
        job.train()
        entries[listening] = [row["step"] for row in job.state.log_history if "loss" in row]
    assert entries[True] == entries[False]
    assert [row["step"] for row in job.state.log_history if "routing/entropy" in row] == entries[False]


def test_a_training_that_failed_leaves_no_hooks_to_the_next(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    job = trainer(model, tmp_path)

    def hooks() -> int:
        return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())

    class FailsAtFirst(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append(hooks())
            if len(found) == 1:
                raise ZeroDivisionError

    before, found = hooks(), list[int]()
    job.add_callback(RoutingCallback(job))
    job.add_callback(FailsAtFirst())
    with pytest.raises(ZeroDivisionError):
        job.train()
    job.train()
    assert set(found) == {found[0]} != {before}
    assert hooks() == before


def test_routing_reaches_the_trackers(tmp_path: Path) -> None:
    """Trackers are callbacks that are called before a user's."""
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    job = trainer(tiny_model("mixtral"), tmp_path, logging_steps=1, max_steps=2)
    job.add_callback(Tracker())
    job.add_callback(RoutingCallback(job))
    job.train()
    assert [("routing/max_violation" in logs, "loss" in logs) for logs in seen[:4]].count((True, False)) == 2


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    job = trainer(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)), tmp_path)
    job.add_callback(RoutingCallback(job))
    with pytest.raises(RequestError, match="a model with MoE layers"):
        job.train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_biases_move_as_the_counts_of_the_step_say(accumulation: int, tmp_path: Path) -> None:
    spec = resolve("deepseek-v3")
    model = tiny_rmoe("deepseek-v3")
    stats: list[Any] = []
    model.model.register_forward_hook(lambda module, args, output: stats.append(output.router_stats))
    callbacks = trainer(model, tmp_path, gradient_accumulation_steps=accumulation)
    callbacks.add_callback(rmoe.RouterUpdates())
    want = [torch.zeros(model.config.num_experts) for _ in model.routers]
    callbacks.train()
    rate = spec.balance.bias_update_rate
    for step in range(4):
        part = stats[step * accumulation : (step + 1) * accumulation]
        counts = sum(one.counts for one in part)
        for layer in range(len(want)):
            load = counts[layer]
            want[layer] += rate * torch.sign(load.sum() - len(load) * load).float()
    assert torch.stack(want).any()
    for router, bias in zip(model.routers, want, strict=True):
        (found,) = [b for name, b in router.named_buffers() if name.endswith("bias")]
        torch.testing.assert_close(found, bias)


def test_a_training_that_ended_with_an_error_leaves_no_second_count(tmp_path: Path) -> None:
    model = tiny_rmoe("deepseek-v3")
    updates = rmoe.RouterUpdates()
    updates.on_train_begin(None, None, None, model=model)
    updates.on_train_begin(None, None, None, model=model)
    model.train()(input_ids=torch.zeros(1, 8, dtype=torch.long))
    assert updates._stats is not None
    assert updates._stats.counts.sum() == 8 * model.config.num_experts_per_tok * len(model.routers)
    updates.on_train_end(None, None, None)
    assert not model.model._forward_hooks


@pytest.mark.parametrize("router", ["deepseek-v3", "quantile-balance"])  # without and with sums of their own
def test_updates_take_the_sums_of_all_ranks(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, given = tiny_rmoe(router), [], []
    model.model.register_forward_hook(lambda module, args, output: seen.append(output.router_stats))
    job = trainer(model, tmp_path, max_steps=1)
    job.add_callback(rmoe.RouterUpdates())
    monkeypatch.setattr(model.model, "update_routers", lambda stats, step, steps: given.append(stats))

    def as_on_two_ranks(*_: Any) -> None:
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))

    monkeypatch.setattr(job.optimizer or job.create_optimizer(), "step", as_on_two_ranks)
    job.train()
    ((own,), (both,)) = seen, given
    assert (own.observed is None) == (router == "deepseek-v3")
    for mine, total in zip(own, both, strict=True):
        assert mine is total is None or torch.equal(total, 2 * mine)


@pytest.mark.parametrize(("copied", "warns"), [(None, True), (["gate"], False)])
def test_an_adapter_that_would_lose_the_biases_is_warned_of(
    copied: list[str] | None, warns: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=copied)
    job = trainer(peft.get_peft_model(tiny_rmoe("deepseek-v3"), config), tmp_path, max_steps=1)
    job.add_callback(rmoe.RouterUpdates())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job.train()
    assert any("the adapter does not save them" in str(one.message) for one in caught) == warns


def test_router_updates_need_an_rmoe_model(tmp_path: Path) -> None:
    config = OlmoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    job = trainer(OlmoeForCausalLM(config), tmp_path)
    job.add_callback(rmoe.RouterUpdates())
    with pytest.raises(RequestError, match="an RMoE model"):
        job.train()


@pytest.mark.parametrize("router", ["noisy-topk", "gshard-sampled"])
def test_a_resumed_training_draws_the_noise_of_one_without_a_break(router: str, tmp_path: Path) -> None:
    weights = {}
    for name, stops in {"whole": (4,), "resumed": (2, 4)}.items():
        for stop in stops:
            job = trainer(
                tiny_rmoe(router), tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2, seed=3,
                gradient_accumulation_steps=2, lr_scheduler_type="constant",
            )  # fmt: skip
            job.add_callback(rmoe.RouterUpdates())
            if stop < 4:
                job.add_callback(_StopAt(stop))
            job.train(resume_from_checkpoint=name == "resumed" and stop == 4)
        weights[name] = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    assert all(torch.equal(weights["whole"][n], p) for n, p in weights["resumed"].items())


def test_the_noise_follows_the_seed_and_the_rank() -> None:
    model, keys = tiny_rmoe("noisy-topk"), set()
    updates = rmoe.RouterUpdates()
    updates.on_train_begin(None, None, None, model=model)
    for seed in (0, 1):
        for rank in (0, 1):
            args = SimpleNamespace(seed=seed, process_index=rank, gradient_accumulation_steps=2)
            updates.on_step_begin(args, SimpleNamespace(global_step=5), None)
            keys.add(int(model.trunk.routing_noise_key))
    assert len(keys) == 4
    assert {key % 2**32 for key in keys} == {10}


def test_what_is_read_without_gradients_is_not_counted(tmp_path: Path) -> None:
    """As an RL loop samples: in training mode, between steps."""
    model = tiny_rmoe("deepseek-v3")
    updates = rmoe.RouterUpdates()
    updates.on_train_begin(None, None, None, model=model)
    args = SimpleNamespace(seed=0, process_index=0, gradient_accumulation_steps=1)
    updates.on_step_begin(args, SimpleNamespace(global_step=0), None)
    before = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        model.train()(torch.zeros(1, 8, dtype=torch.int64))
    updates.on_step_end(args, SimpleNamespace(global_step=1, max_steps=5), None)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    model(torch.zeros(1, 8, dtype=torch.int64))
    updates.on_step_end(args, SimpleNamespace(global_step=1, max_steps=5), None)
    assert not all(torch.equal(b, before[name]) for name, b in model.named_buffers())


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_an_adapter_that_loses_the_experts_default_outputs_is_warned_of(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for copied, named in ((["gate"], '"default_outputs"'), (["gate", "default_outputs"], None)):
        model = tiny_rmoe("smoe", dense_gradients="default")
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=copied)
        adapted = peft.get_peft_model(model, settings)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rmoe.RouterUpdates().on_train_begin(None, None, None, model=adapted)
        found = [str(w.message) for w in said if "the adapter does not save them" in str(w.message)]
        assert [named in each for each in found] == ([True] if named else [])
