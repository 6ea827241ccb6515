"""The training loop, top to bottom.

    for every step: batches, forward and backward, guard, optimizer step, routers' update, log, evaluate, save

What it promises, whatever the layout:

- A step's gradients are those of the mean loss over its tokens, however the batch is cut into micro-batches and
  dealt to processes; the balance loss does not grow with either (`rmoe.training.learner`).
- NaN and infinity stop a step before the optimizer sees it (`Loop.guard`).
- Batches are a pure function of (seed, step, rank), so resuming needs no position in the data.
- Evaluation draws no random numbers: dropout sees the same stream however often it happens.
- The routers' own training state moves once per optimizer step, by sums over micro-batches and ranks.
- A checkpoint has everything: a run that was killed ends in the bits of one that was not (`rmoe.training.resume`).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset

from rmoe.data.config import SplitName
from rmoe.data.order import block_number
from rmoe.routing.noise import rank_seed
from rmoe.training import resume
from rmoe.training.accounting import StepSums, Window
from rmoe.training.average import WeightAverage
from rmoe.training.batches import step_batches
from rmoe.training.build import router_parameters
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.config import TrainingConfig
from rmoe.training.evaluation import Evaluation
from rmoe.training.hooks import Hook
from rmoe.training.learner import Batch, Learner
from rmoe.training.metrics import MetricsLog, Row
from rmoe.training.optimizer import adamw, schedule
from rmoe.training.place import say
from rmoe.training.plan import StepPlan
from rmoe.training.run_folder import METRICS


class Loop:
    """See the module's text.

    Args:
        learner: the model, and how this process holds it.
        training: batch size, rates and the rest.
        plan: what happens at which step.
        accelerator: of this process.
        dataset: sequences; their order is `rmoe.data.order.block_number`'s.
        collate: makes a batch of them; None stacks tensors of one shape.
        sizes: tokens of each sequence without its padding, for the rows; None is where none is padded.
        data_sha256: of the data; a checkpoint of a run on other data is refused.
        store: where checkpoints go; rows go beside them, into metrics.jsonl.
        in_unit: a split's mean loss per token (nats) as `{"bits_per_byte": ...}` or the like, for the rows.
        evaluate: evaluates the model on the validation split; None where there is none.
        average: takes the weights after its steps; None where none are averaged.
        hooks: watch.

    Attributes:
        model: the learner's.
        device, bf16, is_main: of this process: where it computes, whether under bfloat16 autocast, whether it writes.
        step: optimizer steps done, skipped ones included.
        identity: what a checkpoint must have in common with the run that resumes from it.
        skipped_batches: steps skipped so far because of NaN or infinity.
        train_seconds: wall clock of training steps so far, without evaluation, saving and hooks.
        diverged: it ended because more batches were bad than allowed.
        stop_requested: set it (by a signal handler, say) to save and stop after the current step.
        stopped: it ended because of that.
        last_evaluation: (step, evaluation).
    """

    def __init__(
        self,
        learner: Learner,
        training: TrainingConfig,
        plan: StepPlan,
        accelerator: Accelerator,
        *,
        dataset: Dataset[Any],
        collate: Callable[..., Any] | None = None,
        sizes: Sequence[int] | None = None,
        data_sha256: str,
        store: CheckpointStore,
        in_unit: Callable[[SplitName, float], dict[str, float]],
        evaluate: Callable[[nn.Module], Evaluation] | None = None,
        average: WeightAverage | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.learner, self.training, self.plan, self.accelerator = learner, training, plan, accelerator
        self.model, self.device, self.is_main = learner.model, accelerator.device, accelerator.is_main_process
        self.bf16 = accelerator.mixed_precision == "bf16"
        self.dataset, self.collate, self.sizes = dataset, collate, sizes
        self.store, self.metrics = store, MetricsLog(store.folder / METRICS)
        self.in_unit, self._evaluate = in_unit, evaluate
        self.average, self.hooks = average, hooks
        self.identity: dict[str, Any] = {
            "seed": training.seed,
            "data_sha256": data_sha256,
            "batch_size": training.batch_size,
            "sequence_length": training.sequence_length,
        }
        self._router_parameters = list(router_parameters(self.model).values())
        self._parameters = list(learner.model.parameters())
        self.optimizer = adamw(learner.model, training, self._router_parameters)
        self.scheduler = schedule(self.optimizer, training, plan.max_steps)
        self.step = self.skipped_batches = 0
        self.train_seconds = 0.0
        self.diverged = self.stop_requested = self.stopped = False
        self.last_evaluation: tuple[int, Evaluation] | None = None
        self.saved_step: int | None = None
        self.window, self.sums = Window(), StepSums(learner.ranks)

    def run(self, checkpoint: Path | None = None) -> None:
        """Train to the last step, from the start or from a checkpoint (`rmoe.training.resume.newest`)."""
        try:
            self.begin(checkpoint)
            if self.diverged:  # already when that checkpoint was written
                return
            for batches in self.batches(checkpoint):
                self.begin_step()
                self.learner.accumulate(batches, self.sums)
                if self.guard():
                    self.take_step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.step += 1
                self.end_step()
                if self.plan.logs_at(self.step):
                    self.log()
                if self.plan.evaluates_at(self.step):
                    self.evaluate()
                if self.plan.saves_at(self.step) or self.stopped or self.diverged:
                    self.save()
                if self.ended:
                    break
        finally:
            for hook in self.hooks:
                hook.end()

    # --- before the first step --------------------------------------------------------------------

    def begin(self, checkpoint: Path | None) -> None:
        """Weights, optimizer, schedule, counters: as they were when the checkpoint was written."""
        ranks = self.learner.ranks
        # Dropout's stream; nothing else draws from it. Stages of a pipeline draw for different layers.
        set_seed(self.training.seed + 1_000_003 * (ranks.rank % ranks.same if ranks.staged else 0))
        if checkpoint is not None:
            resume.load(self, checkpoint)
        self.model.train()
        for hook in self.hooks:
            hook.begin(self)
        self._clock = time.perf_counter()

    def batches(self, checkpoint: Path | None) -> Iterator[list[Batch]]:
        """What this process sees at each of the steps that are left."""
        ranks, parts = self.learner.ranks, self.learner.parts
        steps = range(self.step, self.plan.max_steps)
        numbers = step_batches(
            len(self.dataset),  # type: ignore[arg-type]
            self.training.seed,
            size=self.training.batch_size // ranks.data // parts,
            parts=parts,
            steps=steps,
            ranks=ranks,
        )
        pinned = self.device.type == "cuda"
        found = iter(
            DataLoader(self.dataset, batch_sampler=numbers, collate_fn=self.collate, pin_memory=pinned)
        )
        if checkpoint is not None:  # after the loader has drawn its number, as in a run without a break
            resume.load_random(self, checkpoint)
        for _ in steps:
            yield [send_to_device(next(found), self.device, non_blocking=True) for _ in range(parts)]

    # --- one step ---------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Before the first micro-batch: sums at zero, and the routers' noise."""
        ranks = self.learner.ranks
        self.sums = StepSums(ranks)
        if self.learner.has_routers:
            # Noise is keyed by (seed and rank, forward passes of a rank so far).
            seed = rank_seed(self.training.seed, ranks.data_rank)
            self.model.set_routing_noise(seed, self.step * self.learner.forward_passes)
        self._tell(lambda hook: hook.step_begin(self))

    def guard(self) -> bool:
        """Whether the step may be taken: its loss and its gradients are finite on every rank."""
        self._norm = self.learner.norm(self._parameters)
        self._grad_norm = float(self._norm)
        self._router_grad_norm = float(self.learner.norm(self._router_parameters))
        self._lm_loss, self._balance_loss, self._finite, self.stopped = self.sums.finish(
            finite=self._grad_norm < float("inf"), stop=self.stop_requested
        )
        self._learning_rate = self.optimizer.param_groups[0]["lr"]
        if not self._finite:
            self.skip()
        return self._finite

    def take_step(self) -> None:
        """Clip, step, and move the routers' own training state, once."""
        if self.training.max_grad_norm > 0:
            self.learner.clip(self.training.max_grad_norm, self._norm)
        self.optimizer.step()
        if self.learner.moves_routers and self.sums.stats is not None:
            self.model.update_routers(self.sums.stats, self.step + 1, self.plan.max_steps)

    def skip(self) -> None:
        """Report a step that is not taken: without gradients the optimizer changes nothing."""
        self.optimizer.zero_grad()
        self.optimizer.step()  # or the schedule would warn that it steps alone
        self.skipped_batches += 1
        self.diverged = self.skipped_batches > self.training.max_skipped_batches
        if not self.is_main:
            return
        losses = {"lm_loss": self._lm_loss, "balance_loss": self._balance_loss}
        self.metrics.append(
            {"kind": "skipped", "step": self.step + 1, **losses, "grad_norm": self._grad_norm}
        )
        say(
            f"left out the batch of step {self.step + 1}: loss {self._lm_loss + self._balance_loss}, gradient norm "
            f"{self._grad_norm} ({self.skipped_batches} so far, {self.training.max_skipped_batches} allowed)"
        )

    def end_step(self) -> None:
        """After a step, skipped or not: clock, sums, average."""
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self.window.seconds += now - self._clock
        self._clock = now
        if self._finite:
            tokens = self._tokens(self.step - 1, self.step)
            self.window.add(self._lm_loss, self._balance_loss, tokens, self.sums.stats)
        if self.average is not None:
            self.average.after(self.step)
        self._tell(lambda hook: hook.step_end(self))

    # --- after a step, where the plan says so -------------------------------------------------------

    def log(self) -> None:
        """Write the means since the last row."""
        row: Row = {"kind": "train", "step": self.step, **self.window.row()}
        if row["lm_loss"] is not None:
            row |= self.in_unit("train", row["lm_loss"])
        row |= {
            "grad_norm": self._grad_norm,
            "router_grad_norm": self._router_grad_norm,
            "lr": self._learning_rate,
            "tokens": self._tokens(0, self.step),
            "peak_mib": peak_mib(self.device),
        }
        self.window = Window()
        self._publish(row)

    def _tokens(self, start: int, stop: int) -> int:
        """Tokens of the steps after `start` up to `stop`, on all ranks."""
        batch = self.training.batch_size
        if self.sizes is None:
            return (stop - start) * batch * self.training.sequence_length
        blocks, seed = len(self.sizes), self.training.seed
        return sum(self.sizes[block_number(blocks, seed, n)] for n in range(start * batch, stop * batch))

    def evaluate(self) -> None:
        """Evaluate the model on the validation split and write a row."""
        if self._evaluate is None:
            return
        evaluation = self._evaluate(self.learner.evaluated)
        self.last_evaluation = (self.step, evaluation)
        row: Row = {"kind": "eval", "step": self.step, "split": "valid", "loss": evaluation.loss}
        row |= self.in_unit("valid", evaluation.loss)
        self._publish({**row, "tokens": evaluation.targets, "context": evaluation.context})
        self._clock = time.perf_counter()

    def _publish(self, row: Row) -> None:
        if self.is_main:
            self.metrics.append(row)
        self._tell(lambda hook: hook.log(self, row))

    def _tell(self, what: Callable[[Hook], None]) -> None:
        """Call the hooks; the clock of the steps stands still."""
        begun = time.perf_counter()
        for hook in self.hooks:
            what(hook)
        self._clock += time.perf_counter() - begun

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.step != self.saved_step:
            resume.save(self)
            self.saved_step = self.step
            self._clock = time.perf_counter()

    # --- what others ask ----------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether there is no step after this one."""
        return self.step >= self.plan.max_steps or self.stopped or self.diverged


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process so far: the allocator's on a GPU, else resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
