"""`--match-params`: routers compared at equal numbers of parameters.

The knob is the width of the experts, `model.moe_intermediate_size`: a router with more parameters than the baseline's
gets narrower experts, one with fewer gets wider ones, until the non-embedding parameters of both agree as closely as
whole columns allow. The baseline is left as it is, so that all routers are compared with one set of its runs. Expert
matrices then differ in shape and start from different values; everything else still starts equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from rmoe.errors import RequestError

TOLERANCE = 0.005  # of the non-embedding parameters
KNOB = "model.moe_intermediate_size"
ALIGNED = 8  # columns: what grouped_mm takes in any dtype; other widths run in a slower loop


@dataclass(frozen=True)
class Match:
    """A router at matched parameters.

    Attributes:
        value: of the knob.
        parameters: non-embedding, then.
        target: the baseline's.
    """

    value: int
    parameters: int
    target: int

    @property
    def is_aligned(self) -> bool:
        """Whether the fast kernel takes this width."""
        return self.value % ALIGNED == 0

    @property
    def error(self) -> float:
        """Relative difference to the target."""
        return self.parameters / self.target - 1


def match(width: int, counts: dict[int, int], target: int) -> Match:
    """The width whose count comes nearest to the target; an aligned one where that is near enough.

    Args:
        width: as configured.
        counts: non-embedding parameters at `width` and at one width more; they grow linearly with it.

    Raises:
        RequestError: no width comes within `TOLERANCE`.

    >>> match(64, {64: 1000, 65: 1010}, 975)
    Traceback (most recent call last):
    rmoe.errors.RequestError: --match-params is '+0.51% at model.moe_intermediate_size 62'; allowed: within 0.5% ...
    """
    slope = counts[width + 1] - counts[width]
    best = max(1, width + round((target - counts[width]) / slope))
    candidates = [best, *(w for w in (best // ALIGNED * ALIGNED, -(-best // ALIGNED) * ALIGNED) if w > 0)]
    matches = [Match(w, counts[width] + (w - width) * slope, target) for w in candidates]
    aligned = [m for m in matches if m.is_aligned and abs(m.error) <= TOLERANCE]
    found = min(aligned, key=lambda m: abs(m.error), default=matches[0])
    value = found.value
    if abs(found.error) > TOLERANCE:
        raise RequestError(
            "--match-params",
            f"{found.error:+.2%} at {KNOB} {value}",
            f"within {TOLERANCE:.1%} of the baseline's non-embedding parameters: take a wider model or fewer experts",
        )
    return found


def matched_widths(counts: dict[str, dict[int, int]], baseline: str, width: int) -> dict[str, Match]:
    """Every router but the baseline, at the baseline's non-embedding parameters.

    Args:
        counts: router -> width -> non-embedding parameters, at `width` and `width + 1`.
    """
    target = counts[baseline][width]
    return {name: match(width, own, target) for name, own in counts.items() if name != baseline}
