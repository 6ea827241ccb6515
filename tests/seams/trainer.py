"""`transformers.Trainer`, as people use it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils.generic import find_labels

from tests.seams.families import PAD, VOCAB, Family, close, ids, rows, same_outputs, same_weights
from tests.seams.job import job

GROUP = "Trainer"


def trainer(model: Any, folder: Path, args: dict[str, Any] | None = None, **more: Any) -> Trainer:
    """A quiet Trainer of two steps; `args` go to TrainingArguments, `more` to Trainer."""
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    options = {"train_dataset": rows(), "eval_dataset": rows(6), "data_collator": default_data_collator}
    return Trainer(
        model, TrainingArguments(str(folder), **{**settings, **(args or {})}), **{**options, **more}
    )


def token_accuracy(prediction: Any) -> dict[str, float]:
    """What a user's `compute_metrics` does with the logits of a language model."""
    assert isinstance(prediction.predictions, np.ndarray), (
        f"predictions are a {type(prediction.predictions).__name__}"
    )
    assert prediction.predictions.shape == (6, 12, VOCAB)
    guess = prediction.predictions[:, :-1].argmax(-1)
    return {"accuracy": float((guess == prediction.label_ids[:, 1:]).mean())}


def has_option(name: str) -> bool:
    return name in inspect.signature(TrainingArguments).parameters


@job(GROUP, "train: the loss is finite and falls")
def trains(family: Family, tmp: Path) -> None:
    t = trainer(family.causal(), tmp, {"max_steps": 6})
    t.train()
    losses = [row["loss"] for row in t.state.log_history if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1


@job(GROUP, "evaluate: `eval_loss` is the loss the model itself gives")
def evaluates(family: Family, tmp: Path) -> None:
    model = family.causal()
    found = trainer(model, tmp, {"per_device_eval_batch_size": 6}).evaluate()["eval_loss"]
    with torch.no_grad():
        want = model(input_ids=ids(6, 12), labels=ids(6, 12)).loss
    assert abs(found - float(want)) < 1e-4


@job(GROUP, "`find_labels`: `labels` is the only label of language model and classifier")
def label_names_found(family: Family, tmp: Path) -> None:
    assert find_labels(type(family.causal())) == ["labels"]
    assert find_labels(type(family.classifier(num_labels=3))) == ["labels"]


@job(GROUP, "evaluate with `compute_metrics` on the logits")
def compute_metrics(family: Family, tmp: Path) -> None:
    model = family.causal()
    found = trainer(model, tmp, compute_metrics=token_accuracy).evaluate()
    with torch.no_grad():
        guess = model(input_ids=ids(6, 12)).logits[:, :-1].argmax(-1)
    assert found["eval_accuracy"] == float((guess == ids(6, 12)[:, 1:]).double().mean())


@job(GROUP, "evaluate with `preprocess_logits_for_metrics`, batched metrics and accumulation on the host")
def preprocessed_metrics(family: Family, tmp: Path) -> None:
    def guess(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1)

    def accuracy(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        assert prediction.predictions.shape[1:] == (12,)
        return {"accuracy": 0.5}

    args = {"eval_accumulation_steps": 1, "batch_eval_metrics": True}
    t = trainer(family.causal(), tmp, args, preprocess_logits_for_metrics=guess, compute_metrics=accuracy)
    assert t.evaluate()["eval_accuracy"] == 0.5


@job(GROUP, "evaluate a model whose configuration says `output_router_logits`")
def evaluates_with_router_logits(family: Family, tmp: Path) -> None:
    model = family.causal(output_router_logits=True)
    t = trainer(model, tmp, {"per_device_eval_batch_size": 6}, eval_dataset=rows(6))
    assert np.isfinite(t.evaluate()["eval_loss"])
    found = t.predict(rows(6)).predictions
    found = found if isinstance(found, tuple) else (found,)
    assert any(isinstance(part, np.ndarray) and part.shape == (6, 12, VOCAB) for part in found)


@job(GROUP, "predict, with labels")
def predicts(family: Family, tmp: Path) -> None:
    model = family.causal()
    found = trainer(model, tmp).predict(rows(6))
    with torch.no_grad():
        close(torch.from_numpy(found.predictions), model(input_ids=ids(6, 12)).logits, 1e-4)
    assert found.label_ids.shape == (6, 12)
    assert np.isfinite(found.metrics["test_loss"])


@job(GROUP, "predict, without labels")
def predicts_without_labels(family: Family, tmp: Path) -> None:
    model = family.causal()
    found = trainer(model, tmp).predict([{"input_ids": row} for row in ids(6, 12)])
    assert found.predictions.shape == (6, 12, VOCAB)
    assert found.label_ids is None


@job(GROUP, "`load_best_model_at_end`")
def best_model_at_end(family: Family, tmp: Path) -> None:
    args = {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }  # fmt: skip - the first step counts as the best, so there is something to load
    model = family.causal()
    t = trainer(model, tmp, args)
    t.train()
    assert t.state.best_global_step == 1
    same_weights(model, AutoModelForCausalLM.from_pretrained(tmp / "checkpoint-1"))


@job(GROUP, "early stopping")
def early_stopping(family: Family, tmp: Path) -> None:
    args = {
        "max_steps": 9, "learning_rate": 3.0, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    t = trainer(family.causal(), tmp, args, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)])
    t.train()
    assert t.state.global_step < 9


def _trained(family: Family, folder: Path, **args: Any) -> Any:
    model = family.causal()
    trainer(model, folder, args).train()
    return model


@job(GROUP, "`gradient_checkpointing=True` trains to the same weights as without")
def gradient_checkpointing(family: Family, tmp: Path) -> None:
    same_weights(_trained(family, tmp, gradient_checkpointing=True), _trained(family, tmp), 1e-5)


@job(GROUP, "`gradient_checkpointing_kwargs`: `use_reentrant: False`")
def checkpointing_not_reentrant(family: Family, tmp: Path) -> None:
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    same_weights(_trained(family, tmp, **args), _trained(family, tmp), 1e-5)


@job(GROUP, "`gradient_checkpointing_kwargs`: `use_reentrant: True`")
def checkpointing_reentrant(family: Family, tmp: Path) -> None:
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    same_weights(_trained(family, tmp, **args), _trained(family, tmp), 1e-5)


def _checkpointing(family: Family, folder: Path, **kwargs: Any) -> Any:
    """Train with `activation_checkpointing` (5.24) or by its older name, which takes none of the newer options."""
    if has_option("activation_checkpointing"):
        return _trained(family, folder, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    return _trained(family, folder, gradient_checkpointing=True)


@job(GROUP, "`activation_checkpointing`: every second layer")
def checkpointing_every_second_layer(family: Family, tmp: Path) -> None:
    same_weights(_checkpointing(family, tmp, every_n_layers=2), _trained(family, tmp), 1e-5)


@job(GROUP, "`activation_checkpointing`: activations kept on the host")
def checkpointing_offloaded(family: Family, tmp: Path) -> None:
    same_weights(_checkpointing(family, tmp, offload=True), _trained(family, tmp), 1e-5)


@job(GROUP, "checkpointing, accumulation and `output_router_logits` together")
def checkpointing_with_router_logits(family: Family, tmp: Path) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = family.causal(output_router_logits=True, router_aux_loss_coef=1.0).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        for part in ids(4).split(2):
            model(input_ids=part, labels=part).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    got, want = gradients(True), gradients(False)
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name])


@job(GROUP, "gradient accumulation: four small batches train like one large one")
def accumulation(family: Family, tmp: Path) -> None:
    def run(**args: Any) -> Any:
        model = family.causal(router_aux_loss_coef=0.0)  # a balance loss of parts is not that of the whole
        trainer(model, tmp, {"optim": "sgd", "learning_rate": 0.1, **args}).train()
        return model

    same_weights(run(per_device_train_batch_size=1, gradient_accumulation_steps=4), run(), 1e-5)


@job(GROUP, "gradient accumulation: the balance loss does not grow with it")
def accumulated_balance_loss(family: Family, tmp: Path) -> None:
    row = ids(1, 12)[0]
    data = [{"input_ids": row, "labels": row}] * 8
    losses = []
    for parts in (1, 4):
        model = family.causal(output_router_logits=True, router_aux_loss_coef=1.0)
        args = {
            "max_steps": 1, "learning_rate": 0.0, "gradient_accumulation_steps": parts,
            "per_device_train_batch_size": 8 // parts,
        }  # fmt: skip
        t = trainer(model, tmp, args, train_dataset=data)
        t.train()
        losses.append(t.state.log_history[0]["loss"])
    assert abs(losses[0] - losses[1]) < 1e-3, losses


def _own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum")
    return total / (labels[:, 1:].numel() if num_items_in_batch is None else num_items_in_batch)


@job(GROUP, "`compute_loss_func`")
def compute_loss_func(family: Family, tmp: Path) -> None:
    model = family.causal()
    with torch.no_grad():
        want = _own_loss(model(input_ids=ids(8, 12)), ids(8, 12))
    args = {"learning_rate": 0.0, "max_steps": 1, "gradient_accumulation_steps": 2}
    t = trainer(model, tmp, args, compute_loss_func=_own_loss)
    t.train()
    assert abs(t.state.log_history[0]["loss"] - float(want)) < 1e-3


@job(GROUP, "label smoothing: the loss is that of the shifted labels")
def label_smoothing(family: Family, tmp: Path) -> None:
    model = family.causal()
    found = trainer(model, tmp, {"label_smoothing_factor": 0.1, "per_device_eval_batch_size": 6}).evaluate()[
        "eval_loss"
    ]
    with torch.no_grad():
        logits = model(input_ids=ids(6, 12)).logits[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, ids(6, 12)[:, 1:].flatten(), label_smoothing=0.1)
    assert abs(found - float(want)) < 1e-3, (found, float(want))


@job(GROUP, "resume from a checkpoint: the same weights as without a break")
def resumes(family: Family, tmp: Path) -> None:
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = family.causal()
    trainer(whole, tmp / "run", args).train()
    resumed = family.causal()
    trainer(resumed, tmp / "run", args).train(resume_from_checkpoint=str(tmp / "run" / "checkpoint-2"))
    # Reloaded tensors lie at other alignments, so sums may differ in the last bit.
    same_weights(resumed, whole, 1e-6)


@job(GROUP, "`label_names` given")
def label_names_given(family: Family, tmp: Path) -> None:
    found = trainer(
        family.causal(), tmp, {"label_names": ["labels"]}, compute_metrics=token_accuracy
    ).evaluate()
    assert {"eval_loss", "eval_accuracy"} <= found.keys()


def _classify(family: Family, folder: Path, labels: Any, want: Any, **config: Any) -> None:
    """Evaluate and train a classifier; `want(logits)` is the loss without any balance loss."""
    model = family.classifier(router_aux_loss_coef=0.0, **config)
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids(4), labels, strict=True)]

    def spread(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (4, config["num_labels"])
        return {"spread": float(prediction.predictions.std())}

    t = trainer(model, folder, train_dataset=data, eval_dataset=data, compute_metrics=spread)
    found = t.evaluate()
    with torch.no_grad():
        logits = model(input_ids=ids(4)).logits
    assert abs(found["eval_loss"] - float(want(logits))) < 1e-4
    assert found["eval_spread"] > 0
    t.train()
    assert t.evaluate()["eval_loss"] < found["eval_loss"]


@job(GROUP, "classification: one label of several")
def classifies(family: Family, tmp: Path) -> None:
    labels = torch.tensor([0, 2, 1, 2])
    _classify(family, tmp, labels, lambda logits: F.cross_entropy(logits, labels), num_labels=3)


@job(GROUP, "classification: regression, `problem_type` given and found")
def regresses(family: Family, tmp: Path) -> None:
    labels = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for problem_type in ("regression", None):
        _classify(
            family, tmp, labels, lambda logits: F.mse_loss(logits[:, 0], labels), num_labels=1,
            problem_type=problem_type,
        )  # fmt: skip


@job(GROUP, "classification: several labels at once, `problem_type` given and found")
def classifies_multi_label(family: Family, tmp: Path) -> None:
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    for problem_type in ("multi_label_classification", None):
        _classify(
            family, tmp, labels, lambda logits: F.binary_cross_entropy_with_logits(logits, labels), num_labels=3,
            problem_type=problem_type,
        )  # fmt: skip


@job(GROUP, "classification: padding on either side, with and without an attention mask")
def classifies_padded(family: Family, tmp: Path) -> None:
    model = family.classifier(num_labels=3)
    row = ids(1, 7)
    gap = torch.full((1, 4), PAD)
    with torch.no_grad():
        want = model(input_ids=row).logits
        right = torch.cat([row, gap], 1)
        close(model(input_ids=right).logits, want)
        close(model(input_ids=right, attention_mask=(right != PAD).long()).logits, want)
        left = torch.cat([gap, row], 1)
        mask = (left != PAD).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        close(model(input_ids=left, attention_mask=mask, position_ids=positions).logits, want)


@job(GROUP, "group by length")
def groups_by_length(family: Family, tmp: Path) -> None:
    rows_ = [
        {"input_ids": ids(1, n)[0].tolist(), "labels": ids(1, n)[0].tolist()} for n in (3, 9, 4, 8, 5, 7)
    ]

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        filled = {"input_ids": PAD, "labels": -100}
        out = {
            key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in batch])
            for key, fill in filled.items()
        }
        return out | {"attention_mask": (out["labels"] != -100).long()}

    strategy = (
        {"train_sampling_strategy": "group_by_length"}
        if has_option("train_sampling_strategy")
        else {"group_by_length": True}
    )
    t = trainer(
        family.causal(),
        tmp,
        {**strategy, "per_device_train_batch_size": 2},
        train_dataset=rows_,
        data_collator=pad,
    )
    t.train()
    assert np.isfinite(t.state.log_history[0]["loss"])


@job(GROUP, "padding-free batches (`DataCollatorWithFlattening`): sequences in one row do not see each other")
def padding_free(family: Family, tmp: Path) -> None:
    model = family.causal(router_aux_loss_coef=0.0)
    parts = [{"input_ids": row.tolist()} for row in ids(3, 6)]
    packed = DataCollatorWithFlattening()(parts)
    with torch.no_grad():
        apart = torch.stack([model(input_ids=row[None]).logits[0] for row in ids(3, 6)])
        close(model(**packed, use_cache=False).logits[0], apart.flatten(0, 1), 1e-4)
    t = trainer(model, tmp, train_dataset=parts, data_collator=DataCollatorWithFlattening())
    t.train()
    assert np.isfinite(t.state.log_history[0]["loss"])


@job(GROUP, "`bf16=True`")
def mixed_precision(family: Family, tmp: Path) -> None:
    t = trainer(family.causal(), tmp, {"bf16": True}, compute_metrics=token_accuracy)
    t.train()
    assert np.isfinite(t.state.log_history[0]["loss"])
    assert np.isfinite(t.evaluate()["eval_loss"])


@job(GROUP, "`neftune_noise_alpha`")
def neftune(family: Family, tmp: Path) -> None:
    t = trainer(family.causal(), tmp, {"neftune_noise_alpha": 5.0, "max_steps": 1})
    t.train()
    assert np.isfinite(t.state.log_history[0]["loss"])


@job(GROUP, "`model_init`, and counting the tokens seen")
def model_init(family: Family, tmp: Path) -> None:
    args = {"include_num_input_tokens_seen": "non_padding", "max_steps": 1}
    t = trainer(None, tmp, args, model_init=lambda: family.causal())
    t.train()
    assert t.state.num_input_tokens_seen == 4 * 12


@job(GROUP, "save as before a push: `save_model`, a model card, a given state dict; loads the same")
def saves_for_a_push(family: Family, tmp: Path) -> None:
    model = family.causal()
    t = trainer(model, tmp / "run")
    t.train()
    t.save_model(str(tmp / "saved"))
    t.create_model_card(model_name="tiny", tags=["moe"])
    assert (tmp / "run" / "README.md").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp / "saved")
    assert type(loaded) is type(model)
    same_weights(loaded, model)
    same_outputs(loaded, model.eval())
    model.save_pretrained(
        tmp / "given", state_dict=model.state_dict(), is_main_process=True, max_shard_size="20KB"
    )
    same_weights(AutoModelForCausalLM.from_pretrained(tmp / "given"), model)
