"""`rmoe.load`: a saved model of any kind this package writes or reads, every weight accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

import rmoe.model  # noqa: F401 - registers RMoE with the Auto classes
from rmoe.compat import model_classes
from rmoe.errors import RequestError
from rmoe.model.weights import open_weights

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    base: str | Path | None = None,
    verify: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """Load a model folder: RMoE, grafted, or any other transformers model.

    The class is the one that was saved. Weights come from safetensors only, keep the dtype they have on disk, and
    must be exactly the model's: transformers itself fills a missing weight with random numbers and a warning. A graft
    that is an adapter is joined with its base, after a check that the base is the one it was made from.

    Args:
        path: a model folder, or an id of the Hugging Face Hub.
        dtype: "auto" keeps the saved dtype.
        device: where the model goes, default the CPU.
        base: where an adapter's base is, if not where the adapter says: a folder, or a name of the Hub.
        verify: compare all bytes of an adapter's base with its digest. Without it names, dtypes and shapes of all
            tensors and a sample of their bytes are compared (`rmoe.model.weights.sample_digest`).
        changes: fields of the configuration with other values than the saved ones (`router_aux_loss_coef=0.0`,
            `norm_topk_prob=False`), or how it is computed: `attn_implementation`, `experts_implementation`.

    Returns:
        The model, in evaluation mode.

    Raises:
        RequestError: no such folder, no weights, pickled weights, an unknown model type, weights that do not fit, a
            base that is missing or another model, a change of a field that the configuration has not, or to a value
            it cannot have.
    """
    folder = Path(path)
    if folder.exists():
        open_weights(folder)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # None would ask on the terminal
    except RequestError:
        raise
    except Exception as error:  # what a damaged configuration makes transformers raise is anyone's guess
        raise RequestError("model", str(path), f"a model folder or a model of the Hub ({error})") from error
    _require_known_quantisation(config)
    computed = {name: changes.pop(name) for name in _IMPLEMENTATIONS if name in changes}
    config = _changed(config, changes)
    chosen = model_class(config)
    if base is not None or verify:
        if not hasattr(chosen, "graft_base"):
            raise RequestError(
                "base", base and str(base), f"nothing: a {config.model_type} model has no base"
            )
        computed |= {"base": base, "verify": verify}
    return read_strictly(chosen, path, config=config, dtype=dtype, **computed).to(device).eval()


def read_strictly(chosen: Any, path: str | Path, *, free: tuple[str, ...] = (), **options: Any) -> Any:
    """A class's `from_pretrained`, from safetensors alone, of weights that are exactly the model's.

    Args:
        free: beginnings of names that need not fit.
        options: further keywords of `from_pretrained`.

    Raises:
        RequestError: the files do not make a model, or the weights do not fit.
    """
    try:
        model, report = chosen.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (RequestError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:200]
        raise RequestError("model", str(path), f"files that make a model ({said})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(name for name in map(str, report[kind]) if not name.startswith(free))
        if wrong:
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise RequestError("model", str(path), f"weights that fit its configuration; {kind}: {shown}")
    return model


def _require_known_quantisation(config: Any) -> None:
    """transformers ignores a method that it does not know, with a warning, and takes the weights for plain ones.

    Raises:
        RequestError: the method is unknown.
    """
    found = getattr(config, "quantization_config", None)
    if (
        isinstance(found, dict)
        and found.get("quant_method")
        and not AutoHfQuantizer.supports_quant_method(found)
    ):
        raise RequestError(
            "quantization_config.quant_method", found["quant_method"], "a method that transformers can read"
        )


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """The configuration made anew with the changes, so that all it derives from its fields is of one piece."""
    for name, value in changes.items():
        if not hasattr(config, name):
            raise RequestError(name, value, f"a field of the {config.model_type} configuration")
    if not changes:
        return config
    values = config.to_dict()
    if "router" in changes and config.model_type == "rmoe":
        del values["norm_topk_prob"]  # it was the old router's
    try:
        return type(config).from_dict(values | changes)
    except RequestError:
        raise
    except Exception as error:  # transformers validates with errors of several kinds
        name, value = next(iter(changes.items()))
        raise RequestError(
            name, value, f"a value that the {config.model_type} configuration takes ({error})"
        ) from error


def model_class(config: Any) -> Any:
    """The class whose name was saved, among those any Auto class has for this configuration."""
    name = (config.architectures or [None])[0]
    found = (candidate for _, candidate in model_classes(type(config)))
    return next((candidate for candidate in found if candidate.__name__ == name), AutoModelForCausalLM)


def empty_model(config: Any) -> PreTrainedModel:
    """A model of this configuration on the meta device: its modules and shapes, no weights."""
    chosen = model_class(config)
    with torch.device("meta"):
        return chosen.from_config(config) if chosen is AutoModelForCausalLM else chosen(config)
