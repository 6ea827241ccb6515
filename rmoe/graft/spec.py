"""What a graft is, as data. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeGuard

from rmoe.errors import RequestError
from rmoe.routing.recurrence import BaseRecurrence, Recurrence
from rmoe.routing.spec import RouterSpec


@dataclass(frozen=True, kw_only=True)
class GraftSpec:
    """A recurrent router on a family's gate: the gate reads `x + B h`, or `B h` alone.

    Attributes:
        recurrence: how `h` comes about (Eq. 4, 5). The family's gate takes the place of scorer and gate.
        pure: leave `x` out of what the gate reads. For training from scratch: the function changes at once.
        seed: the projectors and the cell start from generators keyed by (seed, parameter name).

    Raises:
        RequestError: the recurrence has no state of its own to add, or a field has the wrong type.
    """

    recurrence: Recurrence.Config = dataclasses.field(default_factory=Recurrence.Config)
    pure: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not _can_graft(self.recurrence):
            allowed = "a router with a recurrence; `rmoe zoo` lists them"
            raise RequestError("--router", self.recurrence.kind, allowed)
        for name, kind in (("pure", bool), ("seed", int)):
            if type(getattr(self, name)) is not kind:
                raise RequestError(f"graft.{name}", getattr(self, name), kind.__name__)

    @classmethod
    def from_router(
        cls, router: str | RouterSpec = "rmoe", *, width: int | None = None, pure: bool = False, seed: int = 0
    ) -> GraftSpec:
        """The graft of a zoo row's recurrence; its scorer, gate and balance stay with the family.

        Args:
            router: a name in the zoo, or a spec.
            width: `p`, if it is to differ from the row's.

        Raises:
            RequestError: unknown row, a row without recurrence, `p` <= 0.
        """
        from rmoe.routing.zoo import ZOO, resolve

        recurrence = (resolve(router) if isinstance(router, str) else router).recurrence
        if not _can_graft(recurrence):
            rows = [name for name, row in ZOO.items() if _can_graft(row.spec.recurrence)]
            allowed = f"a router with a recurrence: {', '.join(rows)}"
            raise RequestError("--router", router if isinstance(router, str) else recurrence.kind, allowed)
        if width is not None:
            if width <= 0:
                raise RequestError("--width", width, "1 or more")
            recurrence = dataclasses.replace(recurrence, width=width)
        return cls(recurrence=recurrence, pure=pure, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        return {"recurrence": self.recurrence.to_dict(), "pure": self.pure, "seed": self.seed}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraftSpec:
        """Read `to_dict`'s form; keys of the folder's own (`base_*`) are not the spec's and are passed over."""
        recurrence = BaseRecurrence.Config.from_dict(data["recurrence"])
        return cls(recurrence=recurrence, pure=data["pure"], seed=data["seed"])  # type: ignore[arg-type]


def _can_graft(recurrence: BaseRecurrence.Config) -> TypeGuard[Recurrence.Config]:
    """Whether a row has a state `h` of its own, to be added to the `x` that the gate reads."""
    return isinstance(recurrence, Recurrence.Config) and not recurrence.concat_hidden
