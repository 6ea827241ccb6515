"""Stacked training against one by one, against a plain loop, and what cannot be stacked."""

from __future__ import annotations

import pytest
import torch

from rmoe.probes.stack import CONTENT, HIDDEN, Ensemble, RouterStack, fitted
from rmoe.probes.train import recurrent_share, train
from rmoe.probes.world import World
from rmoe.results.probes import Knobs
from rmoe.routing import ZOO, RouterContext, balance_loss, find
from rmoe.routing.initial import fill, keyed_generator

SMALL = Knobs(layers=3, experts=5, width=16, steps=20, tokens=32)
LANES = [("lookup", 0), ("overwrite", 0), ("carry", 3)]
# One row of each kind: cells, residual scores, training-time state, noise, own losses, slots that may be empty.
QUICK = [
    "smoe",
    "rmoe",
    "gated-linear",
    "rmoe-np-r1.0",
    "deepseek-v3",
    "noisy-topk",
    "remoe",
    "gshard",
    "stable-moe",
]
SLOW = [
    "rmoe-lstm", "rmoe-rnn", "eda", "rmoe-truncated-2", "smoe-dropout", "smoe-entropy", "expert-choice", "sparsemixer",
    "switch", "hash", "xmoe-gru", "hyper-moe", "omni-router", "smoe-mlp-mi", "dynmoe", "blockffn",
]  # fmt: skip


def ensemble(name: str, lanes: list[tuple[str, int]], knobs: Knobs = SMALL) -> Ensemble:
    row = find(name)
    return Ensemble(fitted(row.spec, knobs.width), row.top_k or 2, lanes, knobs, torch.float64)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_stacked_equals_one_by_one(name: str) -> None:
    """Losses on unseen tokens and every parameter and buffer, after 20 steps in float64, within 1e-5."""
    worlds = [World(probe, seed, SMALL, torch.float64) for probe, seed in LANES]
    together = ensemble(name, LANES)
    assert together.note == ""
    apart = [ensemble(name, [lane]) for lane in LANES]
    curve = train([together], worlds, SMALL)[0]
    for i, (one, w) in enumerate(zip(apart, worlds, strict=True)):
        alone = train([one], [w], SMALL)[0]
        assert (curve.regret[:, i] - alone.regret[:, 0]).abs().max() < 1e-5
        for key, value in {**together.parameters, **together.buffers, "experts": together.experts}.items():
            other = one.experts if key == "experts" else {**one.parameters, **one.buffers}[key]
            assert (value[i] - other[0]).abs().max() < 1e-5, key


def test_equals_a_plain_training_loop() -> None:
    """The zoo's own modules, an optimizer of its own and no vmap: the same losses, step by step."""
    probe, seed = "integrate", 4
    w = World(probe, seed, SMALL, torch.float64)
    row = find("rmoe")
    stack = RouterStack(fitted(row.spec, SMALL.width), 2, SMALL)
    fill(stack, seed, HIDDEN**-0.5, f"{probe}/")
    stack = stack.double()
    shape = (SMALL.layers, SMALL.experts, CONTENT, CONTENT)
    experts = torch.randn(shape, generator=keyed_generator(seed, f"{probe}/experts")).double() / CONTENT**0.5
    experts.requires_grad_()
    plain = torch.optim.Adam(
        [{"params": list(stack.parameters())}, {"params": [experts]}], lr=SMALL.learning_rate
    )
    block = w.tokens(32 * SMALL.tokens, "train/0")
    for step in range(3):
        rate = SMALL.learning_rate * (1 + torch.cos(torch.tensor(torch.pi * step / SMALL.steps)).item()) / 2
        plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = rate, 4 * rate
        part = slice(step * SMALL.tokens, (step + 1) * SMALL.tokens)
        context = RouterContext(1, SMALL.tokens, None, torch.zeros(SMALL.tokens, dtype=torch.int64))
        state, routings, loss = (), [], torch.zeros((), dtype=torch.float64)
        for l, router in enumerate(stack.routers):
            x, y = block.inputs[l, part], block.targets[l, part]
            routing, state = router(x, state, stack.router_shared, context)
            routings.append(routing)
            for t in range(SMALL.tokens):
                guess = sum(
                    g * (x[t, -CONTENT:] @ experts[l, n])
                    for g, n in zip(routing.weights[t], routing.experts[t].tolist(), strict=True)
                )
                loss = loss + (guess - y[t]).square().sum() / (SMALL.layers * SMALL.tokens * CONTENT)
        loss = loss + balance_loss(list(stack.routers), routings, context, SMALL.balance)
        plain.zero_grad()
        loss.backward()
        plain.step()
    ours = ensemble("rmoe", [(probe, seed)])
    from rmoe.probes.train import _noise_keys, _step

    for step in range(1, 4):
        rate = (
            SMALL.learning_rate
            * (1 + torch.cos(torch.tensor(torch.pi * (step - 1) / SMALL.steps)).item())
            / 2
        )
        part = slice((step - 1) * SMALL.tokens, step * SMALL.tokens)
        _step(
            ours,
            block.inputs[None, :, part],
            block.targets[None, :, part],
            _noise_keys([w], step),
            step,
            rate,
        )
    assert (ours.experts[0] - experts).abs().max() < 1e-9
    for key, value in stack.named_parameters():
        assert (ours.parameters[key][0] - value).abs().max() < 1e-9, key


def test_what_cannot_be_stacked_runs_one_by_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from rmoe.routing.scorer import Linear

    def peeking(self: Linear, features: torch.Tensor, shared: object, noise: object) -> torch.Tensor:
        scale = 2.0 if features.sum().item() > 1e9 else 1.0  # .item() is refused under vmap
        return scale * self.last(None)(features)

    want = ensemble("smoe", LANES)
    monkeypatch.setattr(Linear, "forward", peeking)
    got = ensemble("smoe", LANES)
    assert want.note == ""
    assert "vmap" in got.note
    assert "\n" not in got.note
    worlds = [World(probe, seed, SMALL, torch.float64) for probe, seed in LANES]
    curve = train([got], worlds, SMALL)[0]
    monkeypatch.undo()
    assert (curve.regret - train([want], worlds, SMALL)[0].regret).abs().max() < 1e-9


def test_every_row_is_stacked() -> None:
    """Cheap: building tries a forward and a backward pass and an update."""
    notes = {name: ensemble(name, LANES[:2], Knobs(layers=2)).note for name in ZOO}
    assert {name for name, note in notes.items() if note} == set()


def test_recurrent_share_by_finite_state() -> None:
    """Zero when the state is detached anyway; between when it is passed; None without a state."""
    w = World("integrate", 0, SMALL, torch.float64)
    tokens = w.tokens(64, "check")
    parts = tokens.inputs[None], tokens.targets[None]
    shares = {
        name: recurrent_share(ensemble(name, [("integrate", 0)]), *parts)
        for name in ("rmoe", "rmoe-detach", "rmoe-truncated-2", "smoe", "rmoe-np")
    }
    assert shares["smoe"] is None
    assert shares["rmoe-np"] is None
    assert float(shares["rmoe-detach"]) == 0  # type: ignore[arg-type]
    assert 0 < float(shares["rmoe-truncated-2"]) < float(shares["rmoe"])  # type: ignore[arg-type]
