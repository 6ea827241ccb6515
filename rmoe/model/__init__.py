"""The HuggingFace model around `rmoe.routing`, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rmoe.compat import announce_causal_lm
from rmoe.model.configuration_rmoe import RMoEConfig
from rmoe.model.initialize import count_parameters, initialize
from rmoe.model.modeling_rmoe import RMoEForCausalLM, RMoEForSequenceClassification, RMoEModel
from rmoe.model.outputs import (
    RMoECausalLMOutputWithPast,
    RMoEModelOutputWithPast,
    RMoESequenceClassifierOutput,
)

AutoConfig.register("rmoe", RMoEConfig, exist_ok=True)
AutoModel.register(RMoEConfig, RMoEModel, exist_ok=True)
AutoModelForCausalLM.register(RMoEConfig, RMoEForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(RMoEConfig, RMoEForSequenceClassification, exist_ok=True)
announce_causal_lm("rmoe", RMoEForCausalLM.__name__)

__all__ = [
    "RMoECausalLMOutputWithPast",
    "RMoEConfig",
    "RMoEForCausalLM",
    "RMoEForSequenceClassification",
    "RMoEModel",
    "RMoEModelOutputWithPast",
    "RMoESequenceClassifierOutput",
    "count_parameters",
    "initialize",
]
