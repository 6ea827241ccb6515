"""BlockFFN: its weights by hand, and its losses where sequences, chunks and padding matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.routing import Geometry, RouterContext, build_router, resolve, vary
from rmoe.routing.block_ffn import ActivationLocality, ChunkSparsity, NormedReLU
from rmoe.routing.losses import Loss, LossView

E = 4


def view(logits: Tensor, probs: Tensor, batch: int, mask: Tensor | None = None, experts: int = E) -> LossView:
    """`[L, T, E]` each; the losses look at nothing else."""
    context = RouterContext(batch, logits.shape[1] // batch, mask)
    nothing = torch.zeros(logits.shape[0], experts)
    return LossView(logits, probs, nothing, nothing, context, nothing, experts, 2, [None])


def test_weights_by_hand() -> None:
    """Scores 3, -1, 4, 0: the mean of squares over all four experts is 25 / 4, its root 2.5. A token may ask nobody."""
    gate = build_router(resolve("blockffn"), Geometry(12, E, 2)).gate
    with torch.no_grad():
        gate.norm.weight.copy_(torch.tensor([1.0, 1.0, 0.5, 1.0]))
    routing = gate(torch.tensor([[3.0, -1.0, 4.0, 0.0], [-1.0] * 4]), None, RouterContext(1, 2))
    assert torch.allclose(routing.weights[0], torch.tensor([1.2, 0.0, 0.8, 0.0]))
    assert torch.allclose(routing.probs[0], torch.tensor([3 / 7, 0.0, 4 / 7, 0.0]))
    assert routing.experts.tolist() == [[0, E, 2, E], [E] * 4]
    assert (routing.weights[1] == 0).all()
    assert torch.isfinite(routing.probs).all()


def test_the_size_of_the_scores_does_not_count() -> None:
    gate = build_router(resolve("blockffn"), Geometry(12, E, 2)).gate.double()
    with torch.no_grad():
        gate.norm.weight.fill_(1.0)
    logits = torch.randn(30, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once, more = (gate(factor * logits, None, RouterContext(1, 30)) for factor in (1.0, 100.0))
    busy = (logits > 0.1).any(-1)  # where eps is nothing beside the mean of squares
    assert (once.weights - more.weights)[busy].abs().max() < 1e-2
    assert torch.equal(once.experts, more.experts)


def test_locality_by_hand() -> None:
    """Two sequences of two tokens: only neighbours of one sequence count, and the later token is the target."""
    a, b = math.log(3), math.log(4)  # sigmoids 3/4 and 4/5
    logits = torch.tensor([a, b, 9.0, 9.0], dtype=torch.float64)[None, :, None].expand(1, 4, E)
    got = ActivationLocality(sharpness=1.0)(view(logits, logits, 2))
    first = -(4 / 5 * math.log(3 / 4) + 1 / 5 * math.log(1 / 4))
    q = 1 / (1 + math.exp(-9))
    second = -(q * math.log(q) + (1 - q) * math.log(1 - q))
    assert abs(float(got) - (first + second) / 2) < 1e-12


def test_chunks_by_hand() -> None:
    """Sequences of 3 in chunks of 2: the last chunk is one token. An expert is idle where no token asks it."""
    p = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1.0]], dtype=torch.float64)
    got = ChunkSparsity(chunk=2)(view(p[None], p[None], 1))
    idle = (0.25 + 0.5 + 0.5 + 1) / 4, (1 + 1 + 1 + 0) / 4
    assert abs(float(got) - (1 - sum(idle) / 2)) < 1e-12
    assert abs(float(ChunkSparsity()(view(p[None], p[None], 1))) - (1 - (0.25 + 0.5 + 0.5 + 0) / 4)) < 1e-12


LOSSES = [ActivationLocality(sharpness=3.0), ChunkSparsity(chunk=2), ChunkSparsity(chunk=5)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}")
def test_pads_count_nowhere(loss: Loss) -> None:
    """Two sequences of 4 and 1 tokens, padded to 6 on the right: what each gives alone, weighted by what it counts."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 12, E, dtype=torch.float64, generator=generator).requires_grad_()
    probs = logits.relu() / logits.relu().sum(-1, keepdim=True).clamp(min=1e-9)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] + [False] * 5]).flatten()
    got = loss(view(logits, probs, 2, mask))
    alone = [loss(view(logits[:, cut], probs[:, cut], 1)) for cut in (slice(0, 4), slice(6, 7))]
    counts = {"activation_locality": (3, 0)}.get(loss.kind, (2, 1) if loss == LOSSES[1] else (1, 1))
    wanted = sum(n * value for n, value in zip(counts, alone, strict=True)) / sum(counts)
    assert (got - wanted).abs().max() < 1e-12
    gradient = torch.autograd.grad(got.sum(), logits)[0]
    assert torch.isfinite(gradient).all()
    assert (gradient[:, ~mask] == 0).all()
    assert (gradient[:, mask] != 0).any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}")
def test_one_token_or_none_gives_a_finite_loss(loss: Loss) -> None:
    one = torch.ones(1, 1, E)
    assert torch.isfinite(loss(view(one, one / E, 1))).all()
    assert float(loss(view(one, one / E, 1, torch.zeros(1, dtype=torch.bool)))) == 0.0


def test_both_losses_move_the_router_as_they_promise() -> None:
    """Gradient steps on either: neighbours agree more, and chunks ask fewer experts."""
    router = build_router(resolve("blockffn"), Geometry(12, 8, 2, initializer_range=0.5)).double()
    x = torch.randn(128, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    context = RouterContext(1, 128)
    for loss in (ActivationLocality(sharpness=5.0), ChunkSparsity(chunk=4)):
        with torch.no_grad():
            router.gate.norm.weight.fill_(1.0)
            router.scorer.linear.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
        before = behaviour(router, x, context, loss)
        for _ in range(200):
            routing = router(x, (), None, context)[0]
            value = loss(view(routing.logits[None], routing.probs[None], 1, experts=8))
            (gradient,) = torch.autograd.grad(value.sum(), router.scorer.linear.weight)
            with torch.no_grad():
                router.scorer.linear.weight -= gradient
        assert behaviour(router, x, context, loss) < before - 0.02


def behaviour(router: torch.nn.Module, x: Tensor, context: RouterContext, loss: Loss) -> float:
    """Share of experts on which neighbours differ, or which a chunk of 4 asks."""
    asked = router(x, (), None, context)[0].logits > 0
    if isinstance(loss, ActivationLocality):
        return float((asked[1:] != asked[:-1]).double().mean())
    return float(asked.unflatten(0, (-1, 4)).any(1).double().mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormedReLU.Config(eps=0.0), r"gate\.eps is 0\.0; allowed: a value above 0"),
        (lambda: ActivationLocality(sharpness=-1.0), r"loss\.activation_locality\.sharpness is -1\.0"),
        (lambda: ChunkSparsity(chunk=0), r"loss\.chunk_sparsity\.chunk is 0"),
        (lambda: ChunkSparsity(weight=-1.0), r"loss\.chunk_sparsity\.weight is -1\.0"),
        (lambda: vary(resolve("blockffn"), balance={"bias_update_rate": 1e-3}), r"balance\.bias_update_rate"),
        (lambda: vary(resolve("blockffn"), router={"identity_experts": 1}), r"router\.gate is 'normed_relu'"),
    ],
)  # fmt: skip
def test_refuses(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match=message):
        make()
