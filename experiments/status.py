"""How a command of this folder ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rmoe.errors import RequestError, RunError


def exit_status(work: Callable[[], None]) -> int:
    """Do `work`: 0; 2 after one line about a wrong request, 1 after one about a failed run."""
    try:
        work()
    except (RequestError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0
