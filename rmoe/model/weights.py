"""The weights of a model folder: safetensors in one file or in shards, read one tensor at a time, never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmoe.errors import RequestError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = (
    "graft.safetensors"  # of a folder that holds only what its model adds to, or changes in, a base elsewhere
)

SAMPLE_WHOLE, SAMPLE_BLOCK = (
    2**20,
    2**12,
)  # bytes; see `sample_digest`, whose values in adapters depend on them

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class WeightFolder:
    """The weight files of a model folder, in order, by name."""

    path: Path
    files: tuple[str, ...]

    def names(self, file: str) -> list[str]:
        """Names of the tensors in one file."""
        with safe_open(self.path / file, framework="pt") as weights:
            return list(weights.keys())

    def tensors(self, *files: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these files, or of all."""
        for file in files or self.files:
            with safe_open(self.path / file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    yield name, weights.get_tensor(name)


def open_weights(path: Path) -> WeightFolder:
    """Find and check the weight files of a model folder; of an adapter its own, without its base's.

    Raises:
        RequestError: no such folder, no configuration, no weights, pickled weights, a file that the index names
            but that is missing or lies elsewhere, a file that is not safetensors.
    """
    if not (path / CONFIG).is_file():
        raise RequestError("model", str(path), f"a folder with {CONFIG}")
    if (path / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (path / INDEX).is_file():
        files = sorted(set(_weight_map(path / INDEX).values()))
    elif (path / ADAPTER).is_file():
        files = [ADAPTER]
    else:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        held = f"{pickles[0]}, a pickle, which can run code when read" if pickles else "no weights"
        raise RequestError("model", str(path), f"a folder with safetensors weights; this one has {held}")
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise RequestError(
                "model", str(path / file), f"a file in the folder of the {INDEX} that names it"
            )
        require_safetensors(path / file)
    return WeightFolder(path, tuple(files))


def require_safetensors(path: Path) -> None:
    """Check that a file is a whole safetensors file, by its header.

    Raises:
        RequestError: it is missing, cut, or something else.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise RequestError("model", str(path), f"a safetensors file ({error})") from None


def write_index(weights: WeightFolder) -> None:
    """Write the index that makes these files one model."""
    sizes = {name: t.numel() * t.element_size() for name, t in weights.tensors()}
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file in weights.files for name in weights.names(file)},
    }
    write_json(weights.path / INDEX, index)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One sha256 over the names, dtypes, shapes and bytes of tensors, whatever files they are in."""
    each = {name: [str(t.dtype), list(t.shape), tensor_sha256(t)] for name, t in tensors}
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def layout_digest(weights: WeightFolder) -> str:
    """One sha256 over the names, dtypes and shapes of all tensors, whatever files they are in."""
    layout = {name: [entry["dtype"], entry["shape"]] for _, _, name, entry in entries(weights)}
    return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()


def sample_digest(weights: WeightFolder) -> str:
    """One sha256 over a sample of all tensors' bytes: seconds for a model whose `digest` takes minutes.

    A tensor of up to 1 MiB (gates, norms, biases) is read whole, a larger one in four blocks of 4 KiB: its first, its
    last and two between.
    """
    each: dict[str, str] = {}
    for file, start, name, entry in entries(weights):
        begin, end = entry["data_offsets"]
        hasher = hashlib.sha256()
        with open(weights.path / file, "rb", buffering=0) as stream:
            for offset, size in _blocks(end - begin):
                stream.seek(start + begin + offset)
                hasher.update(stream.read(size))
        each[name] = hasher.hexdigest()
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def entries(weights: WeightFolder) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """(file, where its data starts, tensor's name, dtype and shape and offsets), from the safetensors headers."""
    for file in weights.files:
        with open(weights.path / file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                yield file, 8 + size, name, entry


def _blocks(size: int) -> list[tuple[int, int]]:
    """(offset, size) of what `sample_digest` reads of a tensor of so many bytes."""
    if size <= SAMPLE_WHOLE:
        return [(0, size)]
    last = size - SAMPLE_BLOCK
    return [(last * part // 3, SAMPLE_BLOCK) for part in range(4)]


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestError: the file is not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("model", str(path), f"a JSON file ({error})") from None
    if not isinstance(data, dict):
        raise RequestError("model", str(path), "a JSON object")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """As transformers writes them: indented, keys sorted, a newline at the end."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(f, str) for f in weight_map.values())
    ):
        raise RequestError("model", str(path), "an index with a weight_map from tensors to files")
    return weight_map
