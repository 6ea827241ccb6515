"""How a model is spread over processes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from rmoe.validation import AtLeastOne, check_fields, require


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over processes (`torchrun --nproc-per-node N`); all 1 is a copy in each (DDP).

    Attributes:
        fsdp: processes that weights, gradients and optimizer state are cut into (FSDP2).
        expert: of those, processes that the experts are dealt out to (expert parallelism).
        replicate: copies of such groups (HSDP), or of pipelines.
        tensor: processes that each matrix is cut into (tensor parallelism); they see the same sequences.
        pipeline: stages that the layers are cut into, one process each; `training.micro_batch_size` is then what
            travels through the stages at a time.
    """

    fsdp: AtLeastOne = 1
    expert: AtLeastOne = 1
    replicate: AtLeastOne = 1
    tensor: AtLeastOne = 1
    pipeline: AtLeastOne = 1

    def __post_init__(self) -> None:
        check_fields(self, "parallel")
        shards = self.fsdp * self.tensor
        fits = self.expert == 1 or (shards % self.expert == 0 and self.expert % self.tensor == 0)
        allowed = f"1, or a divisor of parallel.fsdp ({self.fsdp})"
        if self.tensor > 1:
            allowed = (
                f"1, or a multiple of parallel.tensor ({self.tensor}) that divides fsdp x tensor ({shards})"
            )
        require(fits, "parallel.expert", self.expert, allowed)
        alone = self.pipeline == 1 or self.fsdp * self.tensor == 1
        require(alone, "parallel.pipeline", self.pipeline, "1 with parallel.fsdp or parallel.tensor above 1")

    @property
    def shards(self) -> bool:
        """Whether transformers cuts the weights up (pipelines cut between layers)."""
        return self.fsdp * self.tensor > 1

    @property
    def data(self) -> int:
        """Processes, or groups of them, that see different sequences."""
        return self.replicate * self.fsdp

    @property
    def same_data(self) -> int:
        """Processes that work together on the same sequences."""
        return self.tensor * self.pipeline

    @property
    def processes(self) -> int:
        """Processes of the layout; 1 also stands for any number of copies (DDP)."""
        return self.replicate * self.fsdp * self.tensor * self.pipeline

    def require_processes(self, count: int) -> None:
        """Check that the layout is one for `count` processes; with all sizes 1 it is for any number.

        Raises:
            RequestError: it is not.
        """
        product = self.processes
        said = f"replicate x fsdp x tensor x pipeline = {product}"
        require(product in (1, count), "parallel", said, f"the number of processes ({count})")
