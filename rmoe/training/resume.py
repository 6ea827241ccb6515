"""A loop's checkpoints: written whole, checked before any of it is loaded, put back to the bit.

What is in which file is `rmoe.training.state`'s business, where the tensors come from `rmoe.training.storage`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from rmoe.errors import RequestError
from rmoe.training import state as contents
from rmoe.training.checkpoint import Damaged
from rmoe.training.storage import OptimizerRecord

if TYPE_CHECKING:
    from rmoe.training.loop import Loop


def save(loop: Loop) -> None:
    """Write a checkpoint of the loop as it is between two steps. Collective."""
    # Every rank's generators; the rest is the same on all of them.
    random = gather_object([contents.capture_random(loop.device)])
    write = loop.learner.storage.collect(loop.store, loop.step, loop.optimizer)
    if loop.is_main:
        with loop.store.staged(loop.step) as folder:
            loop.metrics.sync()  # a checkpoint never knows of steps that the rows before it lack
            optimizer = write(folder)
            loop.model.config.save_pretrained(folder)
            contents.save_random(folder, [tensors for _, tensors in random])
            if loop.average is not None:
                loop.average.save(folder)
            contents.write_state(folder, _state(loop, optimizer, [host for host, _ in random]))
    loop.accelerator.wait_for_everyone()


def _state(
    loop: Loop, optimizer: OptimizerRecord, random: list[contents.HostRandom]
) -> contents.TrainingState:
    return contents.TrainingState(
        step=loop.step,
        **loop.identity,
        skipped_batches=loop.skipped_batches,
        train_seconds=loop.train_seconds,
        pending=loop.window,
        scheduler=loop.scheduler.state_dict(),
        param_groups=optimizer.groups,
        optimizer_tensors=optimizer.tensors,
        host_random=random,
        averaged=0 if loop.average is None else loop.average.count,
    )


def newest(loop: Loop) -> Path | None:
    """The newest checkpoint that the loop can resume from; the same answer on every rank.

    Raises:
        RequestError: it is whole, but of a run with another seed, data or batch.
    """
    found: list[Any] = [
        loop.store.newest_valid(lambda folder: _check(loop, folder)) if loop.is_main else None
    ]
    broadcast_object_list(found)
    return found[0]  # type: ignore[no-any-return]


def _check(loop: Loop, folder: Path) -> None:
    """Look at all of a checkpoint before any of it is loaded.

    Raises:
        Damaged: it does not fit this model.
        RequestError: it is whole, but of a run with another seed, data or batch.
    """
    state = contents.read_state(folder)
    for name, now in loop.identity.items():
        was = getattr(state, name)
        if was != now:
            raise RequestError(name, now, f"{was!r}, as {folder} was trained with")
    if folder.name != f"checkpoint-{state.step}":
        raise Damaged(f"{contents.STATE} is of step {state.step}")
    loop.learner.storage.check(folder, state)
    if loop.average is not None:
        loop.average.check(folder, state.averaged)


def load(loop: Loop, folder: Path) -> None:
    """Put everything back but the random generators (`load_random`). Collective."""
    storage, state = loop.learner.storage, contents.read_state(folder)
    storage.load_model(folder)
    storage.load_optimizer(folder, state, loop.optimizer)
    # A rate follows from the settings and the step; how the groups are cut is the layout's.
    counts = {name: state.scheduler[name] for name in ("last_epoch", "_step_count")}
    loop.scheduler.load_state_dict(loop.scheduler.state_dict() | counts)
    loop.step = loop.saved_step = state.step
    loop.skipped_batches, loop.train_seconds = state.skipped_batches, state.train_seconds
    loop.diverged = loop.skipped_batches > loop.training.max_skipped_batches
    loop.window = state.pending
    if loop.average is not None:
        loop.average.load(folder, state.averaged)


def load_random(loop: Loop, folder: Path) -> None:
    """Put this rank's random generators back."""
    ranks = loop.learner.ranks
    # Those that compute the same in parts must draw the same; stages compute different things.
    rank = ranks.rank if ranks.staged else ranks.data_rank * ranks.same
    state, tensors = contents.read_state(folder), contents.load_random(folder, rank)
    if rank < len(state.host_random) and tensors:
        contents.restore_random(state.host_random[rank], tensors, loop.device)
    else:  # more ranks than the checkpoint was written by: a stream of its own for each new one
        torch.manual_seed((loop.training.seed + 1_000_003 * rank + state.step) % 2**31)
