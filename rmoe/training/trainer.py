"""`RMoETrainer`: `transformers.Trainer`, with its known faults closed.

What differs, and why (each was measured on transformers 5.23):

- The balance loss does not grow with gradient accumulation: Trainer leaves a loss that counts
  `num_items_in_batch` undivided, so four micro-batches would add four balance losses (`compute_loss`).
- NaN and infinity stop the step before the optimizer sees it; Trainer logs them as 0 and goes on (`_judge`).
- Checkpoints are this package's: whole or absent, sealed, all or nothing (`_save_checkpoint` and the loaders).
- Batches are a pure function of (seed, example): the whole run is one epoch of a stateless sampler.
- Evaluation draws no random numbers; dropout sees the same stream however often it happens.
- The routers' training state moves exactly once per optimizer step, by sums over micro-batches and ranks.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from rmoe.data.blocks import BlockSampler
from rmoe.data.config import SplitName
from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.training import state as contents
from rmoe.training.accounting import StepSums, Window
from rmoe.training.average import WeightAverage
from rmoe.training.build import router_parameters
from rmoe.training.checkpoint import CheckpointStore, Damaged
from rmoe.training.evaluation import Evaluation
from rmoe.training.metrics import MetricsLog, Row
from rmoe.training.parallel import is_sharded, total_norm
from rmoe.training.place import Ranks
from rmoe.training.storage import Gathered, OptimizerRecord, Sharded, Storage, Whole

TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must have in common with the run that resumes from it."""

    seed: int
    data_sha256: str
    batch_size: int
    sequence_length: int


class RMoETrainer(Trainer):
    """See the module's text.

    Args:
        model: a causal language model or classifier: of this package, grafted, or any of transformers.
        args: with `max_steps` set; its batch size and accumulation must give `identity.batch_size`.
        train_dataset: blocks; their order is `BlockSampler`'s.
        store: where checkpoints go.
        metrics: where rows go.
        identity: of the run.
        in_unit: a split's mean loss per token (nats) as `{"bits_per_byte": ...}` or the like, for the rows.
        judge: evaluates the model on the validation split; None where there is none.
        max_skipped_batches: how many batches with NaN or infinity may be left out.
        ranks: which processes see which sequences; None is different ones for each.
        router_learning_rate: the peak for the routers' parameters; None is the common one.
        average: takes the weights after its steps; None where none are averaged.
        branch_points: steps after which a checkpoint is written, whatever the interval.
        callbacks: of transformers; `on_log` gets each row, its lists as `name/0`, `name/1`, ...
        eval_dataset, data_collator, processing_class, optimizers: as in transformers.

    Attributes:
        skipped_batches: left out so far.
        train_seconds: wall clock of training steps so far, without evaluation and saving.
        diverged: it ended because more batches were bad than allowed.
        stop_requested: set it (by a signal handler, say) to save and stop after the current step.
        stopped: it ended because of that.
        last_evaluation: (step, figures).
    """

    control: TrainerControl
    loss_is_scaled_for_ga = True  # `compute_loss` does it, for both parts

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        store: CheckpointStore,
        metrics: MetricsLog,
        identity: Identity,
        in_unit: Callable[[SplitName, float], dict[str, float]],
        judge: Callable[[nn.Module], Evaluation] | None = None,
        max_skipped_batches: int = 0,
        ranks: Ranks | None = None,
        router_learning_rate: float | None = None,
        average: WeightAverage | None = None,
        branch_points: tuple[int, ...] = (),
        callbacks: list[TrainerCallback] | None = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        use_cache = getattr(model.config, "use_cache", None)
        args.save_only_model = True  # Trainer refuses sharded models otherwise; we save and load ourselves
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=[_Steps(self), *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback)
        if use_cache is not None:
            model.config.use_cache = use_cache  # Trainer turns it off, and it would be saved with the model
        self.store, self.metrics, self.identity = store, metrics, identity
        self.in_unit, self.judge = in_unit, judge
        self.max_skipped_batches = max_skipped_batches
        self.router_learning_rate, self.average = router_learning_rate, average
        self.branch_points = frozenset(branch_points)
        self.ranks = ranks or Ranks(self.accelerator.num_processes, self.accelerator.process_index)
        self.storage = self._storage()
        self.skipped_batches = 0
        self.train_seconds = 0.0
        self.diverged = False
        self.stop_requested = False
        self.stopped = False
        self.last_evaluation: tuple[int, Evaluation] | None = None
        self._counts_items = getattr(model, "loss_type", None) == "ForCausalLM"
        self._has_routers = hasattr(model, "update_routers")
        self._skips_logits = isinstance(model, RMoEForCausalLM)
        self._router_parameters = list(router_parameters(model).values())
        self._window, self._sums = Window(), StepSums(self.ranks)
        self._step_losses = (0.0, 0.0)
        self._step_taken = False
        self._grad_norm, self._router_grad_norm, self._learning_rate = 0.0, 0.0, 0.0
        self._saved_step: int | None = None
        self._clock = time.perf_counter()

    def _storage(self) -> Storage:
        if not is_sharded(self.model):
            return Whole(self.model)
        return Sharded(self.model) if self.ranks.same == 1 else Gathered(self.model)

    @property
    def judged(self) -> nn.Module:
        """What can be evaluated; on all processes together."""
        return self.model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; with a rate of their own the routers' parameters get groups of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if is_new and self.router_learning_rate is not None:
            _split_groups(optimizer, self._router_parameters, self.router_learning_rate)
        return optimizer

    # --- one optimizer step --------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """As in transformers, but processes that work together on the same sequences are dealt the same."""
        loader = super().get_train_dataloader()
        if self.ranks.same > 1:
            shard: Any = loader.batch_sampler
            shard.num_processes, shard.process_index = self.ranks.data, self.ranks.data_rank
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """The whole run as one epoch: no step straddles two, and resuming is skipping."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        examples = self.args.max_steps * self.identity.batch_size
        return BlockSampler(len(dataset), self.identity.seed, stop=examples)

    def begin_step(self) -> None:
        """Called before the first micro-batch of a step."""
        self._sums = StepSums(self.ranks)
        if self._has_routers:
            # Noise is keyed by (seed and rank, forward passes of a rank so far).
            seed = (self.identity.seed + 1_000_003 * self.ranks.data_rank) % 2**31
            self.model.set_routing_noise(seed, self.state.global_step * self.micro_batches)

    @property
    def micro_batches(self) -> int:
        """Forward passes of a process in a step."""
        return int(self.args.gradient_accumulation_steps)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's part of the step's loss: its gradients, summed, are those of the mean loss.

        The language-model part is a sum over its tokens divided by the step's tokens on all ranks; the balance
        part a mean over micro-batches, whose number must not change its weight. Ranks with different sequences
        average their gradients, so what is already a share of the whole is multiplied by their number. Trainer
        counts the tokens of all ranks, and so those of ranks that see the same more than once.
        """
        if self._has_routers:
            inputs = {**inputs, "router_stats": self._sums.stats}
        if self._skips_logits and not return_outputs:
            inputs = {**inputs, "output_logits": False}
        if self._counts_items and num_items_in_batch is not None:
            items = num_items_in_batch / self.ranks.same if self.ranks.same > 1 else num_items_in_batch
            inputs = {**inputs, "num_items_in_batch": items, "use_cache": False}
        else:
            num_items_in_batch = None
        outputs = model(**inputs)
        task_loss, balance_loss = self._split_loss(outputs)
        micro_batches = self.current_gradient_accumulation_steps
        if num_items_in_batch is None:
            task_loss = task_loss / (micro_batches * self.ranks.data)
        balance_loss = balance_loss / micro_batches
        self._sums.add(task_loss, balance_loss, getattr(outputs, "router_stats", None))
        loss = task_loss * self.ranks.data + balance_loss
        return (loss, outputs) if return_outputs else loss

    def _split_loss(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """(language-model or task loss, balance losses with their weight)."""
        loss = outputs.loss
        for name in ("lm_loss", "task_loss"):
            if getattr(outputs, name, None) is not None:
                return getattr(outputs, name), outputs.balance_loss
        aux_loss = getattr(outputs, "aux_loss", None)  # of transformers' own MoE models: without its weight
        if aux_loss is None:
            return loss, torch.zeros_like(loss)
        balance_loss = self.model.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return loss - balance_loss, balance_loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in transformers; after the last micro-batch the step's loss and gradients are looked at."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._judge_gradients(model)
        return loss

    def _judge_gradients(self, model: nn.Module) -> None:
        """Keep NaN and infinity from the optimizer: without gradients its step changes nothing."""
        self._grad_norm = self.gradient_norm(list(model.parameters()))
        self._router_grad_norm = self.gradient_norm(self._router_parameters)
        task, balance, finite, stop = self._sums.finish(
            finite=self._grad_norm < float("inf"), stop=self.stop_requested
        )
        self._step_losses = (task, balance)
        self._step_taken, self.stopped = finite, stop
        if not finite:
            model.zero_grad(set_to_none=True)
            self._skip(task, balance)

    def gradient_norm(self, parameters: list[nn.Parameter]) -> float:
        """The 2-norm of their gradients, the same on every process."""
        return total_norm(p.grad for p in parameters if p.grad is not None)

    def _skip(self, task_loss: float, balance_loss: float) -> None:
        step = self.state.global_step + 1
        self.skipped_batches += 1
        self.diverged = self.skipped_batches > self.max_skipped_batches
        row: Row = {
            "kind": "skipped",
            "step": step,
            "lm_loss": task_loss,
            "balance_loss": balance_loss,
            "grad_norm": self._grad_norm,
        }
        if self.is_world_process_zero():
            self.metrics.append(row)
            print(
                f"left out the batch of step {step}: loss {task_loss + balance_loss}, gradient norm "
                f"{self._grad_norm} ({self.skipped_batches} so far, {self.max_skipped_batches} allowed)",
                file=sys.stderr,
                flush=True,
            )

    def after_optimizer(self) -> None:
        """Called right after the optimizer's step: the routers' own training state moves, once."""
        self._learning_rate = self._get_learning_rate()
        if self._has_routers and self._step_taken and self._sums.stats is not None:
            self.model.update_routers(self._sums.stats, self.state.global_step + 1, self.state.max_steps)

    def end_step(self, control: TrainerControl) -> None:
        """Called after a step, skipped or not."""
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._window.seconds += now - self._clock
        self._clock = now
        if self._step_taken:
            tokens = self.identity.batch_size * self.identity.sequence_length
            self._window.add(*self._step_losses, tokens, self._sums.stats)
        if self.average is not None:
            self.average.after(self.state.global_step)
        control.should_log |= self.state.global_step >= self.state.max_steps
        control.should_save |= self.state.global_step in self.branch_points
        if self.stopped or self.diverged:
            control.should_save = control.should_training_stop = True

    # --- what is said --------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write this package's row where Trainer would log its own; its summary at the end is left out."""
        if "loss" not in logs:
            return
        step = self.state.global_step
        row: Row = {"kind": "train", "step": step, **self._window.row()}
        if row["lm_loss"] is not None:
            row |= self.in_unit("train", row["lm_loss"])
        row |= {
            "grad_norm": self._grad_norm,
            "router_grad_norm": self._router_grad_norm,
            "lr": self._learning_rate,
            "tokens": step * self.identity.batch_size * self.identity.sequence_length,
            "peak_mib": peak_mib(self.args.device),
        }
        self._window = Window()
        self._publish(row)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judge the model on the validation split and write a row."""
        assert self.judge is not None
        evaluation = self.judge(self.judged)
        self.last_evaluation = (self.state.global_step, evaluation)
        self._publish(
            {
                "kind": "eval",
                "step": self.state.global_step,
                "split": "valid",
                "loss": evaluation.loss,
                **self.in_unit("valid", evaluation.loss),
                "tokens": evaluation.targets,
                "context": evaluation.context,
            }
        )
        figures = {"eval_loss": evaluation.loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        self._clock = time.perf_counter()
        return figures

    def _publish(self, row: Row) -> None:
        if self.is_world_process_zero():
            self.metrics.append(row)
        prefix = "eval_" if row["kind"] == "eval" else ""
        flat = {f"{prefix}{name}": value for name, value in _scalars(row).items() if name != "step"}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, flat)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here: Trainer's estimate walks over all parameters at every micro-batch."""
        return 0

    # --- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        step = self.state.global_step
        if step == self._saved_step:
            return
        # Every rank's generators; the rest is the same on all of them.
        random = gather_object([contents.capture_random(self.args.device)])
        write = self.storage.collect(self.store, step, self.optimizer)
        if self.is_world_process_zero():
            self.store.save(step, lambda folder: self._write_checkpoint(folder, random, write))
        self.accelerator.wait_for_everyone()
        self._saved_step = step
        self._clock = time.perf_counter()

    def _write_checkpoint(
        self,
        folder: Path,
        random: list[tuple[Any, dict[str, Tensor]]],
        write_tensors: Callable[[Path], OptimizerRecord],
    ) -> None:
        self.metrics.sync()  # a checkpoint never knows of steps that the rows before it lack
        optimizer = write_tensors(folder)
        self.model.config.save_pretrained(folder)
        contents.save_random(folder, [tensors for _, tensors in random])
        if self.average is not None:
            self.average.save(folder)
        self.state.save_to_json(str(folder / TRAINER_STATE))
        state = contents.TrainingState(
            step=self.state.global_step,
            **asdict(self.identity),
            skipped_batches=self.skipped_batches,
            train_seconds=self.train_seconds,
            pending=self._window.to_dict(),
            scheduler=self.lr_scheduler.state_dict(),
            param_groups=optimizer.groups,
            optimizer_tensors=optimizer.tensors,
            host_random=[host for host, _ in random],
            averaged=0 if self.average is None else self.average.count,
        )
        contents.write_state(folder, state)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint this run can go on from; the same answer on every rank."""
        found = [self.store.newest_valid(self._check)] if self.is_world_process_zero() else [None]
        if self.ranks.world > 1:
            torch.distributed.broadcast_object_list(found)
        return found[0]

    def _check(self, folder: Path) -> None:
        """Look at all of a checkpoint before any of it is loaded.

        Raises:
            Damaged: it does not fit this model.
            RequestError: it is whole, but of a run with another seed, data or batch.
        """
        state = contents.read_state(folder)
        for name, now in asdict(self.identity).items():
            was = getattr(state, name)
            if was != now:
                raise RequestError(name, now, f"{was!r}, as {folder} was trained with")
        try:
            trainer_step = TrainerState.load_from_json(str(folder / TRAINER_STATE)).global_step
        except (OSError, ValueError, TypeError) as error:
            raise Damaged(f"{TRAINER_STATE}: {' '.join(str(error).split())}") from None
        if trainer_step != state.step:
            raise Damaged(f"{TRAINER_STATE} is of step {trainer_step}, not {state.step}")
        self.storage.check(folder, state)
        if self.average is not None:
            self.average.check(folder, state.averaged)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.storage.load_model(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        state = contents.read_state(folder)
        self.storage.load_optimizer(folder, state, self.optimizer)
        groups = len(self.optimizer.param_groups)
        self.lr_scheduler.load_state_dict(contents.for_groups(state.scheduler, groups))
        self.skipped_batches, self.train_seconds = state.skipped_batches, state.train_seconds
        self._window = Window(state.pending)
        if self.average is not None:
            self.average.load(folder, state.averaged)
        self._saved_step = state.step

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        # Those that compute the same in parts must draw the same; stages compute different things.
        rank = self.ranks.rank if self.ranks.staged else self.ranks.data_rank * self.ranks.same
        state, tensors = contents.read_state(folder), contents.load_random(folder, rank)
        if rank < len(state.host_random) and tensors:
            contents.restore_random(state.host_random[rank], tensors, self.args.device)
        else:  # more ranks than the checkpoint was written by: a stream of its own for each new one
            torch.manual_seed((self.identity.seed + 1_000_003 * rank + state.step) % 2**31)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: mixed precision is bfloat16."""

    def restart_clock(self) -> None:
        """Called when training begins."""
        self._clock = time.perf_counter()


def _split_groups(optimizer: torch.optim.Optimizer, members: list[nn.Parameter], rate: float) -> None:
    """Move `members` into groups of their own, with the settings of the group they were in and another rate."""
    chosen = {id(parameter) for parameter in members}
    for group in list(optimizer.param_groups):
        inside = [p for p in group["params"] if id(p) in chosen]
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if inside:
            optimizer.add_param_group({**group, "params": inside, "lr": rate})


class _Steps(TrainerCallback):
    """Tells the trainer where in a step it is."""

    def __init__(self, trainer: RMoETrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.restart_clock()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin_step()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.after_optimizer()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.trainer.end_step(control)
        return control


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process so far: the allocator's on a GPU, else resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _scalars(row: Row) -> dict[str, float]:
    """A row's numbers, lists as `name/0`, `name/1`, ...: what TensorBoard and its like take."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float):
            flat[name] = value
        elif isinstance(value, list):
            flat |= {f"{name}/{index}": item for index, item in enumerate(value)}
    return flat
