"""Marks for what a test owes to the release it runs under; `make lowest` runs the suite under the lowest declared."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def older(library: str, release: str) -> bool:
    """Whether the installed release is older than this one."""
    return Version(version(library)) < Version(release)


def since(library: str, release: str, reason: str) -> pytest.MarkDecorator:
    """Skip under releases older than this one, because of `reason`."""
    return pytest.mark.skipif(older(library, release), reason=f"{library} below {release}: {reason}")
