"""A grafted model as transformers knows models: its configuration, its class, and the Auto classes.

On disk a grafted model has `model_type: "rmoe_graft"`, so a program that knows no grafts refuses it instead of
loading the family without its router; the family's own fields stay where every tool looks for them. In memory
the configuration is of a subclass of the family's and keeps the family's `model_type`, which is what transformers
chooses weight conversions and parallel plans by.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rmoe.compat import announce_causal_lm, is_loaded, keep_recording, model_classes
from rmoe.errors import RequestError
from rmoe.graft.attach import attach, is_grafted
from rmoe.graft.base import GRAFT_MODEL_TYPE, GRAFT_SECTION, POINTER
from rmoe.graft.join import JoinsBase
from rmoe.graft.modules import reduce_as
from rmoe.graft.spec import GraftSpec
from rmoe.model.auto_code import save_with_code
from rmoe.model.initialize import initialize_missing
from rmoe.model.recompute import NonReentrant
from rmoe.routing.initial import Initialized

Model = TypeVar("Model", bound=PreTrainedModel)

CLASS_PREFIX = "Grafted"

# See `rmoe.model.auto_code`. The configuration alone is enough: reading it registers the model classes.
AUTO_MAP = {"AutoConfig": "configuration_rmoe_graft.GraftConfig"}
CODE = {"configuration_rmoe_graft.py": "from rmoe.graft import GraftConfig\n"}


def graft(
    model: Model, router: str | GraftSpec = "rmoe", *, width: int | None = None, pure: bool = False
) -> Model:
    """Put a recurrent router onto a pretrained MoE, in place, without changing its function.

    Each gate is called with `x + B_i h_i`, `B_i = 0`; its weights and all that its family does with its scores
    stay as they are, and the experts still read `x`. The model's class becomes a subclass of its own, whose
    `save_pretrained` writes a standalone folder that `rmoe.load` and, after `import rmoe.graft`, transformers' Auto
    classes read. `save_adapter` writes an adapter.

    Args:
        model: any transformers MoE whose layers pass hidden states on one by one; see `rmoe families`.
        router: a zoo row, whose recurrence is taken, or the whole graft.
        width: `p`, if it is to differ from the row's.
        pure: the gate reads `B_i h_i` alone.

    Returns:
        The same object.

    Raises:
        RequestError: a dense model, no gate beside the experts, already grafted, a row without recurrence, p <= 0.
    """
    if is_grafted(model):
        raise RequestError("model", model.config.model_type, "a model without a graft")
    spec = router if isinstance(router, GraftSpec) else GraftSpec.from_router(router, width=width, pure=pure)
    attach(model, spec)
    return adopt(model, spec)


class GraftConfig(PreTrainedConfig):
    """What `AutoConfig` finds under `rmoe_graft`; `from_dict` gives the family's configuration with the graft."""

    model_type = GRAFT_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base_type = config_dict.get(GRAFT_SECTION, {}).get("base_model_type")
        if base_type not in CONFIG_MAPPING:
            raise RequestError(f"{GRAFT_SECTION}.base_model_type", base_type, "a model type of transformers")
        return grafted_config_class(CONFIG_MAPPING[base_type]).from_dict(config_dict, **kwargs)


@cache
def grafted_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A family's configuration that writes itself as `rmoe_graft`; its models are registered with the Auto classes."""

    def to_dict(self: Any) -> dict[str, Any]:
        return base.to_dict(self) | {"model_type": GRAFT_MODEL_TYPE}

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        family = {key: value for key, value in config_dict.items() if key != "model_type"}
        return base.from_dict.__func__(cls, family, **kwargs)  # type: ignore[attr-defined]

    # This module, not the family's: transformers 5.17 registers no models for a configuration from its own modules.
    body = {
        "__module__": __name__,
        "to_dict": to_dict,
        "from_dict": classmethod(from_dict),
        "__reduce_ex__": reduce_as(grafted_config_class, base),
    }
    config_class = type(CLASS_PREFIX + base.__name__, (base,), body)
    families: dict[Any, type[PreTrainedModel]] = {}
    for auto, base_model in model_classes(base):
        families.setdefault(auto, base_model)
    for auto, base_model in families.items():
        model_class = grafted_model_class(base_model, config_class)  # type: ignore[arg-type]
        auto.register(config_class, model_class, exist_ok=True)
        if auto is AutoModelForCausalLM:
            announce_causal_lm(f"{GRAFT_MODEL_TYPE}-{base.model_type}", model_class.__name__)
    return config_class


@cache
def grafted_model_class(
    base: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    """A family's model class that puts the graft of its configuration on when it is made."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if POINTER in getattr(config, GRAFT_SECTION):
            config = _without_pointer(config)
        base.__init__(self, config, *args, **kwargs)
        if not is_grafted(self):  # a classifier makes its backbone through AutoModel, which has grafted it
            attach(self, GraftSpec.from_dict(getattr(config, GRAFT_SECTION)))

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save = partial(base.save_pretrained, self)
        save_with_code(self, save, Path(save_directory), args, kwargs, CODE, AUTO_MAP)

    def initialize_weights(self: Any) -> None:
        # The backbone, a model of its own, knows nothing of the graft's modules in it.
        ours = [m for m in self.modules() if isinstance(m, Initialized) and not is_loaded(m)]
        base.initialize_weights(self)
        for module in ours:
            initialize_missing(module, std=0.0)  # they name all their rules

    body = {
        # The family's module: by it transformers tells its own models, whose weights it converts, from others.
        "__module__": base.__module__,
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "__reduce_ex__": reduce_as(_model_class, base, config_class.__bases__[0]),
        "config_class": config_class,
        "initialize_weights": initialize_weights,
    }
    return type(CLASS_PREFIX + base.__name__, (NonReentrant, JoinsBase, base), body)


def _without_pointer(config: Any) -> Any:
    """A model in memory is whole: what writes its configuration beside all its weights must not call it an adapter."""
    config = copy.copy(config)
    section = getattr(config, GRAFT_SECTION)
    setattr(config, GRAFT_SECTION, {name: value for name, value in section.items() if name != POINTER})
    return config


def _model_class(base: type[PreTrainedModel], config_base: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """`grafted_model_class` from the family's classes alone, which pickle can find."""
    return grafted_model_class(base, grafted_config_class(config_base))  # type: ignore[arg-type]


def adopt(model: Model, spec: GraftSpec) -> Model:
    """Give a model that `attach` has changed the class and configuration that save and load it.

    The configuration is a copy: another model may have been made from the same object.
    """
    old = model.config
    config = copy.deepcopy(old)
    config.__class__ = grafted_config_class(type(old))  # type: ignore[arg-type]
    setattr(config, GRAFT_SECTION, graft_section(spec, old.model_type, type(model).__name__))
    config.auto_map = dict(AUTO_MAP)
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = config
    model.__class__ = grafted_model_class(type(model), type(config))  # type: ignore[arg-type]
    keep_recording(model)
    return model


def graft_section(
    spec: GraftSpec, base_model_type: str, base_architecture: str, **more: Any
) -> dict[str, Any]:
    """The `rmoe_graft` object of a configuration."""
    origin = {"base_model_type": base_model_type, "base_architecture": base_architecture}
    return spec.to_dict() | origin | more


AutoConfig.register(GRAFT_MODEL_TYPE, GraftConfig, exist_ok=True)
