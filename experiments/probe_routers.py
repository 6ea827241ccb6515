"""Controls that the mechanism statements need and the zoo does not have: `--plugin experiments/probe_routers.py`."""

from __future__ import annotations

from rmoe.routing.scorer import MLP
from rmoe.routing.zoo import ZooRow, register, resolve, vary

# At the probes' sizes (d = 32, E = 8, L = 6, p = 32) rmoe's routers have 14,016 parameters; a width of 57 gives 14,022.
register(
    "smoe-mlp-matched",
    ZooRow(
        vary(resolve("smoe"), scorer=MLP.Config(width=57)),
        "control",
        "MLP router with RMoE's parameters at probe size",
    ),
)
register(
    "eda-linear-unnormed",
    ZooRow(
        vary(resolve("eda-linear"), recurrence={"normalize": False}),
        "control",
        "linear state with learned decay, not normalised",
    ),
)
register(
    "gated-linear-full-softmax",
    ZooRow(
        vary(resolve("gated-linear"), gate={"renormalize": False}),
        "control",
        "gated linear state, weights not renormalised",
    ),
)
register(
    "rmoe-np-full-softmax",
    ZooRow(
        vary(resolve("rmoe-np"), gate={"renormalize": False}),
        "control",
        "the state never passed, weights not renormalised",
    ),
)
