"""A dense checkpoint becomes an RMoE model of the same function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rmoe
from rmoe.cli.main import main
from rmoe.errors import RequestError
from rmoe.graft import upcycle
from rmoe.graft.upcycle import upcycle_folder

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(3, 25).view(2, 11)


def dense(kind: str, **changes: Any) -> PreTrainedModel:
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    if kind == "mistral":
        changes = {"sliding_window": None} | changes
    torch.manual_seed(0)
    made = model(config(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # larger weights than at initialisation, biases other than zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.mark.parametrize("router", ["rmoe", "smoe", "rmoe-lstm", "xmoe"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_the_function_is_the_same(kind: str, router: str) -> None:
    model = dense(kind)
    made = upcycle(model, router, num_experts=6, top_k=2).eval()
    assert made.config.num_experts == 6
    with torch.no_grad():
        torch.testing.assert_close(made(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert torch.equal(made.generate(TOKENS, **options), model.generate(TOKENS, **options))


def test_tied_embeddings_and_dtype_are_kept() -> None:
    model = dense("llama", tie_word_embeddings=True).to(torch.bfloat16)
    made = upcycle(model)
    assert made.dtype == torch.bfloat16
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_experts_are_copies_that_training_moves_apart() -> None:
    made = upcycle(dense("llama"), num_experts=4).train()
    experts = made.model.layers[0].mlp.experts.down_proj
    assert all(torch.equal(experts[0], experts[n]) for n in range(4))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    for _ in range(2):
        made(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert not torch.equal(experts[0], experts[1])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = dense("qwen2")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    argv = [
        "graft",
        "--upcycle",
        str(tmp_path / "dense"),
        "--out",
        str(out),
        "--experts",
        "4",
        "--router",
        "rmoe-norm",
    ]
    assert main(argv) == 0
    assert "4 experts" in capsys.readouterr().out
    assert (out / "tokenizer_config.json").is_file()
    with torch.no_grad():
        torch.testing.assert_close(rmoe.load(out)(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_layers_that_rmoe_has_not() -> None:
    with pytest.raises(RequestError, match="k_norm"):
        upcycle(dense("qwen3"))
    with pytest.raises(RequestError, match="sliding window"):
        upcycle(dense("mistral", sliding_window=4))
    with pytest.raises(RequestError, match="mlp"):
        upcycle(dense("llama", mlp_bias=True))


@pytest.mark.parametrize("router", ["expert-choice", "smoe-capacity", "remoe"])
def test_a_router_that_would_change_the_function(router: str) -> None:
    with pytest.raises(RequestError, match=r"--router|gate"):
        upcycle(dense("llama"), router)


def test_the_generation_defaults_are_the_dense_models(tmp_path: Path) -> None:
    model = dense("qwen2")
    model.save_pretrained(tmp_path / "dense")
    said = {
        "eos_token_id": [5, 6],
        "temperature": 0.7,
        "do_sample": False,
    }  # what transformers would not write
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(said))
    made = upcycle_folder(tmp_path / "dense", tmp_path / "out", "rmoe-norm", num_experts=2, top_k=1)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said
    for one in (made, rmoe.load(tmp_path / "out"), upcycle(rmoe.load(tmp_path / "dense"), "rmoe-norm")):
        assert one.generation_config.eos_token_id == [5, 6]
        assert one.generation_config.temperature == 0.7
