"""`--match-params`: routers compared at equal numbers of parameters.

The knob is the width of the experts, `model.moe_intermediate_size`: a router with more parameters than the baseline's
gets narrower experts, one with fewer gets wider ones, until the non-embedding parameters of both agree as closely as
whole columns allow. The baseline is left as it is, so that all routers are compared with one set of its runs. Expert
matrices then differ in shape and start from different values; everything else still starts equal.
"""

from __future__ import annotations

from rmoe.errors import RequestError

TOLERANCE = 0.005  # of the non-embedding parameters
KNOB = "model.moe_intermediate_size"
ALIGNED = 8  # columns: what grouped_mm takes in any dtype; other widths run in a slower loop


def matched_width(width: int, counts: dict[int, int], target: int) -> tuple[int, float]:
    """The width whose count comes nearest to the target; an aligned one where that is near enough.

    Args:
        width: as configured.
        counts: non-embedding parameters at `width` and at one width more; they grow linearly with it.

    Returns:
        The width, and the relative difference of its count to the target.

    Raises:
        RequestError: no width comes within `TOLERANCE`.

    >>> matched_width(64, {64: 1000, 65: 1010}, 975)
    Traceback (most recent call last):
    rmoe.errors.RequestError: --match-params is '+0.51% at model.moe_intermediate_size 62'; allowed: within 0.5% ...
    """
    slope = counts[width + 1] - counts[width]

    def error(value: int) -> float:
        return (counts[width] + (value - width) * slope) / target - 1

    best = max(1, width + round((target - counts[width]) / slope))
    neighbours = (best // ALIGNED * ALIGNED, -(-best // ALIGNED) * ALIGNED)
    aligned = [value for value in neighbours if value > 0 and abs(error(value)) <= TOLERANCE]
    found = min(aligned, key=lambda value: abs(error(value)), default=best)
    if abs(error(found)) > TOLERANCE:
        raise RequestError(
            "--match-params",
            f"{error(found):+.2%} at {KNOB} {found}",
            f"within {TOLERANCE:.1%} of the baseline's non-embedding parameters: take a wider model or fewer experts",
        )
    return found, error(found)
