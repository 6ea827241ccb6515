"""pyproject.toml's requirements as lists for pip: for `make latest`, `make lowest` and `make docs`.

    python tools/requirements.py latest     every name without its version: the newest of everything, caps ignored
    python tools/requirements.py lowest     run-time requirements at the lowest release they declare
    python tools/requirements.py declared   all requirements of all extras as they are declared
    python tools/requirements.py docs       the requirements of one extra as they are declared

The standard library alone: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+(?:\[[a-z,]+\])?)(?P<specifier>[^;]*)")


def requirements(form: str) -> list[str]:
    """One line per requirement, run-time ones first."""
    project = tomllib.loads(Path(__file__).parent.with_name("pyproject.toml").read_text())["project"]
    if form in project["optional-dependencies"]:
        return list(project["optional-dependencies"][form])
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    lines = []
    for line in (*project["dependencies"], *extras):
        match = REQUIREMENT.match(line)
        assert match is not None, line
        name, specifier = match["name"], match["specifier"].strip()
        lowest = re.match(r">=\s*([0-9.]+)", specifier)
        if form == "latest":
            lines.append(name)
        elif form == "lowest" and lowest and line in project["dependencies"]:
            minor = lowest[1] if "." in lowest[1] else f"{lowest[1]}.0"
            lines.append(f"{name}=={minor}{'' if minor.count('.') > 1 else '.*'}")
        else:
            lines.append(name + specifier)
    return lines


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
