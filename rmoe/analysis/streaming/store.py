"""What a streamed run keeps on disk: each layer's routing, and the hidden states to resume from after a kill."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmoe.analysis.weights import LayerWeights
from rmoe.errors import RequestError
from rmoe.graft.modules import RouterStream
from rmoe.moe import RoutingBatch, RoutingRecord
from rmoe.records import NOT_JSON, Record, write_record
from rmoe.routing.contract import Routing

STATE_VERSION = 1
_SEQUENCES: tuple[Any, ...] = (tuple, list, Routing, RouterStream)


class StoredRecord(Record, frozen=True, kw_only=True):
    """One call of a routed layer, for all tokens."""

    layer: str
    stage: int
    num_experts: int
    classes: int
    slots: int


class State(Record, frozen=True, kw_only=True):
    """How far a run is. `stage` layers have run for all chunks, whose outputs are in `outputs-<stage % 2>`."""

    schema_version: int = STATE_VERSION
    identity: dict[str, str]
    stage: int = 0
    arrived: list[int] = msgspec.field(
        default_factory=list
    )  # [chunks] checksum of what the next layer is called with
    outputs: list[list[Any]] = msgspec.field(
        default_factory=list
    )  # [stage][chunks] form of what a layer returned
    records: list[StoredRecord] = msgspec.field(default_factory=list)
    weights: dict[str, LayerWeights] = msgspec.field(default_factory=dict)  # by name of the layer


class Store:
    """The folder of a streamed run.

    Args:
        folder: made if it is not there.
        tokens: of the whole text.
        spans: (first, one past the last) token of each chunk.
    """

    def __init__(self, folder: Path, tokens: int, spans: list[tuple[int, int]]) -> None:
        self.folder, self.tokens, self.spans = folder, tokens, spans
        folder.mkdir(parents=True, exist_ok=True)

    def saved_state(self, identity: dict[str, str]) -> State | None:
        """Of an earlier run of the same model on the same text; None if there is none that can be resumed."""
        try:
            state = msgspec.json.decode((self.folder / "state.json").read_bytes(), type=State)
        except (OSError, *NOT_JSON):
            return None
        usable = state.schema_version == STATE_VERSION and state.identity == identity and state.stage > 0
        return state if usable else None

    def save_state(self, state: State) -> None:
        """Written last, after all that it speaks of."""
        write_record(self.folder / "state.json", state)

    def write_output(self, stage: int, chunk: int, tensors: list[Tensor]) -> Path:
        """Keep what the layer of a stage returned for one chunk; two stages are kept."""
        path = self._output(stage, chunk)
        path.parent.mkdir(exist_ok=True)
        save_file({str(i): _own(tensor) for i, tensor in enumerate(tensors)}, path)
        return path

    def read_output(self, stage: int, chunk: int, device: torch.device) -> list[Tensor]:
        """Read it again."""
        found = load_file(self._output(stage, chunk), device=str(device))
        return [found[str(i)] for i in range(len(found))]

    def has_outputs(self, stage: int) -> bool:
        """Whether all outputs of a stage are there and whole."""
        try:
            for chunk in range(len(self.spans)):
                self.read_output(stage, chunk, torch.device("cpu"))
        except (OSError, SafetensorError, KeyError):
            return False
        return True

    def has_records(self, records: list[StoredRecord]) -> bool:
        """Whether the routing of all these layers is there."""
        return all(
            path.is_file() and path.stat().st_size == self.tokens * width * 4
            for number, stored in enumerate(records)
            for path, width, _ in self._files(number, stored.classes, stored.slots)
        )

    def write_record(self, number: int, chunk: int, record: RoutingRecord) -> None:
        """Keep a layer's routing of one chunk."""
        for name, array in self._arrays(number, record.probs.shape[-1], record.experts.shape[-1]):
            start, end = self.spans[chunk]
            values = getattr(record, name).detach()
            array[start:end] = values.to(torch.int32 if name == "experts" else torch.float32).cpu().numpy()

    def batch(self, chunk: int, records: list[StoredRecord]) -> RoutingBatch:
        """All layers' routing of one chunk, as the plain way stacks it."""
        start, end = self.spans[chunk]
        found = []
        for number, stored in enumerate(records):
            parts = {
                name: torch.from_numpy(np.array(array[start:end]))
                for name, array in self._arrays(number, stored.classes, stored.slots)
            }
            probs, experts, weights = parts["probs"], parts["experts"].long(), parts["weights"]
            found.append(RoutingRecord(probs, probs, experts, weights, stored.num_experts))
        return RoutingBatch.stack(found)

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _output(self, stage: int, chunk: int) -> Path:
        return self.folder / f"outputs-{stage % 2}" / f"{chunk}.safetensors"

    def _files(self, number: int, classes: int, slots: int) -> Iterator[tuple[Path, int, str]]:
        for name, width, kind in (
            ("probs", classes, "f4"),
            ("experts", slots, "i4"),
            ("weights", slots, "f4"),
        ):
            yield self.folder / f"{name}-{number}", width, kind

    def _arrays(self, number: int, classes: int, slots: int) -> Iterator[tuple[str, np.ndarray]]:
        for path, width, kind in self._files(number, classes, slots):
            size = self.tokens * width * 4
            if not path.is_file() or path.stat().st_size != size:
                _allocate(path, size)
            yield path.name.partition("-")[0], np.memmap(path, kind, "r+", shape=(self.tokens, width))


def _allocate(path: Path, size: int) -> None:
    """A file of zeros whose blocks the disk has: a memory map of one that fills up later ends the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def require_space(folder: Path, needed: int) -> None:
    """Check, before anything is written, that a disk has room; what an earlier run left is written over.

    Raises:
        RequestError: it has not.
    """
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    free += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if free < needed:
        allowed = (
            f"a disk with {needed / 1e9:.1f} GB for hidden states and routing (fewer --tokens need less)"
        )
        raise RequestError("--out", f"{folder} with {free / 1e9:.1f} GB free", allowed)


class CannotResume(Exception):
    """What an earlier run left is not enough to make its forward passes again."""


def form_of(value: Any, tensors: list[Tensor]) -> Any:
    """The form of what a layer returned, as JSON; its tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1, "shape": list(value.shape), "dtype": str(value.dtype)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"is": value}
    if type(value) in _SEQUENCES:
        return {type(value).__name__: [form_of(item, tensors) for item in value]}
    return {"unknown": type(value).__name__}


def made_again(form: Any, tensors: list[Tensor] | None, device: torch.device) -> Any:
    """What had this form; with zeros for its tensors where they are not given.

    Raises:
        CannotResume: it had something else in it than tensors and plain values.
    """
    ((kind, content),) = ((k, v) for k, v in form.items() if k not in ("shape", "dtype"))
    if kind == "is":
        return content
    if kind == "tensor":
        if tensors is not None:
            return tensors[content]
        dtype = getattr(torch, form["dtype"].removeprefix("torch."))
        return torch.zeros(form["shape"], dtype=dtype, device=device)
    made = [made_again(item, tensors, device) for item in content] if kind != "unknown" else []
    for sequence in _SEQUENCES:
        if sequence.__name__ == kind:
            return sequence(*made) if hasattr(sequence, "_fields") else sequence(made)
    raise CannotResume(str(content))


def checksum(value: Any, start: int = 0) -> int:
    """CRC-32 of all tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        start = zlib.crc32(str(value.shape).encode(), start)
        if not value.numel():
            return start
        own = _own(value)  # NumPy's view of a tensor would keep its memory from ever being freed by resizing
        return zlib.crc32(own.flatten().view(torch.uint8).numpy().data, start)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            start = checksum(item, start)
    return start


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, with memory of its own: two results of a layer may be views of one."""
    return tensor.detach().to("cpu", copy=True).contiguous()
