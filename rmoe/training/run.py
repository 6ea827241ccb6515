"""`train(config, out)`: one run from its configuration to its result, or on from where it was killed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from accelerate import Accelerator

from rmoe.compat import enable_checkpointing
from rmoe.data import Corpus, prepare
from rmoe.data.config import SplitName
from rmoe.errors import RequestError
from rmoe.errors import Stopped as Stopped
from rmoe.model import RMoEConfig, RMoEForCausalLM
from rmoe.parallel import Pipeline
from rmoe.parallel.fit import require_fit
from rmoe.parallel.sharding import distribute
from rmoe.places import require_writable
from rmoe.records import write_record
from rmoe.results import run as records
from rmoe.results.run import Averaged, InitialLogits, RunResult, TextLosses
from rmoe.training import run_folder
from rmoe.training.average import WeightAverage
from rmoe.training.branch import begin_branch, require_branch, require_steady
from rmoe.training.build import (
    build_model,
    load_plugins,
    model_config,
    parameter_counts,
    require_router_parameters,
)
from rmoe.training.card import training_card
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.config import RunConfig
from rmoe.training.disk import require_space
from rmoe.training.environment import hardware, versions
from rmoe.training.evaluation import Evaluation, context_of, evaluate, summarize_routing
from rmoe.training.flow import carry_out, disk_trouble, enter, on_first_rank
from rmoe.training.hooks import Hook, Trackers
from rmoe.training.initial_scale import fixed_batch, start_at
from rmoe.training.learner import Learner, ModelLearner
from rmoe.training.loop import Loop, peak_mib
from rmoe.training.metrics import read_metrics
from rmoe.training.pipelined import PipelineLearner, build_pipeline
from rmoe.training.place import Place, accelerator_of, micro_batches, place_of, say, torch_settings
from rmoe.training.plan import StepPlan
from rmoe.training.profile import StepProfiler
from rmoe.training.progress import ProgressReport
from rmoe.training.publish import curves, layer_curves, publish_model
from rmoe.training.run_folder import RunRecord, fingerprint
from rmoe.training.run_folder import read_result as read_result

MOST_STRETCHES = 10_000  # of the test split in a result


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    profile: bool = False,
    branch_of: Path | None = None,
) -> RunResult:
    """Train one model.

    The same configuration gives the same bits on the same machine, also when the run was killed in between.

    Args:
        config: what to compute.
        out: the run's folder; see `rmoe.training.run_folder`.
        resume: go on with the run in `out`, from its newest valid checkpoint; at step 0 where there is none.
            A finished run is left as it is.
        progress: show how far it is, on stderr.
        profile: also record a few steps into `out/profile`, see `rmoe.training.profile`.
        branch_of: folder of a longer `wsd` run with the same settings: begin where this one's decay begins, at that
            run's checkpoint; see `rmoe.training.branch`. The result is that of the whole run.

    Returns:
        The result, also written to `out/result.json`.

    Raises:
        RequestError: the request is wrong; nothing was written to `out`.
        RunError: the run failed; it says what is saved.
        Stopped: SIGTERM or SIGINT ended it after a checkpoint.
    """
    if profile and config.training.compile:
        raise RequestError("profile", True, "off with training.compile: a compiled region has no stages")
    if profile and config.parallel.pipeline > 1:
        raise RequestError("profile", True, "off with parallel.pipeline above 1")
    require_writable(out)
    if not resume:
        run_folder.refuse_used(out)
    plugins = load_plugins(config.plugin)
    # What is wrong with the sizes, the router or the layout is said before any text is read.
    require_fit(model_config(config, vocab_size=64), config.parallel)
    corpus = prepare(config.data, config.training.sequence_length)
    for split in ("train", "valid", "test") if config.logging.test else ("train", "valid"):
        if split not in corpus.manifest.splits:
            raise RequestError("data.split", config.data.split, f"a rule that gives a {split} split")
    architecture = model_config(config, corpus.vocab_size)
    with ExitStack() as stack:
        threads = stack.enter_context(torch_settings(config))
        place = place_of(config)
        record = RunRecord(
            config=config.to_dict(),
            router_spec=architecture.router_spec.to_dict(),
            model=_sizes(architecture),
            plugins=plugins,
            data_sha256=corpus.manifest.key,
            versions=versions(),
            hardware=hardware(threads, config.training.device),
            started_in=str(Path.cwd()),
        )
        branch = None if branch_of is None else require_branch(config, record, branch_of)
        same = partial(_go_on, out, record) if resume else None
        if resume and (out / run_folder.RESULT).exists():
            enter(stack, out, run_folder.CONFIG, record, same)
            say(f"{out} is finished already: nothing to do")
            return read_result(out)
        model = build_model(architecture, config.training.seed)  # whatever it refuses, nothing is written yet
        if branch_of is not None:
            require_steady(model, fixed_batch(corpus.train), config, branch_of)
        initial = _initial_logits(out if resume else None, model, corpus, config.training.initial_logit_std)
        record = msgspec.structs.replace(record, initial_logits=initial)
        if not (out / run_folder.CONFIG).exists():
            require_router_parameters(model, config.training.router_learning_rate)
            keep = config.checkpoints.keep + len(config.training.branch_points)
            require_space(out, model, keep, config.training.average > 0)
        if config.training.gradient_checkpointing:
            enable_checkpointing(model)
        spread = spread_model(model, config, place)
        stack.enter_context(disk_trouble(out))
        enter(stack, out, run_folder.CONFIG, record, same)
        if branch is not None and on_first_rank(partial(begin_branch, branch, out, record)):
            resume = True
        return _run(config, out, corpus, spread, record, place, resume, progress, profile)


# --- before training -----------------------------------------------------------------------------


def _go_on(out: Path, record: RunRecord) -> None:
    """Make sure that the run in a folder is this one, and say it where it was begun on something else."""
    run_folder.require_same(out, record)
    machines = run_folder.read_run(out).hardware, record.hardware
    was, now = (machine.accelerator or machine.cpu for machine in machines)
    if was != now and not (out / run_folder.RESULT).exists():
        say(f"begun on {was}, going on on {now}: rounding may differ, and so may the run's bits")


def _sizes(architecture: RMoEConfig) -> dict[str, Any]:
    """The model's configuration without what transformers adds about itself."""
    values: dict[str, Any] = msgspec.to_builtins(architecture.to_diff_dict())
    for name in ("transformers_version", "dtype", "architectures", "auto_map"):
        values.pop(name, None)
    return values


def _initial_logits(
    resumed: Path | None, model: RMoEForCausalLM, corpus: Corpus, target: float | None
) -> InitialLogits | None:
    """Set and measure the scale of the logits; where nothing is set, a resumed run has measured it already."""
    if target is None and resumed is not None and (resumed / run_folder.CONFIG).exists():
        stored = run_folder.read_run(resumed).initial_logits
        if stored is not None:
            return stored
    return start_at(model, fixed_batch(corpus.train), target)


def _sealed_as(out: Path, record: RunRecord) -> str:
    """The fingerprint the checkpoints of `out` have: of the run as it was started, wherever its files lie now."""
    return fingerprint(run_folder.read_run(out) if (out / run_folder.CONFIG).exists() else record)


# --- training ------------------------------------------------------------------------------------


def _run(
    config: RunConfig,
    out: Path,
    corpus: Corpus,
    model: RMoEForCausalLM | Pipeline,
    record: RunRecord,
    place: Place,
    resume: bool,
    progress: bool,
    profile: bool,
) -> RunResult:
    pinned = frozenset(config.training.branch_points)
    store = CheckpointStore(out, _sealed_as(out, record), config.checkpoints.keep, pinned)

    def in_unit(split: SplitName, loss: float) -> dict[str, float]:
        return {corpus.unit: corpus.in_unit(split, loss)}

    def evaluate_on(split: SplitName, limit: int | None) -> Callable[[Any], Evaluation]:
        return partial(evaluate, blocks=corpus.blocks(split), limit=limit, bf16=place.bf16, ranks=place.ranks)

    learner, accelerator = make_learner(model, config, out, place)
    steps = config.average_steps
    average = WeightAverage(learner.model, steps) if steps else None
    hooks: list[Hook] = [Trackers(accelerator, run_folder.flat(record.config))]
    if progress:
        hooks.append(ProgressReport(corpus.unit))
    if profile:
        hooks.append(StepProfiler(out))
    loop = Loop(
        learner,
        config.training,
        StepPlan.of(config),
        accelerator,
        dataset=corpus.train,
        data_sha256=corpus.manifest.key,
        store=store,
        in_unit=in_unit,
        evaluate=evaluate_on("valid", config.logging.evaluate_blocks),
        average=average,
        hooks=hooks,
    )
    warmup, steps_in_all = config.training.warmup_steps, config.training.max_steps
    if warmup >= steps_in_all:
        say(f"a warm-up of {warmup} steps in a run of {steps_in_all}: the rate does not reach its peak")
    carry_out(loop, resume)

    def measures(valid: Evaluation) -> dict[str, Any]:
        """Of the weights as they are: what a result says of both splits."""
        test = evaluate_on("test", config.test_blocks)(learner.evaluated) if config.logging.test else None
        return {
            "val": corpus.in_unit("valid", valid.loss),
            "test": None if test is None else corpus.in_unit("test", test.loss),
            "test_losses": _text_losses(test),
        }

    final = evaluate_on("valid", config.logging.final_blocks)
    valid = _final(loop, config, final)
    measured = measures(valid)
    averaged = None
    if average is not None:
        with average.applied():
            averaged = Averaged(steps=sorted(steps), **measures(final(learner.evaluated)))
    routing = None if place.ranks.staged else summarize_routing(learner.model, corpus.valid, bf16=place.bf16)
    whole = learner.storage.whole_model()
    if place.ranks.rank == 0:
        if routing is None:  # no stage sees the whole routing
            routing = summarize_routing(whole, corpus.valid, bf16=place.bf16)
        logged = read_metrics(loop.metrics.path)
        result = RunResult(
            router=config.router,
            router_spec=record.router_spec,
            seed=config.training.seed,
            config=record.config,
            versions=record.versions,
            hardware=record.hardware,
            corpus=records.CorpusInfo(
                name=corpus.manifest.source.name, sha256=corpus.manifest.key, unit=corpus.unit
            ),
            steps=loop.step,
            tokens=loop.step * config.training.batch_size * config.training.sequence_length,
            skipped_batches=loop.skipped_batches,
            **measured,
            context=valid.context,
            test_context=(
                context_of(corpus.blocks("test"), config.test_blocks) if config.logging.test else None
            ),
            parameters=parameter_counts(whole),
            curves=curves(logged, corpus.unit),
            seconds_per_1k_steps=1000 * loop.train_seconds / loop.step,
            peak_mib=peak_mib(loop.device),
            routing=routing,
            initial_logits=record.initial_logits,
            layer_curves=layer_curves(logged),
            averaged=averaged,
            folder=str(out),
            model=str(out / run_folder.MODEL),
        )
        publish_model(out, whole, corpus.tokenizer, training_card(result))
        write_record(out / run_folder.RESULT, result)
        store.clear_staging()
    accelerator.wait_for_everyone()
    return read_result(out)


def spread_model(model: RMoEForCausalLM, config: RunConfig, place: Place) -> RMoEForCausalLM | Pipeline:
    """The model as its layout (`config.parallel`) spreads it over the ranks."""
    if place.ranks.staged:
        return build_pipeline(model, config, place)
    return distribute(model, config.parallel, place.ranks.world)


def make_learner(
    model: RMoEForCausalLM | Pipeline, config: RunConfig, out: Path, place: Place
) -> tuple[Learner, Accelerator]:
    """The model as the loop wants it, and accelerate's view of this process."""
    accelerator = accelerator_of(config, out, place, unused=not config.training.gradient_checkpointing)
    if isinstance(model, Pipeline):
        return PipelineLearner(model, place.ranks), accelerator
    return ModelLearner(model, accelerator, place.ranks, micro_batches(config, place.ranks)), accelerator


# --- after training ------------------------------------------------------------------------------


def _final(loop: Loop, config: RunConfig, evaluate: Callable[[Any], Evaluation]) -> Evaluation:
    """The finished model on the validation split: not twice, if the last evaluation was just that."""
    last = loop.last_evaluation
    if (
        config.logging.evaluate_blocks == config.logging.final_blocks
        and last is not None
        and last[0] == loop.step
    ):
        return last[1]
    return evaluate(loop.learner.evaluated)


def _text_losses(evaluation: Evaluation | None) -> TextLosses | None:
    """An evaluation's losses in at most `MOST_STRETCHES` stretches, to a thousandth of a nat."""
    if evaluation is None or not evaluation.block_nats:
        return None
    blocks = evaluation.block_nats
    size = -(-len(blocks) // MOST_STRETCHES)
    nats = [round(sum(blocks[start : start + size]), 3) for start in range(0, len(blocks), size)]
    return TextLosses(blocks=size, targets=evaluation.targets, nats=nats)
