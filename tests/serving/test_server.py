"""The endpoint over real sockets: streaming, a client that leaves, wrong requests, many at once."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from statistics import quantiles
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")

import torch  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import settings as hypothesis_settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import Tokenizer, decoders  # noqa: E402
from tokenizers.models import BPE  # noqa: E402
from transformers import GenerationConfig, PreTrainedTokenizerFast  # noqa: E402

from rmoe.data.encode import byte_tokenizer  # noqa: E402
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize  # noqa: E402
from rmoe.serving.limits import KINDS, Limits, Refused, parse, tokens_asked  # noqa: E402
from rmoe.serving.server import _Answer, _Streamer, build_app  # noqa: E402
from rmoe.serving.text import TokenText  # noqa: E402

APP: dict[str, Any] = {}
LIMITS = Limits(max_length=4096, concurrent=2, waiting=200, max_body_bytes=20_000)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    torch.set_num_threads(1)
    config = RMoEConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
        moe_intermediate_size=8, max_position_embeddings=4096,
    )  # fmt: skip
    model = RMoEForCausalLM(config).eval()
    initialize(model, 0)
    APP["model"] = model
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        app = build_app(model, byte_tokenizer(), "tiny", LIMITS)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield number
        server.should_exit = True
        thread.join(timeout=10)


def post(port: int, body: Any, path: str = "/v1/completions") -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, raw, {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def get(port: int, path: str) -> dict[str, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def until_free(port: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if get(port, "/health") == {"status": "ok", "busy": 0, "waiting": 0}:
            return
        time.sleep(0.05)
    raise AssertionError(get(port, "/health"))


def test_completion(port):
    status, answer = post(port, {"prompt": "def f(", "max_tokens": 5})
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"
    assert post(port, {"prompt": "def f(", "max_tokens": 5})[1]["choices"] == answer["choices"]


def test_temperature_means_sampling(port):
    texts = {
        post(port, {"prompt": "x", "max_tokens": 20, "temperature": 2.0, "seed": seed})[1]["choices"][0][
            "text"
        ]
        for seed in range(4)
    }
    assert len(texts) > 1


def test_a_seed_holds_when_requests_overlap(port):
    def ask(seed):
        body = {"prompt": "x", "max_tokens": 30, "temperature": 2.0, "seed": seed}
        return post(port, body)[1]["choices"][0]["text"]

    alone = [ask(seed) for seed in range(2)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, [0, 1, 0, 1])) == alone * 2


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest(port, temperature):
    body = {"prompt": "x", "max_tokens": 3}
    status, answer = post(port, body | {"temperature": temperature})
    assert status == 200
    assert answer["choices"][0]["text"] == post(port, body)[1]["choices"][0]["text"]


def test_streaming_gives_the_same_text(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps({"prompt": "abc", "max_tokens": 12, "stream": True})
    )
    lines = connection.getresponse().read().decode().split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert len(chunks) > 2
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == post(port, {"prompt": "abc", "max_tokens": 12})[1]["choices"][0]["text"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def with_byte_fallback() -> Any:
    """As of Llama 2: what has no token comes as bytes, `<0x00>` and so on, and a run of them is one text."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁cd", "é"]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@given(ids=st.lists(st.sampled_from([0, 1, 0xC3 + 2, 0xA9 + 2, 0xFF + 2, 0x61 + 2, 258, 259, 260, 261])))
@hypothesis_settings(max_examples=200, deadline=None)
def test_text_of_byte_fallback_comes_as_it_is_as_a_whole(ids: list[int]) -> None:
    tokenizer = with_byte_fallback()
    assert asyncio.run(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.sampled_from([97, 32, 46, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF])))
@hypothesis_settings(max_examples=200, deadline=None)
def test_text_of_bytes_comes_as_it_is_as_a_whole(ids: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert asyncio.run(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_is_sent_as_soon_as_it_is_certain() -> None:
    text = TokenText(with_byte_fallback(), skip_special_tokens=True)
    found = [text.step(None, token) for token in (258, 260, 0xC3 + 2, 0xA9 + 2, 259, 1, 258)]
    assert found == ["a", " cd", None, None, "éb", None, " a"]


async def streamed(tokenizer: Any, ids: list[int]) -> str:
    queue = _Answer(tokenizer, GenerationConfig())
    streamer = _Streamer(tokenizer, asyncio.get_running_loop(), queue)
    streamer.put(torch.tensor([1, 2]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    parts = []
    while (part := await queue.get()) is not None:
        parts.append(part)
    return "".join(parts)


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_token_at_the_limit_is_a_stop(
    port: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = post(port, {"prompt": "abc", "max_tokens": 1})[1]["choices"][0]
    assert first["finish_reason"] == "length"
    (token,) = first["text"].encode()
    monkeypatch.setattr(APP["model"].generation_config, "eos_token_id", token)
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps({"prompt": "abc", "max_tokens": 1, "stream": stream})
    )
    sent = connection.getresponse().read().decode()
    assert re.findall(r'"finish_reason":\s*"(\w+)"', sent) == ["stop"]
    assert set(re.findall(r'"model":\s*"([^"]+)"', sent)) == {"tiny"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "own",
    [{"num_beams": 2}, {"num_return_sequences": 2}, {"return_dict_in_generate": True}, {"stop_strings": ["~never~"]}],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_what_a_models_own_generation_config_says_is_no_error(
    port: int, own: dict[str, Any], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "stream": stream}

    def text() -> str:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        assert response.status == 200
        return "".join(re.findall(r'"text":\s*"((?:[^"\\]|\\.)*)"', response.read().decode()))

    plain = text()
    for name, value in own.items():
        monkeypatch.setattr(APP["model"].generation_config, name, value)
    assert text() == plain
    if "stop_strings" in own:
        monkeypatch.setattr(APP["model"].generation_config, "stop_strings", json.loads(f'"{plain}"')[1:2])
        assert text() == plain[:1]


def test_a_client_that_leaves_is_no_error_of_the_servers(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """The worker sets the result of a request that was cancelled meanwhile."""
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port)) as gone:
            body = json.dumps({"prompt": "abc", "max_tokens": 2000}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
            gone.sendall(head.encode() + body)
            time.sleep(0.3)
    assert post(port, {"prompt": "abc", "max_tokens": 1})[0] == 200
    time.sleep(0.3)
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("answer", [b"abc", "aé€".encode(), "a€".encode()[:-1], b"k\xff\xe2", b"\xe2\x82"])
def test_a_stream_cut_in_mid_character_is_the_whole_answer(answer):
    tokenizer = byte_tokenizer()
    assert asyncio.run(streamed(tokenizer, list(answer))) == tokenizer.decode(
        list(answer), skip_special_tokens=True
    )


def test_what_is_too_long_is_named_as_it_was_asked_for() -> None:
    limits = Limits(max_length=10)
    for body, prompt, name in (
        ({"prompt": "x", "max_tokens": 8}, 4, "max_tokens"),
        ({"messages": [], "max_completion_tokens": 8}, 4, "max_completion_tokens"),
        ({"prompt": "x", "max_tokens": 1}, 10, "prompt"),
        ({"messages": [], "max_completion_tokens": 1}, 11, "messages"),
    ):
        with pytest.raises(Refused, match="over the limit of 10") as refusal:
            tokens_asked(body, prompt, limits)
        assert refusal.value.body()["error"]["param"] == name


def test_a_prompt_without_a_token_is_refused() -> None:
    for body, name in (({"prompt": " "}, "prompt"), ({"messages": []}, "messages")):
        with pytest.raises(Refused, match="this prompt has no tokens") as refusal:
            tokens_asked(body, 0, Limits(max_length=10))
        assert refusal.value.body()["error"]["param"] == name


def test_a_client_that_hangs_up_while_it_sends_is_no_error(port: int, capfd: pytest.CaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", port)) as gone:
        gone.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{"prom')
        time.sleep(0.2)
    until_free(port)
    assert post(port, {"prompt": "abc", "max_tokens": 1})[0] == 200
    assert "request failed" not in capfd.readouterr().err


def test_models_and_nothing_else(port):
    assert [item["id"] for item in get(port, "/v1/models")["data"]] == ["tiny"]
    for path in ("/load_model", "/reset", "/v1/responses", "/docs", "/openapi.json"):
        assert post(port, {}, path)[0] in (404, 405)


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_frees_its_slot(port, stream):
    """4,000 tokens would take far longer than we wait: the computation itself must have stopped."""
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head + body)
        deadline = time.monotonic() + 20
        while get(port, "/health")["busy"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert get(port, "/health")["busy"] == 1
    until_free(port)
    begun = time.monotonic()
    assert post(port, {"prompt": "b", "max_tokens": 1})[0] == 200
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 15_000, "not JSON"),
        (b"[]", "must be a JSON object"),
        ({}, "prompt must be a text"),
        ({"prompt": ""}, "prompt must be a text"),
        ({"prompt": ["a", "b"]}, "prompt must be a text"),
        ({"prompt": [97, 98]}, "prompt must be a text"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be an integer"),
        ({"prompt": "a", "max_tokens": 10**9}, "max_tokens 1000000000: over the limit of 4096"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "a", "generation_config": '{"num_beams": 100000}'}, "unknown field 'generation_config'"),
        ({"prompt": "a", "n": 50}, "n must be an integer"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias must map"),
        ({"prompt": "a", "logit_bias": {"no": 1}}, 'logit_bias[no] is "no"'),
        ({"prompt": "a", "stop": [""]}, "stop must be"),
        ({"prompt": "a", "suffix": "end"}, "suffix must be "),
        ({"prompt": "a", "suffix": "\ud800"}, "suffix must be "),
        ({"prompt": "\ud800"}, "prompt must be a text"),
        ({"prompt": "a", "stop": "\ud800"}, "stop must be"),
        ({"prompt": "a" * 5000}, "prompt of 5000 tokens"),
    ],
)
def test_wrong_requests_say_why(port, body, said):
    status, answer = post(port, body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert post(port, {"prompt": "a", "max_tokens": 1})[0] == 200


def test_other_refusals(port):
    assert post(port, {"prompt": "a", "model": "gpt2"})[0] == 404
    assert post(port, {"prompt": "a" * 30_000})[0] == 413
    status, answer = post(port, {"messages": [{"role": "user", "content": "hi"}]}, "/v1/chat/completions")
    assert status == 400
    assert "no chat template" in answer["error"]["message"]


def test_sixteen_at_once(port, capsys, note):
    """100 requests: every one answered, none with an error."""

    def ask(number: int) -> tuple[int, float]:
        begun = time.monotonic()
        status, _ = post(port, {"prompt": f"request {number}", "max_tokens": 8})
        return status, time.monotonic() - begun

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, range(100)))
    assert [status for status, _ in answers] == [200] * 100
    cuts = quantiles([seconds for _, seconds in answers], n=20)
    with capsys.disabled():
        print(f"\n100 requests, 16 at once: p50 {cuts[9]:.3f} s, p95 {cuts[18]:.3f} s")
    note(kind="endpoint", requests=100, answered=len(answers), p50=cuts[9], p95=cuts[18])
    until_free(port)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@hypothesis_settings(max_examples=200)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_any_values_are_read_or_refused(kind, data):
    body = data.draw(st.dictionaries(st.sampled_from(sorted(KINDS[kind].model_fields)), JSON, max_size=5))
    if data.draw(st.booleans()):
        body |= {"prompt": "a"} if kind == "completion" else {"messages": [{"role": "user", "content": "a"}]}
    status, said = verdict(json.dumps(body).encode(), kind)
    assert status in (200, 400, 404)
    assert "\n" not in said


def verdict(raw: bytes, kind: str) -> tuple[int, str]:
    try:
        parse(raw, kind, "tiny", 256)
    except Refused as refused:
        return refused.status, refused.message
    return 200, ""
