"""The names of other packages that `rmoe.compat` vouches for are there, and mean what it says."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import DynamicCache, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel
from transformers.distributed import tensor_parallel
from transformers.integrations import moe
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils import TransformersKwargs

import rmoe
from rmoe.compat import (
    ATTENTION_KEYWORDS,
    CACHE,
    CACHE_NAMES,
    FakeTensorMode,
    accept_empty_slots,
    decode_by,
    enable_checkpointing,
    forget_accelerators,
    has_default_gate,
    is_loaded,
    is_replica,
    is_split_by_plan,
    kept_accelerators,
    model_classes,
    plain_forward,
    storage_key,
    stream_error,
    takes_lengths,
    weights_later,
)
from rmoe.model import RMoEForSequenceClassification
from tests.model.small import config, model, tokens
from tests.versions import older


def test_the_cache_has_one_of_two_names() -> None:
    named = set(CACHE_NAMES) & set(inspect.signature(LlamaAttention.forward).parameters)
    assert named == {CACHE}
    assert CACHE in inspect.signature(OlmoeForCausalLM.forward).parameters


def test_every_attention_keyword_of_transformers_is_known() -> None:
    own = {
        "num_items_in_batch",
        "position_ids",
        "output_hidden_states",
        "output_router_logits",
    }  # ours by name
    assert set(TransformersKwargs.__annotations__) - own <= ATTENTION_KEYWORDS


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_both_names_of_the_cache_work(name: str) -> None:
    net, ids = model().eval(), tokens(2, 9)
    want = net(ids).logits
    cache = DynamicCache(config=net.config)
    first = net(ids[:, :5], **{name: cache}).logits
    rest = net(ids[:, 5:], **{name: cache})
    assert (torch.cat((first, rest.logits), 1) - want).abs().max() < 1e-5
    assert rest[CACHE] is cache
    other = DynamicCache(config=net.config)
    assert net(ids[:, :2], cache=other, past_key_values=cache)[CACHE] is cache  # the one that holds tokens
    net(ids, cache=other)
    assert net(ids[:, :2], cache=other, past_key_values=cache)[CACHE] is other


@pytest.mark.parametrize("of", ["trunk", "causal", "classifier"])
def test_an_unknown_keyword_is_an_error_that_names_it(of: str) -> None:
    net = RMoEForSequenceClassification(config(num_labels=2)) if of == "classifier" else model()
    called = net.model if of == "trunk" else net
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_keys'"):
        called(tokens(), past_keys=None)


def test_attention_gets_its_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    forward = LlamaAttention.forward

    def spy(self: LlamaAttention, *args: object, **kwargs: object) -> object:
        seen.append(set(kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", spy)
    net = model()
    net(tokens(), attention_instances={0: None})
    assert len(seen) == net.config.num_hidden_layers
    assert all("attention_instances" in names for names in seen)


def test_checkpointing_has_one_of_two_names() -> None:
    net = model().train()
    enable_checkpointing(net)
    assert all(layer.gradient_checkpointing for layer in net.model.layers)
    assert any(
        hasattr(PreTrainedModel, f"{kind}_checkpointing_enable") for kind in ("activation", "gradient")
    )


def test_flags_are_heeded_from_the_configuration_and_the_call() -> None:
    net, ids = model(attention="eager").eval(), tokens(2, 7)
    layers = net.config.num_hidden_layers
    plain = net(ids)
    assert plain.hidden_states is plain.attentions is plain.router_logits is plain.aux_loss is None
    assert plain[CACHE].get_seq_length() == 7
    assert CACHE not in net(ids, use_cache=False)
    flags = ("output_hidden_states", "output_attentions", "output_router_logits")
    asked = net(ids, **dict.fromkeys(flags, True))
    for flag in flags:
        setattr(net.config, flag, True)
    configured = net(ids)
    for out in (asked, configured):
        assert len(out.hidden_states) == layers + 1
        assert [tuple(a.shape) for a in out.attentions] == [
            (2, net.config.num_attention_heads, 7, 7)
        ] * layers
        assert [tuple(r.shape) for r in out.router_logits] == [
            (14, net.config.num_experts)
        ] * net.config.num_moe_layers
        assert torch.equal(out.hidden_states[-1], net.trunk(ids).last_hidden_state)
        assert torch.equal(out.balance_loss, net.balance_loss(net.trunk(ids)))
    assert net(ids, output_attentions=False).attentions is None
    # As tuples, the balance loss comes before the logits.
    assert torch.equal(net(ids, return_dict=False)[1], plain.logits)
    net.config.return_dict = False
    assert torch.equal(net(ids)[1], plain.logits)


def private_uses(source: str) -> list[str]:
    """Private names of other packages in a module: attributes of anything but self and super(), imports, strings."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and not _is_own(node.value):
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("rmoe"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if _is_private(name)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in (
            "getattr",
            "setattr",
            "hasattr",
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(str(name.value)):
                found.append(str(name.value))
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_TUPLES


def _is_own(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return getattr(value.func, "id", None) == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


OF_TUPLES = {"_replace", "_asdict", "_fields", "_exit"}
"""Public, whatever their names look like: of named tuples, and `os._exit`."""

STILL_PRIVATE: dict[str, set[str]] = {}
"""What has not moved to `rmoe/compat.py` yet; it can only shrink."""


def test_private_names_of_other_packages_are_in_one_file() -> None:
    root = Path(rmoe.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        if names := set(private_uses(path.read_text())):
            found[str(path.relative_to(root))] = names
    del found["compat.py"]
    assert found == STILL_PRIVATE


def test_a_private_name_is_found() -> None:
    source = "from torch._x import y\nmodel._hooked = getattr(model, '_plan')\nself._own = super()._init(a._replace())"
    assert set(private_uses(source)) == {"_x", "_hooked", "_plan"}


def test_everything_an_auto_class_has_for_a_configuration() -> None:
    found = [(auto.__name__, made.__name__) for auto, made in model_classes(OlmoeConfig)]
    assert ("AutoModelForCausalLM", "OlmoeForCausalLM") in found
    assert ("AutoModel", "OlmoeModel") in found
    assert not list(model_classes(int))


def test_experts_as_transformers_decorates_them() -> None:
    experts = model().model.layers[1].mlp.experts
    assert has_default_gate(experts)
    assert plain_forward(experts) is not type(experts).forward
    assert list(inspect.signature(plain_forward(experts)).parameters)[1:] == [
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ]
    accept_empty_slots(experts)
    ids, weights = torch.tensor([[0, 5]]), torch.tensor([[0.5, 0.0]])
    x = torch.randn(1, 36, generator=torch.Generator().manual_seed(0))
    for name in ("eager", "grouped_mm", "batched_mm"):
        experts.config._experts_implementation = name
        alone = experts(x, ids[:, :1], weights[:, :1])
        torch.testing.assert_close(experts(x, ids, weights), alone)  # index E is an empty slot


def test_marks_that_others_leave() -> None:
    layer = nn.Linear(2, 2)
    assert not any((is_loaded(layer), is_loaded(layer.weight), is_replica(layer), is_split_by_plan(layer)))
    assert "_is_replica" in inspect.getsource(nn.Module._replicate_for_data_parallel)
    assert "_is_hf_initialized" in inspect.getsource(PreTrainedModel.initialize_weights) + inspect.getsource(
        PreTrainedModel._initialize_weights
    )
    assert "_is_hooked" in inspect.getsource(tensor_parallel)
    if not older("transformers", "5.23"):  # below, the experts take empty slots unasked
        assert "_is_expert_parallel" in inspect.getsource(moe)


def test_an_accelerator_of_another_precision_in_one_process() -> None:
    for precision in ("no", "bf16", "no"):
        forget_accelerators()
        assert Accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision
    with pytest.raises(ValueError, match="mixed_precision='bf16'"):  # what it is for
        Accelerator(cpu=True, mixed_precision="bf16")


def test_an_accelerator_is_what_it_was_after_another() -> None:
    forget_accelerators()
    with kept_accelerators():
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
        with kept_accelerators():
            forget_accelerators()
            Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=1)
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 4)
    assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"


def test_tensors_of_one_storage_have_one_key() -> None:
    with FakeTensorMode():
        whole = torch.empty(4)
        assert storage_key(whole) == storage_key(whole[1:]) != storage_key(torch.empty(4))


def test_which_attention_takes_lengths() -> None:
    settings = config()
    for name in ("sdpa", "eager", "flex_attention", None):
        settings._attn_implementation = name
        assert not takes_lengths(settings)
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        settings._attn_implementation_internal = name
        assert takes_lengths(settings)


def test_a_streamer_decodes_by_what_it_is_given() -> None:
    pytest.importorskip("fastapi")
    from transformers.cli.serving.utils import DirectStreamer

    streamer, found = (
        DirectStreamer(None, SimpleNamespace(call_soon_threadsafe=lambda f, x: f(x)), Queue()),
        [],
    )
    streamer._queue = SimpleNamespace(put_nowait=found.append)
    decode_by(streamer, SimpleNamespace(step=lambda backend, token: f"<{token}>"))
    streamer.put(torch.tensor([7]))  # the prompt
    streamer.put(torch.tensor([3]))
    assert found == ["<3>"]
    with pytest.raises(AttributeError, match="compat"):
        decode_by(SimpleNamespace(), None)


def test_an_error_ends_a_stream_of_transformers_server() -> None:
    pytest.importorskip("fastapi")
    from transformers.cli.serving import completion

    assert isinstance(stream_error("why"), completion._StreamError)  # what the handler asks each item
    assert stream_error("why").msg == "why"


def test_a_model_is_made_without_its_weights_and_filled_part_by_part(tmp_path: Path) -> None:
    """Experts that are apart in the file are joined, buffers that are in no file are computed, nothing is drawn."""
    small = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=3,
    )
    OlmoeForCausalLM(small).save_pretrained(tmp_path)
    whole = rmoe.load(tmp_path)
    with weights_later() as later:
        empty = rmoe.load(tmp_path)
    assert all(parameter.is_meta for parameter in empty.parameters())
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, dict(empty.named_buffers())[name])
    first = [key for key, name in later.target.items() if name.startswith("model.layers.0.")]
    assert any(".experts.2.gate_proj" in key for key in first)
    assert {later.target[k] for k in first if ".experts." in k} == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    later.load(first, torch.device("cpu"))
    for name, parameter in empty.named_parameters():
        assert parameter.is_meta != name.startswith("model.layers.0."), name
    later.load([key for key in later.target if key not in first], torch.device("cpu"))
    for name, parameter in empty.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
