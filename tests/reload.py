"""What a reload can promise: every bit of every tensor, and outputs that differ by rounding alone.

Outputs may differ in the last bits: a tensor read from a file lies at another alignment, and the processor's kernels
add in another order there (1.5e-8 was seen).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_reloaded(loaded: nn.Module, saved: nn.Module, ids: Tensor) -> None:
    """Equal names, dtypes, bits and flags of all tensors; logits within rounding."""
    assert_same_tensors(loaded, saved)
    with torch.no_grad():
        assert_same_logits(loaded.eval()(input_ids=ids).logits, saved.eval()(input_ids=ids).logits)


def assert_same_tensors(loaded: nn.Module, saved: nn.Module) -> None:
    got, want = loaded.state_dict(), saved.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def assert_same_logits(got: Tensor, want: Tensor) -> None:
    """Within 32 roundings of the largest logit."""
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= 32 * torch.finfo(want.dtype).eps * want.abs().max()
