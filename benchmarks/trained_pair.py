"""An RMoE and transformers' OLMoE of the size of the preset `quick`, trained alike, for `rmoe analyze` to be tried on.

    python -m benchmarks.trained_pair OUT [--steps 400]
    rmoe analyze OUT/rmoe --compare-with OUT/rmoe --dtype bf16 --measures load,predictability --out OUT/a

Both read the same batches of the Python standard library's source, as bytes, with AdamW and the same schedule; each is
saved with its tokenizer. What is said of them in docs/analysis.md comes from these two commands.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from rmoe.data import DataConfig, prepare
from rmoe.data.corpus import Corpus
from rmoe.training.build import build_model, model_config
from rmoe.training.config import RunConfig

BATCH, LENGTH, SEED = 8, 128, 0
RATE, WARM_UP = 3e-3, 16


def olmoe(like: RunConfig, vocab_size: int) -> OlmoeForCausalLM:
    """transformers' OLMoE with a preset's sizes and its balance loss on."""
    model = like.model
    config = OlmoeConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.moe_intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        max_position_embeddings=512,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(SEED)
    return OlmoeForCausalLM(config)


def train(model: PreTrainedModel, corpus: Corpus, steps: int) -> float:
    """Train on random windows of the text; the mean loss of the last 20 steps, in nats per byte."""
    tokens = torch.from_numpy(corpus.train.tokens.astype("int64"))
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    losses = []
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([tokens[start : start + LENGTH] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    preset = RunConfig.from_preset("quick")
    corpus = prepare(DataConfig(max_bytes=preset.data.max_bytes), LENGTH)
    ours = build_model(model_config(preset, corpus.vocab_size), SEED)
    for name, model in (("rmoe", ours), ("olmoe", olmoe(preset, corpus.vocab_size))):
        loss = train(model, corpus, arguments.steps)
        model.eval().save_pretrained(arguments.out / name)
        corpus.tokenizer.save_pretrained(arguments.out / name)
        count = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{name}: {count:,} parameters, {arguments.steps} steps, loss {loss:.3f} (balance loss included)"
        )


if __name__ == "__main__":
    main()
