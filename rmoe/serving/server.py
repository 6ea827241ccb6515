"""transformers' OpenAI handlers behind our limits: one model, four routes, loopback unless told otherwise.

transformers' own server also loads any model a client names, unloads them, and takes any generation setting; and it
looks classes up inside transformers, where ours are not. Here the model is loaded once, by `rmoe.load`, strictly and
from safetensors only, and handed to the handlers as loaded.

The handlers always stream: an answer that is asked for whole is put together from the same parts.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, NamedTuple

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    get_response_template,
)

from rmoe.compat import decode_by, stream_error
from rmoe.errors import one_line
from rmoe.serving.limits import Limits, Refused, Slots, parse, tokens_asked
from rmoe.serving.text import Penalties, StopText, TokenText, Until, before_stop

POLL_SECONDS = 0.1
OWN = "rmoe_own"
FAILED = "the server could not carry this out"


class _Answer(asyncio.Queue[Any]):
    """What a streamer sends, as a client is to get it.

    An answer that ends in the middle of a character is sent as the whole answer shows it; and it ends before a stop
    string, which transformers' sends.

    Args:
        tokenizer: with which the whole answer is decoded.
        config: of the generation.
        stops: the stop strings.
        parsed: the streamer tells reasoning from text: the text is not the whole answer.
    """

    def __init__(self, tokenizer: Any, config: Any, stops: Sequence[str] = (), parsed: bool = False) -> None:
        super().__init__()
        self.ids: list[int] = []
        self._tokenizer, self._config, self._stops, self._parsed = tokenizer, config, stops, parsed
        self._text = ""
        # Of the field that is being sent: reasoning is a str of a class of its own.
        self._field: type[str] = str
        self._held = StopText(stops)

    def put_nowait(self, item: Any) -> None:
        """Called in the loop's thread for each item, None last."""
        if isinstance(item, str):
            if type(item) is not self._field:
                self._send_rest()
                self._field, self._held = type(item), StopText(self._stops)
            item = self._field(self._held.feed(item))
            self._text += item
        elif item is None:
            self._send_rest()
        if item != "":
            super().put_nowait(item)

    def _send_rest(self) -> None:
        """What is missing of the field that ends, or of the answer."""
        whole = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        whole = _whole_answer(whole, self.ids, self._stops, self._config)
        rest = whole[len(self._text) :] if whole.startswith(self._text) else ""
        if self._parsed:
            rest = self._field(self._held.rest())
        if rest:
            super().put_nowait(rest)


class _Streamer(DirectStreamer):
    """As transformers', into an `_Answer`; cancelled, it ends the generation by `gone`."""

    def __init__(self, tokenizer: Any, loop: Any, answer: _Answer, response_parser: Any = None) -> None:
        super().__init__(tokenizer.backend_tokenizer, loop, answer, response_parser=response_parser)
        decode_by(self, TokenText(tokenizer, skip_special_tokens=response_parser is None))
        self.gone, self._answer, self._prompt_seen = threading.Event(), answer, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._answer.ids += value.tolist()
        self._prompt_seen = True
        super().put(value)

    def cancel(self) -> None:
        self.gone.set()


class _Manager(GenerateManager):
    """Generation that stops when nobody waits for it any more.

    Args:
        parses: answers of this model have a place for reasoning; see `_parsing`.
    """

    def __init__(self, parses: bool) -> None:
        super().__init__()
        self._parses = parses

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, DirectStreamer]:
        """As transformers', with our streamer."""
        loop = asyncio.get_running_loop()
        response_parser = response_parser if self._parses else None
        own = _taken(gen_config)
        answer = _Answer(processor, gen_config, own.stops, parsed=response_parser is not None)
        streamer = _Streamer(processor, loop, answer, response_parser=response_parser)

        def work() -> None:
            try:
                _generate(model, processor, inputs, gen_config, own, streamer)
            except Exception as error:
                _log_failure(error)
                loop.call_soon_threadsafe(answer.put_nowait, stream_error(FAILED))

        self.submit(work)
        return answer, streamer


def _whole_answer(text: str, ids: list[int], stops: Sequence[str], config: Any) -> str:
    """The text before a stop string.

    One that is found, or a token that ends an answer, is why it ended, were it also at the last token allowed.
    """
    ready = before_stop(text, stops)
    ends = config.eos_token_id
    if ready != text or (ids and ids[-1] in (ends if isinstance(ends, list) else [ends])):
        config.max_new_tokens = None  # by which the handlers tell "length" from "stop"
    return ready


class _Own(NamedTuple):
    """What `_Sampling` puts beside a request's configuration, which has no place for it."""

    frequency: float = 0.0
    presence: float = 0.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


def _taken(config: Any) -> _Own:
    return config.__dict__.pop(OWN, _Own())


def _generate(
    model: Any,
    processor: Any,
    inputs: Any,
    config: Any,
    own: _Own,
    streamer: _Streamer,
) -> None:
    """One answer, in the worker's thread. A seed holds for this answer alone: others may be asked for meanwhile."""
    processors, length = LogitsProcessorList(), inputs["input_ids"].shape[-1]
    if own.frequency or own.presence:
        processors.append(Penalties(own.frequency, own.presence, length))
    with torch.random.fork_rng(enabled=own.seed is not None):
        if own.seed is not None:
            torch.manual_seed(own.seed)
        model.generate(
            **inputs,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([Until(streamer.gone, processor, own.stops, length)]),
            logits_processor=processors,
            streamer=streamer,
            tokenizer=processor,  # for a model's own stop strings
        )


class _OneModel(ModelManager):
    """It loads nothing: the model is here already. And its name is ours: no `@main` behind it."""

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id


class _State(GenerationState):
    """One manager, for the one model."""

    def __init__(self, parses: bool) -> None:
        super().__init__()
        self._one = _Manager(parses)

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._one


class _Sampling:
    """What both handlers leave out: a temperature means sampling, and the number of tokens is ours to say.

    transformers takes the frequency penalty for a repetition penalty, which divides logits and counts the prompt, has
    no bias for completions, and seeds torch when a request arrives, not when its answer begins. It looks for stop
    strings at the end of the prompt too, and draws from the 50 likeliest tokens where nobody said so. `top_p` alone
    samples, as the temperature is 1 by default in OpenAI's API; without both the answer is greedy.
    """

    def _build_generation_config(self, body: dict[str, Any], base: Any, use_cb: bool = False) -> Any:
        own = _Own(
            body.pop("frequency_penalty", 0.0),
            body.pop("presence_penalty", 0.0),
            body.pop("seed", None),
            tuple(body.pop("stop", ())),
        )
        config = super()._build_generation_config(body, base, use_cb=use_cb)  # type: ignore[misc]
        # What a model's own generation_config.json may say and one answer, perhaps streamed, cannot be.
        config.num_beams = config.num_return_sequences = 1
        config.return_dict_in_generate = False
        if stops := config.stop_strings:  # they end the answer in `generate`; here they are cut off
            own = own._replace(stops=(*own.stops, *([stops] if isinstance(stops, str) else stops)))
        setattr(config, OWN, own)
        if bias := body.get("logit_bias"):
            config.sequence_bias = {(int(token),): float(value) for token, value in bias.items()}
        config.do_sample = body.get("temperature", 1.0 if body.get("top_p", 1) < 1 else 0.0) > 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        elif config.top_k is None:  # what a model's own generation_config.json says stays
            config.top_k = 0
        config.use_cache = True
        return config


class _Chat(_Sampling, ChatCompletionHandler):
    pass


class _Completion(_Sampling, CompletionHandler):
    pass


def _parsing(tokenizer: Any, model: PreTrainedModel) -> Any:
    """The tokenizer with the response template by which reasoning is told from the answer; None where it cannot be.

    transformers picks a template by the model's type. Where the chat template has not the mark at which that one's
    answers begin, it would take the prompt for a part of the answer. Tools are not offered, so a tool call is text.
    """
    template = get_response_template(tokenizer, model)
    if template is None or not getattr(tokenizer, "chat_template", None):
        return None
    begins = template.get("start_anchor") or []
    try:
        asked: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
        )
    except Exception:  # a template refuses by raising what it likes
        return None
    if begins and not any(mark in asked for mark in ([begins] if isinstance(begins, str) else begins)):
        return None
    fields = {name: field for name, field in template.get("fields", {}).items() if name != "tool_calls"}
    own = copy.copy(tokenizer)
    own.response_template = {**template, "fields": fields}
    return own


def build_app(model: PreTrainedModel, tokenizer: Any, name: str, limits: Limits) -> FastAPI:
    """The endpoint.

    Args:
        model: in evaluation mode.
        tokenizer: of the model; `/v1/chat/completions` needs its chat template.
        name: what clients call the model.
        limits: see `Limits`.
    """
    manager = _OneModel(device="cpu")
    manager.force_model = name
    parsing = _parsing(tokenizer, model)
    manager.loaded_models[name] = TimedModel(model, -1, tokenizer if parsing is None else parsing)
    state = _State(parses=parsing is not None)
    handlers: dict[str, Any] = {"chat": _Chat(manager, state), "completion": _Completion(manager, state)}
    slots = Slots(limits)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    vocabulary = int(model.config.get_text_config().vocab_size)

    async def answer(request: Request, kind: str) -> Any:
        body = parse(await _read(request, limits), kind, name, vocabulary)
        length = await asyncio.to_thread(_prompt_length, tokenizer, body, kind)
        body["max_tokens"] = tokens_asked(body, length, limits)
        body.pop("max_completion_tokens", None)
        include_usage = body.pop("stream_options", {}).get("include_usage")
        identity = request.headers.get("x-request-id", "")[:64] or f"rmoe-{id(body):x}"
        streamed, body["stream"] = body.get("stream", False), True
        slot = slots.one()
        await _unless_gone(request, slot.__aenter__())
        try:
            response = await _unless_gone(request, handlers[kind].handle_request(body, identity))
            chunks = _chunks(response.body_iterator, include_usage if streamed else None)
            if streamed:
                response.body_iterator = _as_events(chunks, slot)
                return response
            response = await _unless_gone(request, _joined(chunks, kind))
        except BaseException:
            await slot.__aexit__(None, None, None)
            raise
        await slot.__aexit__(None, None, None)
        return response

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(request, "completion")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await answer(request, "chat")

    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "rmoe"}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> Any:
        if asked != name:
            raise Refused(404, f"this server has one model, {name!r}", "model")
        return card

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok", "busy": slots.busy, "waiting": slots.in_line}

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        body = Refused(error.status_code, one_line(str(error.detail))).body()
        body["error"]["code"] = None
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        _log_failure(error)
        return JSONResponse(Refused(500, FAILED).body(), status_code=500)

    return app


def _prompt_length(tokenizer: Any, body: dict[str, Any], kind: str) -> int:
    if kind == "completion":
        return len(tokenizer(body["prompt"])["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(400, "this model has no chat template: use /v1/completions")
    try:
        rendered = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=True)
    except Exception as error:  # a template refuses by raising what it likes
        raise Refused(400, f"the chat template refuses: {' '.join(str(error).split())[:200]}") from None
    return len(rendered["input_ids"] if isinstance(rendered, dict) or hasattr(rendered, "keys") else rendered)


async def _read(request: Request, limits: Limits) -> bytes:
    """The body, if it is short enough and comes soon enough.

    Raises:
        Refused: it is not, or does not.
    """

    async def collect() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limits.max_body_bytes:
                raise Refused(413, f"the body is over {limits.max_body_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(collect(), limits.body_seconds)
    except ClientDisconnect:
        raise Refused(499, "the client has gone") from None
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s") from None


async def _unless_gone(request: Request, work: Any) -> Any:
    """Await work, but give it up when the client has closed the connection.

    Raises:
        Refused: the client has gone (nobody will read it).
    """
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=POLL_SECONDS)
            if done:
                return task.result()
            if await request.is_disconnected() and not task.done():  # done: the slot it holds is its caller's
                raise Refused(499, "the client has gone")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _log_failure(error: Exception) -> None:
    said = one_line(f"{type(error).__name__}: {error}")
    print(f"request failed: {said}", file=sys.stderr, flush=True)


async def _chunks(parts: Any, include_usage: bool | None) -> AsyncGenerator[list[dict[str, Any]]]:
    """Chunks as OpenAI sends them, errors as objects, and usage where it was asked for; those of a part together.

    Args:
        parts: transformers' events, one or more to a part.
        include_usage: True puts the usage into an event of its own without choices; False leaves it out; None leaves
            it in the last event, where transformers puts it.
    """
    try:
        async for part in parts:
            found = []
            for event in filter(None, part.split("\n\n")):
                chunk = json.loads(event.removeprefix("data: "))
                if "error" in chunk:
                    chunk = Refused(500, chunk["error"]).body()
                for choice in chunk.get("choices", ()):
                    choice.setdefault("finish_reason", None)
                usage = chunk.get("usage")
                if include_usage is not None and "choices" in chunk:
                    chunk["usage"] = None
                found.append(chunk)
                if include_usage and usage is not None:
                    found.append({**chunk, "choices": [], "usage": usage})
            yield found
    finally:
        await parts.aclose()


async def _as_events(chunks: AsyncGenerator[list[dict[str, Any]]], slot: Any) -> AsyncIterator[str]:
    """As a client that asked for a stream reads them, `[DONE]` last.

    Args:
        slot: free again when the stream ends, however it ends.
    """
    try:
        async for found in chunks:
            yield "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in found)
        yield "data: [DONE]\n\n"
    finally:
        await chunks.aclose()
        await slot.__aexit__(None, None, None)


async def _joined(chunks: AsyncGenerator[list[dict[str, Any]]], kind: str) -> JSONResponse:
    """The answer as a whole.

    Raises:
        Refused: it failed on the way.
    """
    text = dict.fromkeys(("text", "content", "reasoning_content"), "")
    whole: dict[str, Any] = {}
    try:
        async for chunk in (chunk async for found in chunks for chunk in found):
            if "error" in chunk:
                raise Refused(500, chunk["error"]["message"])
            (choice,) = chunk["choices"]
            for name in text:
                text[name] += choice.get("delta", choice).get(name) or ""
            whole = chunk | {"finish_reason": choice["finish_reason"]}  # the last one has the usage
    finally:
        await chunks.aclose()
    answer: dict[str, Any] = {"text": text["text"]}
    if kind == "chat":
        thought = {"reasoning_content": text["reasoning_content"]} if text["reasoning_content"] else {}
        answer = {"message": {"role": "assistant", "content": text["content"]} | thought}
    choice = {"index": 0, **answer, "finish_reason": whole.pop("finish_reason")}
    named = {"chat": "chat.completion", "completion": "text_completion"}
    return JSONResponse({**whole, "object": named[kind], "choices": [choice]})
