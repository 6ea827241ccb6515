"""A shorter `wsd` run that begins at a longer one's checkpoint: the constant part is trained once for all lengths.

A run of M steps is constant until `M - M // 5`. A longer run with the same settings is the same run up to there, bit
for bit, since its rate is constant too and batches follow from (seed, step). So the checkpoint of that step, kept by
`training.branch_points`, is the shorter run's own; only the seal on it is new.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.training import run_folder
from rmoe.training.checkpoint import MANIFEST, CheckpointStore, Damaged, verify
from rmoe.training.config import RunConfig
from rmoe.training.metrics import MetricsLog, read_metrics
from rmoe.training.run_folder import (
    CHECKPOINTS,
    RunRecord,
    completed,
    flat,
    read_run,
    require_equal,
    settings_of,
)
from rmoe.validation import require

FIELD = "--branch-of"
MOST_UPDATES = 1000
LENGTH = ("training.max_steps", "training.branch_points", "training.average", "training.average_every")


def require_branch(config: RunConfig, record: RunRecord, source: Path) -> Path:
    """The checkpoint that a run begins at; nothing is written.

    Args:
        record: of the run to begin.
        source: folder of the longer run.

    Raises:
        RequestError: the run in `source` is another one, too short, or did not keep that checkpoint.
    """
    step = config.training.constant_steps
    if config.training.schedule != "wsd":
        raise RequestError(FIELD, str(source), f"a run with schedule wsd, not {config.training.schedule}")
    if config.average_steps and min(config.average_steps) <= step:
        raise RequestError("training.average", config.training.average, f"averages after step {step} alone")
    stored = completed(read_run(source))
    longer = RunConfig.from_dict(stored.config)
    if longer.training.max_steps < config.training.max_steps:
        allowed = f"at most {longer.training.max_steps}, the steps of the run in {source}"
        raise RequestError("training.max_steps", config.training.max_steps, allowed)
    if config.average_steps and longer.average_steps and min(longer.average_steps) <= step:
        allowed = (
            f"0: the run in {source} has weights averaged by step {step} that this run would not average"
        )
        raise RequestError("training.average", config.training.average, allowed)
    free = {name for name in flat(record.config) if name.startswith(("logging.", "checkpoints."))}
    parts = ("config", "model", "plugins", "data_sha256")
    was, now = (settings_of(each, parts) for each in (stored, record))
    require_equal(was, now, free.union(run_folder.MAY_DIFFER, LENGTH), f"the run in {source}")
    return source / CHECKPOINTS / f"checkpoint-{step}"


def require_steady(model: RMoEForCausalLM, ids: Tensor, config: RunConfig, source: Path) -> None:
    """Check that the routers' own state moves alike in the longer run and in this one, up to the branch.

    Copies of the routers are updated at the steps of the constant part, at most `MOST_UPDATES` of them.

    Args:
        model: of this run, before its first step.
        ids: `[N, S]`, whose routing the updates are given.

    Raises:
        RequestError: naming the state that differs.
    """
    lengths = config.training.max_steps, RunConfig.from_dict(read_run(source).config).training.max_steps
    with torch.no_grad():
        stats = model(input_ids=ids, use_cache=False).router_stats
    routers = [copy.deepcopy(model.routers) for _ in lengths]
    last = config.training.constant_steps
    for step in range(1, last + 1, max(1, -(-last // MOST_UPDATES))):
        for copied, length in zip(routers, lengths, strict=True):
            for router in copied:
                router.update_all(stats, step, length)
        for mine, theirs in zip(*routers, strict=True):
            for (name, here), there in zip(mine.named_buffers(), theirs.buffers(), strict=True):
                allowed = f"a router without {name}: it moves with the length of the run"
                require(torch.equal(here, there), FIELD, str(source), allowed)


def begin_branch(checkpoint: Path, out: Path, record: RunRecord) -> bool:
    """Copy a checkpoint and the metrics up to it into a new run's folder, unless that has a checkpoint.

    Args:
        checkpoint: from `require_branch`.
        out: the new run's folder, which a wrong request leaves empty.
        record: of the new run.

    Returns:
        Whether it did.

    Raises:
        RequestError: it is not there or damaged.
    """
    source, step = checkpoint.parents[1], int(checkpoint.name.rpartition("-")[2])
    store = CheckpointStore(out, run_folder.fingerprint(record))
    if store.found():
        return False
    try:
        verify(checkpoint, step, run_folder.fingerprint(read_run(source)))
    except Damaged as reason:
        for name in (run_folder.CONFIG, run_folder.METRICS):
            (out / name).unlink(missing_ok=True)
        allowed = f"a run that kept {checkpoint.name} (training.branch_points): {reason}"
        raise RequestError(FIELD, str(source), allowed) from None

    metrics = MetricsLog(store.folder / run_folder.METRICS)
    metrics.path.unlink(missing_ok=True)  # of a branch that was killed before its checkpoint was there
    for row in read_metrics(source / run_folder.METRICS):
        if row["step"] <= step:
            metrics.append(row)
    metrics.sync()
    with store.staged(step) as folder:
        for path in checkpoint.iterdir():
            if path.name != MANIFEST:
                shutil.copyfile(path, folder / path.name)
    return True
