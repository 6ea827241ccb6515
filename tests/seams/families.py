"""The four models of the table, tiny: transformers' OLMoE as the control, RMoE, and two grafts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoeModel,
    OlmoePreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rmoe.graft import GraftSpec, graft
from rmoe.model import RMoEConfig, RMoEForCausalLM, RMoEForSequenceClassification, RMoEModel
from rmoe.routing.recurrence import Recurrence
from tests.graft.conftest import at_work

VOCAB = 320
EXPERTS = 8
LAYERS = 2
PAD, BOS, EOS = 0, 1, 2

CACHE = "cache" if "cache" in inspect.signature(OlmoeForCausalLM.forward).parameters else "past_key_values"
"""What the installed transformers calls the key-value cache: `cache` from 5.24 on."""

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_SPEC = GraftSpec(recurrence=Recurrence.Config(width=8), seed=3)


class OlmoeForSequenceClassification(GenericForSequenceClassification, OlmoePreTrainedModel):  # type: ignore[misc]
    """transformers has no classifier for OLMoE; this is how it makes every other family's."""


AutoModelForSequenceClassification.register(OlmoeConfig, OlmoeForSequenceClassification, exist_ok=True)


def olmoe_classifier_known() -> bool:
    """Whether that took effect: older releases of transformers register nothing for configurations of their own."""
    try:
        AutoModelForSequenceClassification.from_config(FAMILIES[CONTROL].config())
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Family:
    """One column of the table: makes a tiny model for each task, the same weights each time.

    `sizes` are the configuration's fields beyond the common ones.
    """

    name: str
    config_class: type[PreTrainedConfig]
    classes: dict[str, type[PreTrainedModel]]
    sizes: dict[str, Any]
    finish: Callable[[Any], Any] = lambda model: model

    def config(self, **changes: Any) -> PreTrainedConfig:
        return self.config_class(**{**_SIZES, **self.sizes, **changes})

    def make(self, task: str, **changes: Any) -> Any:
        torch.manual_seed(0)
        return self.finish(self.classes[task](self.config(**changes))).eval()

    def causal(self, **changes: Any) -> Any:
        return self.make("causal", **changes)

    def classifier(self, **changes: Any) -> Any:
        return self.make("classifier", **changes)

    def trunk(self, **changes: Any) -> Any:
        return self.make("trunk", **changes)

    @property
    def is_graft(self) -> bool:
        return self.name.startswith("graft")


def _grafted(model: PreTrainedModel) -> PreTrainedModel:
    """Grafted, with a router state that changes the outputs."""
    return at_work(graft(copy.deepcopy(model), _SPEC))


_OLMOE = {"causal": OlmoeForCausalLM, "classifier": OlmoeForSequenceClassification, "trunk": OlmoeModel}
_QWEN3 = {
    "causal": Qwen3MoeForCausalLM,
    "classifier": Qwen3MoeForSequenceClassification,
    "trunk": Qwen3MoeModel,
}
_RMOE = {"causal": RMoEForCausalLM, "classifier": RMoEForSequenceClassification, "trunk": RMoEModel}

CONTROL = "olmoe"
FAMILIES = {
    family.name: family
    for family in (
        Family(CONTROL, OlmoeConfig, _OLMOE, {"intermediate_size": 16}),
        Family("rmoe", RMoEConfig, _RMOE, {"moe_intermediate_size": 16}),
        Family("graft-olmoe", OlmoeConfig, _OLMOE, {"intermediate_size": 16}, _grafted),
        Family(
            "graft-qwen3moe",
            Qwen3MoeConfig,
            _QWEN3,
            {"intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8},
            _grafted,
        ),
    )
}


def ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random tokens without padding, `[batch, length]`."""
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def rows(count: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    """A data set for `Trainer`."""
    return [{"input_ids": row, "labels": row} for row in ids(count, length)]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def same_weights(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 0.0) -> None:
    """Both state dicts have the same names and values."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def same_outputs(one: Any, other: Any, tokens: Tensor | None = None, tolerance: float = 1e-5) -> None:
    """Both models give the same logits (or hidden states)."""
    tokens = ids() if tokens is None else tokens
    close(one(input_ids=tokens)[0], other(input_ids=tokens)[0], tolerance)
