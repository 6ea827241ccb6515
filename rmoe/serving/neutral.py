"""Fields of OpenAI's API that ask for nothing when they have their neutral value: accepted then, else refused by name.

Clients send many of them always. None reaches the model: what they could ask for is not offered here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Neutral:
    """When a field asks for nothing, and that in words. null always does."""

    holds: Callable[[Any], bool]
    allowed: str


def _equal(*values: Any) -> Neutral:
    """One of these values; 0 is 0.0, but no number is false."""

    def holds(given: Any) -> bool:
        return any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)

    return Neutral(holds, " or ".join(["null", *map(json.dumps, values)]))


def _any(kind: type, said: str) -> Neutral:
    """Any value of a type: it says nothing about the answer."""
    return Neutral(lambda given: isinstance(given, kind), said)


_BOTH = {
    "n": _equal(1),
    "user": _any(str, "a text"),
    "metadata": _any(dict, "an object"),
    "store": _equal(False),
    "service_tier": _equal("auto", "default"),
    "safety_identifier": _any(str, "a text"),
    "prompt_cache_key": _any(str, "a text"),
    "logprobs": _equal(False),
}
NEUTRAL: dict[str, dict[str, Neutral]] = {
    "completion": _BOTH | {"echo": _equal(False), "best_of": _equal(1), "suffix": _equal("")},
    "chat": _BOTH
    | {
        "tools": _equal([]),
        "tool_choice": _equal("none", "auto"),
        "functions": _equal([]),
        "function_call": _equal("none", "auto"),
        "parallel_tool_calls": _any(bool, "true or false"),
        "top_logprobs": _equal(0),
        "response_format": _equal({"type": "text"}),
        "modalities": _equal(["text"]),
        "reasoning_effort": _equal("none"),
        "verbosity": _equal("medium"),
        "audio": _equal(),
        "prediction": _equal(),
        "web_search_options": _equal(),
    },
}

# Keys of a message that ask for nothing when they are null or empty: a client sends back the answer it was given.
MESSAGE_EXTRAS = frozenset(
    {"refusal", "audio", "function_call", "tool_calls", "annotations", "reasoning_content"}
)
