"""Every promised family is analysed with every measure, not only read."""

from __future__ import annotations

import pytest
import torch

from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import MEASURES, AnalysisOptions
from tests.graft.tiny_families import PROMISED, tiny_model

IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
EVERYWHERE = (
    "load", "coverage", "coactivation", "paths", "mi_chosen", "entropy", "top_tokens", "contexts", "similarity",
    "router_weights", "gradient_split", "predictability", "saliency", "regret",
)  # fmt: skip


@pytest.mark.parametrize("family", PROMISED)
def test_every_measure(family: str) -> None:
    options = AnalysisOptions(gradient_tokens=32, measures=tuple(MEASURES))
    (found,) = analyze_models([Subject(family, tiny_model(family))], IDS.numpy(), str, options)
    assert found.check is not None
    assert found.check.passed
    assert [name for name in EVERYWHERE if getattr(found, name) is None] == []
    assert found.balance is not None
    assert len(found.balance.switch) == found.layers
    assert found.regret is not None
    assert min(found.regret.exchanges) > 0
    linear = found.contributions is not None and all(row[0] is not None for row in found.contributions.values)
    assert linear == (family != "phimoe")  # whose norms take the mean off
