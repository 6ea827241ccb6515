"""Chat with a family whose answers transformers parses: reasoning apart, stop strings, templates of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("httpx", reason="needs the extra `serve`")

import torch
from fastapi.testclient import TestClient
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rmoe.data.encode import byte_tokenizer
from rmoe.serving.limits import Limits
from rmoe.serving.server import build_app

QWEN = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
OTHER = "{% for m in messages %}### {{m.role}}: {{m.content}}\n{% endfor %}### assistant:"
ASK = {"messages": [{"role": "system", "content": "SECRET"}, {"role": "user", "content": "hi"}]}
TOOL = '<tool_call>{"name": "f", </tool_call>'


@pytest.fixture(scope="module")
def client() -> Callable[[str, str], TestClient]:
    """A server whose model says what it is told to."""
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()

    def build(says: str, template: str) -> TestClient:
        def generate(
            input_ids: Any, streamer: Any, stopping_criteria: Any, generation_config: Any, **_: Any
        ) -> Any:
            streamer.put(input_ids[0])
            for byte in says.encode()[: generation_config.max_new_tokens]:
                token = torch.tensor([[byte]])
                input_ids = torch.cat([input_ids, token], 1)
                streamer.put(token[0])
                if bool(stopping_criteria(input_ids, None).all()):
                    break
            streamer.end()
            return input_ids

        model.generate = generate
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        return TestClient(build_app(model, tokenizer, "tiny", Limits(max_length=512)))

    return build


def said(client: TestClient, stream: bool, **options: Any) -> tuple[str, str, str]:
    """(content, reasoning, why it ended)."""
    answer = client.post("/v1/chat/completions", json=ASK | {"max_tokens": 60, "stream": stream} | options)
    assert answer.status_code == 200, answer.text
    if not stream:
        (choice,) = answer.json()["choices"]
        message = choice["message"]
        return message["content"], message.get("reasoning_content", ""), choice["finish_reason"]
    events = [e.removeprefix("data: ") for e in answer.text.split("\n\n") if e.startswith("data: {")]
    choices = [json.loads(event)["choices"][0] for event in events]
    content, thought = (
        "".join(choice["delta"].get(name) or "" for choice in choices)
        for name in ("content", "reasoning_content")
    )
    return content, thought, choices[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("template", "says", "stop", "expected"),
    [
        (QWEN, "<think>hmm</think>answer", [], ("answer", "hmm", "stop")),
        (QWEN, "<think>hmm</think>one STOP two", ["STOP"], ("one ", "hmm", "stop")),
        (QWEN, "<think>a STOP b</think>c", ["STOP"], ("", "a ", "stop")),
        (QWEN, "<think>a S</think>b S", ["STOP"], ("b S", "a S", "stop")),
        (
            QWEN,
            f"x {TOOL}",
            [],
            (f"x {TOOL}", "", "stop"),
        ),  # tools are not offered: it is text, were it whole
        (OTHER, "answer", [], ("answer", "", "stop")),  # not the prompt, and no system message
        (OTHER, "one STOP two", ["STOP"], ("one ", "", "stop")),
    ],
)
def test_whole_and_streamed_answers_are_the_same(client, template, says, stop, expected, stream):
    ended = says + "<|im_end|>" if template == QWEN else says
    assert said(client(ended, template), stream, **({"stop": stop} if stop else {})) == expected


def test_an_answer_can_be_sent_back(client):
    served = client("<think>hmm</think>answer", QWEN)
    message = served.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "answer", "reasoning_content": "hmm"}
    again = {"messages": [*ASK["messages"], message, {"role": "user", "content": "and?"}]}
    assert served.post("/v1/chat/completions", json=again).status_code == 200
