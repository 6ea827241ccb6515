"""The card of a trained model, from its run's result."""

from __future__ import annotations

from rmoe.model.card import Metric, ModelCard
from rmoe.results.run import RunResult
from rmoe.routing.describe import equation, stages
from rmoe.routing.spec import RouterSpec

LOAD = """import rmoe
from transformers import AutoTokenizer

model = rmoe.load(folder)  # or, after import rmoe: AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""


def training_card(result: RunResult) -> ModelCard:
    """Data, router, metrics and how to load the model, of a run that is finished but for its model."""
    config, spec = result.config, RouterSpec.from_dict(result.router_spec)
    training, model = config["training"], config["model"]
    found = (("validation", result.val), ("test", result.test))
    context = result.context or ""
    if result.test_context not in (None, context):
        context = f"{context} (validation), and from {result.test_context} (test)"
    return ModelCard(
        title=f"{result.router}-{config['preset']}",
        summary=(
            f"A Mixture-of-Experts language model with the router `{result.router}`, trained from random weights for "
            f"{result.steps:,} steps ({result.tokens:,} tokens). It has had no safety training and no evaluation "
            "beyond the metrics below."
        ),
        data=result.corpus.name,
        metrics=tuple(
            Metric(split=split, unit=result.corpus.unit, value=value)
            for split, value in found
            if value is not None
        ),
        context=context,
        load=LOAD,
        tables={
            "Router": {"name": result.router, **stages(spec), "equation": f"`{equation(spec)}`"},
            "Data": {"text": result.corpus.name, "sha256 of the encoded text": result.corpus.sha256},
            "Model": {
                "layers": model["num_hidden_layers"],
                "width": model["hidden_size"],
                "experts": f"{model['num_experts']}, {model['num_experts_per_tok']} per token",
                "parameters": f"{result.parameters.total:,}",
                "active per token": f"{result.parameters.active:,}",
                "router": f"{result.parameters.router:,}",
            },
            "Training": {
                "preset": config["preset"],
                "seed": result.seed,
                "batch": f"{training['batch_size']} x {training['sequence_length']} tokens",
                "learning rate": f"{training['learning_rate']}, {training['schedule']}",
                "skipped batches": result.skipped_batches,
                "code": result.versions.code,
                **{name: result.versions.libraries.get(name, "-") for name in ("torch", "transformers")},
                "hardware": result.hardware.accelerator or result.hardware.cpu,
            },
        },
    )
