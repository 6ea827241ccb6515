"""What a request may ask for, checked before any of it reaches the model; and how many may be at work at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rmoe.serving.neutral import MESSAGE_EXTRAS, NEUTRAL


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


CODES = {404: "model_not_found", 429: "rate_limit_exceeded"}


class Refused(Exception):
    """A request that is not carried out; answered with `status` and one sentence, naming the field `param`."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param = param if param is None or param[:80].isprintable() else None

    def body(self) -> dict[str, Any]:
        """As OpenAI's API words errors."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        code = CODES.get(self.status)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}


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
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "frequency_penalty",
    "presence_penalty", "logit_bias",
}  # fmt: skip
FIELDS = {
    "completion": COMMON | {"prompt", "suffix"} | NEUTRAL["completion"].keys(),
    "chat": COMMON | {"messages", "max_completion_tokens"} | NEUTRAL["chat"].keys(),
}
DEFAULT_TOKENS = 256
LEAST_TOP_P = 1e-6  # 0 means the likeliest token alone, which this is


def parse(raw: bytes, kind: str, model: str, vocab_size: int) -> dict[str, Any]:
    """A request's JSON as the handlers want it, without what asks for nothing (null, and see `rmoe.serving.neutral`).

    Args:
        raw: the body.
        kind: "completion" or "chat".
        model: the only name this server answers to.
        vocab_size: token ids that a bias may name.

    Raises:
        Refused: not JSON, a field unknown, of the wrong type, out of range, or asking for what is not offered.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    unknown = sorted(body.keys() - FIELDS[kind])
    if unknown:
        known = ", ".join(sorted(FIELDS[kind]))
        raise Refused(400, f"unknown field {unknown[0][:80]!r}; known: {known}", unknown[0])
    body = {name: value for name, value in body.items() if value is not None}
    if body.setdefault("model", model) != model:
        raise Refused(404, f"this server has one model, {model!r}", "model")
    _drop_neutral(body, kind)
    _check_text(body, kind)
    _number(body, "temperature", 0, 100)
    _number(body, "top_p", 0, 1)
    if "top_p" in body:
        body["top_p"] = max(body["top_p"], LEAST_TOP_P)
    for name in ("frequency_penalty", "presence_penalty"):
        _number(body, name, -2, 2)
    _integer(body, "seed", 0, 2**63 - 1)
    for name in ("max_tokens", "max_completion_tokens"):
        _integer(body, name, 1, 2**31)
    if not isinstance(body.get("stream", False), bool):
        raise Refused(400, "stream must be true or false", "stream")
    _check_stream_options(body)
    _check_stop(body)
    _check_bias(body, vocab_size)
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
            400,
            f"prompt of {prompt_tokens} tokens{wanted}: over the limit of {limits.max_length} together",
            "prompt" if asked is None else "max_tokens",
        )
    return min(DEFAULT_TOKENS, room) if asked is None else int(asked)


def _drop_neutral(body: dict[str, Any], kind: str) -> None:
    for name, neutral in NEUTRAL[kind].items():
        if name not in body:
            continue
        value = body.pop(name)
        if not neutral.holds(value):
            if name == "n":
                raise Refused(400, "n must be an integer from 1 to 1: more answers are not offered", name)
            if name == "echo":
                raise Refused(400, "echo is not offered: it must be false", name)
            given = json.dumps(value)[:80]
            raise Refused(400, f"{name} is {given}, which is not offered; allowed: {neutral.allowed}", name)


def _check_stream_options(body: dict[str, Any]) -> None:
    options = body.get("stream_options", {})
    known = isinstance(options, dict) and options.keys() <= {"include_usage", "include_obfuscation"}
    if not known or not all(value is None or isinstance(value, bool) for value in options.values()):
        raise Refused(400, "stream_options must be {include_usage: true or false}", "stream_options")
    if options.get("include_obfuscation"):
        raise Refused(400, "stream_options.include_obfuscation is not offered", "stream_options")


def _check_text(body: dict[str, Any], kind: str) -> None:
    if kind == "chat":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages must be a list of {role, content}, both texts", "messages")
        body["messages"] = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        return
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = body["prompt"] = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "prompt must be a text that is not empty, or a list of one", "prompt")
    if not isinstance(body.get("suffix", ""), str):
        raise Refused(400, "suffix must be a text", "suffix")


def _message(message: Any, where: str) -> dict[str, str]:
    """One message with its content as a text; several parts of text are lines of it."""

    def refuse(said: str) -> Refused:
        return Refused(
            400, f"messages must be a list of {{role, content}}, both texts: {where}{said}", "messages"
        )

    if not isinstance(message, dict):
        raise refuse(" is no object")
    for name, value in message.items():
        if name not in ("role", "content", "name") and (name not in MESSAGE_EXTRAS or value):
            raise refuse(f" has {name[:80]!r}, which is not offered")
    if message.get("role") not in ("system", "developer", "user", "assistant"):
        raise refuse(
            f".role is {json.dumps(message.get('role'))[:80]}, not system, developer, user or assistant"
        )
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise refuse(
                    f".content[{number}] is no {{type: text, text}}; images, sound and files are not offered"
                )
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise refuse(".content is no text")
    return {"role": message["role"], "content": content}


def _number(body: dict[str, Any], name: str, low: float, high: float) -> None:
    value = body.get(name, low)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(400, f"{name} must be a number from {low:g} to {high:g}", name)


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> None:
    value = body.get(name, low)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(400, f"{name} must be an integer from {low} to {high}", name)


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(texts, list)
        or len(texts) > 4
        or not all(isinstance(t, str) and 0 < len(t) <= 100 for t in texts)
    ):
        raise Refused(400, "stop must be one to four texts of at most 100 characters", "stop")
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
        said = "logit_bias must map at most 300 token ids to numbers from -100 to 100"
        raise Refused(400, said, "logit_bias")
    if not bias:
        body.pop("logit_bias", None)
