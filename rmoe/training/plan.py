"""What a run does at which of its optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from rmoe.training.config import RunConfig


@dataclass(frozen=True)
class StepPlan:
    """Steps are counted from 1.

    Attributes:
        max_steps: the last step.
        log_every: steps between rows of metrics.jsonl; the last step has one, too.
        evaluate_every: steps between evaluations; None is never.
        save_every: steps between checkpoints, the last step has one, too; None is never.
        branch_points: steps that have a checkpoint whatever the interval.
    """

    max_steps: int
    log_every: int
    evaluate_every: int | None = None
    save_every: int | None = None
    branch_points: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: RunConfig) -> StepPlan:
        """The plan that a run's configuration asks for."""
        return cls(
            config.training.max_steps,
            config.logging.every,
            config.evaluation_interval,
            config.checkpoint_interval,
            frozenset(config.training.branch_points),
        )

    def logs_at(self, step: int) -> bool:
        """Whether a row is written after a step."""
        return step % self.log_every == 0 or step >= self.max_steps

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after a step."""
        return self.evaluate_every is not None and step % self.evaluate_every == 0

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        if self.save_every is None:
            return False
        return step % self.save_every == 0 or step >= self.max_steps or step in self.branch_points
