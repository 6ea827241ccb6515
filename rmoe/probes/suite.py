"""The probes: each a Markov chain over layers and a paragraph on what it asks of a router.

`E` classes, `L` layers. To add one: subclass `Probe`, give it a `name`, a docstring and a `chain`; everything else
(generator, oracles, training, measures, card) follows from the chain. It has to ask something that no probe here asks.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.probes.chain import Chain
from rmoe.results.probes import Knobs

PROBES: dict[str, type[Probe]] = {}


class Probe:
    """A task with a known optimum.

    Attributes:
        name: as `--probes` takes it.
        noise: standard deviation of the noise on every cue, unless the knob `noise` says otherwise.
        asks: what solves it, in one line.
    """

    name: ClassVar[str]
    asks: ClassVar[str]
    noise: ClassVar[float] = 0.3

    def __init_subclass__(cls) -> None:
        PROBES[cls.name] = cls

    def __init__(self, knobs: Knobs) -> None:
        self.classes, self.layers = knobs.experts, knobs.layers
        self.sigma = self.noise if knobs.noise is None else knobs.noise

    def chain(self) -> Chain:
        """The hidden world. This one: one class for all layers, shown in each."""
        return self._one_class(torch.arange(self.classes).expand(self.layers, -1))

    def _one_class(self, shown: Tensor, start: Tensor | None = None) -> Chain:
        """A class drawn once, uniformly or from `start`, that stays."""
        stay = torch.eye(self.classes, dtype=torch.float64)
        return Chain(
            start=self._uniform() if start is None else start,
            step=stay.expand(self.layers - 1, -1, -1),
            shown=shown,
            label=torch.arange(self.classes),
            classes=self.classes,
        )

    def _uniform(self, states: int | None = None) -> Tensor:
        count = states or self.classes
        return torch.full((count,), 1 / count, dtype=torch.float64)


class Lookup(Probe):
    """Every layer shows the class clearly. A router that reads its input and learns solves it without memory; a frozen
    one cannot. The positive control: a router that fails here fails at routing itself.
    """

    name, asks = "lookup", "any learned router; a frozen one cannot"


class Carry(Probe):
    """Layer 0 shows the class clearly, the layers above show noise alone. Only a router that passes something up the
    layers, and whose state survives layers that add nothing, can know the class there.
    """

    name, asks = "carry", "memory across layers"

    def chain(self) -> Chain:
        shown = torch.full((self.layers, self.classes), self.classes)
        shown[0] = torch.arange(self.classes)
        return self._one_class(shown)


class Integrate(Probe):
    """Every layer shows the class, each time behind so much noise that one look is often wrong. The best answer adds up
    the evidence of all layers so far, so the state has to be a running sum, not the last thing seen.
    """

    name, asks, noise = "integrate", "adding up weak evidence over layers", 1.5


class Overwrite(Probe):
    """A new class is announced in layer 0 and in each later layer with probability 0.35; the rest show noise alone. The
    last one announced counts. A state that only keeps, or only adds, is wrong after the second announcement.
    """

    name, asks = "overwrite", "keeping and forgetting"
    announced: ClassVar[float] = 0.35

    def chain(self) -> Chain:
        n = self.classes
        # States: class c as it was, then class c just announced.
        keep, new = torch.eye(n, dtype=torch.float64) * (1 - self.announced), self._uniform() * self.announced
        row = torch.cat((keep, new.expand(n, -1)), -1)
        return Chain(
            start=torch.cat((torch.zeros(n, dtype=torch.float64), self._uniform())),
            step=row.repeat(2, 1).expand(self.layers - 1, -1, -1),
            shown=torch.cat((torch.full((n,), n), torch.arange(n))).expand(self.layers, -1),
            label=torch.arange(n).repeat(2),
            classes=n,
        )


class Compose(Probe):
    """Every layer shows a number g clearly; the class is the sum of all numbers so far, modulo E. Nothing that adds up
    evidence helps: the state has to be a counter on a ring, as in the word problem of a cyclic group.
    """

    name, asks = "compose", "state tracking: a nonlinear or rotating state"

    def chain(self) -> Chain:
        n = self.classes
        total, number = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)  # z = (sum, g)
        adds = (total[:, None] + number) % n == total  # from a sum, by a number, to a sum
        return Chain(
            start=(total == number).double() / n,
            step=(adds.double() / n).expand(self.layers - 1, -1, -1),
            shown=number.expand(self.layers, -1),
            label=total,
            classes=n,
        )


class Zipf(Probe):
    """As lookup, but class n has probability proportional to 1 / (n + 1). The world is not balanced: what a balance
    loss or a selection bias costs shows here.
    """

    name, asks = "zipf", "routing an unbalanced world in spite of the balance loss"

    def chain(self) -> Chain:
        rank = torch.arange(1, self.classes + 1, dtype=torch.float64)
        shown = torch.arange(self.classes).expand(self.layers, -1)
        return self._one_class(shown, rank.reciprocal() / rank.reciprocal().sum())


class Late(Probe):
    """Noise alone up to a random layer, the class in that layer and all above it. Before, the best router hedges;
    after, it commits, in whichever layer that happens.
    """

    name, asks = "late", "exploring first, committing later"

    def chain(self) -> Chain:
        n, start = self.classes, self._uniform()
        stay = torch.eye(n, dtype=torch.float64)
        # States: class c not yet shown, then class c shown. The first layer that shows it is uniform over layers.
        step = torch.zeros(self.layers - 1, 2 * n, 2 * n, dtype=torch.float64)
        for layer in range(1, self.layers):
            begins = 1 / (self.layers - layer)
            step[layer - 1] = torch.cat(
                (torch.cat((stay * (1 - begins), stay * begins), -1), torch.cat((0 * stay, stay), -1))
            )
        return Chain(
            start=torch.cat((start * (1 - 1 / self.layers), start / self.layers)),
            step=step,
            shown=torch.cat((torch.full((n,), n), torch.arange(n))).expand(self.layers, -1),
            label=torch.arange(n).repeat(2),
            classes=n,
        )


class Decoy(Probe):
    """As lookup, but every layer has a class of its own, never that of the layer below. What was seen below is the
    wrong answer here: the negative control for recurrent routers.
    """

    name, asks = "decoy", "ignoring memory when it misleads"

    def chain(self) -> Chain:
        n = self.classes
        other = (1 - torch.eye(n, dtype=torch.float64)) / (n - 1)
        lookup = self._one_class(torch.arange(n).expand(self.layers, -1))
        return lookup._replace(step=other.expand(self.layers - 1, -1, -1))


def named_probes(asked: tuple[str, ...]) -> tuple[str, ...]:
    """Probe names without repetition, in the suite's order; `all` is every one.

    Raises:
        RequestError: no such probe, or none at all.
    """
    wanted = set(PROBES) if "all" in asked else set(asked)
    for name in asked:
        if name != "all" and name not in PROBES:
            raise RequestError("--probes", name, f"all, or names among {', '.join(PROBES)}")
    if not wanted:
        raise RequestError("--probes", "", f"all, or names among {', '.join(PROBES)}")
    return tuple(name for name in PROBES if name in wanted)
