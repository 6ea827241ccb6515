"""A griffe extension: two habits of this package's docstrings, in the form that mkdocstrings reads.

Parameters described together (`num_experts, top_k: ...`) get a row each, and a doctest outside any section becomes an
"Examples" section. Only the docstrings that mkdocstrings sees are changed; files stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(    )(\w+(?:, \w+)+): (.*(?:\n     +.*)*)", re.MULTILINE)
DOCTEST = re.compile(r"^(>>> .*(?:\n\S.*)*)", re.MULTILINE)


def rewritten(text: str) -> str:
    r"""The docstring as mkdocstrings reads it.

    >>> rewritten("Sum.\n\nArgs:\n    a, b: terms.\n\n>>> 1 + 1\n2").splitlines()[3:]
    ['    a: terms.', '    b: see `a`.', '', 'Examples:', '    >>> 1 + 1', '    2']
    """

    def one_each(match: re.Match[str]) -> str:
        indent, names, said = match.groups()
        first, *others = names.split(", ")
        return "\n".join(
            [f"{indent}{first}: {said}", *(f"{indent}{name}: see `{first}`." for name in others)]
        )

    def section(match: re.Match[str]) -> str:
        return "Examples:\n" + "\n".join("    " + line for line in match[1].splitlines())

    return DOCTEST.sub(section, ENTRY.sub(one_each, text))


class Docstrings(griffe.Extension):
    """Rewrites each docstring once it is collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
