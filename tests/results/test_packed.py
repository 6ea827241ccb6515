"""Packed lists: every kind comes back as it was, and what is not a packed list is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from rmoe.results.packed import pack, unpack

RNG = np.random.default_rng(0)
VALUES = {
    "integers": RNG.integers(-3, 300, (7, 5, 4)).tolist(),
    "wide integers": [2**40, 1] * 40,
    "doubles": RNG.normal(size=(9, 11)).tolist(),
    "singles": RNG.normal(size=99).astype(np.float32).tolist(),
    "few distinct": (RNG.integers(0, 9, (40, 40)) / 7).tolist(),
    "extreme": [1e300, -0.0, 5e-324, 1.5] * 20,
    "nulls": [[None if i == j else i / 3 for i in range(12)] for j in range(12)],
    "ragged": [[1.5] * (i % 4) for i in range(60)],
    "ragged rows": [[[{"text": f"t{i % 5}", "count": i}] * (i % 3)] for i in range(99)],
    "texts": ["a", "é", "</script>", ""] * 30,
    "mixed": [1, "a", None, True, [2], {"b": [1] * 64}] * 20,
    "booleans": [True, False] * 40,
    "uneven rows": [{"a": 1}, {"b": 2}] * 40,
    "empty": [[], [[]], {}],
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_packed_comes_back_through_json(name):
    value = {name: [VALUES[name]]}
    packed = json.loads(json.dumps(pack(value, least=32), allow_nan=False))
    assert repr(unpack(packed)) == repr(value)  # repr: -0.0, 1 and 1.0, True and 1 are told apart


@pytest.mark.parametrize("name", ["integers", "doubles", "ragged", "ragged rows", "texts"])
def test_short_lists_stay_as_they_are(name):
    assert pack(VALUES[name], least=10**6) == VALUES[name] or name == "ragged rows"
    assert json.dumps(pack(VALUES[name], least=32)) != json.dumps(VALUES[name])


def test_few_distinct_numbers_take_about_a_byte_each():
    shares = (np.random.default_rng(1).poisson(117, (47, 64, 64)) / 30_000).tolist()
    assert len(json.dumps(pack(shares, least=32))) < 1.5 * 47 * 64 * 64


@pytest.mark.parametrize(
    "change",
    [
        {"packed": "object"},
        {"packed": "float64"},
        {"n": 10**12},
        {"n": 3},
        {"bytes": "AAAA"},
        {"bytes": "not base64"},
        {"bytes": None},
        {"lengths": ["x"]},
        {"lengths": [0]},
        {"lengths": [3]},
        {"lengths": [[1, 2]]},
        {"of": {"packed": "float64", "n": 0, "bytes": "eJwDAAAAAAE="}},
    ],
)
def test_what_was_damaged_is_refused(change):
    packed = copy.deepcopy(pack(VALUES["integers"], least=32))
    packed.update(change)  # of [7][5][4] integers
    with pytest.raises(ValueError, match="packed list"):
        unpack(packed)
