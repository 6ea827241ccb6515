"""Eight small runs of `rmoe compare`: sharing the machine, one thread each, against one by one with all threads.

    python -m benchmarks.sharing [--parts grid steps] [--sizes quick larger] [--out benchmarks/results]

`grid`: wall clock of whole comparisons, two routers and four seeds, each way once. One by one with all threads is the
fastest way to do without sharing, and what sharing is compared with. One by one with one thread gives the bits of
the shared runs, which is checked on one seed.
`steps`: steps per second of as many workers as there are cores against one worker with all threads, over growing
sizes: where sharing stops paying.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.results import write_result
from rmoe.compare.compare import Options, compare
from rmoe.compare.engines.devices import cores
from rmoe.compare.engines.engine import Wants
from rmoe.compare.engines.process import Process, threads_of
from rmoe.compare.sharing import share, step_work
from rmoe.compare.timing import TimeSteps
from rmoe.data import prepare
from rmoe.errors import RunError
from rmoe.training.config import ModelConfig, RunConfig, TrainingConfig

ROUTERS, SEEDS = ("smoe", "rmoe"), 4
QUICK = RunConfig.from_preset("quick")


def _size(
    hidden: int, layers: int, experts: int, top_k: int, width: int, batch: int, length: int, steps: int
) -> RunConfig:
    model = ModelConfig(hidden, layers, hidden // 32, num_experts=experts, num_experts_per_tok=top_k,
                        moe_intermediate_size=width)  # fmt: skip
    training = TrainingConfig(max_steps=steps, batch_size=batch, sequence_length=length, threads=1)
    return dataclasses.replace(QUICK, preset="", model=model, training=training)


GRIDS = {"quick": QUICK, "larger": _size(256, 4, 8, 2, 256, 8, 256, 20)}
LADDER = {
    "quick": QUICK,
    "d=192, 4 x 256": _size(192, 4, 8, 2, 192, 4, 256, 1),
    "larger": GRIDS["larger"],
    "medium, 2 layers, 4 x 512": _size(352, 2, 16, 2, 352, 4, 512, 1),
    "medium, 2 layers, 16 x 512": _size(352, 2, 16, 2, 352, 16, 512, 1),
    "0.9B, 2 layers, 1 x 512": _size(1280, 2, 16, 4, 448, 1, 512, 1),
}


def with_threads(config: RunConfig, threads: int) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, threads=threads))


def with_steps(config: RunConfig, steps: int | None) -> RunConfig:
    training = config.training if steps is None else dataclasses.replace(config.training, max_steps=steps)
    return dataclasses.replace(config, training=training)


def whole_grid(config: RunConfig, seeds: int = SEEDS) -> dict[str, Any]:
    """Seconds of each way, and whether those with equal threads gave equal bits."""
    prepare(config.data, config.training.sequence_length)
    ways = {
        "one_by_one_all_threads": (1, cores(), seeds),
        "shared": (cores(), 1, seeds),
        "one_seed_one_by_one_one_thread": (1, 1, 1),
    }
    seconds: dict[str, float] = {}
    bits: dict[str, dict[str, str]] = {}
    for name, (jobs, threads, count) in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            options = Options(jobs=jobs, timing_rounds=0, analysis_tokens=0)
            compare(with_threads(config, threads), ROUTERS, count, Path(folder), options=options)
            seconds[name] = time.monotonic() - started
            models = Path(folder).glob("runs/*/model/model.safetensors")
            bits[name] = {m.parts[-3]: hashlib.sha256(m.read_bytes()).hexdigest() for m in models}
    return {
        "runs": len(ROUTERS) * seeds,
        "steps": config.training.max_steps,
        "step_work": step_work(config.model, config.training),
        "cores": cores(),
        **{f"{name}_s": value for name, value in seconds.items()},
        "faster": seconds["one_by_one_all_threads"] / seconds["shared"],
        "same_bits_as_one_by_one": bits["one_seed_one_by_one_one_thread"].items() <= bits["shared"].items(),
    }


def steps_per_second(config: RunConfig, jobs: int, threads: int, steps: int) -> float:
    """Of all workers together, while all of them train."""
    job = TimeSteps(config=with_threads(config, threads).to_dict(), steps=steps)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        warm_up = msgspec.structs.replace(job, steps=1)
        workers = [Process(threads_of(threads), Path(folder, f"{number}.log")) for number in range(jobs)]
        try:
            # Once unmeasured: what is measured begins with all workers up.
            list(pool.map(lambda worker: worker.do(warm_up, Wants()), workers))
            answers = list(pool.map(lambda worker: worker.do(job, Wants()), workers))
        finally:
            for worker in workers:
                worker.close()
    for answer in answers:
        if answer.error is not None:
            raise RunError(f"timing failed: {answer.error}", "nothing", "run the same command again")
    return sum(1 / median(answer.value.step_seconds) for answer in answers)


def ladder(sizes: list[str], steps: int) -> list[dict[str, Any]]:
    """Sharing over sizes: how much faster, and what `rmoe compare` would choose."""
    found = []
    for name in sizes:
        config = dataclasses.replace(LADDER[name], router="rmoe")
        prepare(config.data, config.training.sequence_length)
        alone = steps_per_second(config, 1, cores(), steps)
        shared = steps_per_second(config, cores(), 1, steps)
        found.append(
            {
                "size": name,
                "step_work": step_work(config.model, config.training),
                "one_by_one_all_threads_steps_per_s": alone,
                "shared_steps_per_s": shared,
                "faster": shared / alone,
                "default_jobs": share(
                    config.model, dataclasses.replace(config.training, threads=None), None, False
                ).jobs,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("grid", "steps"), default=["grid", "steps"])
    parser.add_argument("--sizes", nargs="+", choices=list(LADDER), help="default: all of a part")
    parser.add_argument("--steps", type=int, default=20, help="measured of each size")
    parser.add_argument("--grid-steps", type=int, help="of each run of a grid; default: the preset's")
    parser.add_argument("--out", type=Path, help="folder for a dated result")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if "grid" in options.parts:
        chosen = [name for name in GRIDS if name in (options.sizes or GRIDS)]
        figures["grid"] = {name: whole_grid(with_steps(GRIDS[name], options.grid_steps)) for name in chosen}
    if "steps" in options.parts:
        figures["steps"] = ladder(options.sizes or list(LADDER), options.steps)
    write_result("-".join(["sharing", *options.parts]), figures, options.out)


if __name__ == "__main__":
    main()
