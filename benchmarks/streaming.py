"""A checkpoint larger than the memory that its analysis may use: peak memory, and time beside what the hardware allows.

    python -m benchmarks.streaming FOLDER [--gib 6] [--limit-gib 2] [--tokens 20000] [--dtype bfloat16] [--cgroup GROUP]

Writes a Qwen3-MoE checkpoint with random weights into FOLDER, analyses it in a process of limited memory, and removes
it. `--cgroup` names the folder of a memory cgroup whose limit you have set: it counts what is resident, the file cache
included. Without it RLIMIT_DATA limits heap and private writable memory, touched or not (`ulimit -v` would also count
the gigabytes of address space that torch reserves and never touches). The file cache of the machine is dropped for the
checkpoint before each run. The limit is the larger of bytes / disk rate and FLOPs / matrix rate, both measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rmoe.model.weights import INDEX

HIDDEN, EXPERTS, WIDTH, TOP_K, SEQUENCE = 2048, 32, 640, 2, 500
HEADS, KEY_HEADS, HEAD = 16, 4, 128
LAYER_PARAMETERS = 3 * HIDDEN * WIDTH * EXPERTS + HIDDEN * EXPERTS + 2 * HIDDEN * HEAD * (HEADS + KEY_HEADS)


def write_checkpoint(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """Random weights, a shard per layer; returns their bytes. One layer is in memory at a time."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD,
        vocab_size=32_768,
        max_position_embeddings=4096,
        dtype=str(dtype).removeprefix("torch."),
        architectures=["Qwen3MoeForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(part, {})[name] = tensor
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    total = 0
    for part, tensors in shards.items():
        file = f"model-{part}.safetensors"
        values: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            for key, shape in _as_published(name, tensor.shape):
                value = torch.ones(shape) if "norm" in key else torch.randn(shape, generator=generator) * 0.02
                values[key] = value.to(dtype)
        save_file(values, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(values, file)
        total += sum(value.nbytes for value in values.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return total


def _as_published(name: str, shape: torch.Size) -> list[tuple[str, tuple[int, ...]]]:
    """Qwen3-MoE checkpoints have each expert's matrices apart; transformers joins them when it loads."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, tuple(shape))]
    base, _, own = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if own == "gate_up_proj" else ("down_proj",)
    rows = shape[1] // len(parts)
    return [(f"{base}.{e}.{part}.weight", (rows, shape[2])) for e in range(shape[0]) for part in parts]


def drop_cache(folder: Path) -> None:
    """Have the machine forget the file contents it has in memory."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: Path, limit: int = 2 << 30) -> float:
    """Bytes per second of reading the checkpoint, uncached, up to `limit` bytes."""
    drop_cache(folder)
    read, began = 0, time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while read < limit and (chunk := opened.read(8 << 20)):
                read += len(chunk)
    return read / (time.perf_counter() - began)


def matrix_rate(dtype: torch.dtype, tokens: int = 2048, repeats: int = 5) -> float:
    """FLOP per second of a product with a square weight: what this torch reaches here with these threads."""
    a, b = torch.randn(tokens, HIDDEN, dtype=dtype), torch.randn(HIDDEN, HIDDEN, dtype=dtype)
    a @ b
    best = min(_timed(lambda: a @ b) for _ in range(repeats))
    return 2 * tokens * HIDDEN * HIDDEN / best


def _timed(work: object) -> float:
    """Seconds of processor time: other programs may have the processor meanwhile."""
    began = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - began


def flops(layers: int, tokens: int) -> float:
    """Of all matrix products of the layers, attention's scores included."""
    per_token = 3 * HIDDEN * WIDTH * TOP_K + HIDDEN * EXPERTS + 2 * HIDDEN * HEAD * (HEADS + KEY_HEADS)
    scores = 2 * HEADS * HEAD * SEQUENCE
    return 2.0 * layers * tokens * (per_token + scores)


def run(
    folder: Path, out: Path, tokens: int, limit: int | Path, *options: str
) -> tuple[float, float, int, str]:
    """Seconds by the clock and of processor time, peak resident bytes and progress of `rmoe analyze --stream`.

    Args:
        limit: bytes, for RLIMIT_DATA; or the folder of a memory cgroup.
    """

    def confine() -> None:
        if isinstance(limit, Path):
            (limit / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-m", "rmoe.cli.main", "analyze", str(folder), "--stream", "--out", str(out)]
    command += ["--tokens", str(tokens), "--sequence-length", str(SEQUENCE), "--device", "cpu", *options]
    # Where pyarrow is installed, transformers imports it, and its own allocator reserves 1 GiB that it never touches.
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    drop_cache(folder)
    began = time.perf_counter()
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=confine,
    )
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(said)
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=6)
    parser.add_argument("--limit-gib", type=float, default=2)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cgroup", type=Path, help="folder of a memory cgroup, its limit set to --limit-gib")
    given = parser.parse_args()
    limit = given.cgroup or int(given.limit_gib * 2**30)
    dtype = getattr(torch, given.dtype)
    layers = math.ceil(given.gib * 2**30 / (LAYER_PARAMETERS * dtype.itemsize))
    folder, out = given.folder / "checkpoint", given.folder / "out"
    try:
        written = write_checkpoint(folder, layers, dtype)
        disk, matrix = disk_rate(folder), matrix_rate(dtype)
        limits = {"disk_s": written / disk, "matrix_s": flops(layers, given.tokens) / matrix}
        seconds, processor, peak, said = run(folder, out, given.tokens, limit, "--batch-size", "8")
        figures = {
            "checkpoint_gib": written / 2**30,
            "layers": layers,
            "threads": torch.get_num_threads(),
            "disk_mb_per_s": disk / 1e6,
            "matrix_gflop_per_s": matrix / 1e9,
            **limits,
            "seconds": seconds,
            "processor_s": processor,
            "processor_over_limit": processor / max(limits.values()),
            "peak_gib": peak / 2**30,
            "limit_gib": given.limit_gib,
            "limited_by": "cgroup" if given.cgroup else "RLIMIT_DATA",
        }
        print(said, file=sys.stderr)
        print(
            json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}, indent=1)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
