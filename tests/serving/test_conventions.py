"""What vLLM's transformers backend asks of a model, read off ours; and the command with OpenAI's own client."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from rmoe.data.encode import byte_tokenizer
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.model.layers import RMoESparseMoeBlock

ROOT = Path(__file__).parents[2]


def build() -> RMoEForCausalLM:
    config = RMoEConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
        moe_intermediate_size=8,
    )  # fmt: skip
    model = RMoEForCausalLM(config).eval()
    initialize(model, 0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny"
    build().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_the_saved_folder_names_its_base_model(folder):
    assert "AutoModel" in json.loads((folder / "config.json").read_text())["auto_map"]


def test_keyword_arguments_reach_attention():
    seen: list[object] = []

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        seen.append(kwargs.get("marker"))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("rmoe_test", attention)
    model = build()
    model.config._attn_implementation = "rmoe_test"
    marker = object()
    model(input_ids=torch.zeros(1, 3, dtype=torch.int64), marker=marker)
    assert seen == [marker, marker]
    assert model._supports_attention_backend


def test_experts_are_packed_and_called_as_expected():
    block = build().model.layers[0].mlp
    assert isinstance(block, RMoESparseMoeBlock)
    assert block.experts.gate_up_proj.shape == (4, 16, 16)  # [E, 2I, d]
    assert block.experts.down_proj.shape == (4, 16, 8)  # [E, d, I]
    names = list(inspect.signature(type(block.experts).forward).parameters)
    assert names[1:] == ["hidden_states", "top_k_index", "top_k_weights"] or "args" in names


def test_mlp_returns_one_tensor():
    model = build()
    returned: list[object] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: returned.append(output))
    model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    assert [type(output) for output in returned] == [torch.Tensor]


def test_there_are_plans_to_shard_by():
    config = RMoEConfig()
    assert "layers.*.mlp.experts.gate_up_proj" in config.base_model_tp_plan
    assert "layers.*.mlp.experts" in config.base_model_ep_plan


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    pytest.importorskip("uvicorn", reason="needs the extra `serve`")
    command = [sys.executable, "-m", "rmoe.cli.main", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving tiny at (\S+)", line):
            yield process, found[1]
            break
    process.terminate()
    assert process.wait(timeout=30) in (0, -15)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder) as (_, address):
        yield address


@pytest.mark.slow
def test_a_server_that_is_told_to_end_does_not_wait_for_long_answers(folder):
    """Of those at work and in line; `serving` waits for its end."""
    with serving(folder, "--max-length", "200000") as (process, address):
        host, _, port = address.removeprefix("http://").partition("/")[0].rpartition(":")
        body = json.dumps({"prompt": "abc", "max_tokens": 150_000})
        clients = [HTTPConnection(host, int(port)) for _ in range(2)]
        for client in clients:
            client.request("POST", "/v1/completions", body)
        time.sleep(2)
        begun = time.monotonic()
        process.terminate()
        process.wait(timeout=60)
        assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_openais_client(address):
    client = pytest.importorskip("openai").OpenAI(base_url=address, api_key="none")
    assert address.startswith("http://127.0.0.1:")
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=8)
    parts = client.completions.create(model="tiny", prompt="abc", max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--port", "70000", "0 to 65535"),
        ("--concurrent", "0", "1 or more"),
        ("--max-length", "1", "2 or more"),
        ("--waiting", "-1", "0 or more"),
        ("--device", "nonsense", "a device that torch finds here"),
    ],
)
def test_wrong_requests(folder, option, value, allowed, capsys):
    from rmoe.cli.main import main

    assert main(["serve", str(folder), option, value]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {option} is ")
    assert f"allowed: {allowed}" in said


def test_an_ipv6_address_is_announced_in_brackets(folder, monkeypatch, capsys):
    import uvicorn

    from rmoe.cli.main import main

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(uvicorn.Config, "bind_socket", lambda self: socket.create_server(("127.0.0.1", 0)))
    assert main(["serve", str(folder), "--host", "::1", "--port", "0"]) == 0
    assert " at http://[::1]:" in capsys.readouterr().err


def test_no_model(tmp_path, capsys):
    from rmoe.cli.main import main

    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
