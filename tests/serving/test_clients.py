"""The endpoint as OpenAI's own client meets it: what asks for nothing is accepted, the rest is refused by name."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs the extra `serve`")

import torch  # noqa: E402

from rmoe.data.encode import byte_tokenizer  # noqa: E402
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize  # noqa: E402
from rmoe.serving.limits import Limits, Refused, parse  # noqa: E402
from rmoe.serving.server import build_app  # noqa: E402
from rmoe.serving.text import Penalties, StopText, Until, before_stop  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 4}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    torch.set_num_threads(1)
    config = RMoEConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
        moe_intermediate_size=8, max_position_embeddings=512,
    )  # fmt: skip
    model = RMoEForCausalLM(config).eval()
    initialize(model, 0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        app = build_app(model, tokenizer, "tiny", Limits(max_length=512))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield number
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


NOTHING: dict[str, list[Any]] = {
    "n": [1, None],
    "user": ["me"],
    "metadata": [{}, {"a": "b"}],
    "store": [False],
    "service_tier": ["auto", "default"],
    "presence_penalty": [0, 0.0, None],
    "frequency_penalty": [0, 0.0],
    "logit_bias": [{}, None],
    "stop": [None, []],
    "seed": [None],
    "stream": [False, None],
    "top_p": [1, 1.0],
    "temperature": [0, 0.0],
    "logprobs": [None, False],
}
OF_CHAT: dict[str, list[Any]] = {
    "tools": [None, []],
    "tool_choice": ["none", "auto"],
    "functions": [None, []],
    "function_call": ["none"],
    "parallel_tool_calls": [True, False],
    "top_logprobs": [0, None],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "reasoning_effort": [None, "none"],
    "verbosity": ["medium"],
    "audio": [None],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
}
OF_TEXT: dict[str, list[Any]] = {"echo": [False], "best_of": [1], "suffix": [None, ""], "prompt": [["hi"]]}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_what_asks_for_nothing_changes_nothing(kind: str) -> None:
    base = ASK if kind == "chat" else TEXT
    plain = parse(json.dumps(base).encode(), kind, "tiny", 320)
    for name, values in (NOTHING | (OF_CHAT if kind == "chat" else OF_TEXT)).items():
        for value in values:
            read = parse(json.dumps(base | {name: value}).encode(), kind, "tiny", 320)
            harmless = {
                "presence_penalty",
                "frequency_penalty",
                "temperature",
                "top_p",
                "stream",
                "logit_bias",
            }
            assert {k: v for k, v in read.items() if k not in harmless} == plain, (name, value)


def test_what_asks_for_nothing_is_answered_alike(client: Any) -> None:
    """All at once, through OpenAI's client."""
    last = {name: values[0] for name, values in (NOTHING | OF_CHAT).items() if values[0] is not None}
    answer = client.chat.completions.create(**ASK)
    assert client.chat.completions.create(**ASK, extra_body=last).choices == answer.choices
    last = {name: values[0] for name, values in (NOTHING | OF_TEXT).items() if values[0] is not None}
    last.pop("prompt")
    assert (
        client.completions.create(**TEXT, extra_body=last).choices
        == client.completions.create(**TEXT).choices
    )


MORE: list[tuple[str, str, Any]] = [
    ("chat", "n", 2),
    ("chat", "logprobs", True),
    ("chat", "top_logprobs", 5),
    ("chat", "tools", [{"type": "function", "function": {"name": "f"}}]),
    ("chat", "tool_choice", "required"),
    ("chat", "functions", [{"name": "f"}]),
    ("chat", "response_format", {"type": "json_object"}),
    ("chat", "modalities", ["text", "audio"]),
    ("chat", "reasoning_effort", "high"),
    ("chat", "audio", {"voice": "alloy"}),
    ("chat", "prediction", {"type": "content", "content": "a"}),
    ("chat", "web_search_options", {"search_context_size": "low"}),
    ("chat", "store", True),
    ("chat", "service_tier", "flex"),
    ("chat", "stream_options", {"other": 1}),
    ("chat", "presence_penalty", 3),
    ("chat", "temperature", True),
    ("chat", "messages", [{"role": "tool", "content": "a"}]),
    ("chat", "messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("chat", "messages", [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]),
    ("chat", "messages", []),
    ("completion", "logprobs", 0),
    ("completion", "logprobs", 5),
    ("completion", "best_of", 2),
    ("completion", "echo", True),
    ("completion", "prompt", ["a", "b"]),
    ("completion", "prompt", [1, 2]),
    ("completion", "max_tokens", 5000),
    ("completion", "generation_config", "{}"),
]


@pytest.mark.parametrize(("kind", "name", "value"), MORE)
def test_what_would_change_the_answer_is_refused_by_name(
    kind: str, name: str, value: Any, client: Any
) -> None:
    make = client.chat.completions.create if kind == "chat" else client.completions.create
    body = (ASK if kind == "chat" else TEXT) | {name: value}
    known = {key: body.pop(key) for key in ("model", "messages", "prompt") if key in body}
    with pytest.raises(openai.BadRequestError) as caught:
        make(**known, extra_body=body)
    assert caught.value.param == name
    assert caught.value.type == "invalid_request_error"
    assert name in caught.value.body["message"]


def test_errors_have_openais_form(client: Any, port: int) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(**TEXT | {"model": "gpt-4o"})
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    assert client.models.retrieve("tiny").id == "tiny"
    for method, path, status in (("POST", "/v1/embeddings", 404), ("GET", "/v1/completions", 405)):
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(method, path)
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert response.status == status
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


def test_a_failure_while_streaming_is_an_error_too(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError('no "memory"\n')

    monkeypatch.setattr(RMoEForCausalLM, "generate", fail)
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(TEXT | {"stream": True}))
    events = connection.getresponse().read().decode().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "memory" not in events[0]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_usage(kind: str, client: Any) -> None:
    """Prompt and answer counted once each, in one event without choices where a stream is asked for it."""
    make, body = (
        (client.chat.completions.create, ASK) if kind == "chat" else (client.completions.create, TEXT)
    )
    length = len("user: hi\n") if kind == "chat" else len("hi")
    whole = make(**body)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (
        length,
        4,
        length + 4,
    )
    events = list(make(**body, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert all(event.usage is None for event in events[:-1])
    assert events[-2].choices[0].finish_reason == "length"
    assert all(
        event.usage is None for event in make(**body, stream=True, stream_options={"include_usage": False})
    )
    texts = [c.delta.content if kind == "chat" else c.text for event in events for c in event.choices]
    said = whole.choices[0].message.content if kind == "chat" else whole.choices[0].text
    assert "".join(text or "" for text in texts) == said


def test_a_stream_ends_with_done(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(ASK | {"stream": True}))
    assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")


def test_parts_of_text_and_an_answer_sent_back(client: Any) -> None:
    parts = [{"type": "text", "text": "hi"}]
    first = client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": parts}]})
    assert first == first.model_copy(update={"choices": client.chat.completions.create(**ASK).choices})
    history = [*ASK["messages"], first.choices[0].message.model_dump(), *ASK["messages"]]
    again = client.chat.completions.create(**ASK | {"messages": history})
    answer = first.choices[0].message.content
    assert again.usage.prompt_tokens == len(f"user: hi\nassistant: {answer}\nuser: hi\n".encode())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_before_its_stop_string(stream: bool, client: Any) -> None:
    whole = client.completions.create(**TEXT | {"max_tokens": 40}).choices[0].text
    stop = next(whole[i : i + 2] for i in range(3, len(whole) - 2) if whole.find(whole[i : i + 2]) == i)
    answer = client.completions.create(**TEXT | {"max_tokens": 40}, stop=[stop], stream=stream)
    choices = [choice for event in answer for choice in event.choices] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
    assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_that_begins_in_the_prompt_stops_nothing(stream: bool, client: Any) -> None:
    body = TEXT | {"prompt": "hiz", "logit_bias": {str(ord("z")): 100}, "max_tokens": 9}
    for stop, said, why in (("iz", "z" * 9, "length"), ("zzzz", "", "stop")):
        answer = client.completions.create(**body, stop=[stop], stream=stream)
        choices = [choice for event in answer for choice in event.choices] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == said
        assert choices[-1].finish_reason == why


def test_where_a_stop_string_is_found() -> None:
    """After the prompt, however long the answer is, with a character cut at the head of what is decoded."""
    tokenizer, stops = byte_tokenizer(), ["STOP"]
    prompt, text = list(b"ab STOP"), list(("\u20ac" * 50 + "STOP").encode())
    until = Until(threading.Event(), tokenizer, stops, len(prompt))
    ended = [bool(until(torch.tensor([prompt + text[:n]]), None)) for n in range(len(text) + 1)]
    assert ended == [False] * len(text) + [True]
    until.gone.set()
    assert bool(until(torch.tensor([prompt]), None))


@pytest.mark.parametrize("asked", [{"temperature": 1.0}, {"top_p": 0.9}])
def test_sampling_draws_from_all_tokens(asked: dict[str, float], client: Any, drawn_from: list[int]) -> None:
    client.completions.create(**TEXT, **asked)
    assert min(drawn_from, default=0) > 200  # transformers' own default: the 50 likeliest


def test_a_bias_is_heeded_by_both(client: Any) -> None:
    bias = {str(ord("z")): 100}
    assert client.completions.create(**TEXT, logit_bias=bias).choices[0].text == "zzzz"
    assert client.chat.completions.create(**ASK, logit_bias=bias).choices[0].message.content == "zzzz"


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_keeps_a_token_from_coming_again(name: str, client: Any) -> None:
    """At a bias that makes one token the likeliest by less than the penalty."""
    body = TEXT | {"prompt": "zz", "max_tokens": 6, "logit_bias": {str(ord("z")): 1.5}}
    assert client.completions.create(**body).choices[0].text == "zzzzzz"
    penalised = client.completions.create(**body, **{name: 2.0}).choices[0].text
    assert penalised[0] == "z"  # the prompt does not count
    assert penalised.count("z") == 1


def test_penalties_are_openais() -> None:
    scores = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 3, 1, 2, 1]])
    expected = scores.clone()
    for token, count in ((1, 2), (2, 1)):  # after a prompt of two
        expected[0, token] -= 0.5 * count + 0.25
    torch.testing.assert_close(Penalties(0.5, 0.25, 2)(ids, scores), expected)


@pytest.mark.parametrize("stops", [["END"], ["aab", "b"], ["aa"], []])
@pytest.mark.parametrize("text", ["abaabEND", "aaaab", "xENxEND", "EN", "", "ab\nEND more END"])
def test_a_text_in_parts_ends_where_the_whole_does(text: str, stops: list[str]) -> None:
    for size in (1, 2, 3, 100):
        parts = StopText(stops)
        sent = "".join(parts.feed(text[i : i + size]) for i in range(0, len(text), size)) + parts.rest()
        assert sent == before_stop(text, stops)


def test_an_unprintable_name_is_refused_too() -> None:
    with pytest.raises(Refused) as caught:
        parse(b'{"a\\nb\\ud800": 1}', "chat", "tiny", 320)
    assert caught.value.param is None
    assert "\n" not in caught.value.message
    json.dumps(caught.value.body(), ensure_ascii=False).encode()
