"""Several forward passes of one model that stop at every layer, so that each layer runs for all of them at once.

Each forward pass is the model's own, in a thread of its own: masks, rotary embeddings and whatever travels from layer
to layer are what the model makes them. Only one thread runs at any time. A layer's work is done by the main thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class _Finished(BaseException):
    """Ends a forward pass that has nothing left to show."""


class Walker(threading.Thread):
    """One forward pass.

    Attributes:
        unit: path of the layer it has arrived at; forward, args, kwargs: that layer's call.
        arrived: how many layers it has arrived at.
        done: it is over.
    """

    def __init__(self, work: Callable[[], object], passed: list[Callable[[], Any]]) -> None:
        """`work` is the forward pass; the first `len(passed)` layers are not run but give what these return."""
        super().__init__(daemon=True)
        self._work, self._passed = work, passed
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        self._answer: Any = None
        self.unit = ""
        self.forward: Callable[..., Any] | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.arrived = 0
        self.done = False

    def run(self) -> None:
        """The thread."""
        self._go.acquire()
        try:
            with torch.no_grad():
                if not self._stopping:
                    self._work()
        except _Finished:
            pass
        except BaseException as error:
            self._error = error
        self.done = True
        self._there.release()

    def resume(self, answer: Any = None) -> None:
        """Give the layer's result, and wait until the pass has arrived at its next layer or is over."""
        self.args, self.kwargs, self.forward = (), {}, None
        self._answer = answer
        self._go.release()
        self._there.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread."""
        if self.is_alive():
            self._stopping = True
            self._go.release()
            self.join()

    def arrive(
        self, unit: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Called in the thread in place of a layer."""
        self.arrived += 1
        if self.arrived <= len(self._passed):
            return self._passed[self.arrived - 1]()
        self.unit, self.forward, self.args, self.kwargs = unit, forward, args, kwargs
        del args, kwargs, forward
        self._there.release()
        self._go.acquire()
        if self._stopping:
            raise _Finished
        answer, self._answer = self._answer, None
        return answer


def at_unit(unit: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer does instead of running: its forward pass waits."""
    walker = threading.current_thread()
    if not isinstance(walker, Walker):
        raise RuntimeError(f"{unit} was called outside a streamed forward pass")
    return walker.arrive(unit, forward, args, kwargs)


def at_head(*args: Any, **kwargs: Any) -> Any:
    """What the head does instead of running: the forward pass is over."""
    raise _Finished
