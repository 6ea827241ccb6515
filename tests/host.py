"""A program that has an Accelerator and progress bars of its own, and calls this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from rmoe.compat import forget_accelerators, kept_accelerators


@contextmanager
def host_program() -> Iterator[None]:
    """What is called inside leaves the program its own settings."""
    forget_accelerators()
    with kept_accelerators():
        mine = Accelerator(cpu=True, mixed_precision="bf16")
        bars = is_progress_bar_enabled()
        enable_progress_bar()
        try:
            yield
            assert (mine.mixed_precision, is_progress_bar_enabled()) == ("bf16", True)
        finally:
            (enable_progress_bar if bars else disable_progress_bar)()
