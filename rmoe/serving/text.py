"""What of a generated text is sent: it ends before a stop string, whole or in parts."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

BYTES_OF_CHARACTER = 4

_ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of a byte-fallback vocabulary."""


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string, as OpenAI sends it; `generate` leaves that string in.

    >>> before_stop("one two three", ["three", "two"])
    'one '
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class StopText:
    """As `before_stop`, for a text that comes in parts: what may be the beginning of a stop string is held back.

    >>> parts = StopText(["END"])
    >>> [parts.feed(part) for part in ("a E", "NT b EN", "D c")], parts.rest()
    (['a ', 'ENT b ', ''], '')
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self._held = ""
        self._ended = False

    def feed(self, text: str) -> str:
        """The part that can be sent now."""
        self._held += text
        ready = before_stop(self._held, self.stops)
        if self._ended or len(ready) < len(self._held):
            ready = "" if self._ended else ready
            self._ended, self._held = True, ""
            return ready
        kept = max(
            (n for stop in self.stops for n in range(1, len(stop)) if ready.endswith(stop[:n])), default=0
        )
        ready, self._held = ready[: len(ready) - kept], ready[len(ready) - kept :]
        return ready

    def rest(self) -> str:
        """What was held back when the text has ended."""
        return self._held


class TokenText:
    """Text of tokens that come one by one: the parts, joined, are what all tokens together decode to.

    What a later token can still change is held back: the beginning of a character, and a run of byte-fallback tokens,
    which is decoded as a whole (`<0xC3><0xA9>` is one character, with `<0xFF>` behind them three unknown ones).
    tokenizers' own `DecodeStream` raises on such a run if it is no text.

    Args:
        tokenizer: of transformers.
        skip_special_tokens: as its `decode`.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._ids: list[int] = []  # from a token before those held back on: it says how their text begins
        self._sent = 0  # of them

    def step(self, _backend: Any, token: int) -> str | None:
        """The text that is certain now; the signature is `DecodeStream.step`'s."""
        if token in self._skipped:
            return None
        self._ids.append(token)
        if _ONE_BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            return None
        before, now = self._decode(self._ids[: self._sent]), self._decode(self._ids)
        if now.endswith("\ufffd") or not now.startswith(before):
            return None
        if len(now) > len(before):
            self._ids = self._ids[self._sent :]
            self._sent = len(self._ids)
        return now[len(before) :] or None

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text


class Until(StoppingCriteria):
    """Ends an answer when nobody waits for it, or when a stop string is in it; the prompt's text does not count.

    Args:
        gone: set when nobody waits any more.
        tokenizer: of the model.
        stops: the stop strings.
        prompt: tokens of the prompt.
    """

    def __init__(self, gone: threading.Event, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self.gone, self.tokenizer, self.stops, self.prompt = gone, tokenizer, stops, prompt
        # The last tokens that can hold a stop string and the character before it: a token is a byte or more.
        self._tail = BYTES_OF_CHARACTER * (max(map(len, stops), default=0) + 2)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each answer `[B]` has ended, for the ids `[B, S]` so far."""
        tails = input_ids[:, self.prompt :][:, -self._tail :]
        ended = [self.gone.is_set() or self._stops_in(tail) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)

    def _stops_in(self, ids: Tensor) -> bool:
        if not self.stops:
            return False
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return before_stop(text, self.stops) != text


class Penalties(LogitsProcessor):
    """OpenAI's penalties: a token generated c times loses `frequency * c`, and `presence` if c > 0, of its logit.

    Args:
        frequency, presence: see above.
        prompt: tokens of the prompt, which do not count.
    """

    def __init__(self, frequency: float, presence: float, prompt: int) -> None:
        self.frequency, self.presence, self.prompt = frequency, presence, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` after the penalty, for the ids `[B, S]` so far."""
        generated = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(
            1, generated, torch.ones_like(generated, dtype=scores.dtype)
        )
        return scores - self.frequency * counts - self.presence * (counts > 0).to(scores.dtype)
