"""The paper's digitised mutual information against a loop over `sklearn.metrics.mutual_info_score`, in one run.

    python benchmarks/mutual_information.py [--out benchmarks/results]

8 layers, 16 experts. The loop does each unordered pair of layers once and is given the bins; ours starts
from the probabilities. Processor time, both on one thread. Required: equal to 1e-9 on the loop's tokens, and
at least 200 times faster.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from results import write_result
from sklearn.metrics import mutual_info_score

from rmoe.analysis.mutual_information import digitise, digitised_mutual_information

LAYERS, EXPERTS = 8, 16
LOOP_TOKENS, TOKENS = 60, 8192
REPEATS = 5


def main() -> None:
    """Measure, print, and with --out keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for a dated result")
    out = parser.parse_args().out

    logits = 1.5 * np.random.default_rng(0).standard_normal((LAYERS, EXPERTS, TOKENS))
    probs = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    pairs = list(combinations_with_replacement(range(LAYERS), 2))
    bins = digitise(probs[..., :LOOP_TOKENS])

    loop, ours = [], []
    reference = np.empty((LAYERS, LAYERS, LOOP_TOKENS))
    for _ in range(REPEATS):  # alternating, so that what else runs on the machine meets both
        start = time.process_time()
        for i, j in pairs:
            for t in range(LOOP_TOKENS):
                reference[i, j, t] = reference[j, i, t] = mutual_info_score(bins[i, :, t], bins[j, :, t])
        loop.append((time.process_time() - start) / LOOP_TOKENS)
        start = time.process_time()
        information = digitised_mutual_information(probs)
        ours.append((time.process_time() - start) / TOKENS)

    difference = float(np.abs(information[..., :LOOP_TOKENS] - reference).max())
    ratios = np.array(loop) / np.array(ours)
    write_result(
        "mutual_information",
        {
            "layers": LAYERS,
            "experts": EXPERTS,
            "loop_us_per_token": float(np.median(loop)) * 1e6,
            "ours_us_per_token": float(np.median(ours)) * 1e6,
            "times_faster_median": float(np.median(ratios)),
            "times_faster_least": float(ratios.min()),
            "largest_difference_nats": difference,
            "repeats": REPEATS,
        },
        out,
        "cpu",
    )
    if difference > 1e-9 or np.median(ratios) < 200:
        raise SystemExit("below what is required")


if __name__ == "__main__":
    main()
