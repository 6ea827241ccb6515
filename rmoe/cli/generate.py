"""`rmoe generate`: continue a text."""

from __future__ import annotations

from rmoe.cli.arguments import require_unset
from rmoe.cli.models import Model, Plugins
from rmoe.errors import RequestError


def run(
    model: Model,
    *,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    plugin: Plugins = (),
) -> None:
    """Continue a text.

    Args:
        prompt: the text to continue.
        max_new_tokens: how many tokens to add, at most.
        temperature: 0 takes the likeliest token each time; above it tokens are drawn.
        top_p: draw only from the likeliest tokens that hold this much of the probability.
        seed: of the draws.
    """
    for name, value, allowed, ok in (
        ("--prompt", prompt, "a text that is not empty", bool(prompt)),
        ("--max-new-tokens", max_new_tokens, "1 or more", max_new_tokens >= 1),
        ("--temperature", temperature, "0 or more", temperature >= 0),
        ("--top-p", top_p, "above 0, at most 1", 0 < top_p <= 1),
        ("--seed", seed, "0 or more, below 2^63", 0 <= seed < 2**63),
        ("--prompt", ascii(prompt), "a text in UTF-8", not any("\ud800" <= c <= "\udfff" for c in prompt)),
    ):
        if not ok:
            raise RequestError(name, value, allowed)
    if not temperature:
        require_unset(run, {"top_p": top_p, "seed": seed}, ("top_p", "seed"), "with --temperature 0")

    import torch

    from rmoe.cli.models import open_model

    language_model, tokenizer, _ = open_model(model, plugin)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].shape[-1]:
        raise RequestError("--prompt", prompt, "a text of one token or more: this one has none")
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    torch.manual_seed(seed)
    tokens = language_model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
