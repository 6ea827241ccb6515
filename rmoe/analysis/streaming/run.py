"""A streamed run: every layer read once, run over all tokens, and dropped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import transformers
from torch import Tensor

import rmoe
from rmoe.analysis.gradients import find_shared
from rmoe.analysis.streaming.memory import free_memory
from rmoe.analysis.streaming.store import (
    CannotResume,
    State,
    Store,
    StoredRecord,
    checksum,
    form_of,
    made_again,
    require_space,
)
from rmoe.analysis.streaming.walkers import Walker, at_head, at_unit
from rmoe.analysis.streaming.weights import StreamedModel
from rmoe.analysis.weights import layer_weights
from rmoe.errors import RunError
from rmoe.moe import Recorder, RoutedLayer, RoutingBatch, RoutingRecord, listen
from rmoe.moe.recorder import require_each_token
from rmoe.plugins import loaded

Hidden = Literal["auto", "memory", "disk"]
_SHARE_OF_MEMORY = 0.25  # that hidden states may take before they go to disk


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        layer: path of the layer that has just run.
        read, total: bytes of the checkpoint.
        seconds: since the start. resumed: bytes that an earlier run had read.
    """

    layer: str
    read: int
    total: int
    seconds: float
    resumed: int

    def __str__(self) -> str:
        rate = (self.read - self.resumed) / max(self.seconds, 1e-9)
        left = (self.total - self.read) / max(rate, 1e-9)
        return (
            f"{self.layer}: {self.read / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )


class StreamedRouting:
    """The routing of a whole text, chunk by chunk as the plain way would have recorded it.

    Attributes:
        model: without its layers' weights.
        recorder: of the model: names and sizes of its layers, and which were called.
        weights: what each layer's weights said, by name of the layer.
        resumed: layers that an earlier run had done; None where an earlier run could not be resumed.
    """

    def __init__(
        self, model: StreamedModel, recorder: Recorder, store: Store, state: State, resumed: int | None
    ) -> None:
        self.model, self.recorder, self._store, self._state = model.model, recorder, store, state
        by_name = {layer.name: layer for layer in recorder.layers}
        recorder.called = [by_name[record.layer] for record in state.records]
        self.weights = state.weights
        self.resumed = resumed

    def batch(self, chunk: int) -> RoutingBatch:
        """Of the chunk's tokens."""
        return self._store.batch(chunk, self._state.records)

    def close(self) -> None:
        """Remove what is on disk."""
        self._store.remove()


def stream_routing(
    model: StreamedModel,
    blocks: np.ndarray,
    batch_size: int,
    folder: Path,
    hidden: Hidden = "auto",
    report: Callable[[Progress], object] = lambda progress: None,
) -> StreamedRouting:
    """Record the routing of a model on a text with one of its layers in memory at a time.

    Args:
        model: without its layers' weights.
        blocks: [N, S] token ids.
        batch_size: blocks that go through a layer together, as in a forward pass of the plain way.
        folder: for hidden states and routing; an earlier run of the same is resumed at the layer it was in.
        hidden: where hidden states are between two layers; "auto" is the disk if they would take a quarter of the free
            memory.
        report: called after each layer.

    Raises:
        RequestError: a disk that is too small.
        RunError: the model's forward pass does not go through its layers in one order.
    """
    recorder = Recorder(model.model)
    chunks = [blocks[start : start + batch_size] for start in range(0, len(blocks), batch_size)]
    ends = np.cumsum([chunk.size for chunk in chunks]).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    config = model.model.config.get_text_config()
    width = blocks.size * config.hidden_size * model.model.dtype.itemsize
    classes = sum((layer.num_experts + 1) * 4 + layer.slots * 8 for layer in recorder.layers)
    require_space(folder, 2 * width + blocks.size * classes)
    too_much = 2 * width > _SHARE_OF_MEMORY * free_memory(model.device)
    on_disk = hidden == "disk" or (hidden == "auto" and too_much)
    store = Store(folder, blocks.size, spans)
    identity = _identity(model, blocks, batch_size)
    saved, attempts = store.saved_state(identity), [State(identity=identity)]
    if saved is not None and store.has_outputs(saved.stage - 1) and store.has_records(saved.records):
        attempts.insert(0, saved)
    for state in attempts:
        run = _Run(model, recorder, chunks, store, state, on_disk, report)
        try:
            finished = run.all_layers()
        finally:
            run.close()
        if finished is not None:  # else what an earlier run left does not lead to the calls that it had seen
            break
    assert finished is not None  # a run from the start resumes nothing
    resumed = state.stage if saved is None or state is saved else None
    return StreamedRouting(model, recorder, store, finished, resumed)


class _Run:
    """The walkers of all chunks, from where `state` is."""

    def __init__(
        self,
        model: StreamedModel,
        recorder: Recorder,
        chunks: Sequence[np.ndarray],
        store: Store,
        state: State,
        on_disk: bool,
        report: Callable[[Progress], object],
    ) -> None:
        self.model, self.store, self.state, self.on_disk, self.report = model, store, state, on_disk, report
        self.device = model.device
        self.walkers = [self._walker(recorder, i, chunk) for i, chunk in enumerate(chunks)]
        self._undo = model.when_called(at_unit, at_head)
        self._spilled: list[dict[int, Tensor]] = []

    def _walker(self, recorder: Recorder, number: int, chunk: np.ndarray) -> Walker:
        def forward() -> None:
            recorder.run(torch.from_numpy(chunk.astype(np.int64)).to(self.device))

        return Walker(forward, [partial(self._passed, stage, number) for stage in range(self.state.stage)])

    def close(self) -> None:
        """End threads, and let the layers run again."""
        for walker in self.walkers:
            walker.stop()
        self.walkers = []
        self._undo()
        self._undo = lambda: None

    def all_layers(self) -> State | None:
        """Run to the end; None if an earlier run cannot be resumed."""
        began, first = time.perf_counter(), self.state.stage
        self.model.loaded_bytes = 0
        self.model.load("rest")
        self.model.load(self.model.embedding)
        try:
            for walker in self.walkers:
                walker.start()
                walker.resume()
        except CannotResume:
            return None
        self.model.drop(self.model.embedding)
        if (
            first
            and [checksum((walker.args, walker.kwargs)) for walker in self.walkers] != self.state.arrived
        ):
            return None
        done = sum(map(self.model.bytes_of, list(self.model.units)[:first]))
        while not all(walker.done for walker in self.walkers):
            units = {walker.unit if not walker.done else "the end" for walker in self.walkers}
            if len(units) > 1:
                what = f"the forward passes of different tokens are at different layers: {sorted(units)}"
                raise RunError(what, "nothing", "the model can only be analysed as a whole, without --stream")
            unit = units.pop()
            self._one_layer(unit)
            read = self.model.loaded_bytes + done
            total = max(self.model.total_bytes, read)
            self.report(Progress(unit, read, total, time.perf_counter() - began, done))
        return self.state

    def _one_layer(self, unit: str) -> None:
        stage = self.state.stage
        self.model.load(unit)
        self.model.prefetch_after(unit)
        layers = self.model.layers_of(unit)
        records, forms, arrived, spilled = list(self.state.records), [], [], []
        for i, walker in enumerate(self.walkers):
            self._fetch(i)
            output, heard = self._heard(walker, layers)
            for at, (layer, record) in enumerate(heard):
                start, end = self.store.spans[i]
                require_each_token(layer, record, end - start)
                if i == 0:
                    records.append(_stored(layer, record, stage))
                self.store.write_record(len(self.state.records) + at, i, record)
            tensors: list[Tensor] = []
            forms.append(form_of(output, tensors))
            self.store.write_output(stage, i, tensors)
            walker.resume(output)
            del output
            arrived.append(checksum((walker.args, walker.kwargs)))
            spilled.append(_spill(tensors, walker) if self.on_disk else {})
        shared = find_shared(self.model.model, layers) if layers else None
        weights = {layer.name: layer_weights(layer, shared) for layer in layers}
        self.model.drop(unit)
        self._spilled = spilled
        self.state = msgspec.structs.replace(
            self.state,
            stage=stage + 1,
            arrived=arrived,
            outputs=[*self.state.outputs, forms],
            records=records,
            weights=self.state.weights | weights,
        )
        self.store.save_state(self.state)

    def _heard(
        self, walker: Walker, layers: list[RoutedLayer]
    ) -> tuple[Any, list[tuple[RoutedLayer, RoutingRecord]]]:
        """Run a layer for one chunk: its result, and the routing in it."""
        heard: list[tuple[RoutedLayer, RoutingRecord]] = []
        assert walker.forward is not None
        with torch.no_grad(), listen(layers, lambda layer, record: heard.append((layer, record))):
            return walker.forward(*walker.args, **walker.kwargs), heard

    def _fetch(self, chunk: int) -> None:
        """Bring back what was spilled after the layer before."""
        spilled = self._spilled[chunk] if self._spilled else {}
        if not spilled:
            return
        saved = self.store.read_output(self.state.stage - 1, chunk, self.device)
        for index, tensor in spilled.items():
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            tensor.copy_(saved[index])

    def _passed(self, stage: int, chunk: int) -> Any:
        """What a layer that an earlier run has done returned; only the last one's is kept, the rest are zeros."""
        last = stage == self.state.stage - 1
        tensors = self.store.read_output(stage, chunk, self.device) if last else None
        return made_again(self.state.outputs[stage][chunk], tensors, self.device)


def _spill(tensors: list[Tensor], walker: Walker) -> dict[int, Tensor]:
    """Free the memory of those of a layer's results that the next layer's call holds: they are on disk. By index."""
    held: list[Tensor] = []
    form_of((*walker.args, *walker.kwargs.values()), held)
    given = {id(tensor) for tensor in held}
    spilled = {}
    for index, tensor in enumerate(tensors):
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if id(tensor) in given and whole and storage.resizable():
            storage.resize_(0)
            spilled[index] = tensor
    return spilled


def _stored(layer: RoutedLayer, record: RoutingRecord, stage: int) -> StoredRecord:
    return StoredRecord(
        layer=layer.name,
        stage=stage,
        num_experts=record.num_experts,
        classes=record.probs.shape[-1],
        slots=record.experts.shape[-1],
    )


def _identity(model: StreamedModel, blocks: np.ndarray, batch_size: int) -> dict[str, str]:
    """Everything on which the numbers depend: a run with another is not resumed."""
    files = sorted(model.path.glob("*.safetensors"))
    return {
        "config": hashlib.sha256((model.path / "config.json").read_bytes()).hexdigest(),
        "files": " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files),
        "tokens": hashlib.sha256(np.ascontiguousarray(blocks.astype(np.int64)).tobytes()).hexdigest(),
        "blocks": f"{blocks.shape}, {batch_size} at a time",
        "versions": f"rmoe {rmoe.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{model.device.type}",
        "dtype": str(model.model.dtype),
        "plugins": " ".join(loaded()),
    }
