"""Saved and loaded: bit for bit, here and in a fresh process, with and without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.hub import PushToHubMixin

from rmoe.graft import graft
from rmoe.model import RMoEForCausalLM, RMoEForSequenceClassification, initialize
from rmoe.model.auto_code import save_with_code
from tests.graft.conftest import SPEC
from tests.graft.tiny_families import tiny_model
from tests.model.small import config, model, tokens
from tests.reload import assert_reloaded


@pytest.mark.parametrize("router", ["rmoe", "eda", "hash", "smoe-dropout", "random-smoe", "omni-router"])
def test_round_trip_is_exact(tmp_path: Path, router: str) -> None:
    net = model(router=router, experts="auto").eval()
    net.update_routers(net(tokens()).router_stats, 3, 10)
    net.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RMoEForCausalLM
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, _ in net.named_parameters()
    ]
    assert_reloaded(loaded, net, tokens())
    assert not list(tmp_path.glob("*.bin"))


def test_bfloat16_keeps_training_state_in_float32(tmp_path: Path) -> None:
    net = model(router="smoe-bias")
    net.routers[0].selection_bias.bias.fill_(1e-3 + 2**-20)
    net.save_pretrained(tmp_path)
    for low in (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), net.to(torch.bfloat16)):
        assert low.lm_head.weight.dtype == torch.bfloat16
        assert low.routers[0].selection_bias.bias.dtype == torch.float32
        assert (low.routers[0].selection_bias.bias == 1e-3 + 2**-20).all()


def test_arguments_by_position_as_transformers_takes_them(tmp_path: Path) -> None:
    net = model()
    zeros = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    net.save_pretrained(tmp_path / "zeros", True, zeros)
    assert not any(p.any() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "zeros").parameters())
    net.save_pretrained(tmp_path / "other", False)
    assert not (tmp_path / "other" / "modeling_rmoe.py").exists()
    with pytest.raises(ValueError, match="argument"):
        net.save_pretrained(tmp_path / "many", *[True] * 20)


def test_an_adapter_alone_gets_no_code(tmp_path: Path) -> None:
    """transformers writes no config.json beside an adapter of its own: there is no model to be found."""
    save_with_code(Mock(), lambda folder: (folder / "adapter_config.json").touch(), tmp_path, (), {})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
net = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(net(torch.arange(24).view(2, 12)).logits, sys.argv[2])
print(type(net).__module__)
"""


def test_fresh_process(tmp_path: Path) -> None:
    net = model(experts="auto").eval()
    net.save_pretrained(tmp_path / "m")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "m"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "rmoe.model.modeling_rmoe" in done.stdout
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(logits, net(torch.arange(24).view(2, 12)).logits)


def test_without_the_package_the_error_says_pip_install(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "m")
    hide = "import sys, importlib.util as u\nfind = u.find_spec\n"
    block = (
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'rmoe': raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide + block + FRESH, str(tmp_path / "m"), "x"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "pip install rmoe" in done.stderr


def test_config_names_the_auto_classes(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= auto_map.keys()


def test_sequence_classification(tmp_path: Path) -> None:
    net = RMoEForSequenceClassification(config(num_labels=4))
    initialize(net, 0)
    net.eval()
    ids = tokens(3, 6)
    labels = torch.tensor([0, 3, 1])
    out = net(ids, labels=labels)
    out.loss.backward()
    assert out.logits.shape == (3, 4)
    assert torch.equal(out.loss, out.task_loss + out.balance_loss)
    padded, mask = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    assert (net(padded, attention_mask=mask).logits - out.logits).abs().max() < 1e-5
    net.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_reloaded(loaded, net, ids)


@pytest.mark.parametrize("kind", ["rmoe", "graft"])
def test_an_uploaded_folder_has_the_files_of_the_auto_classes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = model(router="smoe") if kind == "rmoe" else graft(tiny_model("olmoe"), SPEC)
    found: list[set[str]] = []

    def upload(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> None:
        found.append({path.name for path in Path(working_dir).iterdir()} | {repo_id})
        assert "auto_map" in json.loads(Path(working_dir, "config.json").read_text())

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: Mock(repo_id="x/y"))
    net.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="x/y", commit_message="first")
    (names,) = found
    assert {"x/y", "config.json", "model.safetensors"} | {
        p.name for p in tmp_path.glob("model/*.py")
    } <= names
