"""Which parameters are the router's: each layer's own part, the family's gate under a graft, the shared cell."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from rmoe.errors import RequestError
from rmoe.finetune.config import FinetuneConfig
from rmoe.graft.attach import CELL, OFFSET, is_grafted, routed_stack

SHARED = "router_shared"


@dataclass(frozen=True)
class RouterParts:
    """Names of parameters.

    Attributes:
        layers: what each layer has of its own: projector and `B` of a graft, projector and scorer of an RMoE model.
        gates: the family's gates under a graft, or of a model without one.
        cell: what all layers share.
        modules: paths of the modules that these are in: each layer's gate, the shared cell.
    """

    layers: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()
    cell: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()

    @property
    def every(self) -> frozenset[str]:
        return self.layers | self.gates | self.cell

    def frozen(self, freeze: str) -> frozenset[str]:
        """What of the routers stays as it is, as `--freeze` says."""
        frozen = {"none": frozenset[str](), "router": self.layers | self.gates, "router+cell": self.every}
        return frozen[freeze]


def router_parts(model: PreTrainedModel) -> RouterParts:
    """The router's parameters of an RMoE model, a grafted one, or any other MoE; none of a dense model."""
    try:
        gates = [layer.gate_name for layer in routed_stack(model)]
    except RequestError:
        return RouterParts()
    cells = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in (CELL, SHARED)]
    names = [name for name, _ in model.named_parameters()]
    cell, within = (
        frozenset(name for name in names if name.startswith(tuple(f"{path}." for path in paths)))
        for paths in (cells, gates)
    )
    own = hasattr(model, "routers")
    layers = frozenset(name for name in within if own or f".{OFFSET}." in name)
    return RouterParts(layers, within - layers, cell, tuple(sorted(gates + cells)))


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
        frozen = parts.frozen(config.freeze)
        if config.freeze != "none" and not frozen:
            raise RequestError("--freeze", config.freeze, "none: the model has no router")
        chosen = frozenset(every - frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return sorted(chosen)
