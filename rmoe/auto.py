"""After `import rmoe` alone, transformers' Auto classes know this package's models, and asking them imports it.

`import rmoe` must stay cheap, and the models' modules import torch. So two stand-ins are registered, as soon as
transformers' Auto classes are there: configurations that turn into the real ones when a folder is read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"

CONFIGS = {"rmoe": ("rmoe.model", "RMoEConfig"), "rmoe_graft": ("rmoe.graft", "GraftConfig")}
"""model_type -> the module whose import registers it, and its configuration. The only arrow up from here: by name,
when a user asks."""


def register_when_asked() -> None:
    """Register the stand-ins now if transformers' Auto classes are there, else right after they are imported."""
    if AUTO_CONFIG in sys.modules:
        _register(sys.modules[AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _AfterAutoConfig())


def _register(auto: ModuleType) -> None:
    for model_type in CONFIGS:
        if model_type not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(model_type, _stand_in(model_type))


def _stand_in(model_type: str) -> type:
    from transformers import PreTrainedConfig

    module, name = CONFIGS[model_type]

    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return getattr(import_module(module), name).from_dict(config_dict, **kwargs)

    def made(cls: type, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    body = {
        "__module__": __name__,
        "model_type": model_type,
        "from_dict": classmethod(from_dict),
        "__new__": made,
    }
    return type(name, (PreTrainedConfig,), body)


class _AfterAutoConfig(MetaPathFinder):
    """Finds one module, as everybody else would, and registers the stand-ins once it has been executed."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
