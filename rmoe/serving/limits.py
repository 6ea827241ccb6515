"""What a request may ask for, checked before any of it reaches the model; and how many may be at work at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rmoe.data.tasks import ROLES, join_parts
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


def _number(low: float, high: float) -> Any:
    return Field(None, ge=low, le=high, allow_inf_nan=False, description=f"a number from {low:g} to {high:g}")


def _integer(low: int, high: int) -> Any:
    return Field(None, ge=low, le=high, description=f"an integer from {low} to {high}")


Stop = Annotated[str, Field(min_length=1, max_length=100)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(BaseModel):
    """The fields of both kinds of request; a description says what a field must be."""

    model_config = ConfigDict(strict=True)

    model: Any = None
    temperature: float | None = _number(0, 100)
    top_p: float | None = _number(0, 1)
    frequency_penalty: float | None = _number(-2, 2)
    presence_penalty: float | None = _number(-2, 2)
    seed: int | None = _integer(0, 2**63 - 1)
    max_tokens: int | None = _integer(1, 2**31)
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="{include_usage: true or false}")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="one to four texts of at most 100 characters"
    )
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=300)] | None = None


class Completion(Common):
    prompt: str = Field(min_length=1, description="a text that is not empty, or a list of one")


class Chat(Common):
    messages: list[Any] = Field(min_length=1, description="a list of {role, content}, both texts")
    max_completion_tokens: int | None = _integer(1, 2**31)


KINDS: dict[str, type[Common]] = {"completion": Completion, "chat": Chat}
FIELDS = {kind: fields.model_fields.keys() | NEUTRAL[kind].keys() for kind, fields in KINDS.items()}
DEFAULT_TOKENS = 256
LEAST_TOP_P = 1e-6  # 0 means the likeliest token alone, which this is
LEAST_TEMPERATURE = 1e-6  # logits divided by much less are infinite


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
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        body["prompt"] = prompt[0]
    _check(body, kind, vocab_size)
    if kind == "chat":
        body["messages"] = [_message(message, f"messages[{i}]") for i, message in enumerate(body["messages"])]
    if "top_p" in body:
        body["top_p"] = max(body["top_p"], LEAST_TOP_P)
    if body.get("temperature", 0) > 0:
        body["temperature"] = max(body["temperature"], LEAST_TEMPERATURE)
    if isinstance(body.get("stop"), str):
        body["stop"] = [body["stop"]]
    return {name: value for name, value in body.items() if value or name not in ("stop", "logit_bias")}


def _check(body: dict[str, Any], kind: str, vocab_size: int) -> None:
    """Refuse the first field that is not what its description says."""
    fields = KINDS[kind].model_fields
    try:
        read = KINDS[kind].model_validate(body)
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_input=False)[0]["loc"][0])
    else:
        if read.stream_options is not None and read.stream_options.include_obfuscation:
            raise Refused(400, "stream_options.include_obfuscation is not offered", "stream_options")
        if all(int(token) < vocab_size for token in read.logit_bias or ()):
            return
        name = "logit_bias"
    if name == "logit_bias":
        said = "logit_bias must map at most 300 token ids to numbers from -100 to 100"
        raise Refused(400, said, name)
    raise Refused(400, f"{name} must be {fields[name].description}", name)


def tokens_asked(body: dict[str, Any], prompt_tokens: int, limits: Limits) -> int:
    """How many tokens to generate at most.

    Raises:
        Refused: prompt and answer together are too long.
    """
    field = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    asked = body.get(field)
    room = limits.max_length - prompt_tokens
    if room < 1:
        said = f"prompt of {prompt_tokens} tokens: with an answer over the limit of {limits.max_length}"
        raise Refused(400, said, "messages" if "messages" in body else "prompt")
    if asked is not None and asked > room:
        said = f"prompt of {prompt_tokens} tokens and {field} {asked}: over the limit of {limits.max_length} together"
        raise Refused(400, said, field)
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


def _message(message: Any, where: str) -> dict[str, str]:
    """One message as a training file's (`rmoe.data.tasks`): its role as templates have it, its content a text."""

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
        content = join_parts(part["text"] for part in content)
    if not isinstance(content, str):
        raise refuse(".content is no text")
    return {"role": ROLES[message["role"]], "content": content}
