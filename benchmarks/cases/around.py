"""What is around the models: analysis, data loading, the command line's start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks import peers
from benchmarks.cases.registry import Contestants, Setting, case
from benchmarks.contestant import Contestant
from rmoe.analysis.measures import RoutingMeasures, Sizes
from rmoe.data.blocks import BlockDataset, BlockSampler
from rmoe.moe.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]


@case("analysis", "tests/analysis")
def analysis(setting: Setting) -> Contestants:
    """A forward pass, and one with every streaming measure fed from it (`rmoe analyze`)."""
    tokens = setting.size.tokens
    return {
        "forward": Contestant(partial(_forward, setting), tokens=tokens),
        "forward, all measures": Contestant(partial(_measured, setting), tokens=tokens),
    }


def _ids(setting: Setting) -> torch.Tensor:
    size = setting.size
    ids = torch.randint(0, size.vocab, (size.batch, size.length), generator=torch.Generator().manual_seed(0))
    return ids.to(setting.device)


def _forward(setting: Setting) -> Callable[[], object]:
    model, ids = peers.ours(setting.size, "rmoe").eval().to(setting.device), _ids(setting)

    @torch.no_grad()
    def call() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return call


def _measured(setting: Setting) -> Callable[[], object]:
    size, ids = setting.size, _ids(setting)
    recorder = Recorder(peers.ours(size, "rmoe").eval().to(setting.device))
    sizes = Sizes(size.layers, size.experts, size.top_k, size.experts)
    counts = np.full(size.vocab, -(-64 * size.tokens // size.vocab))  # of the text that is to come
    measures = RoutingMeasures(sizes, counts, explored_tokens=256)
    return lambda: measures.update(recorder.batch(ids), ids.reshape(-1))


BLOCKS, OVERLAP = 4096, 1


@case("data", "tests/data")
def data(setting: Setting) -> Contestants:
    """One step's batch of blocks: by the trainer's loader, and beside it a random slice per sequence, straight from
    the memory map (nanoGPT's way, which keeps no order and cannot be resumed exactly)."""
    tokens = setting.size.tokens
    return {
        "rmoe": Contestant(partial(_loaded, setting), tokens=tokens, memory="resident"),
        "random slices": Contestant(partial(_sliced, setting), tokens=tokens, memory="resident"),
    }


def _tokens(length: int) -> Path:
    """A file of random bytes that lives as long as this process."""
    folder = tempfile.TemporaryDirectory()
    _FOLDERS.append(folder)
    path = Path(folder.name) / "tokens.bin"
    np.random.default_rng(0).integers(0, 256, BLOCKS * length, dtype=np.uint8).tofile(path)
    return path


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _loaded(setting: Setting) -> Callable[[], object]:
    size = setting.size
    blocks = BlockDataset(_tokens(size.length), "uint8", size.length, overlap=OVERLAP, whole=False)
    sampler = BlockSampler(len(blocks), 0, stop=1000 * len(blocks))
    batches = iter(DataLoader(blocks, batch_size=size.batch, sampler=sampler))
    return lambda: next(batches)


def _sliced(setting: Setting) -> Callable[[], object]:
    size, random = setting.size, np.random.default_rng(0)
    text = np.memmap(_tokens(size.length), dtype="uint8", mode="r")

    def call() -> object:
        starts = random.integers(0, len(text) - size.length, size.batch)
        ids = torch.stack([torch.from_numpy(text[i : i + size.length].astype(np.int64)) for i in starts])
        return {"input_ids": ids, "labels": ids.clone()}

    return call


COMMANDS = (["--help"], ["zoo"], ["train", "--help"])

RUN = """
import sys
from rmoe.cli.main import main
status = main({arguments!r})
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""


@case("start-up", "tests/cli/test_main.py", sized=False)
def start_up(setting: Setting) -> Contestants:
    """The command line, from nothing to its answer."""
    return {
        f"rmoe {' '.join(arguments)}": Contestant(partial(_command, arguments), memory="child")
        for arguments in COMMANDS
    }


def _command(arguments: list[str]) -> Callable[[], float]:
    command = [sys.executable, "-c", RUN.format(arguments=arguments)]

    def call() -> float:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stderr.split()[-2]) / 1024

    return call
