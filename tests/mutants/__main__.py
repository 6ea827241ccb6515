"""`make mutants`: apply each mutant of the fixed sample, run the tests that can see it, list the survivors.

Libraries are imported once; each mutant is a forked process that imports the package with one file changed in memory
(nothing on disk is touched) and runs pytest up to the first failure.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from tests.mutants.operators import Mutant, mutants
from tests.mutants.table import LEFT_OUT, NOT_SLOW, PARTS, selection

ROOT = Path(__file__).resolve().parents[2]
SEED = 13
LIMIT_CPU_S = (
    30  # and three times what the tests need without a mutant; processor time: a busy machine kills none
)
LIMIT_S = 900  # of the clock, for one that waits
MEMORY = 24 << 30
PRELOADED = (
    "torch", "numpy", "scipy.stats", "msgspec", "safetensors.torch", "hypothesis", "tyro", "plotly.graph_objects",
    "sklearn.metrics", "transformers", "transformers.integrations", "transformers.masking_utils", "accelerate",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "torch.utils.flop_counter",
    "torch._dynamo", "transformers.generation", "transformers.trainer",
)  # fmt: skip


def files_of(part: str) -> list[str]:
    paths = sorted((ROOT / part).glob("*.py")) if (ROOT / part).is_dir() else [ROOT / part]
    return [name for path in paths if (name := str(path.relative_to(ROOT))) not in LEFT_OUT]


def all_mutants(files: Iterable[str]) -> list[Mutant]:
    return [
        mutant._replace(tree=None) for file in files for mutant in mutants(file, (ROOT / file).read_text())
    ]


def sample() -> list[Mutant]:
    """The fixed sample: of each part the mutants whose keys hash lowest. Other code may change without moving it."""
    chosen = []
    for part, size in PARTS.items():
        found = sorted(
            all_mutants(files_of(part)), key=lambda m: hashlib.sha256(f"{SEED}{m.key}".encode()).digest()
        )
        chosen += sorted(found[:size], key=lambda m: (m.file, m.line, m.key))
    return chosen


def compiled(chosen: Iterable[Mutant]) -> dict[str, types.CodeType]:
    """Key -> the mutated module's code."""
    keys, files = {m.key for m in chosen}, {m.file for m in chosen}
    found = (m for file in files for m in mutants(file, (ROOT / file).read_text()) if m.key in keys)
    return {m.key: compile(m.tree, str(ROOT / m.file), "exec") for m in found}


def run_tests(
    tests: Iterable[str], scratch: Path, file: str, code: types.CodeType | None, limit: int
) -> None:
    """In the forked process: never returns."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    log = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    if code is not None:
        path, plain = str(ROOT / file), SourceFileLoader.get_code

        def get_code(self: SourceFileLoader, name: str) -> types.CodeType | None:
            return code if self.path == path else plain(self, name)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    # Plain asserts: pytest would otherwise load a module named for its doctests itself, from the disk.
    options = [
        "-x",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        f"--basetemp={scratch / 'tmp'}",
        "-k",
        NOT_SLOW,
    ]
    # In two steps: most mutants fall to the first file, and collecting the others costs more than running it.
    first, *others = tests
    ended = pytest.main([*options, first])
    if others and ended in (0, 5):
        rest = pytest.main([*options, *others])
        ended = ended if rest == 5 else rest  # 5: a file without doctests
    os._exit(ended)


def outcome(
    tests: Iterable[str], scratch: Path, file: str = "", code: types.CodeType | None = None, limit: int = 600
) -> tuple[str, float]:
    """How it ended, "survived" or how it was killed; with the processor's seconds."""
    child = os.fork()
    if child == 0:
        try:
            run_tests(tests, scratch, file, code, limit)
        finally:
            os._exit(70)
    began, done = time.monotonic(), 0
    while not done and time.monotonic() - began < LIMIT_S:
        time.sleep(0.02)
        done, status, usage = os.wait4(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it may have started
    if not done:
        _, status, usage = os.wait4(child, 0)
    ended = os.waitstatus_to_exitcode(status)
    if ended in (4, 5):
        raise SystemExit(f"error: pytest found no tests in {tests}:\n{(scratch / 'log').read_text()}")
    names = {0: "survived", 1: "test", 2: "import", -signal.SIGXCPU: "time", -signal.SIGKILL: "time"}
    return names.get(ended, f"exit {ended}"), usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="*", help="all mutants of these files, instead of the sample")
    parser.add_argument(
        "--changed", metavar="REF", help="all mutants of the covered files that differ from a commit"
    )
    parser.add_argument("--part", help="of the sample, only files whose path begins so")
    parser.add_argument("--keys", nargs="*", help="only these mutants of the sample (or of --files)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    parser.add_argument("--list", action="store_true", help="print the sample and end")
    options = parser.parse_args()
    if options.changed:
        named = ["git", "diff", "--name-only", options.changed, "--", *PARTS]
        changed = subprocess.run(named, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        covered = [file for part in PARTS for file in files_of(part)]
        chosen = all_mutants(file for file in covered if file in changed)
    else:
        chosen = all_mutants(options.files) if options.files else sample()
    chosen = [
        m for m in chosen if m.file.startswith(options.part or "") and m.key in (options.keys or [m.key])
    ]
    if options.list:
        print(*(describe(m) for m in chosen), sep="\n")
        return
    one_thread, offline = ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    os.environ |= dict.fromkeys((*one_thread, *offline, "PYTEST_DISABLE_PLUGIN_AUTOLOAD"), "1")
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that a forked process copies fewer pages
    options.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        raise SystemExit(measure(chosen, options.out, scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def measure(chosen: list[Mutant], out: Path, scratch: Path) -> int:
    every = tuple(dict.fromkeys(test for m in chosen for test in selection(m.file)))
    result, took = outcome(every, scratch)
    print(f"without a mutant: {took:.0f} s", flush=True)
    if result != "survived":
        raise SystemExit(f"error: the tests fail without any mutant\n{(scratch / 'log').read_text()[-3000:]}")
    limit = int(LIMIT_CPU_S + 2 * took)
    reasons = (ROOT / "docs" / "mutants.md").read_text() if (ROOT / "docs" / "mutants.md").exists() else ""
    codes = compiled(chosen)
    counts: dict[str, Counter] = {part: Counter() for part in PARTS}
    survivors, began = [], time.monotonic()
    with out.open("w") as file:
        for mutant in chosen:
            tests = selection(mutant.file)
            result, took = outcome(tests, scratch, mutant.file, codes[mutant.key], limit)
            row = {**mutant._asdict(), "outcome": result, "seconds": round(took, 1)}
            file.write(json.dumps({k: v for k, v in row.items() if k != "tree"}) + "\n")
            file.flush()
            counts[next(part for part in PARTS if mutant.file.startswith(part))][result] += 1
            if result == "survived":
                survivors.append(mutant)
                print(
                    f"{describe(mutant)}{'' if mutant.key in reasons else '  (no reason in docs/mutants.md)'}",
                    flush=True,
                )
    for part, found in counts.items():
        if total := found.total():
            print(f"{part}: {total - found['survived']} of {total} killed {dict(found)}")
    rate = 1 - len(survivors) / max(len(chosen), 1)
    print(f"{len(chosen)} mutants, {rate:.1%} killed, {(time.monotonic() - began) / 60:.0f} minutes")
    return int(rate < 0.9)


def describe(m: Mutant) -> str:
    return f"{m.key} {m.file}:{m.line} {m.function} [{m.operator}] {m.before}  ->  {m.after}"


if __name__ == "__main__":
    main()
