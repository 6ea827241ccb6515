"""Does a recurrent router help a classifier that has read something? RMoE against SMoE, beside a bag of words.

    python -m experiments.study run --plan experiments/classifier-models.toml --data-dir ../shared/data
    python -m experiments.classifier_study run --data-dir ../shared/data
    python -m experiments.classifier_study table          # results/classifier.jsonl -> results/classifier.md

Fixed beforehand in `classifier_study.md`. The first command pretrains the models. A fine-tuning
run that was stopped starts again; finished runs are kept, and a file holds runs of one code only.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from experiments.lines import command, read_rows, require_same, write_table
from experiments.status import exit_status
from rmoe.compare.statistics import t_interval
from rmoe.data.tasks import Labelled, read_tasks
from rmoe.errors import RequestError
from rmoe.finetune.classification import scores
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.run import finetune
from rmoe.records import Record, append_records
from rmoe.results.run import Hardware, Versions
from rmoe.training.environment import hardware, versions
from rmoe.training.run_folder import read_result

RESULTS = Path(__file__).parent / "results" / "classifier.jsonl"
TASKS = {"sst2": ("sst2_train", "sst2_dev"), "banking77": ("banking77_train", "banking77_test")}
BASELINE, ROUTER = "smoe", "rmoe-p32"
SETTINGS = FinetuneConfig(
    task="classification",
    epochs=2.0,
    batch_size=32,
    sequence_length=128,
    learning_rate=1e-3,
    threads=1,
)


class ClassifierRow(Record, frozen=True, kw_only=True):
    """One fine-tuned model.

    Attributes:
        pretraining_steps, pretraining_bits: of the model it started from; bits per byte on the study's test text.
        settings: of `rmoe.finetune.config.FinetuneConfig`, but for the seed and the file of the task.
    """

    task: str
    router: str
    seed: int
    accuracy: float
    f1_macro: float
    pretraining_steps: int
    pretraining_bits: float
    seconds: float
    settings: dict[str, Any]
    versions: Versions
    hardware: Hardware

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.router, self.seed


def settings_of(config: FinetuneConfig) -> dict[str, Any]:
    """What all runs share."""
    return {name: value for name, value in config.to_dict().items() if name not in ("seed", "valid")}


def files_of(task: str, data_dir: Path) -> tuple[Path, Path]:
    """The task's training and test file."""
    first, second = TASKS[task]
    return data_dir / "tasks" / f"{first}.jsonl.gz", data_dir / "tasks" / f"{second}.jsonl.gz"


def run(
    data_dir: Path,
    models: Path,
    out: Path,
    seeds: Sequence[int],
    results: Path,
    config: FinetuneConfig = SETTINGS,
    tasks: Sequence[str] = tuple(TASKS),
) -> None:
    """Fine-tune what is missing, pair by pair, one line into `results` for each finished run.

    Args:
        models: run folders `ROUTER-seedN` with a finished model each.

    Raises:
        RequestError: a model is missing, or `results` has runs of other settings or another code.
    """
    rows, here = read_rows(results, ClassifierRow), versions()
    require_same(rows, {"settings": settings_of(config), "versions": here}, results)
    done = {row.key for row in rows}
    for seed in seeds:
        for task in tasks:
            for router in (BASELINE, ROUTER):
                if (task, router, seed) in done:
                    continue
                row = tuned(task, router, seed, data_dir, models, out, config, here)
                append_records(results, row)
                print(f"{task}, {router}, seed {seed}: accuracy {row.accuracy:.4f}", flush=True)


def tuned(
    task: str,
    router: str,
    seed: int,
    data_dir: Path,
    models: Path,
    out: Path,
    config: FinetuneConfig,
    here: Versions,
) -> ClassifierRow:
    """Fine-tune one model; its folder is removed afterwards."""
    source = read_result(models / f"{router}-seed{seed}")
    if source.test is None or source.model is None:
        raise RequestError("--models", source.folder, "runs with a model that was evaluated on the test text")
    train, test = files_of(task, data_dir)
    folder = out / f"{task}-{router}-seed{seed}"
    start = time.perf_counter()
    found = finetune(
        Path(source.model),
        train,
        folder,
        replace(config, seed=seed, valid=test),
        resume=folder.exists(),
        progress=False,
    )
    shutil.rmtree(folder)
    return ClassifierRow(
        task=task,
        router=router,
        seed=seed,
        accuracy=found.scores["accuracy"],
        f1_macro=found.scores["f1_macro"],
        pretraining_steps=source.steps,
        pretraining_bits=source.test,
        seconds=round(time.perf_counter() - start, 1),
        settings=settings_of(config),
        versions=here,
        hardware=hardware(config.threads or 1, config.device),
    )


def bag_of_words(train: Path, test: Path) -> dict[str, float]:
    """Scores of scikit-learn's logistic regression on counts of words, with its defaults."""
    known, asked = read_tasks(train, Labelled), read_tasks(test, Labelled)
    words = CountVectorizer()
    regression = LogisticRegression(max_iter=2000)
    labels = {label: index for index, label in enumerate(sorted({str(item.label) for item in known}))}
    regression.fit(
        words.fit_transform([item.text for item in known]), [labels[str(item.label)] for item in known]
    )
    said = regression.predict(words.transform([item.text for item in asked]))
    return scores(said.tolist(), [labels[str(item.label)] for item in asked])


def markdown(rows: Sequence[ClassifierRow], words: dict[str, dict[str, float]]) -> str:
    """A line per task: both routers, their paired difference, and the bag of words.

    Args:
        words: task -> scores of `bag_of_words`.

    Raises:
        RequestError: there are no rows.
    """
    if not rows:
        raise RequestError("results", "no runs", "runs of `experiments.classifier_study run`")
    accuracy: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        accuracy[row.task][row.router][row.seed] = row.accuracy
    first = rows[0]
    lines = [
        f"Accuracy on the test file after {first.settings['epochs']:g} epochs; models that had read "
        f"{first.pretraining_steps:,} steps of wiki100. Differences are `{ROUTER}` minus `{BASELINE}`, seed by seed, "
        f"with 95% t intervals. {first.hardware.cpu}, {first.hardware.threads} thread; code {first.versions.code}, "
        + ", ".join(f"{name} {version}" for name, version in first.versions.libraries.items())
        + ".",
        "",
        f"| task | pairs | `{BASELINE}` | `{ROUTER}` | difference | interval | bag of words | commonest label |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for task, by_router in accuracy.items():
        mine, base = by_router[ROUTER], by_router[BASELINE]
        pairs = sorted(mine.keys() & base.keys())
        differences = [mine[seed] - base[seed] for seed in pairs]
        interval = t_interval(differences)[0] if len(pairs) > 1 else None
        cells = [
            task,
            str(len(pairs)),
            *(f"{sum(values[s] for s in pairs) / max(len(pairs), 1):.4f}" for values in (base, mine)),
            f"{sum(differences) / max(len(pairs), 1):+.4f}",
            f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else "",
            f"{words[task]['accuracy']:.4f}",
            f"{words[task]['majority_accuracy']:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong request."""
    parser = command("experiments.classifier_study", __doc__, Path("runs/classifier"), RESULTS)
    parser.add_argument("--models", type=Path, default=Path("runs/classifier-models/models/runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    asked = parser.parse_args(argv)

    def work() -> None:
        if asked.verb == "run":
            run(asked.data_dir, asked.models, asked.out, asked.seeds, asked.results)
        else:
            rows = read_rows(asked.results, ClassifierRow)
            tasks = dict.fromkeys(row.task for row in rows)
            words = {task: bag_of_words(*files_of(task, asked.data_dir)) for task in tasks}
            write_table(asked.results, markdown(rows, words))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
