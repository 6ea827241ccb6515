"""Reading an adapter: its tensors and its base's become one model, through transformers' own `from_pretrained`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from rmoe.errors import RequestError
from rmoe.graft.base import GRAFT_SECTION, Base
from rmoe.model.weights import ADAPTER, WeightFolder, require_safetensors

GENERATION_CONFIG = "generation_config.json"

# Keywords of `from_pretrained` by which a file of a repository is found.
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_OF_A_FILE = (*_OF_THE_HUB, "subfolder", "proxies", "_commit_hash")


class JoinsBase:
    """Mixin of every grafted model's class: `from_pretrained` of an adapter reads the base's weights too.

    Attributes:
        graft_base: of a model that came from an adapter, the pointer to its base; `save_adapter` uses it.
        graft_place: where that base was found.
    """

    graft_base: Base | None = None
    graft_place: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        base: str | Path | None = None,
        verify: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, which gets all other arguments as they are.

        Args:
            base: where an adapter's base is, if not where the adapter says: a folder or a name of the Hub.
            verify: compare all bytes of that base, not only a sample.

        Raises:
            RequestError: the base is not there or another model; or `base` or `verify` for a standalone folder.
        """
        load = super().from_pretrained  # type: ignore[misc]
        name = pretrained_model_name_or_path
        config = None if name is None else cls._given_config(name, kwargs)
        pointer = None if config is None else Base.of_config(config, str(name))
        if config is None or pointer is None:
            if base is not None or verify:
                raise RequestError("base", str(base), f"nothing: {name} has its base in it")
            return load(name, *args, **kwargs)
        folder = _folder(name, kwargs)
        weights = pointer.open(folder, config[GRAFT_SECTION], moved=base, full=verify)
        options = {key: value for key, value in kwargs.items() if key not in _OF_A_FILE}
        options.setdefault("config", str(folder))
        if (folder / GENERATION_CONFIG).is_file():
            options.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
        loaded = load(None, *args, state_dict=dict(_joined(folder, pointer, weights)), **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.graft_base, model.graft_place = pointer, weights.path
        _call_it(model, str(name))
        return loaded

    @classmethod
    def _given_config(cls, name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            return {GRAFT_SECTION: getattr(config, GRAFT_SECTION, None)}
        places = {key: kwargs[key] for key in _OF_A_FILE if key in kwargs}
        found: dict[str, Any] = cls.config_class.get_config_dict(config or name, **places)[0]  # type: ignore[attr-defined]
        return found


def _folder(name: Any, kwargs: dict[str, Any]) -> Path:
    """The adapter's folder; one on the Hub is downloaded whole, which is little."""
    folder = Path(name)
    if not folder.is_dir():
        options = {key: kwargs[key] for key in _OF_THE_HUB if kwargs.get(key) is not None}
        folder = Path(snapshot_download(str(name), allow_patterns=["*.json", ADAPTER], **options))
    return folder / kwargs.get("subfolder", "")


def _joined(folder: Path, pointer: Base, base: WeightFolder) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model: the base's, and after them the adapter's, some in the place of the base's."""
    unused = set(pointer.unused)
    yield from ((name, tensor) for name, tensor in base.tensors() if name not in unused)
    require_safetensors(folder / ADAPTER)
    yield from WeightFolder(folder, (ADAPTER,)).tensors()


def _call_it(model: PreTrainedModel, name: str) -> None:
    """Name a joined model after the adapter, as transformers names a model after what it was loaded from."""
    model.name_or_path = name
    for module in model.modules():
        if "config" in module.__dict__:
            module.config.name_or_path = name  # type: ignore[union-attr]
