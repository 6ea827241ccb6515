"""The model as an object: copied, pickled, converted, saved, loaded, spread over devices and processes."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import rmoe
from rmoe.data.encode import byte_tokenizer
from rmoe.errors import RequestError
from tests.seams.child import TOKENS
from tests.seams.child import logits as child_logits
from tests.seams.families import CACHE, EXPERTS, LAYERS, VOCAB, Family, close, ids, same_outputs, same_weights
from tests.seams.generation import generate, uncached
from tests.seams.job import job

OBJECT = "Copies and conversions"
FILES = "Files and loading"
PLACES = "Devices and processes"
PIPELINES = "Pipelines"
ROOT = Path(__file__).parents[2]


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids() if tokens is None else tokens).logits


def _changed(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


# ---- copies and conversions -------------------------------------------------------------------------------------


@job(OBJECT, "`copy.deepcopy`: the same outputs, and nothing shared")
def deep_copy(family: Family, tmp: Path) -> None:
    model = family.causal()
    before = logits(model)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    close(logits(twin), before, 0.0)
    _changed(twin)
    assert not torch.allclose(logits(twin), before)
    close(logits(model), before, 0.0)


@job(OBJECT, "`pickle`: model and configuration")
def pickled(family: Family, tmp: Path) -> None:
    model = family.causal()
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    close(logits(twin), logits(model))
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
    twin.save_pretrained(tmp)
    same_weights(AutoModelForCausalLM.from_pretrained(tmp), model)


@job(OBJECT, "`torch.save(model)`")
def torch_saved(family: Family, tmp: Path) -> None:
    model = family.causal()
    torch.save(model, tmp / "model.pt")
    close(logits(torch.load(tmp / "model.pt", weights_only=False)), logits(model))


@job(OBJECT, "a state dict saved, and loaded into a new model")
def state_dict(family: Family, tmp: Path) -> None:
    model = family.causal()
    _changed(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = family.causal()
    fresh.load_state_dict(torch.load(buffer))
    close(logits(fresh), logits(model))


def _send_logits(model: Any, queue: Any) -> None:
    queue.put(child_logits(model).tolist())


@job(OBJECT, "sent to a process started by `spawn`", slow=True)
def spawned(family: Family, tmp: Path) -> None:
    model = family.causal()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_send_logits, args=(model, queue))
    process.start()
    got = torch.tensor(queue.get(timeout=120))
    process.join()
    close(got, child_logits(model), 1e-5)


@job(OBJECT, "`half()` and `bfloat16()`: forward, loss, gradient, generation")
def half_precision(family: Family, tmp: Path) -> None:
    want = logits(family.causal())
    for dtype in (torch.float16, torch.bfloat16):
        model = family.causal().to(dtype)
        got = logits(model)
        assert got.dtype == dtype
        assert (got.float() - want).norm() < 0.25 * want.norm()
        loss = model(input_ids=ids(), labels=ids(), output_router_logits=True).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert generate(model).shape == (2, 17)


@job(OBJECT, "`double()`: forward, loss, gradient, generation")
def double_precision(family: Family, tmp: Path) -> None:
    single = family.causal()
    model = family.causal().double()
    got = logits(model)
    assert got.dtype == torch.float64
    close(got.float(), logits(single), 1e-3)
    model(input_ids=ids(), labels=ids(), output_router_logits=True).loss.backward()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)
    assert torch.equal(generate(model), uncached(model))


@job(OBJECT, "`float16` and back, and `to` on part of the model")
def back_to_float(family: Family, tmp: Path) -> None:
    model = family.causal()
    want = logits(model)
    got = logits(model.half().float())
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()


def _resized(family: Family, folder: Path, **changes: Any) -> None:
    for size, multiple in ((VOCAB + 11, None), (VOCAB + 11, 64), (VOCAB - 20, None)):
        model = family.causal(**changes)
        before = logits(model, ids() % 200)
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        width = model.get_input_embeddings().num_embeddings
        assert model.config.vocab_size == width == (384 if multiple else size)
        got = logits(model, ids() % 200)
        assert got.shape[-1] == width
        close(got[..., :200], before[..., :200])
        last = torch.tensor([[5, width - 1]])
        model(input_ids=last, labels=last).loss.backward()
        model.save_pretrained(folder / f"{width}")
        loaded = AutoModelForCausalLM.from_pretrained(folder / f"{width}")
        same_weights(loaded, model)
        close(logits(loaded, last), logits(model, last))


@job(OBJECT, "`resize_token_embeddings`: larger, to a multiple, smaller; saved and loaded")
def resized(family: Family, tmp: Path) -> None:
    _resized(family, tmp)


@job(OBJECT, "`resize_token_embeddings` with every router that reads token ids")
def resized_id_routers(family: Family, tmp: Path) -> None:
    routers: tuple[dict[str, Any], ...] = ({},)
    if family.name == "rmoe":
        routers = ({"router": "hash"}, {"router": "stable-moe", "num_experts_per_tok": 1})
    for number, changes in enumerate(routers):
        _resized(family, tmp / str(number), **changes)


@job(
    OBJECT, "embeddings and head read and replaced (`get_`, `set_input_embeddings`, `set_output_embeddings`)"
)
def replaced_embeddings(family: Family, tmp: Path) -> None:
    model = family.causal()
    head = nn.Linear(32, 7, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    assert logits(model).shape == (2, 9, 7)
    model.set_input_embeddings(nn.Embedding(400, 32))
    assert logits(model, torch.tensor([[399, 3]])).shape == (1, 2, 7)


@job(OBJECT, "tied weights: one tensor in memory and on disk, tied again after loading, resizing, deepcopy")
def tied_weights(family: Family, tmp: Path) -> None:
    def tied(model: Any) -> bool:
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    model = family.causal(tie_word_embeddings=True)
    assert tied(model)
    model.save_pretrained(tmp)
    loaded = AutoModelForCausalLM.from_pretrained(tmp)
    assert tied(loaded)
    same_outputs(loaded, model)
    assert tied(copy.deepcopy(loaded))
    loaded.resize_token_embeddings(340)
    assert tied(loaded)
    loaded(input_ids=ids(), labels=ids()).loss.backward()
    assert loaded.get_input_embeddings().weight.grad.abs().sum() > 0


@job(OBJECT, "`torch.func.functional_call` with other weights")
def functional_call(family: Family, tmp: Path) -> None:
    model = family.causal()
    other = {name: value + 0.05 for name, value in model.state_dict().items() if value.is_floating_point()}
    got = torch.func.functional_call(model, other, (), {"input_ids": ids()}).logits
    model.load_state_dict(other, strict=False)
    close(got.detach(), logits(model))


@job(OBJECT, "`torch.inference_mode`, then training")
def inference_then_training(family: Family, tmp: Path) -> None:
    model = family.causal()
    with torch.inference_mode():
        model(input_ids=ids())
    model.train()(input_ids=ids(), labels=ids()).loss.backward()


@job(OBJECT, "frozen parts: only what requires gradients gets them; `enable_input_require_grads`")
def frozen_parts(family: Family, tmp: Path) -> None:
    model = family.causal().requires_grad_(False)
    head = model.get_output_embeddings().weight.requires_grad_(True)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert [p for p in model.parameters() if p.grad is not None] == [head] or head.grad is not None
    head.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(input_ids=ids()).logits.requires_grad


@job(OBJECT, "counts: `num_parameters`, `get_memory_footprint`")
def counts(family: Family, tmp: Path) -> None:
    model = family.causal()
    total = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == total
    assert model.get_memory_footprint(return_buffers=False) == 4 * total


@job(OBJECT, "the configuration: to a dict, to JSON and back; a copy made by `from_config`")
def configuration(family: Family, tmp: Path) -> None:
    config = family.causal(router_aux_loss_coef=0.3).config
    assert json.loads(config.to_json_string(use_diff=False)) == json.loads(json.dumps(config.to_dict()))
    config.save_pretrained(tmp)
    again = AutoConfig.from_pretrained(tmp)
    assert type(again) is type(config)
    assert again.router_aux_loss_coef == 0.3
    assert again.num_experts == EXPERTS
    assert copy.deepcopy(config) == config
    model = AutoModelForCausalLM.from_config(again)
    assert type(model) is type(family.causal())
    assert model.state_dict().keys() == family.causal().state_dict().keys()


@job(OBJECT, "`torch.export`, fixed and free sizes", slow=True)
def exported(family: Family, tmp: Path) -> None:
    model = family.causal(experts_implementation="batched_mm")
    inputs = {"input_ids": ids(), "use_cache": False}
    program = torch.export.export(model, (), inputs)
    close(program.module()(**inputs).logits, logits(model), 1e-4)
    sizes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    free = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
    other = ids(3, 5)
    close(free(input_ids=other, use_cache=False).logits, logits(model, other), 1e-4)


class _Plain(nn.Module):
    """Ids in, logits out: what ONNX knows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits


@job(OBJECT, "ONNX, run by onnxruntime", slow=True, needs=("onnx", "onnxscript", "onnxruntime"))
def onnx(family: Family, tmp: Path) -> None:
    import onnxruntime

    model = family.causal(experts_implementation="batched_mm")
    torch.onnx.export(_Plain(model), (ids(),), tmp / "model.onnx", dynamo=True, input_names=["input_ids"])
    session = onnxruntime.InferenceSession(tmp / "model.onnx")
    close(torch.from_numpy(session.run(None, {"input_ids": ids().numpy()})[0]), logits(model), 1e-3)


@job(OBJECT, "torchao: int8 weights, in memory and by `from_pretrained`", slow=True, needs=("torchao",))
def torchao(family: Family, tmp: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    model = family.causal()
    want = logits(model)
    model.save_pretrained(tmp)
    quantize_(model, Int8WeightOnlyConfig())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    for quantised in (model, loaded):
        assert type(quantised.model.layers[0].self_attn.q_proj.weight) is not nn.Parameter
        got = logits(quantised)
        assert (got - want).norm() < 0.1 * want.norm()
        assert generate(quantised).shape == (2, 17)


# ---- files and loading ------------------------------------------------------------------------------------------


@job(FILES, "`save_pretrained`, `from_pretrained`: the same class, configuration, weights and outputs")
def saved(family: Family, tmp: Path) -> None:
    model = family.causal()
    _changed(model)
    model.save_pretrained(tmp)
    loaded, report = type(model).from_pretrained(tmp, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.to_diff_dict().keys() >= {"architectures"}
    same_weights(loaded, model)
    same_outputs(loaded, model)


@job(FILES, "in shards, with a variant")
def shards(family: Family, tmp: Path) -> None:
    model = family.causal()
    model.save_pretrained(tmp, max_shard_size="30KB", variant="test")
    assert len(list(tmp.glob("model.test-*.safetensors"))) > 2
    same_weights(AutoModelForCausalLM.from_pretrained(tmp, variant="test"), model)


@job(FILES, "the Auto classes on one folder: trunk from language model, classifier from trunk")
def auto_classes(family: Family, tmp: Path) -> None:
    model = family.causal()
    model.save_pretrained(tmp / "causal")
    trunk = AutoModel.from_pretrained(tmp / "causal")
    same_weights(trunk, model.model)
    trunk.save_pretrained(tmp / "trunk")
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp / "trunk", num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"score.weight"}
    same_weights(classifier.model, model.model)
    again, report = AutoModelForCausalLM.from_pretrained(tmp / "trunk", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    same_weights(again.model, model.model)


@job(FILES, "a classifier saved and loaded, and with another number of labels (`ignore_mismatched_sizes`)")
def classifier_saved(family: Family, tmp: Path) -> None:
    model = family.classifier(num_labels=3)
    model.save_pretrained(tmp)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp)
    assert loaded.config.num_labels == 3
    same_outputs(loaded, model)
    other = AutoModelForSequenceClassification.from_pretrained(
        tmp, num_labels=5, ignore_mismatched_sizes=True
    )
    assert logits(other).shape == (2, 5)


@job(FILES, 'loaded in bfloat16, `dtype="auto"`, and saved again')
def saved_in_bfloat16(family: Family, tmp: Path) -> None:
    family.causal().save_pretrained(tmp / "single")
    low = AutoModelForCausalLM.from_pretrained(tmp / "single", dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    low.save_pretrained(tmp / "low")
    again = AutoModelForCausalLM.from_pretrained(tmp / "low", dtype="auto")
    assert again.dtype == torch.bfloat16
    same_weights(again, low)
    assert torch.equal(logits(again), logits(low))


@job(FILES, "fields and implementations changed in `from_pretrained`")
def changed_in_from_pretrained(family: Family, tmp: Path) -> None:
    family.causal().save_pretrained(tmp)
    model = AutoModelForCausalLM.from_pretrained(
        tmp, router_aux_loss_coef=0.5, attn_implementation="eager", experts_implementation="eager"
    )
    assert model.config.router_aux_loss_coef == 0.5
    assert model.config._attn_implementation == "eager"
    same_outputs(model, family.causal())


@job(FILES, "`rmoe.load(folder, field=value)` changes the field, and refuses one that is not there")
def rmoe_load(family: Family, tmp: Path) -> None:
    family.causal().save_pretrained(tmp)
    model = rmoe.load(tmp, router_aux_loss_coef=0.5, output_router_logits=True, use_cache=False)
    assert model.config.router_aux_loss_coef == 0.5
    out = model(input_ids=ids(), labels=ids())
    assert out.router_logits is not None
    assert out.get(CACHE) is None
    plain = rmoe.load(tmp, router_aux_loss_coef=0.0, output_router_logits=True)(input_ids=ids(), labels=ids())
    assert out.loss > plain.loss
    with pytest.raises(RequestError, match="no_such_field"):
        rmoe.load(tmp, no_such_field=1)


@job(FILES, "`rmoe.load` of a classifier and of a trunk, in another dtype")
def rmoe_load_classes(family: Family, tmp: Path) -> None:
    for name, model in (("classifier", family.classifier(num_labels=3)), ("trunk", family.trunk())):
        model.save_pretrained(tmp / name)
        loaded = rmoe.load(tmp / name)
        assert type(loaded) is type(model)
        same_outputs(loaded, model)
        assert rmoe.load(tmp / name, dtype="bfloat16").dtype == torch.bfloat16


@job(FILES, "a checkpoint that lacks weights: reported, and started as a new model starts")
def lacking_weights(family: Family, tmp: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = family.causal()
    model.save_pretrained(tmp)
    tensors = load_file(tmp / "model.safetensors")
    gone = [name for name in tensors if ".gate." in name or "router" in name]
    assert gone
    save_file(
        {n: t for n, t in tensors.items() if n not in gone},
        tmp / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp, output_loading_info=True)
    assert set(report["missing_keys"]) == set(gone)
    fresh = AutoModelForCausalLM.from_config(model.config).state_dict()
    for name in gone:  # finite, and of the size that a new model's values have
        value, start = loaded.state_dict()[name].float(), fresh[name].float()
        assert torch.isfinite(value).all(), name
        assert value.abs().max() <= 3 * start.abs().max() + 1e-6, name


@job(FILES, "built on the meta device, then `to_empty` and `init_weights` (FSDP, torchtitan)")
def deferred_initialisation(family: Family, tmp: Path) -> None:
    # The control has no buffers; for RMoE, every kind of router state that lives in one.
    routers = (
        ("rmoe", "deepseek-v3", "remoe", "eda", "hash", "smoe-annealed") if family.name == "rmoe" else (None,)
    )
    for router in routers:
        config = family.config(**({} if router is None else {"router": router}))
        direct = AutoModelForCausalLM.from_config(config) if not family.is_graft else family.causal()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(direct.config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(77)
        model.init_weights()
        for (name, got), (_, want) in zip(model.named_buffers(), direct.named_buffers(), strict=True):
            assert torch.equal(got, want), f"{router}: {name}"
        for name, parameter in model.named_parameters():
            assert not (parameter == 77).any(), f"{router}: {name}"


@job(FILES, "the weights as safetensors: readable names, none twice")
def safetensors_names(family: Family, tmp: Path) -> None:
    from safetensors import safe_open

    model = family.causal()
    model.save_pretrained(tmp)
    with safe_open(tmp / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata()["format"] == "pt"
    assert any(".self_attn.q_proj.weight" in name for name in names)
    if family.name != "rmoe":  # a graft leaves the base's own names as they are
        base = {name for name in names if "router_" not in name}
        assert sum(".mlp.gate.weight" in name for name in base) == LAYERS
        assert any(".mlp.experts.0." in name for name in base)


# ---- devices and processes --------------------------------------------------------------------------------------


def _cells_on(model: Any) -> list[str]:
    """Where the shared cell is, by module path; OLMoE has none."""
    return [f"model.{name}" for name, _ in model.model.named_children() if name.startswith("router_")]


def _cell_map(model: Any, place: str) -> dict[str, str]:
    rest = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return rest | {"model.layers.1": "disk", "model.norm": "disk"} | dict.fromkeys(_cells_on(model), place)


def _dispatched(family: Family, folder: Path, device_map: Any, **more: Any) -> None:
    model = family.causal()
    model.save_pretrained(folder / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map=device_map, offload_folder=folder / "offload", **more
    )
    close(logits(loaded), logits(model))
    assert torch.equal(generate(loaded), uncached(model))


@job(PLACES, "`device_map`: half of the layers on disk, the shared cell in memory")
def layers_on_disk(family: Family, tmp: Path) -> None:
    _dispatched(family, tmp, _cell_map(family.causal(), "cpu"))


@job(PLACES, "`device_map`: the shared cell on disk too")
def cell_on_disk(family: Family, tmp: Path) -> None:
    _dispatched(family, tmp, _cell_map(family.causal(), "disk"))


@job(PLACES, '`device_map="auto"` with too little memory')
def auto_device_map(family: Family, tmp: Path) -> None:
    _dispatched(family, tmp, "auto", max_memory={"cpu": 90_000})


@job(PLACES, '`device_map="cpu"`, `low_cpu_mem_usage=True`')
def on_the_cpu(family: Family, tmp: Path) -> None:
    _dispatched(family, tmp, "cpu", low_cpu_mem_usage=True)


@job(PLACES, "accelerate's `cpu_offload`: weights fetched for each module as it runs")
def cpu_offload(family: Family, tmp: Path) -> None:
    from accelerate import cpu_offload as offload

    model = family.causal()
    want = logits(model)
    offloaded = offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    close(logits(offloaded), want)
    assert torch.equal(generate(offloaded), uncached(model))


@job(PLACES, "accelerate's `disk_offload`")
def disk_offload(family: Family, tmp: Path) -> None:
    from accelerate import disk_offload as offload

    model = family.causal()
    want = logits(model)
    close(logits(offload(copy.deepcopy(model), tmp, execution_device=torch.device("cpu"))), want)


@job(PLACES, "accelerate's `init_empty_weights` and `load_checkpoint_and_dispatch`")
def empty_then_loaded(family: Family, tmp: Path) -> None:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    model = family.causal()
    # transformers saves a family's experts one by one; accelerate reads tensors by the names of the model in memory.
    torch.save(model.state_dict(), tmp / "pytorch_model.bin")
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = load_checkpoint_and_dispatch(
        empty, str(tmp / "pytorch_model.bin"), device_map={"": "cpu"}
    ).eval()
    close(logits(loaded), logits(model))


@job(PLACES, "accelerate's `prepare`, `accumulate`, `clip_grad_norm_`, `unwrap_model`, `save_model`")
def accelerator(family: Family, tmp: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = family.causal().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    for part in ids(4).split(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=part, labels=part).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    assert type(plain) is type(family.causal())
    accelerator.save_model(model, tmp)
    fresh = family.causal()
    from safetensors.torch import load_file

    fresh.load_state_dict(load_file(tmp / "model.safetensors"))
    same_outputs(fresh, plain.eval())


def _child(command: list[str], verb: str, folder: Path, out: Path) -> Tensor:
    """Run `tests.seams.child` and read what it wrote."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "-m", "tests.seams.child", verb, str(folder), str(out)], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


def _in_a_child(command: list[str], verb: str) -> Callable[[Family, Path], None]:
    def function(family: Family, tmp: Path) -> None:
        model = family.causal()
        model.save_pretrained(tmp / "saved")
        byte_tokenizer().save_pretrained(tmp / "saved")
        close(_child(command, verb, tmp / "saved", tmp / "logits.pt"), child_logits(model), 1e-4)

    return function


_PYTHON = [sys.executable]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
           "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


@job(
    FILES,
    "`AutoConfig`, `AutoModel`, `AutoTokenizer` after `import rmoe`, without a question on the terminal",
    slow=True,
)
def after_import(family: Family, tmp: Path) -> None:
    _in_a_child(_PYTHON, "registered")(family, tmp)


@job(FILES, "`trust_remote_code=True`, this package installed and not imported", slow=True)
def remote_code(family: Family, tmp: Path) -> None:
    _in_a_child(_PYTHON, "remote")(family, tmp)


@job(FILES, "`AutoConfig` keeps `auto_map`, which TRL loads models by")
def auto_map(family: Family, tmp: Path) -> None:
    family.causal().save_pretrained(tmp)
    written = json.loads((tmp / "config.json").read_text())
    if family.name == "olmoe":
        assert "auto_map" not in written
        return
    read = AutoConfig.from_pretrained(tmp)
    assert read.auto_map == written["auto_map"]
    AutoModelForCausalLM.from_pretrained(tmp).save_pretrained(tmp / "again")
    assert json.loads((tmp / "again" / "config.json").read_text())["auto_map"] == written["auto_map"]


@job(PLACES, '`tp_plan="auto"` on two processes: the same outputs', slow=True)
def tensor_parallel(family: Family, tmp: Path) -> None:
    _in_a_child(_TORCHRUN, "tp")(family, tmp)


def _step_in_a_child(command: list[str]) -> Callable[[Family, Path], None]:
    """Trainer takes one step in the children, on the batch that one process takes here."""

    def function(family: Family, tmp: Path) -> None:
        from tests.seams.trainer import trainer

        model = family.causal(router_aux_loss_coef=0.0)  # a balance loss of parts is not that of the whole
        model.save_pretrained(tmp / "saved")
        got = _child(command, "step", tmp / "saved", tmp / "logits.pt")
        rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
        args = {
            "max_steps": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "gradient_checkpointing": True,
        }
        trainer(model, tmp, args, train_dataset=rows).train()
        close(got, child_logits(model), 1e-4)

    return function


@job(PLACES, "Trainer under `accelerate launch`", slow=True)
def accelerate_launch(family: Family, tmp: Path) -> None:
    _step_in_a_child(_LAUNCH)(family, tmp)


@job(PLACES, "Trainer under `torchrun` on two processes (DDP): the step of one process", slow=True)
def two_processes(family: Family, tmp: Path) -> None:
    _step_in_a_child(_TORCHRUN)(family, tmp)


# ---- pipelines --------------------------------------------------------------------------------------------------


def _with_tokenizer(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@job(PIPELINES, "text-generation, batched, from objects and from a folder")
def text_generation(family: Family, tmp: Path) -> None:
    model = family.causal(pad_token_id=257, eos_token_id=256, bos_token_id=256)
    tokenizer = AutoTokenizer.from_pretrained(_with_tokenizer(model, tmp))
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": 4, "do_sample": False, "return_tensors": True}
    of_objects = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    of_folder = pipeline("text-generation", model=str(tmp), device="cpu")
    texts = ["Hello there", "Hi"]
    want = [of_folder(text, **options)[0]["generated_token_ids"] for text in texts]
    assert [of_objects(text, **options)[0]["generated_token_ids"] for text in texts] == want
    batched = of_objects(texts, batch_size=2, **options)
    assert [[token for token in row[0]["generated_token_ids"] if token != 257] for row in batched] == want


@job(PIPELINES, "text-classification, batched as alone")
def text_classification(family: Family, tmp: Path) -> None:
    _with_tokenizer(family.classifier(num_labels=3, pad_token_id=257), tmp)
    classify = pipeline("text-classification", model=str(tmp), device="cpu", top_k=None)
    texts = ["Hello there", "Hi"]
    alone = [classify(text) for text in texts]
    alone = [found[0] if isinstance(found[0], list) else found for found in alone]
    for batched, single in zip(classify(texts, batch_size=2), alone, strict=True):
        for one, other in zip(batched, single, strict=True):
            assert one["label"] == other["label"]
            assert abs(one["score"] - other["score"]) < 1e-4


@job(PIPELINES, "feature-extraction")
def feature_extraction(family: Family, tmp: Path) -> None:
    trunk = family.trunk(pad_token_id=257)
    features = pipeline("feature-extraction", model=trunk, tokenizer=byte_tokenizer(), device="cpu")
    with torch.no_grad():
        want = trunk(input_ids=torch.tensor([list(b"Hello")]))[0]
    close(features("Hello", return_tensors=True), want, 1e-4)
