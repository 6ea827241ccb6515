"""From a run's configuration to its router, its model, and the model's parameter counts."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from rmoe.errors import RequestError, one_line
from rmoe.model import RMoEConfig, RMoEForCausalLM, count_parameters, initialize
from rmoe.places import expand
from rmoe.routing.spec import RouterSpec
from rmoe.routing.zoo import resolve
from rmoe.training.config import RunConfig
from rmoe.training.result import Parameters


def load_plugins(plugins: tuple[str, ...]) -> dict[str, str]:
    """Import the modules or files that register routers.

    Args:
        plugins: `package.module` or a path that ends in `.py`.

    Returns:
        Plugin -> sha256 of its source, so that a run can tell whether it changed.

    Raises:
        RequestError: there is no such module or file, or importing it fails.
    """
    return {plugin: _load_plugin(plugin) for plugin in plugins}


def _load_plugin(plugin: str) -> str:
    try:
        if plugin.endswith(".py"):
            source = expand(plugin, "--plugin")
            name = f"rmoe_plugin_{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]}"
            if name not in sys.modules:
                spec = importlib.util.spec_from_file_location(name, source)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[name] = module
                try:
                    spec.loader.exec_module(module)
                except BaseException:
                    del sys.modules[name]
                    raise
        else:
            source = Path(import_module(plugin).__file__ or "")
        return hashlib.sha256(source.read_bytes()).hexdigest()
    except RequestError:
        raise
    except Exception as error:  # whatever a plugin does wrong is the request's fault, said in one line
        said = one_line(f"{type(error).__name__}: {error}")
        raise RequestError("--plugin", plugin, f"a module or .py file that imports ({said})") from error


def router_spec(config: RunConfig) -> RouterSpec:
    """The router that `router` names, with `router_option`'s changes.

    Raises:
        RequestError: unknown router, stage or option, or a value that is not allowed.
    """
    data: dict[str, Any] = resolve(config.router).to_dict()
    for change in config.router_option:
        name, separator, text = change.partition("=")
        stage, _, option = name.partition(".")
        table = data.get(stage)
        if not separator or not isinstance(table, dict) or option not in table or option == "losses":
            options = (f"{s}.{o}" for s, t in data.items() if isinstance(t, dict) for o in t if o != "losses")
            raise RequestError("--router-option", change, f"NAME=VALUE, NAME one of {', '.join(options)}")
        table[option] = _json_value(text)
    return RouterSpec.from_dict(data)


def _json_value(text: str) -> object:
    """`256`, `0.5`, `true`, `null` as JSON means them; anything else is the text itself."""
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def model_config(config: RunConfig, vocab_size: int) -> RMoEConfig:
    """The model's configuration: sizes from the run, vocabulary from the data.

    Raises:
        RequestError: sizes or router that cannot work, naming the field.
    """
    return RMoEConfig(
        vocab_size=vocab_size,
        max_position_embeddings=config.training.sequence_length,  # what it has learned; longer may work
        router=router_spec(config).to_dict(),
        **dataclasses.asdict(config.model),
    )


def build_model(config: RMoEConfig, seed: int) -> RMoEForCausalLM:
    """The model with its initial weights, on the CPU in float32."""
    model = RMoEForCausalLM(config)
    initialize(model, seed)
    return model


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all routers and of what they share, by name; empty for a model without `routers`."""
    modules = [*getattr(model, "routers", []), getattr(getattr(model, "trunk", None), "router_shared", None)]
    wanted = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def parameter_counts(model: RMoEForCausalLM) -> Parameters:
    """`rmoe.model.count_parameters` as a result's record."""
    return Parameters(**count_parameters(model))
