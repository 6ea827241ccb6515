"""Tiny models with a graft that does something: `B` random, so that state and shared cell matter."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from rmoe.graft import GraftSpec, graft
from rmoe.graft.attach import OFFSET
from rmoe.routing.recurrence import Recurrence
from tests.graft.tiny_families import tiny_model

SPEC = GraftSpec(recurrence=Recurrence.Config(width=8), seed=3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars about tiny models."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)


def at_work(model: PreTrainedModel) -> PreTrainedModel:
    """Set the `B`s of a grafted model to random values, so that its router state changes its outputs."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f"{OFFSET}.B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def grafted(model_type: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny grafted model whose router state matters."""
    return at_work(graft(tiny_model(model_type, dtype=dtype), SPEC))


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(grafted())
