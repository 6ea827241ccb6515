"""What the slow jobs run in a process of its own: `python -m tests.seams.child VERB FOLDER OUT`.

A verb loads the model in FOLDER its own way and writes logits of `ids()` to OUT.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

TOKENS = torch.arange(2 * 9).reshape(2, 9) % 200 + 7


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def registered(folder: str) -> Tensor:
    """After `import rmoe` alone; stdin is closed, so a question would be an error."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    import rmoe  # noqa: F401

    config = AutoConfig.from_pretrained(folder)
    assert AutoModel.from_pretrained(folder).config.model_type == config.model_type
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [97, 98]
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def remote(folder: str) -> Tensor:
    """With `trust_remote_code=True` and without importing this package."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    assert "rmoe" not in sys.modules
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    return logits(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))


def tensor_parallel(folder: str) -> Tensor:
    """Under torchrun, with `tp_plan="auto"`."""
    from transformers import AutoModelForCausalLM

    import rmoe.graft  # noqa: F401

    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16
    return logits(model)


def step(folder: str) -> Tensor:
    """One step of Trainer on 8 sequences, on as many processes as there are; then the logits."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    import rmoe.graft  # noqa: F401

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    args = TrainingArguments(
        folder + "-run", max_steps=1, per_device_train_batch_size=8 // processes, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=1e-3, gradient_checkpointing=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    t = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)
    t.train()
    assert t.args.world_size == processes
    return logits(model)


if __name__ == "__main__":
    verb, source, out = sys.argv[1:]
    result = {"registered": registered, "remote": remote, "tp": tensor_parallel, "step": step}[verb](source)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(result, out)
