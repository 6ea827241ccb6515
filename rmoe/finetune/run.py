"""`finetune(...)`: from a model folder and a task file to a fine-tuned model folder, resumable.

DIR/finetune.json   what was asked for
DIR/metrics.jsonl   see `rmoe.training.metrics`
DIR/checkpoints/    see `rmoe.training.checkpoint`
DIR/adapter/        with LoRA: the adapters alone, as PEFT loads them
DIR/model/          the fine-tuned model
DIR/result.json     written last
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import PreTrainedModel

from rmoe.compat import enable_checkpointing
from rmoe.data.tasks import Instruction, Labelled, read_tasks
from rmoe.errors import RequestError
from rmoe.finetune.card import finetuning_card
from rmoe.finetune.classification import (
    LabelledTexts,
    label_loss,
    label_set,
    load_classifier,
    predict,
    scores,
)
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.instructions import (
    PackedExamples,
    drafts,
    encode_drafts,
    needs_mask,
    pack,
    why_not_packed,
)
from rmoe.finetune.lora import with_lora
from rmoe.finetune.parts import choose_trained
from rmoe.graft.adapter import strip
from rmoe.graft.attach import is_grafted
from rmoe.graft.base import base_digest
from rmoe.graft.undo import keep_originals
from rmoe.model.head import count_next_tokens, next_token_loss
from rmoe.model.weights import open_weights, tensor_sha256
from rmoe.places import expand, require_writable
from rmoe.records import Record, read_record, sha256, write_record
from rmoe.training import run_folder
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.config import RunConfig
from rmoe.training.evaluation import Evaluation, inference
from rmoe.training.flow import carry_out, disk_trouble, enter
from rmoe.training.language_model import load_language_model, load_tokenizer, require_rows
from rmoe.training.learner import ModelLearner
from rmoe.training.loop import Loop
from rmoe.training.place import Place, accelerator_of, micro_batches, place_of, say, torch_settings
from rmoe.training.plan import StepPlan
from rmoe.training.progress import ProgressReport
from rmoe.training.publish import publish_model

REQUEST = "finetune.json"
VERSION = 1


# Where a thing lies does not make a run another one; what it is does, and has a sha256 of its own.
PLACES = frozenset({"valid"})


class Request(Record, frozen=True, kw_only=True):
    """`finetune.json`."""

    schema_version: int = VERSION
    model: str
    data: str
    config: dict[str, Any]
    model_sha256: (
        str  # of the weights' names, sizes and first bytes: another model under the same path is noticed
    )
    data_sha256: str
    valid_sha256: str | None = None


class FinetuneResult(Record, frozen=True, kw_only=True):
    """`result.json`.

    Attributes:
        examples, left_out: of the data; left out because the prompt alone fills a sequence.
        trained_parameters: how many numbers were trained.
        scores: on the validation file: `accuracy`, `f1_macro`, `majority_accuracy`, or `answer_loss_nats`.
    """

    schema_version: int = VERSION
    model: str
    steps: int
    examples: int
    left_out: int
    sequences: int
    trained_parameters: int
    scores: dict[str, float]


@dataclass
class Job:
    """A task made ready: the model, what it learns from, and how it is evaluated."""

    model: Any
    dataset: PackedExamples | LabelledTexts
    collate: Callable[..., Any] | None
    examples: int
    left_out: int
    evaluate: Callable[[nn.Module], Evaluation] | None
    score: Callable[[PreTrainedModel], dict[str, float]]


def finetune(
    source: Path,
    data: Path,
    out: Path,
    config: FinetuneConfig,
    *,
    resume: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune one model.

    Args:
        source: a model folder: RMoE, grafted, or any other of transformers.
        data: a task file (see `rmoe.data.tasks`) of instructions or conversations, or of `text, label`.
        out: a new or empty folder; with `resume` the run to go on with.

    Raises:
        RequestError: the request is wrong; nothing was written.
        RunError: the run failed; it says what is saved.
    """
    require_writable(out)
    if not resume:
        run_folder.refuse_used(out, REQUEST)
    with ExitStack() as stack:
        stack.enter_context(torch_settings(config.run_config(config.batch_size)))
        data = expand(data, "--data")
        if config.valid is not None:
            config = replace(config, valid=expand(config.valid, "--valid"))
        open_weights(source)
        tokenizer = load_tokenizer(source)
        job = (_instruction_job if config.task == "instruction" else _classification_job)(
            source, data, config, tokenizer
        )
        _require_positions(job.model, config.sequence_length)
        dtypes = {name: p.dtype for name, p in job.model.named_parameters()}
        trained = _prepare(job, config)
        # Weights that LoRA leaves in half precision go with float32 ones only under autocast.
        mixed = any(p.dtype in (torch.bfloat16, torch.float16) for p in job.model.parameters())
        settings = replace(config, precision="bf16") if mixed else config
        place = place_of(settings.run_config(config.batch_size))
        run = settings.run_config(len(job.dataset), place.ranks.data)
        request = Request(
            model=str(source),
            data=str(data),
            config=config.to_dict(),
            model_sha256=_model_sha256(source),
            data_sha256=sha256(data),
            valid_sha256=None if config.valid is None else sha256(config.valid),
        )
        same = partial(_same, out, request) if resume else None
        stack.enter_context(disk_trouble(out))
        request = enter(stack, out, REQUEST, request, same) or request
        if not (out / run_folder.RESULT).exists():
            loop = _train(job, run, request, out, place, resume, progress)
            if loop.is_main:
                model = _merged(loop.model, out, bool(config.lora_rank))
                _restore_dtypes(model, dtypes)
                result = FinetuneResult(
                    model=str(out / run_folder.MODEL),
                    steps=loop.step,
                    examples=job.examples,
                    left_out=job.left_out,
                    sequences=len(job.dataset),
                    trained_parameters=trained,
                    scores=job.score(model),
                )
                complete = partial(_complete, source, out=out, model=model, config=config)
                card = finetuning_card(source, data, config, result, request.data_sha256)
                publish_model(out, model, tokenizer, card, complete)
                write_record(out / run_folder.RESULT, result)
                loop.store.clear_staging()
            loop.accelerator.wait_for_everyone()
        found = read_record(out / run_folder.RESULT, FinetuneResult, VERSION)
        return msgspec.structs.replace(found, model=str(out / run_folder.MODEL))


def _require_positions(model: PreTrainedModel, length: int) -> None:
    """Refuse sequences longer than a table of positions, which the models that learn them have (GPT-2, OPT)."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or length <= most:
        return
    tables = (
        m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()
    )
    if any(most <= table.num_embeddings <= most + 2 for table in tables):  # OPT's has two more
        raise RequestError(
            "--sequence-length", length, f"at most {most}, the positions that the model has learned"
        )


# --- the two tasks -------------------------------------------------------------------------------


def _instruction_job(source: Path, data: Path, config: FinetuneConfig, tokenizer: Any) -> Job:
    items = read_tasks(data, Instruction)
    valid = [] if config.valid is None else read_tasks(config.valid, Instruction, field="--valid")
    model = load_language_model(source)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    require_rows(model, tokenizer, source, tokenizer.eos_token_id, pad)
    unpacked = why_not_packed(model)
    packs = config.packing and unpacked is None
    if config.packing and not packs:
        say(f"not packing: {unpacked}")
    masked = needs_mask(model, packs)

    def sequences(of: list[Instruction]) -> tuple[PackedExamples, int, int]:
        """The sequences, how many examples are in them, and how many are not."""
        made = drafts(of, tokenizer)
        examples = encode_drafts(made, tokenizer, config.sequence_length)
        rows = pack(examples, config.sequence_length) if packs else [[example] for example in examples]
        packed = PackedExamples(rows, config.sequence_length, pad, masked)
        return packed, len(examples), len(made) - len(examples)

    dataset, used, left_out = sequences(items)
    held_out = sequences(valid)[0] if valid else None
    evaluate = None if held_out is None else partial(_answer_loss, sequences=held_out)
    return Job(
        model=model,
        dataset=dataset,
        collate=None,
        examples=used,
        left_out=left_out,
        evaluate=evaluate,
        score=lambda model: {} if evaluate is None else {"answer_loss_nats": evaluate(model).loss},
    )


def _answer_loss(model: nn.Module, sequences: PackedExamples) -> Evaluation:
    """Mean loss over the tokens of answers."""
    nats, targets = 0.0, 0
    with inference(model) as device:
        for index in range(len(sequences)):
            row = {name: tensor[None].to(device) for name, tensor in sequences[index].items()}
            labels = row.pop("labels")
            nats += next_token_loss(model(**row, use_cache=False).logits, labels).item()
            targets += int(count_next_tokens(labels))
    return Evaluation(nats, max(targets, 1), "the instruction and the answer so far")


def _classification_job(source: Path, data: Path, config: FinetuneConfig, tokenizer: Any) -> Job:
    items = read_tasks(data, Labelled)
    labels = label_set(items)
    valid = [] if config.valid is None else read_tasks(config.valid, Labelled, labels, field="--valid")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise RequestError("model", str(source), "a tokenizer with a padding or end-of-text token")
    model = load_classifier(source, labels, pad, config.seed)
    require_rows(model, tokenizer, source, pad)
    dataset = LabelledTexts(items, labels, tokenizer, config.sequence_length, pad)
    held_out = LabelledTexts(valid, labels, tokenizer, config.sequence_length, pad) if valid else None
    return Job(
        model=model,
        dataset=dataset,
        collate=dataset.collate,
        examples=len(items),
        left_out=0,
        evaluate=None if held_out is None else partial(label_loss, texts=held_out),
        score=lambda model: {} if held_out is None else scores(predict(model, held_out), held_out.labels),
    )


# --- before, while and after training ------------------------------------------------------------


def _prepare(job: Job, config: FinetuneConfig) -> int:
    """Choose what is trained and in which precision; returns how many numbers that is."""
    if config.lora_rank:
        job.model = with_lora(job.model, config)
    else:
        choose_trained(job.model, config)
        for (
            parameter
        ) in job.model.parameters():  # exact, and what bfloat16 updates would lose at 2e-5 is kept
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        enable_checkpointing(job.model)
    return sum(p.numel() for p in job.model.parameters() if p.requires_grad)


def _train(
    job: Job, run: RunConfig, request: Request, out: Path, place: Place, resume: bool, progress: bool
) -> Loop:
    # As transformers' Trainer decides it; an adapter of PEFT's is no PreTrainedModel.
    unused = not (isinstance(job.model, PreTrainedModel) and run.training.gradient_checkpointing)
    accelerator = accelerator_of(run, out, place, unused)
    learner = ModelLearner(job.model, accelerator, place.ranks, micro_batches(run, place.ranks))
    learner.moves_routers &= request.config["freeze"] == "none"
    loop = Loop(
        learner,
        run.training,
        StepPlan.of(run),
        accelerator,
        dataset=job.dataset,
        collate=job.collate,
        sizes=job.dataset.sizes,
        data_sha256=request.data_sha256,
        store=CheckpointStore(out, _fingerprint(request), run.checkpoints.keep),
        in_unit=lambda split, loss: {"perplexity": math.exp(min(loss, 700.0))},
        evaluate=job.evaluate,
        hooks=[ProgressReport("perplexity")] if progress else [],
    )
    carry_out(loop, resume)
    return loop


def _merged(model: Any, out: Path, lora: bool) -> PreTrainedModel:
    """The model itself; with LoRA its adapters are saved and then added to the weights."""
    if not lora:
        return model
    model.save_pretrained(out / "adapter")
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def _restore_dtypes(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def _complete(source: Path, folder: Path, out: Path, model: PreTrainedModel, config: FinetuneConfig) -> None:
    """Make the trained model's folder an adapter again if it came from one, or keep what undoes it exactly."""
    if base_digest(source) is not None:
        strip(folder, model, out / run_folder.MODEL)
    elif is_grafted(model) and config.train != "all":
        keep_originals(source, folder)


def _model_sha256(source: Path) -> str:
    weights = open_weights(source)
    hasher = hashlib.sha256((base_digest(source) or "").encode())
    for name, tensor in weights.tensors():
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor_sha256(tensor.reshape(-1)[:64]).encode())
    return hasher.hexdigest()


def _fingerprint(request: Request) -> str:
    """What a checkpoint is sealed with; of a run without a validation file, what earlier releases wrote."""
    values = msgspec.to_builtins(request)
    if request.valid_sha256 is None:
        del values["valid_sha256"]
    return hashlib.sha256(msgspec.json.encode(values)).hexdigest()


def _same(out: Path, now: Request) -> Request:
    """The run that is in the folder, if it is this one: equal settings, model and data, wherever they lie now.

    Raises:
        RequestError: naming the first setting that differs.
    """
    was = read_record(out / REQUEST, Request, VERSION)
    parts = ["config", "data_sha256", "model_sha256", "valid_sha256"]
    if was.valid_sha256 is None and was.config.get("valid") is not None:
        parts.remove("valid_sha256")  # an earlier release did not write it
    # Settings that came after it was begun have their defaults.
    whole = msgspec.structs.replace(was, config=FinetuneConfig().to_dict() | was.config)
    before, after = (run_folder.settings_of(each, parts) for each in (whole, now))
    run_folder.require_equal(before, after, PLACES, f"the run in {out}")
    return was
