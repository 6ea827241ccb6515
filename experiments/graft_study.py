"""Does a graft help? An OLMoE learns one text, then another in five ways; the same pairs for all ways.

    python -m experiments.graft_study run --data-dir ../shared/data --out runs/graft-study [--seeds 0 1 2 3 4]
    python -m experiments.graft_study table          # results/graft.jsonl -> results/graft.md

Fixed beforehand in `graft_study.md`. A run that was stopped starts again; finished runs are kept, and a folder holds
runs of one code only.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel, get_wsd_schedule

from experiments.lines import command, read_rows, require_same, write_table
from experiments.status import exit_status
from rmoe.compare.statistics import compare_to_baseline
from rmoe.data import prepare
from rmoe.data.config import DataConfig
from rmoe.data.corpus import Corpus
from rmoe.data.order import block_number
from rmoe.errors import RequestError, RunError
from rmoe.graft.attach import attach
from rmoe.graft.spec import GraftSpec
from rmoe.records import Record, append_records, durable_rename
from rmoe.results.comparison import Difference
from rmoe.results.run import Hardware, Versions
from rmoe.training.environment import hardware, versions
from rmoe.training.evaluation import evaluate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "graft.jsonl"
FIRST, SECOND = "wiki100.txt.gz", "tech.txt.gz"
MARGIN = 0.005
WIDTH = 32


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What is trained, and for how long; everything that a result depends on."""

    layers: int = 12
    hidden: int = 64
    experts: int = 16
    length: int = 128
    batch: int = 16
    base_steps: int = 2000
    base_rate: float = 3e-3
    steps: int = 1000
    rate: float = 1e-3
    warmup: int = 50
    evaluation_blocks: int = 4000


class GraftRow(Record, frozen=True, kw_only=True):
    """One continued run: bits per byte on the test part of both texts."""

    way: str
    seed: int
    first: float
    second: float
    base_first: float
    base_second: float
    trained_parameters: int
    seconds: float
    size: Size
    versions: Versions
    hardware: Hardware

    @property
    def key(self) -> tuple[str, int]:
        return self.way, self.seed


def base_model(size: Size, vocab: int, seed: int) -> OlmoeForCausalLM:
    """transformers' own OLMoE with random weights."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_experts=size.experts,
        num_experts_per_tok=2,
        max_position_embeddings=size.length,
        output_router_logits=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def nothing_new(model: PreTrainedModel, seed: int) -> None:
    """All weights are trained on; nothing is added."""


def router_alone(model: PreTrainedModel, seed: int) -> None:
    """Only the gates are trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("mlp.gate.weight"))


def graft_of(row: str) -> Callable[[PreTrainedModel, int], None]:
    """A graft of a zoo row's recurrence, p = 32; all weights are trained."""

    def way(model: PreTrainedModel, seed: int) -> None:
        attach(model, GraftSpec.from_router(row, width=WIDTH, seed=seed))

    return way


WAYS: dict[str, Callable[[PreTrainedModel, int], None]] = {
    "nothing new": nothing_new,
    "rmoe": graft_of("rmoe"),
    "eda-linear": graft_of("eda-linear"),
    "low-rank": graft_of("low-rank"),
    "router alone": router_alone,
}


def train(model: nn.Module, corpus: Corpus, steps: int, rate: float, seed: int, size: Size) -> None:
    """AdamW, warm-up, constant, linear to 0 over the last fifth; gradients clipped at 1."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_wsd_schedule(
        optimizer,
        size.warmup,
        steps // 5,
        num_training_steps=steps,
        decay_type="linear",
    )
    blocks = corpus.train
    model.train()
    for step in range(steps):
        numbers = (block_number(len(blocks), seed, step * size.batch + index) for index in range(size.batch))
        ids = torch.stack([blocks[number]["input_ids"] for number in numbers])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not torch.isfinite(loss):
            raise RunError(
                f"the loss is {loss.item()} at step {step}", "the finished runs", "the same command"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def bits(model: PreTrainedModel, corpus: Corpus, size: Size) -> float:
    """Bits per byte on the first blocks of the test split."""
    return corpus.in_unit("test", evaluate(model, corpus.test, limit=size.evaluation_blocks).loss)


def run(
    data_dir: Path,
    out: Path,
    seeds: Sequence[int],
    size: Size,
    results: Path,
    ways: Sequence[str] = tuple(WAYS),
) -> None:
    """Train what is missing, seed by seed, one line into `results` for each continued run.

    Two calls with different seeds may run at once.

    Raises:
        RequestError: `results` has runs of another size or another code.
    """
    rows, here = read_rows(results, GraftRow), versions()
    require_same(rows, {"size": size, "versions": here}, results)
    done = {row.key for row in rows}
    first, second = (prepare(DataConfig(path=str(data_dir / file)), size.length) for file in (FIRST, SECOND))
    for seed in seeds:
        missing = [way for way in ways if (way, seed) not in done]
        if not missing:
            continue
        folder = out / f"base-seed{seed}"
        if not folder.exists():
            base = base_model(size, first.vocab_size, seed)
            train(base, first, size.base_steps, size.base_rate, seed, size)
            staged = folder.with_name(f"{folder.name}.part")
            base.save_pretrained(staged)
            durable_rename(staged, folder)
        base = OlmoeForCausalLM.from_pretrained(folder)
        before = bits(base, first, size), bits(base, second, size)
        for way in missing:
            row = continued(folder, way, seed, first, second, size, before, here)
            append_records(results, row)
            print(f"{way}, seed {seed}: {row.first:.4f} and {row.second:.4f} bits", flush=True)


def continued(
    folder: Path,
    way: str,
    seed: int,
    first: Corpus,
    second: Corpus,
    size: Size,
    before: tuple[float, float],
    here: Versions,
) -> GraftRow:
    """One way of learning the second text from the base in `folder`, which has `before` bits on the two."""
    model = OlmoeForCausalLM.from_pretrained(folder)
    WAYS[way](model, seed)
    start = time.perf_counter()
    train(model, second, size.steps, size.rate, seed + 1000, size)
    seconds = time.perf_counter() - start
    return GraftRow(
        way=way,
        seed=seed,
        first=bits(model, first, size),
        second=bits(model, second, size),
        base_first=before[0],
        base_second=before[1],
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=round(seconds, 1),
        size=size,
        versions=here,
        hardware=hardware(torch.get_num_threads(), "cpu"),
    )


BASELINES = {"nothing new": [way for way in WAYS if way != "nothing new"], "low-rank": ["rmoe", "eda-linear"]}
"""What is subtracted -> from which ways: what a graft changes, and what of it is its memory's doing."""


def markdown(rows: Sequence[GraftRow]) -> str:
    """Both texts, ways against both baselines: paired t intervals, Holm over a baseline's ways."""
    if not rows:
        raise RequestError("results", "no runs", "runs of `experiments.graft_study run`")
    by_way: dict[str, dict[int, GraftRow]] = defaultdict(dict)
    for row in rows:
        by_way[row.way][row.seed] = row
    start = rows[0]
    lines = [
        f"Bits per byte of test text after {start.size.steps:,} steps on `{SECOND}`; lower is better. "
        "Differences are seed by seed, with 95% t intervals; verdicts with a "
        f"margin of {MARGIN:g} bits and Holm's correction. "
        f"Before: {start.base_first:.4f} on `{FIRST}`, {start.base_second:.4f} on `{SECOND}` (seed "
        f"{start.seed}). {start.hardware.cpu}, {start.hardware.threads} thread; code {start.versions.code}, "
        + ", ".join(f"{name} {version}" for name, version in start.versions.libraries.items())
        + ".",
        "",
        "| text | way | runs | parameters trained | bits | "
        + " | ".join(f"minus “{baseline}”" for baseline in BASELINES)
        + " |",
        "|---|---|---:|---:|---:|" + "---|" * len(BASELINES),
    ]
    for field, file in (("second", SECOND), ("first", FIRST)):
        values = {way: {s: getattr(r, field) for s, r in mine.items()} for way, mine in by_way.items()}
        compared = [
            compare_to_baseline(
                {way: values[way] for way in (baseline, *others) if way in values},
                baseline,
                "bits_per_byte",
                "test",
                MARGIN,
                planned=len(others),
            )
            for baseline, others in BASELINES.items()
        ]
        for way in (way for way in WAYS if way in values):
            mine = values[way]
            trained = next(iter(by_way[way].values())).trained_parameters
            cells = [
                f"`{file}`",
                way,
                str(len(mine)),
                f"{trained:,}",
                f"{sum(mine.values()) / len(mine):.4f}",
            ]
            cells += [_shown(found.get(way)) for found in compared]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(difference: Difference | None) -> str:
    """A cell of the table."""
    if difference is None:
        return ""
    interval = difference.interval
    inside = f" ({interval.low:+.4f} to {interval.high:+.4f})" if interval else ""
    return f"{difference.mean:+.4f}{inside}, {difference.verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong request."""
    parser = command("experiments.graft_study", __doc__, Path("runs/graft-study"), RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    asked = parser.parse_args(argv)

    def work() -> None:
        if asked.verb == "run":
            run(asked.data_dir, asked.out, asked.seeds, Size(), asked.results)
        else:
            write_table(asked.results, markdown(read_rows(asked.results, GraftRow)))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
