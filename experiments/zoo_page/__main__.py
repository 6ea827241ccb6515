"""`python -m experiments.zoo_page` writes the table of `rmoe zoo` and the page docs/zoo.md; a test compares both."""

from __future__ import annotations

import json

from experiments.zoo_page.page import PAGE, markdown
from experiments.zoo_page.table import measured
from rmoe.cli.zoo import TABLE
from rmoe.records import atomic_write


def main() -> None:
    table = measured()
    for file, text in ((TABLE, json.dumps(table, indent=1)), (PAGE, markdown(table))):
        with atomic_write(file) as staged:
            staged.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
