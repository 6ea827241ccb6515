"""Mixture-of-Experts language models whose router has a memory across layers (arXiv:2408.06793).

Importing `rmoe` is cheap: nothing here imports torch until a name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and the reference see of the names below
    from rmoe.errors import RequestError, RunError
    from rmoe.model import RMoEConfig, RMoEForCausalLM, RMoEForSequenceClassification, RMoEModel
    from rmoe.model.loading import load
    from rmoe.model.updates import RouterUpdates
    from rmoe.routing.spec import RouterSpec

from rmoe.auto import register_when_asked

__version__ = "0.1.0"

# name -> module that defines it; resolved on first use so that `rmoe zoo` never pays for torch.
_LAZY = {
    "load": "rmoe.model.loading",
    "RMoEConfig": "rmoe.model",
    "RMoEModel": "rmoe.model",
    "RMoEForCausalLM": "rmoe.model",
    "RMoEForSequenceClassification": "rmoe.model",
    "RouterSpec": "rmoe.routing.spec",
    "RouterUpdates": "rmoe.model.updates",
    "RequestError": "rmoe.errors",
    "RunError": "rmoe.errors",
}

__all__ = [
    "RMoEConfig",
    "RMoEForCausalLM",
    "RMoEForSequenceClassification",
    "RMoEModel",
    "RequestError",
    "RouterSpec",
    "RouterUpdates",
    "RunError",
    "__version__",
    "load",
]


register_when_asked()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rmoe' has no attribute {name!r}")
