"""Every promised family is analysed with every measure, not only read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import MEASURES, AnalysisOptions
from rmoe.analysis.regret import RouteRegret
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


def test_the_error_of_a_regret_is_the_standard_error_of_its_mean() -> None:
    model = tiny_model("olmoe")
    options = AnalysisOptions(measures=("regret",))
    (found,) = analyze_models([Subject("olmoe", model)], IDS.numpy(), str, options)
    assert found.regret is not None
    own, _ = RouteRegret(model, 64, options.batch_size)(IDS)
    for layer, (error, n) in enumerate(zip(found.regret.own_error, found.regret.exchanges, strict=True)):
        values = own[layer].numpy()
        values = values[np.isfinite(values)]
        assert len(values) == n
        assert error == (pytest.approx(stats.sem(values)) if n > 1 else None)
