"""How a saved folder finds this package again.

The folder gets two small files and an `auto_map` that names them. They only import `rmoe`: where it is installed,
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` works without importing anything first, and
where it is not, transformers reads their imports and says `pip install rmoe`. After `import rmoe.model` the classes
are registered and no remote code is involved.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

AUTO_MAP = {
    "AutoConfig": "configuration_rmoe.RMoEConfig",
    "AutoModel": "modeling_rmoe.RMoEModel",
    "AutoModelForCausalLM": "modeling_rmoe.RMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_rmoe.RMoEForSequenceClassification",
}

_FILES = {
    "configuration_rmoe.py": "from rmoe.model import RMoEConfig\n",
    "modeling_rmoe.py": "from rmoe.model import RMoEForCausalLM, RMoEForSequenceClassification, RMoEModel\n",
}


def write_auto_code(
    folder: Path,
    files: Mapping[str, str] = MappingProxyType(_FILES),
    auto_map: Mapping[str, str] = MappingProxyType(AUTO_MAP),
) -> None:
    """Write the files (name -> text) beside a saved model and name their classes in its `config.json`."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = dict(auto_map)
    # Sorted as transformers has it; what is inside stays as it is: "10" would come before "2" in `id2label`.
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")


HUB_KEYWORDS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"
)  # fmt: skip


def save_with_code(
    model: Any,
    save: Callable[..., None],
    folder: Path,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    files: Mapping[str, str] = MappingProxyType(_FILES),
    auto_map: Mapping[str, str] = MappingProxyType(AUTO_MAP),
) -> None:
    """`save_pretrained` with the files, which a model that is also uploaded then has too.

    Args:
        model: what `push_to_hub` uploads.
        save: transformers' own `save_pretrained`, which would upload before the files are there.
        folder: where to.
        args, kwargs: its further arguments, by position and by name.
        files, auto_map: see `write_auto_code`.
    """
    if args:
        names = [*inspect.signature(save).parameters][1 : len(args) + 1]
        kwargs |= dict(zip(names, args, strict=True))
    uploads = kwargs.pop("push_to_hub", False)
    hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if uploads and name in kwargs}
    save(folder, **kwargs)
    if kwargs.get("is_main_process", True):
        # Of a model with an adapter of its own transformers saves the adapter alone.
        if (folder / "config.json").exists():
            write_auto_code(folder, files, auto_map)
        if uploads:
            model.push_to_hub(hub.pop("repo_id", folder.name), **hub)
