"""From a run's configuration to its router, its model, and the model's parameter counts."""

from __future__ import annotations

import dataclasses

from torch import nn

from rmoe.model import RMoEConfig, RMoEForCausalLM, count_parameters, initialize
from rmoe.plugins import load_plugins as load_plugins
from rmoe.results.run import Parameters
from rmoe.routing.spec import RouterSpec, with_options
from rmoe.routing.zoo import resolve
from rmoe.training.config import RunConfig
from rmoe.validation import require


def router_spec(config: RunConfig) -> RouterSpec:
    """The router that `router` names, with `router_option`'s changes.

    Raises:
        RequestError: unknown router, stage or option, or a value that is not allowed.
    """
    return with_options(resolve(config.router), config.router_option)


def model_config(config: RunConfig, vocab_size: int) -> RMoEConfig:
    """The model's configuration: sizes from the run, vocabulary from the data.

    Raises:
        RequestError: sizes or router that cannot work, naming the field.
    """
    return RMoEConfig(
        vocab_size=vocab_size,
        max_position_embeddings=config.training.sequence_length,  # what it has learned; longer may work
        router=router_spec(config),
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


def require_router_parameters(model: RMoEForCausalLM, rate: float | None) -> None:
    """Check that `training.router_learning_rate` is of something.

    Raises:
        RequestError: naming the router, which trains nothing.
    """
    trained = rate is None or any(p.requires_grad for p in router_parameters(model).values())
    allowed = f"None with router.kind {model.config.router_spec.router.kind}: it has no trained parameters"
    require(trained, "training.router_learning_rate", rate, allowed)


def parameter_counts(model: RMoEForCausalLM) -> Parameters:
    """`rmoe.model.count_parameters` as a result's record."""
    return Parameters(**count_parameters(model))
