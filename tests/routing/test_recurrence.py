"""How far the recurrent gradient reaches, and the gated linear state at its start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rmoe.errors import RequestError
from rmoe.routing import Geometry, RouterContext, RouterSpec, build_router, build_shared, resolve, vary
from rmoe.routing.initial import fill
from rmoe.routing.recurrence import Recurrence
from rmoe.routing.zoo import ZOO, select

LAYERS = 5
SIZE = Geometry(12, 4, 2, LAYERS, initializer_range=0.5)


def reach(spec: RouterSpec) -> list[list[bool]]:
    """`[above][below]`: whether the scores of layer `above` have a gradient in the projector of layer `below`."""
    shared = build_shared(spec, SIZE)
    routers = torch.nn.ModuleList(build_router(spec, replace(SIZE, layer_index=i)) for i in range(LAYERS))
    for module in (routers, shared):
        if module is not None:
            fill(module.double(), 0, 0.5)
    inputs = torch.randn(LAYERS, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, found = (), []
    projectors = [router.recurrence.projector.weight for router in routers]
    for router, x in zip(routers, inputs, strict=True):
        routing, state = router(x, state, shared, RouterContext(1, 7))
        grads = torch.autograd.grad(routing.logits.sum(), projectors, retain_graph=True, allow_unused=True)
        found.append([g is not None and bool(g.abs().sum() > 0) for g in grads])
    return found


@pytest.mark.parametrize("every", [1, 2, 3, None])
def test_gradient_is_cut_every_n_layers(every: int | None) -> None:
    """Layer l's scores reach down to the last multiple of n, and values are those of the state passed whole."""
    base = vary(resolve("rmoe"), recurrence={"width": 6})
    found = reach(vary(base, recurrence={"truncate_every": every}))
    for above in range(LAYERS):
        lowest = 0 if every is None else above // every * every
        assert found[above] == [lowest <= below <= above for below in range(LAYERS)]


def test_cut_every_layer_is_detached() -> None:
    base = vary(resolve("rmoe"), recurrence={"width": 6})
    assert reach(vary(base, recurrence={"truncate_every": 1})) == reach(
        vary(base, recurrence={"carry": "detached"})
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"truncate_every": 0}, "recurrence.truncate_every is 0"),
        ({"truncate_every": 2, "carry": "detached"}, "null unless recurrence.carry is 'passed'"),
        ({"truncate_every": 2, "carry": "zero"}, "null unless recurrence.carry is 'passed'"),
    ],
)
def test_bad_truncation_is_refused(options: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Recurrence.Config(**options)


def test_gated_linear_starts_as_a_linear_state_that_keeps_953_in_1000() -> None:
    """At the start `h = P x + sig(3) h`, by hand."""
    spec = vary(resolve("gated-linear"), recurrence={"width": 6})
    routers = [build_router(spec, replace(SIZE, layer_index=i)).double() for i in range(3)]
    for i, router in enumerate(routers):
        fill(router, i, 0.5)
    inputs = torch.randn(3, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, want = (), torch.zeros(7, 6, dtype=torch.float64)
    for router, x in zip(routers, inputs, strict=True):
        _, state = router(x, state, None, RouterContext(1, 7))
        want = x @ router.recurrence.projector.weight.T + want / (1 + torch.exp(torch.tensor(-3.0).double()))
        assert (state[0] - want).abs().max() < 1e-12


def test_groups_of_routers() -> None:
    assert select(["all"]) == tuple(ZOO)
    paper = select(["paper"])
    assert {"smoe", "rmoe", "rmoe-np", "rmoe-detach", "xmoe-gru", "rmoe-sproj"} <= set(paper)
    assert not {"remoe", "rmoe-p256-full-softmax", "smoe-capacity"} & set(paper)
    assert select(["rmoe", "smoe", "rmoe"]) == ("rmoe", "smoe")
    for asked in ([], ["nosuch"]):
        with pytest.raises(RequestError):
            select(asked)
