"""An audit of a model's own balance loss: its value, that of Switch's definition, and whether it reaches the router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rmoe.analysis.gradients import MeanGradient, norms, trainable_aux_loss
from rmoe.moe import RoutedLayer, RoutingRecord, listen
from rmoe.results.analysis import BalanceAudit
from rmoe.routing.contract import count_assignments


def audit_balance(
    model: nn.Module, layers: Sequence[RoutedLayer], batches: Sequence[Tensor]
) -> BalanceAudit | None:
    """Audit a language model in evaluation mode; its parameters and their gradients stay as they are.

    The gradient comes in part through the layers above; 0: the loss does not reach the router. Switch's loss is

        E sum_i f_i P_i     f_i: share of assignments, P_i: mean probability of expert i (arXiv:2101.03961, Eq. 4)

    Args:
        model: whose layers each run once.
        layers: its routed layers.
        batches: [B, S] token ids each, of one shape.

    Returns:
        Means over the batches; None without one.
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
