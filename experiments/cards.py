"""Make the package's probe results, `rmoe/probes/cards.json`, and the table of docs/probes.md.

`python -m experiments.cards RUN [PROBE,PROBE,...]` reads RUN/results.jsonl and writes both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rmoe.compare.probes import summarise
from rmoe.errors import RequestError
from rmoe.records import write_record
from rmoe.report.probes.cards import Cards, PackagedCard, Regret, shown
from rmoe.report.probes.table import HELP
from rmoe.results.probes import MEAN, Knobs, ProbeRow, Summary, read_rows

BEGIN, END = "<!-- table: python -m experiments.cards RUN -->", "<!-- end of table -->"


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
                        mean=round(score.mean, 6),
                        half=round((score.interval.high - score.interval.low) / 2, 6),
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


def markdown(cards: Cards) -> str:
    """The table of docs/probes.md, best router first."""
    columns = [MEAN, *cards.probes]
    lines = [
        f"{HELP} Mean ± half the 95% t interval over {cards.seeds} paired seeds; best mean first.",
        "",
        "| router | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| `{name}` | " + " | ".join(shown(card.regret[probe]) for probe in columns) + " |"
            for name, card in cards.routers.items()
        ),
    ]
    return "\n".join(lines)


def with_table(document: str, table: str) -> str:
    """A document with the table between its two marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(run: Path, probes: Sequence[str] = ()) -> None:
    rows, _ = read_rows(run / "results.jsonl")
    cards = cards_of(summarise(complete(rows, probes)))
    root = Path(__file__).parents[1]
    write_record(root / "rmoe" / "probes" / "cards.json", cards)
    docs = root / "docs" / "probes.md"
    docs.write_text(with_table(docs.read_text(encoding="utf-8"), markdown(cards)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(",") if len(sys.argv) > 2 else ())
