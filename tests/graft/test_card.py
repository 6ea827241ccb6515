"""The cards of grafts and upcycled models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from rmoe.data.encode import byte_tokenizer
from rmoe.graft import GraftSpec, graft_folder, undo_folder, upcycle_folder
from tests.graft.tiny_families import tiny_model

CARD = "README.md"
BASE_CARD = "---\nlicense: mit\n---\n# The base"


def model_folder(path: Path, kind: str) -> Path:
    if kind == "dense":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(path)  # type: ignore[arg-type]
    else:
        tiny_model("qwen3_moe").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / CARD).write_text(BASE_CARD)
    return path


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_the_card_names_the_base_and_loads(kind: str, tmp_path: Path) -> None:
    base, out = model_folder(tmp_path / "base", kind), tmp_path / "out"
    if kind == "moe":
        report = graft_folder(base, out, GraftSpec.from_router("rmoe", width=8))
        said = f"| parameters added | {report.added_parameters:,} |"
    else:
        model = upcycle_folder(base, out, "rmoe", num_experts=2, top_k=1)
        said = f"| parameters | {model.num_parameters():,} |"
    card = ModelCard.load(out / CARD)
    assert (card.data.base_model, card.data.license) == ("base", "mit")
    assert said in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {"folder": out}
    exec(code, names)
    assert names["model"].num_parameters() > 0


def test_undo_gives_the_bases_own_card_back(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "moe")
    graft_folder(base, tmp_path / "full", GraftSpec.from_router("rmoe", width=8), full=True)
    undo_folder(tmp_path / "full", tmp_path / "again")
    assert (tmp_path / "again" / CARD).read_text() == BASE_CARD


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_model_of_the_hub_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "models--Org--Nice-MoE" / "snapshots" / ("0123" * 10), kind)
    if kind == "moe":
        graft_folder(base, tmp_path / "out", GraftSpec.from_router("rmoe", width=8))
    else:
        upcycle_folder(base, tmp_path / "out", "rmoe", num_experts=2, top_k=1)
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.base_model == "Org/Nice-MoE"
    assert "0123" not in card.text.split("## ")[0]
