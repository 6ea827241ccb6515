"""Competition: against plain loops over tokens and experts, how often it happens, and what it is refused with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM, initialize
from rmoe.model.competition import DIVERSITY, OF_CHOSEN, compete, drawn
from rmoe.model.layers import RMoESparseMoeBlock
from rmoe.moe import record, replay
from rmoe.parallel.config import ParallelConfig
from rmoe.parallel.fit import misfit
from rmoe.routing import RouterContext, Routing
from rmoe.routing.noise import Noise
from tests import naive
from tests.model.small import config, loss_and_gradients, model, tokens, with_lora_on_experts

T, D, E, K = 11, 36, 5, 2


def block(router: str = "smoe", **changes: object) -> RMoESparseMoeBlock:
    settings = config(router=router, num_shared_experts=0, **changes)
    built = RMoESparseMoeBlock(settings, 0).double()
    built.config = settings  # type: ignore[assignment]
    initialize(built, 1)
    return built.train()


def data(seed: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, direction = (torch.randn(T, D, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, direction


def in_loops(part: RMoESparseMoeBlock, x: Tensor, routing: Routing, real: list[int], weight: float):
    """The layer's output and the loss, from the definition."""
    experts = part.experts
    first = experts.gate_up_proj if experts.gated else experts.up_proj
    rows, loss = [], x.new_zeros(())
    for t in range(len(x)):
        outputs = [naive.expert(x[t], first[n], experts.down_proj[n], experts.gated) for n in range(E)]
        answers = [sum(torch.log1p(value.exp()) for value in out) / D for out in outputs]
        chosen = sorted(range(E), key=lambda n: -float(answers[n]))[:K]
        total = sum(answers[n] for n in chosen)
        rows.append(sum(answers[n] / total * outputs[n] for n in chosen))
        if t not in real:
            continue
        scale = sum(a.exp() for a in answers)
        target = [float(a.exp() / scale) for a in answers]
        off = [(routing.probs[t, n] - target[n]) ** 2 for n in range(E)]
        taught = sum(off) / E + OF_CHOSEN * sum(off[n] for n in chosen) / K
        similar = sum(
            outputs[a] @ outputs[b] / outputs[a].norm() / outputs[b].norm()
            for a in chosen
            for b in chosen
            if a != b
        )
        loss = loss + (weight * taught + DIVERSITY * similar / K**2) / len(real)
    return torch.stack(rows), loss


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_it_equals_plain_loops(gated: bool, padded: bool) -> None:
    """float64, outputs and gradients of router, experts and input, 1e-10."""
    changes: dict[str, object] = {} if gated else {"mlp_gated": False, "hidden_act": "relu"}
    part, (x, direction) = block(**changes), data()
    mask = torch.arange(T) < 7 if padded else None
    inputs = [x.requires_grad_(), *part.gate.parameters(), *part.experts.parameters()]

    def gradients(out: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * direction).sum() + 300 * loss, inputs)

    context = RouterContext(1, T, mask)
    routing = compete(part.experts, x, part.gate(x, (), None, context)[0], mask, 0.7)
    got = part(x[None], routing)[0]
    assert routing.penalty is not None
    found = gradients(got, routing.penalty)
    plain = part.gate(x, (), None, context)[0]
    want, loss = in_loops(part, x, plain, list(range(7 if padded else T)), 0.7)
    assert (got - want).abs().max() < 1e-10
    assert abs(float(routing.penalty - loss)) < 1e-10
    for a, b in zip(found, gradients(want, loss), strict=True):
        assert (a - b).abs().max() < 1e-10
    assert torch.equal(routing.logits, plain.logits)
    assert torch.allclose(routing.probs.sum(-1), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("router", ["olmoe", "deepseek-v3", "smoe"])
def test_weights_are_in_the_gates_units(router: str) -> None:
    part, (x, _) = block(router=router), data()
    routing = part.gate(x, (), None, RouterContext(1, T))[0]
    got = compete(part.experts, x, routing, None, 1.0)
    torch.testing.assert_close(got.weights.sum(-1), routing.weights.sum(-1))
    assert not torch.equal(got.experts, routing.experts)


def test_a_pass_without_gradients_is_no_training() -> None:
    """A model that samples between steps is in training mode: its routing is that of evaluation."""
    net = model(router="rmoe", competition_rate=1.0, erc_loss_coef=0.0).train()
    key = net.trunk.routing_noise_key.clone()
    with torch.no_grad():
        got = net(tokens())
    assert torch.equal(net.trunk.routing_noise_key, key)
    torch.testing.assert_close(got.logits, net.eval()(tokens()).logits)
    assert float((net.train()(tokens()).logits - got.logits).detach().abs().max()) > 1e-3


def test_recording_does_not_see_what_competition_chooses() -> None:
    net = model(router="rmoe", competition_rate=1.0).train()
    with (
        pytest.raises(RequestError, match=r"competition_rate is 1\.0; allowed: 0, or a model in evaluation"),
        record(net),
    ):
        pass
    with record(net.eval()) as recording, torch.no_grad():
        net(tokens())
    with pytest.raises(RequestError, match="competition_rate"), replay(net.train(), recording):
        pass


def test_the_weights_are_the_published_runs() -> None:
    assert (OF_CHOSEN, DIVERSITY) == (0.2, 0.005)


def test_padding_alone_teaches_nothing_and_a_penalty_that_is_there_stays() -> None:
    part, (x, _) = block(), data()
    context = RouterContext(1, T)
    routing = part.gate(x, (), None, context)[0]
    assert float(compete(part.experts, x, routing, torch.zeros(T, dtype=torch.bool), 1.0).penalty) == 0
    alone = compete(part.experts, x, routing, None, 1.0).penalty
    both = compete(part.experts, x, routing._replace(penalty=torch.tensor(2.0)), None, 1.0).penalty
    assert float(both) == pytest.approx(2 + float(alone))


def test_the_router_learns_from_its_loss_alone() -> None:
    part, (x, direction) = block(), data()
    routing = compete(part.experts, x, part.gate(x, (), None, RouterContext(1, T))[0], None, 0.0)
    (part(x[None], routing)[0] * direction).sum().backward()
    assert all(p.grad is None for p in part.gate.parameters())


def test_by_competition_alone_the_router_comes_to_choose_as_the_experts_do() -> None:
    part, (x, _) = block(), data()
    with torch.no_grad():
        part.experts.down_proj *= 30  # affinities that differ
    optimizer = torch.optim.Adam(part.gate.parameters(), lr=0.05)

    def agreement() -> float:
        routing = part.gate(x, (), None, RouterContext(1, T))[0]
        best = compete(part.experts, x, routing, None, 1.0)
        return float(
            (routing.experts.sort(-1).values == best.experts.sort(-1).values).all(-1).double().mean()
        )

    before = agreement()
    for _ in range(300):
        optimizer.zero_grad()
        compete(part.experts, x, part.gate(x, (), None, RouterContext(1, T))[0], None, 1.0).penalty.backward()
        optimizer.step()
    assert before < 0.6
    assert agreement() > 0.9


def test_how_often_a_layer_competes() -> None:
    draws = [[drawn(0.07, Noise(torch.tensor(key), layer)) for key in range(3000)] for layer in (5, 6)]
    assert all(0.05 < sum(each) / 3000 < 0.09 for each in draws)
    assert draws[0] != draws[1]
    assert drawn(1.0, Noise(torch.tensor(0)))


def test_in_a_model_only_in_training() -> None:
    ids = tokens()
    net, plain = (model(router="rmoe", competition_rate=rate) for rate in (1.0, 0.0))
    for part in (net, plain):
        part.train().set_routing_noise(2, 0)
    got, want = net.trunk(ids), plain.trunk(ids)
    assert all(r.penalty is not None for r in got.routing)
    assert not torch.equal(got.routing[0].weights, want.routing[0].weights)
    assert torch.equal(got.routing[0].logits, want.routing[0].logits)
    assert torch.equal(net.eval()(ids).logits, plain.eval()(ids).logits)


def test_a_rate_between_is_heeded_and_recomputed_alike() -> None:
    """Which layers compete follows from the noise's key, in the recomputation of checkpointing too."""
    found, competed = [], set()
    for recompute in (False, True):
        net = model(router="smoe", competition_rate=0.5, num_hidden_layers=6).train()
        if recompute:
            net.gradient_checkpointing_enable()
        for key in range(4):
            net.set_routing_noise(key, 0)
            competed |= {tuple(r.penalty is not None for r in net.trunk(tokens()).routing)}
            net.set_routing_noise(key, 0)
            found.append(loss_and_gradients(net, tokens()))
    assert len(competed) > 2
    for a, b in zip(found[:4], found[4:], strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-6)
        for name, gradient in a[1].items():
            assert (gradient - b[1][name]).norm() <= 1e-5 * gradient.norm().clamp(min=1e-8), name


@pytest.mark.parametrize(
    "router", ["smoe", "deepseek-v3", "rmoe-bias", "noisy-topk", "xmoe", "moepp-residual"]
)
def test_with_other_routers_it_trains(router: str) -> None:
    net = model(router=router, competition_rate=1.0, competition_loss_coef=1.0, erc_loss_coef=0.0).train()
    loss, gradients = loss_and_gradients(net, tokens())
    assert loss > 0
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert any("gate" in name and g.abs().sum() > 0 for name, g in gradients.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router": "eda"}, "competition_rate is 0.1; allowed: 0 with this router"),
        ({"router": "longcat"}, "competition_rate"),
        ({"router": "smoe-capacity"}, "competition_rate"),
        ({"router": "expert-choice"}, "competition_rate"),
        ({"router": "inkling"}, "competition_rate"),
        ({"router": "llama-4"}, "competition_rate"),
        ({"router": "hash"}, "competition_rate"),
        ({"router": "gemma-4"}, "competition_rate is 0.1; allowed: 0 with gate.expert_scale"),
        ({"router": "smoe-entropy"}, "competition_rate is 0.1; allowed: 0 with temperature.target_entropy"),
        ({"dense_gradients": "densemixer"}, "competition_rate is 0.1; allowed: 0 with dense_gradients"),
        ({"competition_rate": 1.5}, "competition_rate is 1.5; allowed: 0 to 1"),
        ({"competition_loss_coef": -1.0}, "competition_loss_coef is -1.0; allowed: 0 or more"),
    ],
)
def test_refused(changes: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        config(**{"router": "smoe", "num_shared_experts": 0, "competition_rate": 0.1, **changes})


def test_refused_where_experts_are_cut_up() -> None:
    settings = config(router="smoe", competition_rate=0.1, num_experts=4)
    assert "competition_rate" in str(misfit(settings, ParallelConfig(fsdp=2, expert=2)))
    assert misfit(settings, ParallelConfig(fsdp=2)) is None
    settings.distributed_config = SimpleNamespace(ep_size=2)
    with pytest.raises(RequestError, match="competition_rate"):
        RMoEForCausalLM(settings)


def test_refused_with_lora_on_the_experts() -> None:
    net, ids = with_lora_on_experts(model(router="smoe", competition_rate=1.0)), tokens()
    with pytest.raises(RequestError, match=r"competition_rate is 1\.0; allowed: 0 with experts in a"):
        net.train()(input_ids=ids, labels=ids)
