"""An audit of a model's own balance loss: its value, that of Switch's definition, and whether it reaches the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmoe.analysis.gradients import MeanGradient, norms, trainable_aux_loss
from rmoe.moe import RoutedLayer, RoutingRecord, listen
from rmoe.routing.contract import count_assignments


@dataclass(frozen=True)
class BalanceAudit:
    """Means over a sample's batches.

    Attributes:
        model: `aux_loss` that the model, as it is configured, returns beside its loss; without its coefficient. None if
            it returns none that can be trained.
        switch: [L] Switch's balance loss (arXiv:2101.03961, Eq. 4) without its coefficient, 1 for even load.

                E sum_i f_i P_i     f_i: share of assignments, P_i: mean probability of expert i

        gradient: [L] norm of the gradient of `model` by the router's own parameters; None without a loss. Part of
            it comes through the layers above. 0: the loss does not reach the router.
        tokens: in the sample.
    """

    model: float | None
    switch: list[float]
    gradient: list[float] | None
    tokens: int


def audit_balance(
    model: nn.Module, layers: Sequence[RoutedLayer], batches: Sequence[Tensor]
) -> BalanceAudit | None:
    """Audit a language model in evaluation mode; its parameters and their gradients stay as they are.

    Args:
        model: whose layers each run once.
        layers: its routed layers.
        batches: [B, S] token ids each, of one shape.

    Returns:
        None without a batch.
    """
    if not batches:
        return None
    owned = [[p for p in layer.gate.parameters() if p.requires_grad] for layer in layers]
    parameters = [p for own in owned for p in own]
    gradient = MeanGradient(parameters)
    values: list[float] = []
    switch = torch.zeros(len(layers), dtype=torch.float64)
    for input_ids in batches:
        loss, records = _run(model, layers, input_ids)
        switch += torch.tensor([switch_loss(one) for one in records], dtype=torch.float64)
        if loss is None:
            continue
        values.append(float(loss.detach()))
        if parameters:
            gradient.add(loss)
    count = len(batches)
    return BalanceAudit(
        model=sum(values) / count if values else None,
        switch=(switch / count).tolist(),
        gradient=norms(gradient.mean(), owned) if values else None,
        tokens=sum(batch.numel() for batch in batches),
    )


def _run(
    model: nn.Module, layers: Sequence[RoutedLayer], input_ids: Tensor
) -> tuple[Tensor | None, list[RoutingRecord]]:
    """The balance loss of a training step's call, and what each layer decided in it."""
    records: list[RoutingRecord] = []
    with listen(layers, lambda layer, record: records.append(record)):
        output = model(input_ids=input_ids, labels=input_ids, use_cache=False)
    return trainable_aux_loss(output), records


def switch_loss(record: RoutingRecord) -> float:
    """`E sum_i f_i P_i` of one layer's decisions."""
    counts = count_assignments(record.experts, record.num_experts).double()
    probs = record.probs[:, : record.num_experts].detach().double().mean(0)
    return float(record.num_experts * (counts / counts.sum().clamp(min=1) * probs).sum())
