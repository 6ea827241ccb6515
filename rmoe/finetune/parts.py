"""Which parameters are the router's: each layer's own part, the family's gate under a graft, the shared cell."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from rmoe.errors import RequestError
from rmoe.finetune.config import FinetuneConfig
from rmoe.graft.attach import CELL, OFFSET, is_grafted, routed_stack
from rmoe.training.build import router_parameters

SHARED = "router_shared"


@dataclass(frozen=True)
class RouterParts:
    """Names of parameters.

    Attributes:
        layers: what each layer has of its own: projector and `B` of a graft, projector and scorer of an RMoE model.
        gates: the family's gates under a graft, or of a model without one.
        cell: what all layers share.
    """

    layers: frozenset[str]
    gates: frozenset[str]
    cell: frozenset[str]


def router_parts(model: PreTrainedModel) -> RouterParts:
    """The router's parameters of an RMoE model, a grafted one, or any other MoE; none of a dense model."""
    if hasattr(model, "routers"):
        names = frozenset(router_parameters(model))
        cell = frozenset(name for name in names if f".{SHARED}." in f".{name}")
        return RouterParts(names - cell, frozenset(), cell)
    try:
        gates = [layer.gate_name for layer in routed_stack(model)]
    except RequestError:
        return RouterParts(frozenset(), frozenset(), frozenset())
    names = frozenset(name for name, _ in model.named_parameters())
    within = frozenset(name for name in names if any(name.startswith(f"{path}.") for path in gates))
    layers = frozenset(name for name in within if f".{OFFSET}." in name)
    return RouterParts(
        layers, within - layers, frozenset(name for name in names if f".{CELL}." in f".{name}")
    )


def choose_trained(model: PreTrainedModel, config: FinetuneConfig) -> list[str]:
    """Set `requires_grad` of every parameter as `--freeze` and `--train` say.

    Returns:
        Names of the parameters that will be trained.

    Raises:
        RequestError: the model has no such router.
    """
    parts = router_parts(model)
    every = {name for name, _ in model.named_parameters()}
    if config.train != "all":
        chosen = parts.layers | parts.cell | (parts.gates if config.train == "router+gate" else frozenset())
        if not chosen:
            allowed = "all; router+gate needs an MoE model" + (
                "" if is_grafted(model) else ", router a graft or RMoE"
            )
            raise RequestError("--train", config.train, allowed)
        if config.task == "classification":  # its head is new
            chosen |= {name for name in every if name.startswith("score.")}
    else:
        frozen = frozenset() if config.freeze == "none" else parts.layers | parts.gates
        if config.freeze != "none" and not frozen:
            raise RequestError("--freeze", config.freeze, "none: the model has no router")
        chosen = frozenset(every - frozen - (parts.cell if config.freeze == "router+cell" else frozenset()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return sorted(chosen)


def module_paths(model: PreTrainedModel, names: frozenset[str]) -> list[str]:
    """Paths of the modules that PEFT copies to train these parameters whole: each layer's gate, the shared cell."""
    gates = [layer.gate_name for layer in routed_stack(model)] if names else []
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        shared = next((place for place, part in enumerate(parts) if part in (CELL, SHARED)), None)
        if shared is not None:
            found.add(".".join(parts[: shared + 1]))
        else:
            found.add(next(path for path in gates if name.startswith(f"{path}.")))
    return sorted(found)
