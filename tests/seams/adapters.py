"""PEFT and TRL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rmoe.data.encode import byte_tokenizer
from tests.seams.families import Family, close, ids, same_outputs
from tests.seams.generation import generate, uncached
from tests.seams.job import job
from tests.seams.trainer import trainer

PEFT = "PEFT"
TRL = "TRL"

NEEDS = ("peft",)
ATTENTION = ["q_proj", "v_proj"]
EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def logits(model: Any) -> Tensor:
    """Of the 9 tokens of `ids()`, whatever an adapter puts before them."""
    with torch.no_grad():
        return model(input_ids=ids()).logits[:, -9:]


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **changes})


def trained(model: Any, config: Any, steps: int = 2) -> Any:
    """`model` with an adapter, after a few steps that must reach it and nothing else."""
    from peft import get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, config).train()
    weights = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= weights.keys()
    return adapted.eval()


def _saved_and_loaded(family: Family, folder: Path, config: Any) -> Any:
    """Train an adapter, save it, load it onto a fresh model: the same outputs, and others than the base's."""
    from peft import PeftModel

    model = family.causal()
    base = logits(model)
    adapted = trained(model, config)
    want = logits(adapted)
    assert not torch.allclose(want, base)
    adapted.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(family.causal(), folder).eval()
    close(logits(loaded), want)
    return adapted


@job(PEFT, "LoRA on attention: train, save, load, generate", needs=NEEDS)
def lora_attention(family: Family, tmp: Path) -> None:
    adapted = _saved_and_loaded(family, tmp, lora())
    assert torch.equal(generate(adapted), uncached(adapted))


@job(PEFT, "LoRA on `all-linear`", needs=NEEDS)
def lora_all_linear(family: Family, tmp: Path) -> None:
    _saved_and_loaded(family, tmp, lora(target_modules="all-linear"))


@job(PEFT, "LoRA on the experts (`target_parameters`)", needs=NEEDS)
def lora_experts(family: Family, tmp: Path) -> None:
    _saved_and_loaded(family, tmp, lora(target_modules=[], target_parameters=EXPERT_WEIGHTS))


@job(
    PEFT,
    "LoRA on attention and experts, merged and unloaded: a plain model with the same outputs",
    needs=NEEDS,
)
def lora_merged(family: Family, tmp: Path) -> None:
    model = family.causal()
    kind = type(model)
    adapted = trained(model, lora(target_parameters=EXPERT_WEIGHTS))
    want = logits(adapted)
    adapted.merge_adapter()
    close(logits(adapted), want, 1e-4)
    adapted.unmerge_adapter()
    close(logits(adapted), want, 1e-4)
    merged = adapted.merge_and_unload()
    assert type(merged) is kind
    close(logits(merged), want, 1e-4)
    merged.save_pretrained(tmp)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp)), want, 1e-4)


@job(PEFT, "LoRA unloaded or switched off: the base again", needs=NEEDS)
def lora_unloaded(family: Family, tmp: Path) -> None:
    model = family.causal()
    base = logits(model)
    adapted = trained(model, lora(target_parameters=EXPERT_WEIGHTS))
    with adapted.disable_adapter():
        close(logits(adapted), base)
    close(logits(adapted.unload()), base)


@job(PEFT, "LoRA on the router's weight", needs=NEEDS)
def lora_router(family: Family, tmp: Path) -> None:
    router = "mlp.gate.scorer.linear.weight" if family.name == "rmoe" else "mlp.gate.weight"
    _saved_and_loaded(family, tmp, lora(target_modules=[], target_parameters=[router]))


@job(PEFT, "several adapters: added, chosen, mixed, deleted", needs=NEEDS)
def several_adapters(family: Family, tmp: Path) -> None:
    model = family.causal()
    base = logits(model)
    adapted = trained(model, lora())
    first = logits(adapted)
    adapted.add_adapter("second", lora(init_lora_weights=False))
    adapted.set_adapter("second")
    second = logits(adapted)
    assert not torch.allclose(first, second)
    adapted.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", combination_type="linear")
    adapted.set_adapter("mixed")
    assert not torch.allclose(logits(adapted), first)
    adapted.delete_adapter("mixed")
    adapted.set_adapter("default")
    close(logits(adapted), first)
    with adapted.disable_adapter():
        close(logits(adapted), base)


@job(PEFT, "`modules_to_save`: the gates, and with a shared cell the cell, trained whole", needs=NEEDS)
def modules_to_save(family: Family, tmp: Path) -> None:
    cell = {"rmoe": ["router_shared"], "olmoe": []}.get(family.name, ["router_cell"])
    adapted = _saved_and_loaded(family, tmp, lora(modules_to_save=["gate", *cell]))
    saved = {name for name, p in adapted.named_parameters() if p.requires_grad}
    for part in ("gate", *cell):
        assert any(f".{part}." in name for name in saved), part
    want = logits(adapted)
    close(logits(adapted.merge_and_unload()), want, 1e-4)


@job(PEFT, "`modules_to_save`: embedding and head, after new tokens were added", needs=NEEDS)
def modules_to_save_embeddings(family: Family, tmp: Path) -> None:
    from peft import PeftModel

    def grown() -> Any:
        model = family.causal()
        model.resize_token_embeddings(324, mean_resizing=False)
        return model

    torch.manual_seed(0)
    adapted = trained(grown(), lora(modules_to_save=["embed_tokens", "lm_head"]))
    want = adapted(input_ids=torch.tensor([[5, 322]])).logits
    assert want.shape[-1] == 324
    adapted.save_pretrained(tmp)
    torch.manual_seed(0)
    close(PeftModel.from_pretrained(grown(), tmp).eval()(input_ids=torch.tensor([[5, 322]])).logits, want)


@job(PEFT, "IA3", needs=NEEDS)
def ia3(family: Family, tmp: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    adapted = _saved_and_loaded(family, tmp, config)
    want = logits(adapted)
    close(logits(adapted.merge_and_unload()), want, 1e-4)


@job(PEFT, "prompt tuning: train, save, load, generate", needs=NEEDS)
def prompt_tuning(family: Family, tmp: Path) -> None:
    from peft import PromptTuningConfig

    _generates_what_forward_says(
        _saved_and_loaded(family, tmp, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    )


def _generates_what_forward_says(adapted: Any) -> None:
    """Each new token is the likeliest one in a forward over the whole text."""
    text = generate(adapted)
    with torch.no_grad():
        assert torch.equal(text[:, 9:], adapted(input_ids=text[:, :-1]).logits[:, -8:].argmax(-1))


def _prefix() -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")


@job(PEFT, "prefix tuning: train, save, load, generate", needs=NEEDS)
def prefix_tuning(family: Family, tmp: Path) -> None:
    adapted = _saved_and_loaded(family, tmp, _prefix())
    assert generate(adapted).shape == (2, 17)


@job(PEFT, "prefix tuning: generation reads the prefix", needs=NEEDS)
def prefix_generation(family: Family, tmp: Path) -> None:
    adapted = trained(family.causal(), _prefix(), steps=20)
    _generates_what_forward_says(adapted)


@job(PEFT, "LoRA under Trainer with gradient checkpointing, resumed", needs=NEEDS)
def lora_under_trainer(family: Family, tmp: Path) -> None:
    from peft import get_peft_model

    def run(**more: Any) -> Any:
        torch.manual_seed(0)
        adapted = get_peft_model(family.causal(), lora(target_parameters=EXPERT_WEIGHTS))
        args = {"max_steps": 4, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 2}
        t = trainer(adapted, tmp, args)
        t.train(**more)
        assert "eval_loss" in t.evaluate()
        return adapted.eval()

    whole = run()
    close(logits(run(resume_from_checkpoint=str(tmp / "checkpoint-2"))), logits(whole), 1e-5)


@job(
    PEFT,
    "transformers' own adapters: `add_adapter`, `load_adapter`, `disable_adapters`",
    needs=("peft>=0.22",),
)
def native_adapters(family: Family, tmp: Path) -> None:
    model = family.causal()
    base = logits(model)
    model.add_adapter(lora(init_lora_weights=False))
    want = logits(model)
    assert not torch.allclose(want, base)
    model.save_pretrained(tmp)
    fresh = family.causal()
    fresh.load_adapter(str(tmp))
    close(logits(fresh), want)
    fresh.disable_adapters()
    close(logits(fresh), base)


@job(PEFT, "an adapter saved beside a saved base, loaded by `AutoPeftModelForCausalLM`", needs=NEEDS)
def auto_peft(family: Family, tmp: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    family.causal().save_pretrained(tmp / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp / "base")
    adapted = trained(model, lora())
    adapted.save_pretrained(tmp / "adapter")
    close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp / "adapter").eval()), logits(adapted))


@job(PEFT, "a classifier with LoRA: the head is trained whole", needs=NEEDS)
def lora_classifier(family: Family, tmp: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = family.classifier(num_labels=3)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS"))
    labels = torch.tensor([0, 2])
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        adapted(input_ids=ids(), labels=labels).loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp)
    loaded = PeftModel.from_pretrained(family.classifier(num_labels=3), tmp).eval()
    same_outputs(loaded, adapted)


@job(PEFT, "an adapted model copied: the copy trains alone", needs=NEEDS)
def adapted_copy(family: Family, tmp: Path) -> None:
    adapted = trained(family.causal(), lora())
    before = logits(adapted)
    twin = copy.deepcopy(adapted)
    close(logits(twin), before)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    assert not torch.allclose(logits(twin), before)
    close(logits(adapted), before)


# ---- TRL: tried outside the project's environment; skipped where it is not installed ----

CONVERSATIONS = [f"What is {n}? It is {n}." for n in range(8)]
PREFERENCES = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no"} for n in range(8)]


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, **more,
    }  # fmt: skip


def _model(family: Family, folder: Path, by_path: bool) -> Any:
    """A model loaded from a folder, as people have it, or the folder's path."""
    family.causal(pad_token_id=257, eos_token_id=256, bos_token_id=256).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model") if by_path else AutoModelForCausalLM.from_pretrained(folder / "model")


def _finite(t: Any) -> None:
    t.train()
    losses = [row["loss"] for row in t.state.log_history if "loss" in row]
    assert losses
    assert torch.isfinite(torch.tensor(losses)).all()


def _sft(family: Family, folder: Path, by_path: bool = False, **args: Any) -> None:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**_options(folder, bf16=False, max_length=32, **args))
    data = _dataset([{"text": text} for text in CONVERSATIONS])
    model = _model(family, folder, by_path)
    t = SFTTrainer(
        model=model, args=config, train_dataset=data, eval_dataset=data, processing_class=byte_tokenizer()
    )
    _finite(t)
    assert "eval_loss" in t.evaluate()


def _dpo(family: Family, folder: Path, by_path: bool = False, **args: Any) -> None:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**_options(folder, bf16=False, **args))
    model = _model(family, folder, by_path)
    _finite(
        DPOTrainer(
            model=model, args=config, train_dataset=_dataset(PREFERENCES), processing_class=byte_tokenizer()
        )
    )


def _grpo(family: Family, folder: Path, by_path: bool = False, **args: Any) -> None:
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(**_options(folder, bf16=False, num_generations=2, max_completion_length=6, **args))
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    model = _model(family, folder, by_path)
    data = _dataset([{"prompt": row["prompt"]} for row in PREFERENCES])
    _finite(
        GRPOTrainer(
            model=model, args=config, train_dataset=data, reward_funcs=reward, processing_class=tokenizer
        )
    )


_ROUTES = {
    "defaults": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "by path": {"by_path": True},
}


def _trl(run: Any, title: str, options: dict[str, Any]) -> Any:
    def function(family: Family, tmp: Path) -> None:
        run(family, tmp, **options)

    function.__name__ = f"trl{run.__name__}_{title.replace(' ', '_')}"
    return function


for _run, _called in ((_sft, "SFT"), (_dpo, "DPO"), (_grpo, "GRPO")):
    for _title, _kwargs in _ROUTES.items():
        job(TRL, f"{_called}, {_title}", slow=True, needs=("trl",))(_trl(_run, _title, _kwargs))


@job(TRL, "GRPO by path with a reference model (`beta` above 0)", slow=True, needs=("trl",))
def trl_grpo_reference(family: Family, tmp: Path) -> None:
    _grpo(family, tmp, by_path=True, beta=0.1)


@job(TRL, "SFT with a LoRA on attention and experts", slow=True, needs=("trl", "peft"))
def trl_sft_lora(family: Family, tmp: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    t = SFTTrainer(
        model=_model(family, tmp, False),
        args=SFTConfig(**_options(tmp, bf16=False, max_length=32)),
        train_dataset=_dataset([{"text": text} for text in CONVERSATIONS]),
        processing_class=byte_tokenizer(),
        peft_config=lora(target_parameters=EXPERT_WEIGHTS),
    )
    _finite(t)


@job(
    TRL, "SFT with `output_router_logits`: the balance loss is trained and logged", slow=True, needs=("trl",)
)
def trl_sft_balance(family: Family, tmp: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = family.causal(pad_token_id=257, eos_token_id=256, bos_token_id=256, output_router_logits=True)
    t = SFTTrainer(
        model=model,
        args=SFTConfig(**_options(tmp, bf16=False, max_length=32)),
        train_dataset=_dataset([{"text": text} for text in CONVERSATIONS]),
        processing_class=byte_tokenizer(),
    )
    _finite(t)
    assert any("aux_loss" in row for row in t.state.log_history)
