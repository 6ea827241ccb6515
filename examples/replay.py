"""Replay a generation's routing in training: both route alike, however else they differ.

    python examples/replay.py

In reinforcement learning a model generates with one program and is trained by another. Rounding alone makes them route
some tokens differently, and the ratio of their probabilities, which the loss is made of, is then noise. So the
generation's routing is recorded, and the training pass takes those experts, with weights from its own scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from rmoe.moe import record, replay

PROMPT, NEW = 6, 12


def log_probs(model: OlmoeForCausalLM, tokens: Tensor) -> Tensor:
    """Log-probability of each generated token, [B, NEW]."""
    scores = model(input_ids=tokens, use_cache=False).logits[:, PROMPT - 1 : -1].float().log_softmax(-1)
    return scores.gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)


def main() -> tuple[float, float]:
    """The largest gap between generated and trained probabilities, routed live and replayed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 8}
    config = OlmoeConfig(
        **sizes,
        initializer_range=0.2,
        num_attention_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        eos_token_id=None,
    )
    actor = OlmoeForCausalLM(config).eval()
    learner = OlmoeForCausalLM(config).eval()
    learner.load_state_dict(actor.state_dict())
    actor.bfloat16()  # as serving engines do
    prompts = torch.randint(0, 256, (4, PROMPT))
    with record(actor) as recording:
        tokens = actor.generate(prompts, max_new_tokens=NEW, do_sample=True, pad_token_id=0)
        with torch.no_grad():
            old = log_probs(actor, tokens)
    rollout = recording.select(range(len(prompts)))  # the generation's own sequences

    with torch.no_grad():
        live = float((log_probs(learner, tokens) - old).abs().mean())
    with replay(learner, rollout):
        new = log_probs(learner, tokens)
        ratio = (new - old).exp()
        advantage = torch.randn(len(prompts), 1)
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        loss.backward()  # replayed here too, where activation checkpointing runs layers again
    replayed = float((new.detach() - old).abs().mean())
    print(f"mean |log ratio|: {live:.5f} routed live, {replayed:.5f} replayed; loss {loss.item():.4f}")
    return live, replayed


if __name__ == "__main__":
    main()
