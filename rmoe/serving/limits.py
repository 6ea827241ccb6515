"""What a request may ask for, checked before any of it reaches the model; and how many may be at work at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Attributes:
    max_length: tokens of prompt and answer together.
    max_body_bytes: of a request.
    concurrent: requests that hold a slot; one is computed at a time, the others' answers are being sent or wait.
    waiting: further requests that may wait for a slot; beyond them the answer is 429.
    body_seconds: how long a request may take to arrive.
    """

    max_length: int
    max_body_bytes: int = 1 << 20
    concurrent: int = 4
    waiting: int = 64
    body_seconds: float = 30.0


class Refused(Exception):
    """A request that is not carried out; answered with `status` and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    def body(self) -> dict[str, Any]:
        """As OpenAI's API words errors."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": None}}


class Slots:
    """At most `concurrent` at work and `waiting` in line, first come first served."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.busy, self.in_line = 0, 0
        self._free = asyncio.Semaphore(limits.concurrent)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A slot, for as long as the context lasts.

        Raises:
            Refused: 429, too many are waiting.
        """
        if self._free.locked() and self.in_line >= self.limits.waiting:
            raise Refused(429, f"{self.busy} requests at work and {self.in_line} waiting: try again later")
        self.in_line += 1
        try:
            await self._free.acquire()
        finally:
            self.in_line -= 1
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self._free.release()


COMMON = {
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "frequency_penalty", "logit_bias", "user",
    "n",
}  # fmt: skip
FIELDS = {
    "completion": COMMON | {"prompt", "suffix", "echo"},
    "chat": COMMON | {"messages", "max_completion_tokens"},
}
DEFAULT_TOKENS = 256


def parse(raw: bytes, kind: str, model: str, vocab_size: int) -> dict[str, Any]:
    """A request's JSON as the handlers want it.

    Args:
        raw: the body.
        kind: "completion" or "chat".
        model: the only name this server answers to.
        vocab_size: token ids that a bias may name.

    Raises:
        Refused: not JSON, a field unknown, of the wrong type or out of range.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    unknown = sorted(body.keys() - FIELDS[kind])
    if unknown:
        raise Refused(400, f"unknown field {unknown[0][:80]!r}; known: {', '.join(sorted(FIELDS[kind]))}")
    body = {name: value for name, value in body.items() if value is not None}
    if body.setdefault("model", model) != model:
        raise Refused(404, f"this server has one model, {model!r}")
    _check_text(body, kind)
    _number(body, "temperature", 0, 100)
    _number(body, "top_p", 1e-6, 1)
    _number(body, "frequency_penalty", -0.99, 2)
    _integer(body, "seed", 0, 2**63 - 1)
    _integer(body, "n", 1, 1)
    for name in ("max_tokens", "max_completion_tokens"):
        _integer(body, name, 1, 2**31)
    for name in ("stream", "echo"):
        if not isinstance(body.get(name, False), bool):
            raise Refused(400, f"{name} must be true or false")
    if body.pop("echo", False):
        raise Refused(400, "echo is not offered")
    _check_stop(body)
    _check_bias(body, vocab_size)
    body.pop("n", None)
    body.pop("user", None)
    return body


def tokens_asked(body: dict[str, Any], prompt_tokens: int, limits: Limits) -> int:
    """How many tokens to generate at most.

    Raises:
        Refused: prompt and answer together are too long.
    """
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    room = limits.max_length - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = "" if asked is None else f" and max_tokens {asked}"
        raise Refused(
            400, f"prompt of {prompt_tokens} tokens{wanted}: over the limit of {limits.max_length} together"
        )
    return min(DEFAULT_TOKENS, room) if asked is None else int(asked)


def _check_text(body: dict[str, Any], kind: str) -> None:
    if kind == "completion":
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise Refused(400, "prompt must be a text that is not empty")
        if not isinstance(body.get("suffix", ""), str):
            raise Refused(400, "suffix must be a text")
        return
    messages = body.get("messages")
    fine = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and m.keys() <= {"role", "content", "name"} and isinstance(m.get("content"), str)
        and m.get("role") in ("system", "developer", "user", "assistant")
        for m in messages
    )  # fmt: skip
    if not fine:
        raise Refused(400, "messages must be a list of {role, content}, both texts")


def _number(body: dict[str, Any], name: str, low: float, high: float) -> None:
    value = body.get(name, low)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(400, f"{name} must be a number from {low:g} to {high:g}")


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> None:
    value = body.get(name, low)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(400, f"{name} must be an integer from {low} to {high}")


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(texts, list)
        or len(texts) > 4
        or not all(isinstance(t, str) and 0 < len(t) <= 100 for t in texts)
    ):
        raise Refused(400, "stop must be one to four texts of at most 100 characters")
    body.pop("stop", None)
    if texts:
        body["stop"] = texts


def _check_bias(body: dict[str, Any], vocab_size: int) -> None:
    bias = body.get("logit_bias", {})
    fine = isinstance(bias, dict) and len(bias) <= 300 and all(
        key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size
        and isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
        for key, value in bias.items()
    )  # fmt: skip
    if not fine:
        raise Refused(400, "logit_bias must map at most 300 token ids to numbers from -100 to 100")
    if not bias:
        body.pop("logit_bias", None)
