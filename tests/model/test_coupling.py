"""The ERC loss: against plain loops, its proxies' bound, and what it does in a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.model.coupling import erc_loss, proxies
from rmoe.parallel.config import ParallelConfig
from rmoe.parallel.fit import misfit
from rmoe.routing.noise import Noise
from tests.model.small import config, loss_and_gradients, model, tokens, with_lora_on_experts


def weights(seed: int = 0, experts: int = 5, inner: int = 7, width: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(experts, width, dtype=torch.float64, generator=generator)
    first = torch.randn(experts, inner, width, dtype=torch.float64, generator=generator)
    return vectors.requires_grad_(), first.requires_grad_()


def noise(key: int = 3) -> Noise:
    return Noise(torch.tensor(key))


def in_loops(vectors: Tensor, first: Tensor, alpha: float, noise: Noise | None) -> Tensor:
    """From the definition, a pair of experts at a time."""
    total, count = vectors.new_zeros(()), len(vectors)
    read = proxies(vectors, noise)

    def answer(i: int, j: int) -> Tensor:
        return sum((first[j, n] @ read[i]) ** 2 for n in range(first.shape[1])).sqrt()

    for i in range(count):
        for j in range(count):
            if i != j:
                total = total + torch.clamp(answer(i, j) - alpha * answer(i, i), min=0)
                total = total + torch.clamp(answer(j, i) - alpha * answer(i, i), min=0)
    return total / count**2


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("noisy", [True, False])
def test_it_equals_plain_loops(alpha: float, noisy: bool) -> None:
    """float64, value and gradients, 1e-10."""
    inputs = weights()
    got = erc_loss(*inputs, alpha, noise() if noisy else None)
    want = in_loops(*inputs, alpha, noise() if noisy else None)
    assert abs(float(got - want)) < 1e-10
    assert float(got) > 0
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_a_proxy_is_nearest_to_its_own_vector(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(9, 13, dtype=torch.float64, generator=generator)
    vectors[1] = vectors[0] + 0.01 * vectors[1]  # two that are close
    vectors[2] *= scale
    moved = [proxies(vectors, noise(key)) for key in range(40)]
    for one in moved:
        assert torch.equal(torch.cdist(one, vectors).argmin(-1), torch.arange(9))
    apart = (torch.cdist(vectors, vectors) + torch.eye(9) * 1e9).amin(-1)
    reach = (apart / vectors.norm(dim=-1) / 2).clamp(max=1)
    assert reach[0] < 0.05  # its neighbour leaves it little room
    draws = torch.stack([one / vectors - 1 for one in moved]) / reach[:, None]  # [40, 9, 13], in (-1, 1)
    assert draws.abs().max() <= 1 + 1e-6
    assert draws.min() < -0.99
    assert draws.max() > 0.99
    assert abs(float(draws.mean())) < 0.03
    first = noise(0).uniform(vectors)  # the sign of the noise, too
    assert torch.allclose(draws[0], 2 * first - 1)
    assert torch.equal(proxies(vectors, None), vectors)


def test_one_expert_has_nobody_to_be_kept_from() -> None:
    vectors, first = weights(experts=1)
    loss = erc_loss(vectors, first, 1.0, noise())
    assert float(loss) == 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (vectors, first)))


def test_by_it_alone_each_vector_excites_its_own_expert_most() -> None:
    vectors, first = weights(experts=6)
    optimizer = torch.optim.Adam([vectors, first], lr=0.02)
    for step in range(300):
        optimizer.zero_grad()
        erc_loss(vectors, first, 0.7, noise(step)).backward()
        optimizer.step()
    norms = torch.einsum("id,jnd->ijn", vectors, first).norm(dim=-1)
    own = norms.diagonal()
    others = norms.masked_fill(torch.eye(6, dtype=torch.bool), 0)
    assert (others.amax(0) < 0.75 * own).all()
    assert (others.amax(1) < 0.75 * own).all()


EVERY = ["smoe", "smoe-topk-softmax", "deepseek-v3", "noisy-topk", "longcat", "omni-router", "moepp-residual"]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("router", EVERY)
def test_in_a_model_it_is_the_mean_over_layers_in_training(router: str, gated: bool) -> None:
    changes = {} if gated else {"mlp_gated": False, "hidden_act": "relu"}
    net, plain = (model(router=router, erc_loss_coef=c, erc_alpha=0.8, **changes) for c in (0.5, 0.0))
    ids = tokens()
    for part in (net, plain):
        part.train()
        part.set_routing_noise(1, 0)
    with_it, without = net(ids, labels=ids), plain(ids, labels=ids)
    assert torch.equal(with_it.lm_loss, without.lm_loss), "the routers' own noise has changed"
    total = torch.zeros(())
    for layer in net.model.layers[1:]:
        experts, geometry = layer.mlp.experts, layer.mlp.gate.geometry
        first = experts.gate_up_proj[:, : experts.intermediate_dim] if gated else experts.up_proj
        vectors = layer.mlp.gate.experts_matrix(net.model.router_shared)[: len(first)]
        key = net.model.routing_noise_key
        stream = Noise(key, geometry.num_layers + geometry.layer_index)
        total = total + in_loops(vectors, first, 0.8, stream)
    difference = with_it.balance_loss - without.balance_loss
    assert float(difference) == pytest.approx(0.5 * float(total) / 2, rel=1e-5)
    assert net.eval()(ids, labels=ids).balance_loss == plain.eval()(ids, labels=ids).balance_loss


def test_it_depends_on_no_token_and_reaches_both_sides() -> None:
    net = model(router="smoe", erc_loss_coef=1.0).train()
    found = []
    for ids in (tokens(), tokens(2, 7, seed=5)):
        net.set_routing_noise(4, 0)
        found.append([float(r.penalty) for r in net.trunk(ids).routing])
    assert found[0] == found[1]
    net.zero_grad()
    net.set_routing_noise(4, 0)
    sum(r.penalty for r in net.trunk(tokens()).routing).backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".", 3)[-1] for name in touched} == {
        "mlp.gate.scorer.linear.weight",
        "mlp.experts.gate_up_proj",
    }


def test_autocast_leaves_it_in_float32() -> None:
    net, found = model(router="smoe", erc_loss_coef=1.0).train(), []
    for low in (False, True):
        net.set_routing_noise(4, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            found.append([float(r.penalty) for r in net.trunk(tokens()).routing])
    assert found[0] == found[1]


def test_recomputation_sees_the_same_proxies() -> None:
    found = []
    for recompute in (False, True):
        net = model(router="smoe", erc_loss_coef=1.0).train()
        if recompute:
            net.gradient_checkpointing_enable()
        net.set_routing_noise(4, 0)
        found.append(loss_and_gradients(net, tokens()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).norm() <= 1e-5 * gradient.norm(), name


def test_it_is_saved(tmp_path: Path) -> None:
    model(router="smoe", erc_loss_coef=0.3, erc_alpha=0.5).save_pretrained(tmp_path)
    loaded = RMoEForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.erc_loss_coef, loaded.config.erc_alpha) == (0.3, 0.5)
    assert loaded.model.layers[1].mlp.config.erc_loss_coef == 0.3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router": "rmoe"}, "erc_loss_coef is 1.0; allowed: 0 with this router"),
        ({"router": "mcf-moe"}, "erc_loss_coef is 1.0; allowed: 0 with this router"),
        ({"router": "acmoe"}, "erc_loss_coef is 1.0; allowed: 0 with this router"),
        ({"router": "smoe-mlp"}, "erc_loss_coef"),
        ({"router": "cosine-moe"}, "erc_loss_coef"),
        ({"router": "hash"}, "erc_loss_coef"),
        ({"erc_loss_coef": -1.0}, "erc_loss_coef is -1.0; allowed: 0 or more"),
        ({"erc_loss_coef": float("nan")}, "erc_loss_coef"),
        ({"erc_alpha": 1.5}, "erc_alpha is 1.5; allowed: 0 to 1"),
    ],
)
def test_refused(changes: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        config(**{"router": "smoe", "erc_loss_coef": 1.0, **changes})


def test_refused_when_the_router_is_set_later() -> None:
    settings = config(router="smoe", erc_loss_coef=1.0)
    settings.router = "rmoe"
    with pytest.raises(RequestError, match="erc_loss_coef"):
        RMoEForCausalLM(settings)


@pytest.mark.parametrize("groups", [{"ep_size": 2}, {"tp_size": 2}, {"enable_expert_parallel": True}])
def test_refused_with_experts_cut_up(groups: dict) -> None:
    settings = config(router="smoe", erc_loss_coef=1.0)
    settings.distributed_config = SimpleNamespace(**groups)
    with pytest.raises(RequestError, match="erc_loss_coef"):
        RMoEForCausalLM(settings)


def test_refused_in_such_a_layout() -> None:
    settings = config(router="smoe", erc_loss_coef=1.0, num_experts=4)
    assert "erc_loss_coef" in str(misfit(settings, ParallelConfig(fsdp=2, expert=2)))
    assert misfit(settings, ParallelConfig(fsdp=2)) is None


def test_refused_with_lora_on_the_experts() -> None:
    net, ids = with_lora_on_experts(model(router="smoe", erc_loss_coef=1.0)), tokens()
    with pytest.raises(RequestError, match=r"erc_loss_coef is 1\.0; allowed: 0 with experts in a"):
        net.train()(input_ids=ids, labels=ids)


def test_a_schedule_can_set_it_while_it_trains() -> None:
    net, ids = model(router="smoe", erc_loss_coef=1.0, router_aux_loss_coef=0.0).train(), tokens()
    net.set_routing_noise(0, 0)
    assert float(net(ids, labels=ids).balance_loss) > 0
    net.config.erc_loss_coef = 0.0
    assert float(net(ids, labels=ids).balance_loss) == 0
    assert not net.model.uses_noise
    rmoe = model(router="rmoe")
    with pytest.raises(RequestError, match="erc_loss_coef"):
        rmoe.config.erc_loss_coef = 1.0


def test_with_an_adapter_on_the_router_it_reads_what_the_router_computes() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        target_modules=[], target_parameters=["scorer.linear.weight"], init_lora_weights=False
    )
    net = model(router="smoe", erc_loss_coef=1.0, router_aux_loss_coef=0.0)
    net, ids = peft.get_peft_model(net, lora).train(), tokens()
    outputs = net(input_ids=ids, labels=ids)
    outputs.balance_loss.backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert found
    assert all(g is not None and g.abs().sum() > 0 for g in found.values())
    gate = net.base_model.model.model.layers[1].mlp.gate
    x = torch.randn(4, 36)
    logits = gate.scorer(x, shared=None, noise=None)
    assert torch.allclose(x @ gate.experts_matrix(None).mT, logits, atol=1e-5)
