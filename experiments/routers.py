"""Routers of the experiments that the zoo does not have: a plugin, `--plugin experiments/routers.py`.

The zoo's state is 128 wide, as in the paper, where the model is 352 wide. At the experiments' width of 96 that would be
no bottleneck at all, so every row with a state of 128 (EDA: 256) is there once more with 32: the paper's ratio.
`NAME-p32` is the zoo's NAME.
"""

from __future__ import annotations

from dataclasses import replace

from rmoe.routing.mechanisms import Recurrence
from rmoe.routing.spec import TemperatureSpec
from rmoe.routing.zoo import ZOO, ZooRow, find, register, vary

WIDTH = 32

for _name, _row in list(ZOO.items()):
    if isinstance(_row.spec.recurrence, Recurrence) and "-p" not in _name:
        _summary = f"{_row.summary}; here p = {WIDTH}"
        register(
            f"{_name}-p{WIDTH}",
            replace(_row, spec=vary(_row.spec, recurrence={"width": WIDTH}), summary=_summary),
        )

_EDA_LINEAR = find(f"eda-linear-p{WIDTH}").spec
register(
    f"eda-linear-unnormed-p{WIDTH}",
    ZooRow(
        vary(_EDA_LINEAR, recurrence={"normalize": False}),
        "control",
        "linear state with learned decay, not normalised",
    ),
)
register(
    f"eda-linear-np-p{WIDTH}",
    ZooRow(
        vary(_EDA_LINEAR, recurrence={"carry": "zero"}),
        "control",
        "the same layer with norm, its state never passed on",
        zero_gradient=(r".*cell\..*",),
    ),
)

for _held in (0.5, 2.0):
    register(
        f"smoe-t{_held:g}",
        ZooRow(
            vary(find("smoe").spec, temperature=TemperatureSpec(start=_held)),
            "control",
            f"gate temperature held at {_held:g}",
        ),
    )
