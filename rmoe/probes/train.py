"""Training routers on worlds: every (probe, seed) of a router at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.probes.stack import Ensemble
from rmoe.probes.world import World, batches
from rmoe.results.probes import Knobs, Reference
from rmoe.routing.initial import keyed_generator

POINTS = 20  # of the learning curve, denser at its start
SHARES = 4  # every so many points the recurrent share is measured too
SHARE_TOKENS = 256


class Curve(NamedTuple):
    """Attributes:
    step: optimizer steps done at each of N points.
    regret: `[N, S]`.
    recurrent_share: `[N, S]`; None where the router has no state.
    """

    step: list[int]
    regret: Tensor
    recurrent_share: Tensor | None


def regret(loss: Tensor, reference: Reference) -> Tensor:
    """`(loss - oracle) / (blind - oracle)` of the means over layers: 0 is optimal, 1 knows nothing. `[L]` -> scalar."""
    oracle, blind = (sum(line) / len(line) for line in (reference.oracle, reference.blind))
    return (loss.double().mean() - oracle) / (blind - oracle)


def regret_by_layer(loss: Tensor, reference: Reference) -> Tensor:
    """`(loss - oracle) / (blind - oracle)` layer by layer, `[L]`."""
    oracle, blind = (torch.tensor(line, dtype=torch.float64) for line in (reference.oracle, reference.blind))
    return (loss.double() - oracle) / (blind - oracle)


def train(ensembles: list[Ensemble], worlds: list[World], knobs: Knobs) -> list[Curve]:
    """Train several routers on the same batches, by Adam, the learning rate falling to zero by a cosine.

    Drawing tokens takes as long as training a linear router on them, so routers share it; they share nothing else.
    """
    held = torch.stack([w.curve.inputs for w in worlds]), torch.stack([w.curve.targets for w in worlds])
    points = sorted({max(1, round(knobs.steps * (i / POINTS) ** 1.5)) for i in range(1, POINTS + 1)})
    measured: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in ensembles]
    for step, (inputs, targets) in enumerate(batches(worlds, knobs.steps, knobs.tokens), start=1):
        rate = knobs.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / knobs.steps))
        noise = _noise_keys(worlds, step)
        for ensemble, found in zip(ensembles, measured, strict=True):
            _step(ensemble, inputs, targets, noise, step, rate)
            if step in points:
                losses = ensemble.evaluate(*held)
                regrets = [regret(a, w.curve_reference) for a, w in zip(losses, worlds, strict=True)]
                wanted = points.index(step) % SHARES == SHARES - 1
                share = (
                    recurrent_share(ensemble, *(part[:, :, :SHARE_TOKENS] for part in held))
                    if wanted
                    else None
                )
                found.append((torch.stack(regrets), share))
    return [_curve(points, found) for found in measured]


def _step(ensemble: Ensemble, inputs: Tensor, targets: Tensor, noise: Tensor, step: int, rate: float) -> None:
    for group in ensemble.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    routed = ensemble.route(inputs, noise)
    losses = ensemble.loss(routed, inputs, targets).mean(-1) + routed.balance
    ensemble.optimizer.zero_grad(set_to_none=True)
    losses.sum().backward()  # seeds share no parameter: each gets its own gradient
    ensemble.optimizer.step()
    ensemble.update(routed, step)


def _curve(points: list[int], found: list[tuple[Tensor, Tensor | None]]) -> Curve:
    shares = [share for _, share in found if share is not None]
    return Curve(points, torch.stack([r for r, _ in found]), torch.stack(shares) if shares else None)


def _noise_keys(worlds: list[World], step: int) -> Tensor:
    """One key of routing noise per seed and step."""
    streams = (keyed_generator(w.seed, f"{w.probe}/noise/{step}") for w in worlds)
    return torch.stack([torch.randint(2**62, (), generator=stream) for stream in streams])


def recurrent_share(ensemble: Ensemble, inputs: Tensor, targets: Tensor) -> Tensor | None:
    """`|g - g_cut| / |g|` per seed: the part of the routers' task gradient that comes down through the state.

    `g_cut` is the gradient with the state detached between layers. None where there is no gradient or no state.
    """
    parameters = list(ensemble.parameters.values())
    if not parameters:
        return None
    gradients = []
    for cut in (False, True):
        routed = ensemble.route(inputs, cut=cut, measured=True)
        if not routed.states.shape[-1]:
            return None
        loss = ensemble.loss(routed, inputs, targets).mean(-1).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        filled = (torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))
        gradients.append(torch.cat([g.reshape(len(g), -1) for g in filled], 1))
    whole, cut_only = gradients
    return (whole - cut_only).norm(dim=1) / whole.norm(dim=1).clamp(min=torch.finfo(whole.dtype).tiny)
