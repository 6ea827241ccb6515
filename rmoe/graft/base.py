"""The base of an adapter: where it is, and how its weights are recognised."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from rmoe.errors import RequestError
from rmoe.model.weights import (
    CONFIG,
    WeightFolder,
    digest,
    layout_digest,
    open_weights,
    read_json,
    sample_digest,
)
from rmoe.places import cached_folder, hub_name, model_place

GRAFT_MODEL_TYPE = "rmoe_graft"
GRAFT_SECTION = "rmoe_graft"
POINTER = "base"  # in that section: an adapter has it, a standalone folder has not
NEW_TENSORS = "base_lacks"  # likewise: names of tensors that training has added to a standalone folder


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`rmoe_graft.base` in an adapter's `config.json`.

    Attributes:
        path, relative: of a local base: absolute, and from the adapter's folder; None for a model of the Hub.
        hub, revision: of a model of the Hub: its name and commit.
        layout_sha256: of the names, dtypes and shapes of its tensors.
        sample_sha256: of a sample of their bytes; see `rmoe.model.weights.sample_digest`. Checked at each load.
        unused: tensors of the base that the model does not have, such as the head that a classifier replaces.
    """

    path: str | None = None
    relative: str | None = None
    hub: str | None = None
    revision: str | None = None
    layout_sha256: str
    sample_sha256: str
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, weights: WeightFolder) -> Base:
        """The pointer to a model folder, or to the Hub where the folder is that of this process's Hub cache."""
        cached = hub_name(weights.path)
        # Another cache, or a copy of one, has the same layout; `cached_folder` would not find the model in it.
        if cached is not None and cached_folder(*cached) != weights.path.absolute():
            cached = None
        name, revision = (None, None) if cached is None else cached
        return cls(
            path=str(weights.path.absolute()) if cached is None else None,
            hub=name,
            revision=revision,
            layout_sha256=layout_digest(weights),
            sample_sha256=sample_digest(weights),
        )

    @classmethod
    def of_config(cls, config: dict[str, Any], adapter: str) -> Base | None:
        """The pointer in a configuration; None if it is not an adapter's.

        Raises:
            RequestError: it is damaged.
        """
        section = config.get(GRAFT_SECTION)
        if not isinstance(section, dict) or POINTER not in section:
            return None
        try:
            return msgspec.convert(section[POINTER], cls)
        except msgspec.ValidationError as error:
            allowed = f"a pointer to a base, as `rmoe graft` writes it ({error})"
            raise RequestError(f"{GRAFT_SECTION}.{POINTER}", adapter, allowed) from None

    def seen_from(self, adapter: Path) -> Base:
        """With `relative` for an adapter in this folder."""
        if self.path is None:
            return self
        relative = os.path.relpath(os.path.realpath(self.path), os.path.realpath(adapter))
        return msgspec.structs.replace(self, relative=relative)

    def locate(self, adapter: Path) -> Path:
        """The base's folder: its absolute path, else the path from the adapter, else the Hub's cache.

        Raises:
            RequestError: it is at none of them.
        """
        places = [Path(self.path)] if self.path is not None else []
        places += [adapter / self.relative] if self.relative is not None else []
        for place in places:
            if (place / CONFIG).is_file():
                return place
        if self.hub is not None:  # a folder does not decide a download
            if (cached := cached_folder(self.hub, self.revision)) is not None:
                return cached
            allowed = (
                f"a model in the Hub cache, or asked for: rmoe.load({str(adapter)!r}, base='hf:{self.hub}') or "
                f"rmoe graft {adapter} --base hf:{self.hub} --out DIR"
            )
            raise RequestError("base", self.hub, allowed)
        allowed = (
            f"a folder that exists; if the base has moved, rmoe.load({str(adapter)!r}, base=PLACE) or "
            f"rmoe graft {adapter} --base PLACE --out DIR"
        )
        raise RequestError("base", self.path, allowed)

    def open(
        self,
        adapter: Path,
        section: dict[str, Any],
        *,
        moved: str | Path | None = None,
        full: bool = False,
    ) -> WeightFolder:
        """Find the base, and check that it is the one that was grafted.

        Args:
            adapter: the adapter's folder.
            section: `rmoe_graft` of its configuration.
            moved: where the base is now, if not where the pointer says: a folder or a name of the Hub.
            full: compare all bytes (`base_sha256`), not only the sample.

        Raises:
            RequestError: it is not there, or another model; says which field differs.
        """
        folder = self.locate(adapter) if moved is None else model_place(moved, "base")
        weights = open_base(folder)
        require_family(weights, section)
        full_sha256 = section.get("base_sha256")
        checks: list[tuple[str, Any, Callable[[WeightFolder], str], str]] = [
            ("layout_sha256", self.layout_sha256, layout_digest, "names, dtypes or shapes"),
            ("sample_sha256", self.sample_sha256, sample_digest, "values"),
        ]
        if full and full_sha256 is not None:
            checks.append(("base_sha256", full_sha256, lambda each: digest(each.tensors()), "values"))
        for field, wanted, measure, what in checks:
            if measure(weights) != wanted:
                allowed = (
                    f"the model that {adapter} was made from; {field} differs: its tensors have other {what}"
                )
                raise RequestError("base", str(folder), allowed)
        return weights


def require_family(base: WeightFolder, section: dict[str, Any]) -> None:
    """Refuse a base of another family than the one that was grafted.

    Args:
        section: `rmoe_graft` of the graft's configuration.
    """
    found, expected = read_json(base.path / CONFIG).get("model_type"), section.get("base_model_type")
    if found != expected:
        raise RequestError("base", str(base.path), f"a {expected} model; model_type of this one is {found}")


def open_base(folder: Path) -> WeightFolder:
    """The weights of a folder that can be a base.

    Raises:
        RequestError: it has none that can be read, or is grafted itself.
    """
    weights = open_weights(folder)
    if read_json(folder / CONFIG).get("model_type") == GRAFT_MODEL_TYPE:
        raise RequestError("base", str(folder), "a model without a graft; --undo takes one off")
    return weights


def base_digest(folder: Path) -> str | None:
    """The digest of an adapter's base, all its bytes; None of any other folder."""
    config = read_json(folder / CONFIG)
    if config.get("model_type") != GRAFT_MODEL_TYPE or Base.of_config(config, str(folder)) is None:
        return None
    return str(config[GRAFT_SECTION].get("base_sha256"))
