"""Everything there is to measure on one GPU, in one call of under ten minutes.

    python -m benchmarks.gpu --text FILE [--minutes 9.5] [--out benchmarks/results]

First every path is checked against float64; then the suite's cases run, the most telling first and what has to be
compiled last, as long as there is time; then SMoE and RMoE train at the medium size on the text for what is left. One
JSON file and one page of tables, rewritten after every part, so that a machine taken away leaves what was measured.
Without a GPU everything runs on the CPU (`--toy` for sizes that end soon), and says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, setting_for
from benchmarks.checks import run_checks
from benchmarks.measure import ROOT
from benchmarks.report import write_report
from benchmarks.suite import chosen, extra_of_the_router, measure, merge, new_report
from rmoe.compare.timing import time_steps
from rmoe.training.config import CheckpointConfig, LoggingConfig, RunConfig
from rmoe.training.run import train

FOR_TRAINING = 0.3
"""Share of the time that checks and cases leave to training, by default."""
BEYOND_STEPS = 20.0
"""Seconds of a run that are not steps: evaluation, saving."""


@dataclass(frozen=True)
class Turn:
    """A case at a size.

    Attributes:
        eager: nothing compiled.
        only: contestants beside the first; all if empty.
        products: say how much of a call is inside matrix products. Recording a step takes seconds.
    """

    case: str
    size: str
    eager: bool = True
    only: tuple[str, ...] = ()
    products: bool = False


DECODERS = ("rmoe", "OLMoE grouped_mm", "OLMoE batched_mm", "smoe, compiled", "OLMoE batched_mm, compiled")
TURNS = (
    Turn("step", "medium"),
    Turn("router", "medium"),
    Turn("decode 1", "medium"),
    Turn("step", "0.9B", only=("rmoe", "OLMoE grouped_mm", "Mixtral grouped_mm")),
    Turn("block", "medium"),
    Turn("decode 64", "medium"),
    Turn("prefill", "medium"),
    Turn("router", "0.9B"),
    Turn("decode 1", "0.9B"),
    Turn("prefill", "0.9B"),
    Turn("block", "0.9B"),
    Turn("analysis", "medium"),
    Turn("data", "medium"),
    Turn("start-up", "medium"),
    Turn("decode 8", "medium"),
    Turn("decode 64", "0.9B"),
    Turn("step", "quick"),
    # With what is compiled, in place of the same turns without.
    Turn("step", "medium", eager=False, products=True),
    Turn("decode 1", "medium", eager=False, only=DECODERS),
    Turn("router", "medium", eager=False, products=True),
)
TOY_TURNS = tuple(Turn(name, "toy") for name in ("router", "block", "step", "prefill", "decode 1", "data"))


def run(
    config: RunConfig,
    turns: Sequence[Turn],
    seconds: float,
    rounds: int,
    path: Path,
    compiled: bool,
    for_training: float = FOR_TRAINING,
) -> dict[str, Any]:
    """All three parts; gives the report.

    Args:
        config: of the runs that are trained, but for router and steps.
        seconds: for everything.
        rounds: of each case.
        path: of the JSON file.
        compiled: check `torch.compile` too, before the first turn with what is compiled.
        for_training: share of the time; 0 trains nothing.
    """
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = new_report(rounds)

    def late(what: str) -> bool:
        spent = time.monotonic() - started
        print(f"{spent:.0f} s: {what}", file=sys.stderr, flush=True)
        if spent <= (1 - for_training) * seconds:
            return False
        report["left_out"].append(what)
        return True

    def check(compiled: bool) -> None:
        found = run_checks(device, compiled)
        report["checks"] += [{**dataclasses.asdict(check), "passed": check.passed} for check in found]

    report |= {"checks": [], "left_out": []}
    check(compiled=False)
    first_compiled = next((turn for turn in turns if not turn.eager), None)
    for turn in turns:
        if compiled and turn is first_compiled and not late("checks of what is compiled"):
            check(compiled=True)
        if late(f"{turn.case}, {turn.size}{'' if turn.eager else ', compiled'}"):
            continue
        setting = setting_for(turn.size, device)
        contestants = chosen(CASES[turn.case].contestants(setting), turn.only, turn.eager)
        case = dataclasses.replace(CASES[turn.case], products=turn.products)
        result = measure(case, setting, contestants, rounds)
        if turn.case == "step":
            extra_of_the_router(result, setting)
        merge(report, result)
        write_report(report, path)
    if for_training:
        report["training"] = train_both(config, seconds - (time.monotonic() - started))
    report["seconds"] = round(time.monotonic() - started)
    write_report(report, path)
    return report


def train_both(config: RunConfig, seconds: float) -> list[dict[str, Any]]:
    """SMoE and RMoE, equally many steps, as many as fit."""
    routers = ("smoe", "rmoe")
    before = time.monotonic()
    # Trained for real: the trainer's own step, its data and its logging.
    step = {name: max(time_steps(_run_config(config, name, 16), 8).step_seconds) for name in routers}
    left = seconds - (time.monotonic() - before) - BEYOND_STEPS * len(routers)
    steps = max(16, min(config.training.max_steps, int(left / sum(step.values()))))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in routers:
            result = train(_run_config(config, name, steps), Path(folder, name), progress=False)
            found.append(
                {
                    "router": name,
                    "steps": result.steps,
                    "tokens": result.tokens,
                    f"val_{result.corpus.unit}": result.val,
                    "seconds_per_1k_steps": result.seconds_per_1k_steps,
                    "peak_mib": result.peak_mib,
                    "parameters": result.parameters.total,
                }
            )
    return found


def _run_config(config: RunConfig, router: str, steps: int) -> RunConfig:
    training = dataclasses.replace(
        config.training, max_steps=steps, warmup_steps=steps // 10, schedule="cosine"
    )
    return dataclasses.replace(
        config,
        router=router,
        training=training,
        logging=LoggingConfig(
            every=max(1, steps // 20), evaluate_every=steps, evaluate_blocks=8, final_blocks=400, test=False
        ),
        checkpoints=CheckpointConfig(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="what SMoE and RMoE are trained on")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--for-training", type=float, default=FOR_TRAINING, help="share of the minutes")
    parser.add_argument("--toy", action="store_true", help="sizes for a machine without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    preset = RunConfig.from_preset("quick" if options.toy else "medium")
    data = dataclasses.replace(preset.data, path=str(options.text), split="auto", max_bytes=None)
    report_name = (
        f"{new_report(0)['date']}-{'gpu' if torch.cuda.is_available() else 'gpu-script-on-cpu'}.json"
    )
    report = run(
        dataclasses.replace(preset, data=data),
        TOY_TURNS if options.toy else TURNS,
        60 * options.minutes,
        options.rounds,
        options.out / report_name,
        compiled=not options.toy,
        for_training=options.for_training,
    )
    print((options.out / report_name).with_suffix(".md").read_text())
    if not all(check["passed"] for check in report["checks"]):
        raise SystemExit("a check failed")


if __name__ == "__main__":
    main()
