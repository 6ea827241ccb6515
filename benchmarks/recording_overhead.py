"""What the default measures add to the forward passes they ride on, at the preset `medium`, in one run.

    python benchmarks/recording_overhead.py [--out benchmarks/results] [--threads N]

Each round runs the same batch twice, plain and recorded, in alternating order. The recorded pass takes the routing
out of the model and feeds every streaming measure, the digitised mutual information on every token (the worst
case: a text longer than 100,000 tokens is sampled). What is done once (the check of the reading, the measures of
weights, the gradient split) is timed after the rounds and spread over `rmoe analyze`'s default number of tokens.
Required: at most 25 % more, all together. Processor time is given beside wall-clock time, because on a shared machine
the latter also says what else was running; the verdict is by processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from results import write_result

from rmoe.analysis.analyze import CHECKED_TOKENS
from rmoe.analysis.gradients import find_shared, router_gradients
from rmoe.analysis.measures import RoutingMeasures, Sizes
from rmoe.analysis.options import AnalysisOptions
from rmoe.analysis.weights import layer_weights
from rmoe.moe import check_reading
from rmoe.moe.recorder import Recorder
from rmoe.training.build import build_model, model_config
from rmoe.training.config import RunConfig

BATCH, LENGTH = 4, 512
ANALYSED_TOKENS = 131_072  # `rmoe analyze`'s default
ROUNDS = 8


def main() -> None:
    """Measure, print, and with --out keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for a dated result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--router", default="rmoe")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    preset = dataclasses.replace(RunConfig.from_preset("medium"), router=arguments.router)
    model = build_model(model_config(preset, vocab_size=320), seed=0).eval()
    recorder = Recorder(model)
    sizes = Sizes(
        len(recorder.layers), recorder.num_experts, recorder.experts_per_token, recorder.num_experts
    )
    tokens = BATCH * LENGTH
    counts = np.full(256, (ROUNDS + 1) * tokens // 256)
    measures = RoutingMeasures(sizes, counts, explored_tokens=256)
    generator = torch.Generator().manual_seed(0)

    def plain(input_ids: torch.Tensor) -> None:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)

    def recorded(input_ids: torch.Tensor) -> None:
        measures.update(recorder.batch(input_ids), input_ids.reshape(-1))

    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    processor: dict[str, list[float]] = {"plain": [], "recorded": []}
    for round_number in range(ROUNDS + 1):
        input_ids = torch.randint(0, 256, (BATCH, LENGTH), generator=generator)
        both = [("plain", plain), ("recorded", recorded)]
        for name, run in both if round_number % 2 else reversed(both):
            start, processor_start = time.perf_counter(), time.process_time()
            run(input_ids)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - processor_start)

    once: dict[str, float] = {}
    blocks = AnalysisOptions().gradient_tokens // LENGTH
    sample = [torch.randint(0, 256, (blocks, LENGTH), generator=generator)]
    shared = find_shared(model, recorder.layers)
    for name, measure in (
        ("check", lambda: check_reading(model, sample[0][:1, :CHECKED_TOKENS])),
        ("weights", lambda: [layer_weights(layer, shared) for layer in recorder.layers]),
        ("gradients", lambda: router_gradients(model, recorder.layers, shared, sample)),
    ):
        start = time.process_time()
        measure()
        once[name] = time.process_time() - start
    forward = sum(processor["plain"]) / (ROUNDS * tokens) * ANALYSED_TOKENS
    share = {name: value / forward for name, value in once.items()}
    streamed = sum(processor["recorded"]) / sum(processor["plain"]) - 1
    together = streamed + sum(share.values())

    ratios = np.array(seconds["recorded"]) / np.array(seconds["plain"])
    write_result(
        "recording_overhead",
        {
            "router": arguments.router,
            "threads": arguments.threads,
            "tokens_per_pass": tokens,
            "plain_us_per_token": float(np.median(seconds["plain"])) / tokens * 1e6,
            "recorded_us_per_token": float(np.median(seconds["recorded"])) / tokens * 1e6,
            "added_share_median": float(np.median(ratios)) - 1,
            "added_share_of_sums": sum(seconds["recorded"]) / sum(seconds["plain"]) - 1,
            "added_share_processor_time": streamed,
            "added_share_once_processor_time": share,
            "added_share_all_processor_time": together,
            "rounds": ROUNDS,
        },
        arguments.out,
        "cpu",
    )
    if together > 0.25:
        raise SystemExit("more than is allowed")


if __name__ == "__main__":
    main()
