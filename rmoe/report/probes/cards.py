"""The zoo's probe results as the package carries them: one small file, made by `python -m experiments.cards`."""

from __future__ import annotations

from importlib.resources import files

import msgspec

from rmoe.records import Record
from rmoe.report.probes.table import HELP
from rmoe.results.probes import MEAN, Knobs

CARDS_VERSION = 1


class Regret(Record, frozen=True, kw_only=True):
    """Mean over seeds and half the 95% t interval."""

    mean: float
    half: float


class PackagedCard(Record, frozen=True, kw_only=True):
    """One router. By probe: regret (also of the mean over probes), and what its state holds, mean over layers."""

    regret: dict[str, Regret]
    decodability: dict[str, float]
    recurrent_share: dict[str, float]
    parameters: int
    seconds: float  # per (probe, seed)


class Cards(Record, frozen=True, kw_only=True):
    """Routers in the order of their mean regret."""

    schema_version: int = CARDS_VERSION
    knobs: Knobs
    seeds: int
    probes: list[str]
    routers: dict[str, PackagedCard]


def packaged() -> Cards | None:
    """The cards this package carries; None where it carries none."""
    file = files("rmoe.probes") / "cards.json"
    return msgspec.json.decode(file.read_bytes(), type=Cards) if file.is_file() else None


def shown(regret: Regret) -> str:
    """`0.123 ± 0.004`, with a sign of minus where it is below 0."""
    return f"{regret.mean:.3f} ± {regret.half:.3f}".replace("-", "−")


def text(cards: Cards, name: str) -> str | None:
    """A router's card for a terminal; None if the package has none of it."""
    card = cards.routers.get(name)
    if card is None:
        return None
    order = list(cards.routers)
    lines = [
        f"{'probe':<10} {'regret':>15} {'state holds class':>18} {'recurrent gradient':>19}",
        *(
            f"{probe:<10} {shown(card.regret[probe]):>15} {_share(card.decodability.get(probe)):>18} "
            f"{_share(card.recurrent_share.get(probe)):>19}"
            for probe in [MEAN, *cards.probes]
        ),
        f"rank {order.index(name) + 1} of {len(order)} by mean regret, {cards.seeds} seeds. {HELP}",
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
