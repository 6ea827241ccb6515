"""Routers of the experiments that the zoo does not have: a plugin, `--plugin experiments/routers.py`.

The zoo's state is 128 wide, as in the paper, where the model is 352 wide. At the CPU size's width of 96 that would be
no bottleneck at all, so every row with a state of 128 (EDA: 256) is there once more with 32, the paper's ratio, and
with 128 for the GPU size: `NAME-p32` and `NAME-p128` are the zoo's NAME.
"""

from __future__ import annotations

from dataclasses import replace

from rmoe.routing.recurrence import Recurrence
from rmoe.routing.temperature import Temperature
from rmoe.routing.zoo import ZOO, ZooRow, find, register, vary

WIDTHS = (32, 128)  # of the CPU size, of the GPU size

# Width -> gate entropy in nats that RMoE of that width, seed 0, ended at on validation text (mean over layers): what
# the steered SMoE is steered to. For the GPU size it has to be measured first: train `rmoe-p128`, and enter it here.
ENTROPY_OF_RMOE = {32: 2.694}

for _width in WIDTHS:
    for _name, _row in list(ZOO.items()):
        if isinstance(_row.spec.recurrence, Recurrence.Config) and "-p" not in _name:
            _spec = vary(_row.spec, recurrence={"width": _width})
            register(
                f"{_name}-p{_width}", replace(_row, spec=_spec, summary=f"{_row.summary}; here p = {_width}")
            )
    _EDA_LINEAR = find(f"eda-linear-p{_width}").spec
    register(
        f"eda-linear-unnormed-p{_width}",
        ZooRow(
            vary(_EDA_LINEAR, recurrence={"normalize": False}),
            "control",
            "linear state with learned decay, not normalised",
        ),
    )
    register(
        f"eda-linear-np-p{_width}",
        ZooRow(
            vary(_EDA_LINEAR, recurrence={"carry": "zero"}),
            "control",
            "the same layer with norm, its state never passed on",
            zero_gradient=(r".*cell\..*",),
        ),
    )
    for _without in ("np", "detach"):
        _row = find(f"rmoe-{_without}-p{_width}")
        register(
            f"rmoe-norm-{_without}-p{_width}",
            replace(
                _row,
                spec=vary(_row.spec, recurrence={"normalize": True}),
                summary=f"{_row.summary}, normalised",
            ),
        )

for _width, _entropy in ENTROPY_OF_RMOE.items():
    register(
        f"smoe-entropy-p{_width}",
        ZooRow(
            vary(find("smoe").spec, temperature=Temperature.Config(target_entropy=_entropy)),
            "control",
            f"temperature steered to the gate entropy of RMoE with p = {_width}, {_entropy:g} nats",
        ),
    )

for _held in (0.5, 2.0):
    register(
        f"smoe-t{_held:g}",
        ZooRow(
            vary(find("smoe").spec, temperature=Temperature.Config(start=_held)),
            "control",
            f"gate temperature held at {_held:g}",
        ),
    )
