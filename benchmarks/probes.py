"""Training seeds stacked against one by one, in CPU seconds of one core: `python -m benchmarks.probes`."""

from __future__ import annotations

import argparse
import time

import torch

from rmoe.probes.stack import Ensemble, fitted
from rmoe.probes.train import train
from rmoe.probes.world import World
from rmoe.results.probes import Knobs
from rmoe.routing import find

SEEDS = 8


def cpu_seconds(router: str, groups: list[list[int]], knobs: Knobs) -> float:
    """Training these groups of seeds, one group after another; building is not counted."""
    row = find(router)
    made = []
    for seeds in groups:
        lanes = [("integrate", seed) for seed in seeds]
        worlds = [World(*lane, knobs) for lane in lanes]
        for w in worlds:
            _ = w.curve_reference
        made.append((Ensemble(fitted(row.spec, knobs.width), row.top_k or knobs.top_k, lanes, knobs), worlds))
    started = time.process_time()
    for ensemble, worlds in made:
        train([ensemble], worlds, knobs)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routers", default="smoe,rmoe,gated-linear")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    knobs = Knobs(steps=given.steps)
    for router in given.routers.split(","):
        times = [
            (
                cpu_seconds(router, [list(range(SEEDS))], knobs),
                cpu_seconds(router, [[seed] for seed in range(SEEDS)], knobs),
            )
            for _ in range(given.rounds)
        ]
        stacked, apart = (sorted(column)[len(times) // 2] for column in zip(*times, strict=True))
        print(
            f"{router}: {SEEDS} seeds stacked {stacked:.2f} s, one by one {apart:.2f} s: {apart / stacked:.1f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
