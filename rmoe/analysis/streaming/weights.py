"""A model whose layers are in memory one at a time, each read from the checkpoint when it is its turn."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

import rmoe
from rmoe.analysis.streaming.memory import bound_kernel_cache, give_back_freed_memory, weights_apart
from rmoe.compat import LaterWeights, weights_later
from rmoe.errors import RequestError
from rmoe.model.weights import ADAPTER, CONFIG, entries, open_weights
from rmoe.moe import RoutedLayer, routed_layers

QUANTISERS = ("fp8", "mxfp4")
"""Block-scaled FP8 (DeepSeek-V3) and MXFP4 (GPT-OSS): transformers' own quantisers give bfloat16 where no kernel is."""


_MOST_TIMES_THE_FILES = 8
"""4 bits in the file, 32 in memory."""


def loaded_bytes(path: Path, dtype: str, enough: int) -> int:
    """Bytes of a model folder's tensors as `rmoe.load` would hold them.

    Quantised files take 2 to 8 times their size where they are converted, and so may a wider `dtype`.

    Args:
        dtype: as `rmoe.load` takes it.
        enough: bytes that there are. A model that fits whatever its files hold is not built to be counted; nor is one
            that is larger on disk already.
    """
    files = sum((path / file).stat().st_size for file in open_weights(path).files)
    known = not (path / ADAPTER).is_file() and _quantised_by(path) in (None, *QUANTISERS)
    if not known or files > enough or files * _MOST_TIMES_THE_FILES <= enough:
        return files
    with weights_later():
        model = rmoe.load(path, dtype=dtype)
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StreamedModel:
    """A model made as `rmoe.load` makes it, without its weights.

    Units are the elements of its outermost module lists, the layers. Each is loaded before it runs and dropped after.
    All other weights stay in memory, but for the input embedding, which can be dropped, and the head, which routing
    does not need.

    Args:
        path: a model folder.
        device: where a layer goes when it is loaded.
        dtype: of the weights, as `rmoe.load` takes it.

    Attributes:
        model: in evaluation mode; parameters of layers that are not loaded are on the meta device.
        units: path of each layer -> the layer.
        loaded_bytes: bytes read so far. total_bytes: of all that one pass over the layers reads.

    Raises:
        RequestError: what `rmoe.load` refuses; layers in no module list; a graft's adapter.
    """

    def __init__(self, path: Path, device: torch.device, dtype: str = "auto") -> None:
        if (path / ADAPTER).is_file():
            allowed = (
                "a model whose weights are all in its folder, not an adapter (rmoe graft --full writes one)"
            )
            raise RequestError("--stream", str(path), allowed)
        method = _quantised_by(path)
        if method not in (None, *QUANTISERS):
            allowed = f"none, or {' or '.join(QUANTISERS)}: of other methods no layer has been read alone and compared"
            raise RequestError("quantization_config.quant_method", method, allowed)
        with weights_later() as later:
            model = rmoe.load(path, dtype=dtype)
        self.model: PreTrainedModel = model
        self.path, self.device = path, device
        self._later: LaterWeights = later
        self.units = _units(model)
        for layer in routed_layers(model):
            if not any(layer.name == unit or layer.name.startswith(f"{unit}.") for unit in self.units):
                raise RequestError("--stream", str(path), f"layers in a module list; {layer.name} is in none")
        self._keys: dict[str, list[str]] = defaultdict(list)
        owners = {name: unit for unit, module in self.units.items() for name in _names(module, unit)}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.embedding = next(name for name, module in model.named_modules() if module is embedding)
        self._head = None if head is None else next(n for n, m in model.named_modules() if m is head)
        for name in _names(embedding, self.embedding):
            owners[name] = self.embedding
        if self._head is not None:
            owners |= dict.fromkeys(_names(head, self._head), "head")
        for key, target in later.target.items():
            self._keys[owners.get(target, "rest")].append(key)
        bound_kernel_cache()
        self._offsets: dict[str, tuple[str, int, int]] = {}
        self._empty: dict[str, dict[str, Tensor]] = {}
        self.loaded_bytes = 0
        self.total_bytes = sum(map(self.bytes_of, (*self.units, self.embedding, "rest")))
        for module in model.modules():  # buffers that no checkpoint holds were computed on the CPU
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    def load(self, part: str) -> None:
        """Read one unit, the embedding, or "rest", everything that is neither a layer nor the embedding nor the head.

        Raises:
            RequestError: a tensor cannot be read or converted.
        """
        keys = self._keys[part]
        if part != "rest":
            self._empty[part] = dict(_tensors(self.model.get_submodule(part)))
        try:
            with weights_apart():
                self._later.load(keys, self.device)
        except Exception as error:  # a damaged file, or a quantiser that needs what is not here
            raise RequestError("MODEL", part, f"weights that can be read here ({error})") from error
        self.loaded_bytes += self.bytes_of(part)
        if part in self.units:
            left = [name for name, tensor in _tensors(self.units[part]) if tensor.is_meta]
            if left:
                raise RequestError("MODEL", f"{part}.{left[0]}", "a tensor that the checkpoint has")

    def prefetch_after(self, unit: str) -> None:
        """Ask the system to read the next unit into its file cache meanwhile. Takes none of this process's memory."""
        paths = list(self.units)
        following = paths[paths.index(unit) + 1 :][:1]
        if not following or not hasattr(os, "posix_fadvise"):
            return
        for file, spans in self._places(following[0]).items():
            with (self.path / file).open("rb") as opened:
                for begin, end in spans:
                    os.posix_fadvise(opened.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _places(self, part: str) -> dict[str, list[tuple[int, int]]]:
        """File -> byte ranges of a part's tensors, neighbours joined."""
        if not self._offsets:
            for file, start, key, entry in entries(open_weights(self.path)):
                begin, end = entry["data_offsets"]
                self._offsets[key] = (file, start + begin, start + end)
        joined: dict[str, list[tuple[int, int]]] = {}
        for file, begin, end in sorted(self._offsets[key] for key in self._keys[part]):
            spans = joined.setdefault(file, [])
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
        return joined

    def drop(self, part: str) -> None:
        """Forget the weights of a unit or of the embedding, if they are loaded."""
        module = self.model.get_submodule(part)
        for name, empty in self._empty.pop(part, {}).items():
            owner_name, _, own = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            setattr(owner, own, empty)
        give_back_freed_memory()

    def layers_of(self, unit: str) -> list[RoutedLayer]:
        """The routed layers of a loaded unit; found anew, since a layer's reader keeps parameters that it looks at."""
        return [
            layer
            for layer in routed_layers(self.model)
            if layer.name == unit or layer.name.startswith(f"{unit}.")
        ]

    def when_called(
        self, on_unit: Callable[..., object], on_head: Callable[..., object]
    ) -> Callable[[], None]:
        """Have units call `on_unit(path, forward, args, kwargs)`, and the head `on_head()`, instead of running.

        Returns:
            What undoes it.
        """

        def replacement(path: str, forward: Callable[..., object]) -> Callable[..., object]:
            return lambda *args, **kwargs: on_unit(path, forward, args, kwargs)

        changed: list[nn.Module] = []
        for path, unit in self.units.items():
            unit.forward = replacement(path, unit.forward)
            changed.append(unit)
        if self._head is not None:
            head = self.model.get_submodule(self._head)
            head.forward = on_head
            changed.append(head)

        def undo() -> None:
            for module in changed:
                del module.forward

        return undo

    def bytes_of(self, part: str) -> int:
        """Bytes of the checkpoint that belong to a unit, the embedding, the head or the rest."""
        return sum(_size(self._later.tensors[key]) for key in self._keys[part])


def _quantised_by(path: Path) -> str | None:
    """The method that a folder's configuration names."""
    try:
        section = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("quantization_config")
        return None if section is None else str(section["quant_method"])
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None  # `rmoe.load` says what is wrong


def _units(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every element, with parts of its own, of a module list that is in no other."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{unit}.") for unit in found):
            for index, element in enumerate(module):
                if any(True for _ in element.children()):
                    found[f"{path}.{index}"] = element
    return found


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that a checkpoint fills: those on the meta device before it does, and once it has."""
    kept = {name for name, _ in module.named_buffers()} - set(module.state_dict())
    return [
        *module.named_parameters(remove_duplicate=False),
        *((name, b) for name, b in module.named_buffers(remove_duplicate=False) if name not in kept),
    ]


def _names(module: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name in module.state_dict()]


def _size(tensor: Any) -> int:
    """Bytes of a slice of a safetensors file; types of eight bits and less are counted as one byte."""
    dtype = str_to_torch_dtype.get(tensor.get_dtype(), torch.uint8)
    return math.prod(tensor.get_shape()) * dtype.itemsize
