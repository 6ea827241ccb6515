"""Every experts path equals the plain one: outputs and gradients, odd sizes, idle experts, low precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations import moe

from rmoe.errors import RequestError
from rmoe.model.experts import choose_experts, sorted_experts
from rmoe.model.layers import GatedExperts, UngatedExperts, _Experts
from tests.model.small import POST, PRE, config, model, tokens

DECISIONS = {
    "even": lambda t, e: torch.stack((torch.arange(t) % e, (torch.arange(t) + 1) % e), -1),
    "uneven": lambda t, e: torch.stack(
        (torch.zeros(t).long(), 1 + torch.arange(t) % 2), -1
    ),  # 3 and 4 are idle
    "one expert": lambda t, e: torch.tensor([[2, e]]).repeat(t, 1),
    "empty slots": lambda t, e: torch.randint(0, e + 1, (t, 2), generator=torch.Generator().manual_seed(1)),
    "nothing": lambda t, e: torch.full((t, 2), e),
}


def experts(implementation: str, gated: bool, dtype: torch.dtype, **sizes: int) -> _Experts:
    settings = config(**(PRE if gated else POST), **sizes)
    settings._experts_implementation = implementation
    torch.manual_seed(0)
    built = (GatedExperts if gated else UngatedExperts)(settings)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    built._is_expert_parallel = True
    return built.to(dtype)


def outputs_and_gradients(
    built: _Experts, decision: str, dtype: torch.dtype, count: int = 23
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, built.hidden_dim, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(count, 2, generator=generator).to(dtype)
    index = DECISIONS[decision](count, 5)
    weights = weights.masked_fill(index == 5, 0.0).requires_grad_()
    out = built(x, index, weights)
    if out.requires_grad:  # the plain loop's does not when nobody computes
        out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    found |= {name: p.grad for name, p in built.named_parameters()}
    return {name: torch.zeros(()) if value is None else value for name, value in found.items()}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("count", [1, 23])
def test_equals_the_plain_loop(decision: str, gated: bool, count: int) -> None:
    got, want = (
        outputs_and_gradients(experts(path, gated, torch.float64), decision, torch.float64, count)
        for path in ("sorted_mm", "eager")
    )
    for name, value in want.items():
        assert (got[name] - value).abs().max() < 1e-12, name


@pytest.mark.parametrize("gated", [True, False])
def test_bfloat16_within_its_own_error(gated: bool) -> None:
    """Relative error at most 2 % of the norm: bfloat16 rounds to 0.4 %, and a few such errors add up."""
    exact = outputs_and_gradients(experts("eager", gated, torch.float64), "even", torch.float64)
    low = outputs_and_gradients(experts("sorted_mm", gated, torch.bfloat16), "even", torch.bfloat16)
    for name, value in exact.items():
        assert (low[name].double() - value).norm() < 0.02 * value.norm(), name


def test_the_operator_keeps_torchs_rules() -> None:
    x, weights = torch.randn(7, 6, requires_grad=True), torch.rand(7, 2, requires_grad=True)
    up, down = torch.randn(3, 8, 6, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    index = torch.randint(0, 4, (7, 2))
    torch.library.opcheck(sorted_experts, (x, index, weights, up, down, "silu"))


def test_same_bits_twice() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        once, twice = (
            outputs_and_gradients(experts("sorted_mm", True, torch.float32), "uneven", torch.float32)
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_one_token_without_gradients_reads_chosen_experts_only() -> None:
    built = experts("sorted_mm", True, torch.float64)
    x, index = torch.randn(1, 36, dtype=torch.float64), torch.tensor([[3, 5]])
    weights = torch.tensor([[0.7, 0.0]], dtype=torch.float64)
    want = built(x, index, weights).detach()
    built.gate_up_proj.data[:3] = torch.nan
    built.down_proj.data[4] = torch.nan
    with torch.no_grad():
        assert (built(x, index, weights) - want).abs().max() < 1e-12


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("path", ["auto", "sorted_mm", "grouped_mm", "batched_mm"])
def test_autocast_computes_in_bfloat16(path: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path's products, and so its result, are in autocast's dtype; gradients are in the weights' own."""
    products: list[torch.dtype] = []
    for name in ("_grouped_linear", "_batched_linear"):
        monkeypatch.setattr(moe, name, _recording(getattr(moe, name), products))
    sizes = {"hidden_size": 48, "moe_intermediate_size": 24}
    exact = outputs_and_gradients(experts("eager", gated, torch.float32, **sizes), "even", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = outputs_and_gradients(experts(path, gated, torch.float32, **sizes), "even", torch.float32)
    assert low["out"].dtype == torch.bfloat16
    assert set(products) == ({torch.bfloat16} if path in ("grouped_mm", "batched_mm") else set())
    assert low["down_proj"].dtype == low["x"].dtype == torch.float32
    for name, value in exact.items():
        assert 0 < (low[name].float() - value).norm() < 0.02 * value.norm(), name


def test_autocast_with_rows_torch_cannot_group() -> None:
    built = experts("grouped_mm", True, torch.float32)  # 36 wide
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs_and_gradients(built, "even", torch.float32)["out"].dtype == torch.float32


def _recording(function: Callable[..., Tensor], products: list[torch.dtype]) -> Callable[..., Tensor]:
    def linear(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        products.extend((x.dtype, weight.dtype))
        return function(x, weight, *args, **kwargs)

    return linear


def test_auto_is_the_default_and_a_pure_function() -> None:
    assert type(model().model)(config()).config._experts_implementation == "auto"

    def choose(device: str, dtype: torch.dtype, tokens: int, grad: bool, compiled: bool = False) -> str:
        rows = tokens / 8
        return choose_experts(device, dtype, tokens, rows, 352, 352, grad=grad, compiled=compiled)

    assert choose("cpu", torch.float32, 4096, True) == "sorted_mm"
    assert choose("cpu", torch.float32, 8, True) == "sorted_mm"
    assert choose("cpu", torch.float32, 8, False) == "grouped_mm"
    assert choose("cpu", torch.float32, 512, False) == "sorted_mm"
    assert choose("cpu", torch.float32, 1, False) == "sorted_mm"  # reads the chosen experts only
    assert choose("cpu", torch.float32, 1, False, compiled=True) == "batched_mm"
    assert choose("cuda", torch.bfloat16, 4096, True) == "grouped_mm"
    assert choose("cuda", torch.float32, 4096, True) == "sorted_mm"
    assert choose("cuda", torch.float32, 1, False) == "batched_mm"  # no wait for the device
    odd = choose_experts("cuda", torch.bfloat16, 4096, 512, 36, 20, grad=True, compiled=False)
    assert odd == "sorted_mm"


@pytest.mark.parametrize(
    ("dtype", "hidden", "width"),
    [(torch.float32, 32, 90), (torch.float32, 34, 16), (torch.bfloat16, 32, 20), (torch.bfloat16, 36, 16)],
)
def test_auto_computes_odd_sizes_without_gradients_too(dtype: torch.dtype, hidden: int, width: int) -> None:
    """torch's grouped product wants rows of whole 16 bytes; what trains must also generate."""
    net = model(router="smoe", hidden_size=hidden, moe_intermediate_size=width, experts="auto").to(dtype)
    ids = tokens(1, 5)
    with torch.no_grad():
        short = net(ids).logits
    torch.testing.assert_close(short, net(ids).logits.detach())


def test_auto_asks_for_rows_of_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    built, asked = experts("auto", True, torch.float32), []

    def choose(*sizes: Any, grad: bool, compiled: bool) -> str:
        asked.append((*sizes, grad, compiled))
        return "eager"

    monkeypatch.setattr("rmoe.model.experts.choose_experts", choose)
    built(torch.randn(10, 36), torch.zeros(10, 2).long(), torch.rand(10, 2))
    with torch.no_grad():
        built(torch.randn(1, 36), torch.zeros(1, 2).long(), torch.rand(1, 2))
    width = built.intermediate_dim
    assert asked == [
        ("cpu", torch.float32, 10, 4.0, 36, width, True, False),
        ("cpu", torch.float32, 1, 0.4, 36, width, False, False),
    ]


def test_unknown_activation() -> None:
    built = experts("sorted_mm", True, torch.float32)
    built.config.hidden_act = "tanh"
    with pytest.raises(RequestError):
        built(torch.randn(2, 36), torch.zeros(2, 2).long(), torch.rand(2, 2))
    built.config._experts_implementation = "auto"  # takes the plain loop
    assert built(torch.randn(2, 36), torch.zeros(2, 2).long(), torch.rand(2, 2)).shape == (2, 36)


def test_empty_experts_have_zero_gradients() -> None:
    found = outputs_and_gradients(experts("sorted_mm", True, torch.float32), "uneven", torch.float32)
    assert (found["gate_up_proj"][3:] == 0).all()
    assert (found["down_proj"][3:] == 0).all()
    net = model(experts="sorted_mm")
    net(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
