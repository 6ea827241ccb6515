"""What a request may ask for, checked before any of it reaches the model; and how many may be at work at once."""

from __future__ import annotations

import asyncio
import json
import operator
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Predicate
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from rmoe.data.tasks import ROLES, join_parts
from rmoe.errors import one_line


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


DEFAULT_TOKENS = 256
LEAST_TOP_P = 1e-6  # 0 means the likeliest token alone, which this is
LEAST_TEMPERATURE = 1e-6  # logits divided by much less are infinite


def _number(low: float, high: float) -> Any:
    said = f"be a number from {low:g} to {high:g}"
    return Field(None, ge=low, le=high, allow_inf_nan=False, description=said)


def _integer(low: int, high: int) -> Any:
    return Field(None, ge=low, le=high, description=f"be an integer from {low} to {high}")


def _neutral(description: str, **bounds: Any) -> Any:
    """A field of OpenAI's API that is accepted where it asks for nothing, and does not reach the handlers.

    Clients send many of them always. What they could ask for is not offered here.
    """
    return Field(None, exclude=True, description=description, **bounds)


def _known(token: str, info: Any) -> str:
    if int(token) >= info.context:
        raise ValueError("the vocabulary is smaller")
    return token


def _text(content: Any) -> Any:
    """The text of a message, from its parts if it has some."""
    if not isinstance(content, list):
        return content
    return join_parts(part.text for part in _PARTS.validate_python(content))


def _one(prompt: Any) -> Any:
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


# Not `Literal[False]`, which 0 is equal to.
No = Annotated[bool, Predicate(operator.not_)]
Empty = Annotated[Any, Predicate(operator.not_)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$"), AfterValidator(_known)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a message's content; images, sound and files are not offered."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


_PARTS = TypeAdapter(list[Part])


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Message(Strict):
    """One message as a training file's (`rmoe.data.tasks`): its role as templates have it, its content a text.

    A client sends back the answer it was given, with fields that are empty then.
    """

    role: Annotated[Literal["system", "developer", "user", "assistant"], AfterValidator(ROLES.get)]
    content: Annotated[str, BeforeValidator(_text)]
    name: Any = Field(None, exclude=True)
    refusal: Empty = Field(None, exclude=True)
    audio: Empty = Field(None, exclude=True)
    function_call: Empty = Field(None, exclude=True)
    tool_calls: Empty = Field(None, exclude=True)
    annotations: Empty = Field(None, exclude=True)
    reasoning_content: str | None = Field(None, exclude=True)  # templates leave out what was thought before


MESSAGES = (
    "be a list of {role, content}, the role system, developer, user or assistant, "
    "the content a text or parts of type text"
)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: No | None = None


class TextFormat(Strict):
    type: Literal["text"]


class Common(Strict):
    """The fields of both kinds of request; a description says what a field must be."""

    model: Any = None
    temperature: Annotated[float, AfterValidator(lambda t: t and max(t, LEAST_TEMPERATURE))] = _number(0, 100)
    top_p: Annotated[float, AfterValidator(lambda p: max(p, LEAST_TOP_P))] = _number(0, 1)
    frequency_penalty: float = _number(-2, 2)
    presence_penalty: float = _number(-2, 2)
    seed: int = _integer(0, 2**63 - 1)
    max_tokens: int = _integer(1, 2**31)
    stream: bool = Field(False, description="be true or false")
    stream_options: StreamOptions | None = Field(None, description="be {include_usage: true or false}")
    stop: Annotated[list[Stop], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = (
        Field([], max_length=4, description="be one to four texts of at most 100 characters")
    )
    logit_bias: dict[TokenId, Bias] = Field(
        {}, max_length=300, description="map at most 300 token ids to numbers from -100 to 100"
    )
    n: float = _neutral("be an integer from 1 to 1: more answers are not offered", ge=1, le=1)
    user: str = _neutral("be a text")
    metadata: dict[Any, Any] = _neutral("be an object")
    store: No = _neutral("be null or false")
    service_tier: Literal["auto", "default"] = _neutral('be null, "auto" or "default"')
    safety_identifier: str = _neutral("be a text")
    prompt_cache_key: str = _neutral("be a text")
    logprobs: No = _neutral("be null or false")


class Completion(Common):
    prompt: Annotated[str, BeforeValidator(_one)] = Field(
        min_length=1, description="be a text that is not empty, or a list of one"
    )
    echo: No = _neutral("be null or false")
    best_of: float = _neutral("be null or 1", ge=1, le=1)
    suffix: str = _neutral('be null or ""', max_length=0)


class Chat(Common):
    messages: list[Message] = Field(min_length=1, description=MESSAGES)
    max_completion_tokens: int = _integer(1, 2**31)
    tools: list[Any] = _neutral("be null or []", max_length=0)
    tool_choice: Literal["none", "auto"] = _neutral('be null, "none" or "auto"')
    functions: list[Any] = _neutral("be null or []", max_length=0)
    function_call: Literal["none", "auto"] = _neutral('be null, "none" or "auto"')
    parallel_tool_calls: bool = _neutral("be true or false")
    top_logprobs: float = _neutral("be null or 0", ge=0, le=0)
    response_format: TextFormat = _neutral('be null or {"type": "text"}')
    modalities: list[Literal["text"]] = _neutral('be null or ["text"]', min_length=1, max_length=1)
    reasoning_effort: Literal["none"] = _neutral('be null or "none"')
    verbosity: Literal["medium"] = _neutral('be null or "medium"')
    audio: None = _neutral("be null")
    prediction: None = _neutral("be null")
    web_search_options: None = _neutral("be null")


KINDS: dict[str, type[Common]] = {"completion": Completion, "chat": Chat}


def parse(raw: bytes, kind: str, model: str, vocab_size: int) -> dict[str, Any]:
    """A request's JSON as the handlers want it, without what asks for nothing (null, and see `_neutral`).

    Args:
        raw: the body.
        kind: "completion" or "chat".
        model: the only name this server answers to.
        vocab_size: token ids that a bias may name.

    Raises:
        Refused: not JSON, a field unknown, of the wrong type, out of range, or asking for what is not offered.
    """
    fields = KINDS[kind].model_fields
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    unknown = sorted(body.keys() - fields.keys())
    if unknown:
        known = ", ".join(sorted(fields))
        raise Refused(400, f"unknown field {unknown[0][:80]!r}; known: {known}", unknown[0])
    body = {name: value for name, value in body.items() if value is not None}
    if body.setdefault("model", model) != model:
        raise Refused(404, f"this server has one model, {model!r}", "model")
    try:
        read = KINDS[kind].model_validate(body, context=vocab_size)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, *within = map(str, first["loc"])
        given = "nothing" if first["type"] == "missing" else json.dumps(first["input"])
        where = "".join(
            f"[{part[:80]}]" for part in within if part != "[key]"
        )  # pydantic's mark of a bad key
        said = f"{name} must {fields[name].description}; {name}{where} is {given[:80]}"
        raise Refused(400, one_line(said), name) from None
    asked = read.model_dump(exclude_unset=True)
    return {name: value for name, value in asked.items() if value or name not in ("stop", "logit_bias")}


def tokens_asked(body: dict[str, Any], prompt_tokens: int, limits: Limits) -> int:
    """How many tokens to generate at most.

    Raises:
        Refused: there is no prompt, or prompt and answer together are too long.
    """
    prompt = "messages" if "messages" in body else "prompt"
    if prompt_tokens < 1:
        raise Refused(400, "this prompt has no tokens: its text is none of this model's", prompt)
    field = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    asked = body.get(field)
    room = limits.max_length - prompt_tokens
    if room < 1:
        said = f"prompt of {prompt_tokens} tokens: with an answer over the limit of {limits.max_length}"
        raise Refused(400, said, prompt)
    if asked is not None and asked > room:
        said = f"prompt of {prompt_tokens} tokens and {field} {asked}: over the limit of {limits.max_length} together"
        raise Refused(400, said, field)
    return min(DEFAULT_TOKENS, room) if asked is None else int(asked)
