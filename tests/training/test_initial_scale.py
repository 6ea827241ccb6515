"""The scale of the logits at the start: reached by every scorer that has one, exactly, and nothing else moved."""

from __future__ import annotations

import copy

import pytest
import torch

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.routing.zoo import find
from rmoe.training.initial_scale import measure, require_scale, start_at
from tests.training import tiny

IDS = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(0))
SCALED = [
    "smoe", "random-smoe", "smoe-mlp", "xmoe", "cosine-moe", "xmoe-reference", "hyper-moe", "rmoe", "rmoe-norm",
    "low-rank-norm", "eda", "eda-linear", "path-moe", "omni-router", "deepseek-v3", "noisy-topk", "smoe-annealed",
]  # fmt: skip


def model_of(router: str, seed: int = 0) -> RMoEForCausalLM:
    config = RMoEConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_experts=5,
        num_experts_per_tok=find(router).top_k or 2,
        moe_intermediate_size=16,
        router=find(router).spec.to_dict(),
    )
    model = RMoEForCausalLM(config)
    initialize(model, seed)
    return model


def naive(model: RMoEForCausalLM) -> list[float]:
    """In float64, from the raw logits, token by token."""
    model.eval()
    with torch.no_grad():
        routing = model(input_ids=IDS, use_cache=False, output_routing=True).routing
    found = []
    for layer in routing:
        logits = layer.logits.double()
        centred = logits - logits.mean(-1, keepdim=True)
        found.append(float((centred.square().sum(-1) / (logits.shape[-1] - 1)).mean().sqrt()))
    return found


@pytest.mark.parametrize("router", SCALED)
def test_every_layer_starts_at_the_target(router):
    model = model_of(router)
    before = naive(model)
    found = start_at(model, IDS, 1.3)
    assert found.drawn == pytest.approx(before, rel=1e-5)
    after = naive(model)
    assert found.start == pytest.approx(after, rel=1e-5)
    shares = router in ("path-moe", "omni-router")  # layers that share a scorer meet the target together
    groups = {"path-moe": [after[:2], after[2:]], "omni-router": [after]}.get(
        router, [[value] for value in after]
    )
    for group in groups:
        pooled = (sum(value**2 for value in group) / len(group)) ** 0.5
        assert pooled == pytest.approx(1.3, rel=2e-3)
    assert shares or after == pytest.approx([1.3] * 3, rel=2e-3)


def test_only_the_scorers_move_and_only_by_a_factor():
    model = model_of("rmoe")
    before = copy.deepcopy(model.state_dict())
    start_at(model, IDS, 0.5)
    for name, tensor in model.state_dict().items():
        ratio = tensor.double() / before[name].double()
        if "scorer" in name:
            assert float(ratio.std() / ratio.mean()) < 1e-5, name
        else:
            assert torch.equal(tensor, before[name]), name


def test_residual_scores_have_their_own_scores_at_the_target():
    model = model_of("rmoe-np-r1.0")
    first, *above = start_at(model, IDS, 1.0).start
    assert first == pytest.approx(1.0, rel=2e-3)
    assert all(1.0 < value < 2.0 for value in above)  # own scores plus the layer's below


def test_without_a_target_it_only_measures():
    model = model_of("smoe")
    before = copy.deepcopy(model.state_dict())
    found = start_at(model, IDS, None)
    assert found.start == found.drawn == measure(model, IDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert start_at(model_of("hash"), IDS, None) is None


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ("hash", "router.kind hash: it has no scorer"),
        ("stable-moe", "router.kind stable: it has no scorer"),
        ("stable-moe-onestage", "scorer.kind half_cosine: it has no scale"),
    ],
)
def test_a_router_without_a_scale_is_refused_by_name(router, said):
    with pytest.raises(RequestError, match=rf"training.initial_logit_std is 1.0; allowed: None with {said}"):
        require_scale(model_of(router), 1.0)


def test_what_a_cosine_cannot_reach_is_refused():
    with pytest.raises(
        RequestError, match=r"initial_logit_std is 1000.0; allowed: a smaller value \(the cosine's"
    ):
        start_at(model_of("xmoe"), IDS, 1000.0)


def test_the_scale_of_a_zoo_row_is_what_its_initialisation_says():
    """Against closed forms: G normal with std s on unit-scale inputs gives s sqrt(features)."""
    from experiments.zoo_page.cost import MEDIUM
    from experiments.zoo_page.logit_scale import initial_logit_std

    for router, expected in (("smoe", 0.02 * 352**0.5), ("rmoe-norm", 1.0), ("xmoe", 2 / 16**0.5)):
        assert initial_logit_std(find(router).spec, MEDIUM) == pytest.approx(expected, rel=0.05)
    assert initial_logit_std(find("hash").spec, MEDIUM) is None


def test_a_resumed_run_has_its_scale_measured_once(text, tmp_path, monkeypatch):
    """It stands in config.json; a finished run is not even built again."""
    from rmoe.training import run as module

    calls = []
    real = module.start_at
    monkeypatch.setattr(module, "start_at", lambda *given: calls.append(given) or real(*given))
    config = tiny.config(text, max_steps=4)
    first = module.train(config, tmp_path / "run", progress=False)
    assert len(calls) == 1
    monkeypatch.setattr(module, "build_model", lambda *given: pytest.fail("built again"))
    assert module.train(config, tmp_path / "run", resume=True, progress=False) == first
    monkeypatch.undo()
    monkeypatch.setattr(module, "start_at", lambda *given: calls.append(given) or real(*given))
    (tmp_path / "run" / "result.json").unlink()
    again = module.train(config, tmp_path / "run", resume=True, progress=False)
    assert len(calls) == 1
    assert again.initial_logits == first.initial_logits
