"""The zoo's probe results as the package carries them: one small file, and the table of docs/probes.md made from it.

`python -m rmoe.report.probes.cards RUN [PROBE,PROBE,...]` reads RUN/results.jsonl and writes both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

from rmoe.errors import RequestError
from rmoe.probes.results import Knobs, ProbeRow, read_rows
from rmoe.records import Record, write_record
from rmoe.report.probes.summary import MEAN, Summary, summarise
from rmoe.report.probes.table import HELP

CARDS_VERSION = 1
BEGIN, END = "<!-- table: python -m rmoe.report.probes.cards RUN -->", "<!-- end of table -->"


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


def complete(rows: list[ProbeRow], probes: Sequence[str] = ()) -> list[ProbeRow]:
    """Rows at the default knobs of the routers that have every probe and seed there is; others are still running.

    Args:
        probes: these only; empty is all.
    """
    mine = [row for row in rows if row.knobs == Knobs() and (not probes or row.probe in probes)]
    wanted = {(row.probe, row.seed) for row in mine}
    found: dict[str, set[tuple[str, int]]] = {}
    for row in mine:
        found.setdefault(row.router, set()).add((row.probe, row.seed))
    return [row for row in mine if found[row.router] == wanted]


def cards_of(summary: Summary) -> Cards:
    seeds = len(summary.cards[0].scores[MEAN].seeds)
    if seeds < 2:
        raise RequestError("results", f"{seeds} seed", "2 or more seeds")
    return Cards(
        knobs=summary.knobs,
        seeds=seeds,
        probes=summary.probes,
        routers={
            card.router: PackagedCard(
                regret={
                    probe: Regret(
                        mean=round(score.mean, 4),
                        half=round((score.interval.high - score.interval.low) / 2, 4),
                    )
                    for probe, score in card.scores.items()
                    if score.interval is not None
                },
                decodability={
                    probe: round(sum(held) / len(held), 3)
                    for probe, detail in card.details.items()
                    if (held := detail.by_layer.get("decodability"))
                },
                recurrent_share={
                    probe: round(detail.recurrent_share, 3)
                    for probe, detail in card.details.items()
                    if detail.recurrent_share is not None
                },
                parameters=card.parameters,
                seconds=round(card.seconds, 2),
            )
            for card in summary.cards
        },
    )


def packaged() -> Cards | None:
    """The cards this package carries; None where it carries none."""
    file = files("rmoe.probes") / "cards.json"
    return msgspec.json.decode(file.read_bytes(), type=Cards) if file.is_file() else None


def _shown(regret: Regret) -> str:
    return f"{regret.mean:.3f} ± {regret.half:.3f}".replace("-", "−")


def markdown(cards: Cards) -> str:
    """The table of docs/probes.md, best router first."""
    columns = [*cards.probes, MEAN]
    lines = [
        f"{HELP} Mean ± half the 95% t interval over {cards.seeds} paired seeds; best mean first.",
        "",
        "| router | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| `{name}` | " + " | ".join(_shown(card.regret[probe]) for probe in columns) + " |"
            for name, card in cards.routers.items()
        ),
    ]
    return "\n".join(lines)


def text(cards: Cards, name: str) -> str | None:
    """A router's card for a terminal; None if the package has none of it."""
    card = cards.routers.get(name)
    if card is None:
        return None
    order = list(cards.routers)
    lines = [
        f"{'probe':<10} {'regret':>15} {'state holds class':>18} {'recurrent gradient':>19}",
        *(
            f"{probe:<10} {_shown(card.regret[probe]):>15} {_share(card.decodability.get(probe)):>18} "
            f"{_share(card.recurrent_share.get(probe)):>19}"
            for probe in [*cards.probes, MEAN]
        ),
        f"rank {order.index(name) + 1} of {len(order)} by mean regret, {cards.seeds} seeds. {HELP}",
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def with_table(document: str, table: str) -> str:
    """A document with the table between its two marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(run: Path, probes: Sequence[str] = ()) -> None:
    rows, _ = read_rows(run / "results.jsonl")
    cards = cards_of(summarise(complete(rows, probes)))
    root = Path(__file__).parents[3]
    write_record(root / "rmoe" / "probes" / "cards.json", cards)
    docs = root / "docs" / "probes.md"
    docs.write_text(with_table(docs.read_text(encoding="utf-8"), markdown(cards)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(",") if len(sys.argv) > 2 else ())
