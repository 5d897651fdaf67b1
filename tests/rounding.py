"""Equality of two ways to compute the same sums, up to their roundings."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def assert_equal_to_rounding(actual: Any, expected: Any, roundings: int) -> None:
    """Tensors, or equal structures of them, that differ by no more than ``roundings`` units of the largest value.

    Args:
        roundings: on the longest way to a value: a sum of n terms has n, and each side has its own. The unit is that of
            the largest finite value of the whole structure: a sum may cancel to less than its terms.

    Raises:
        AssertionError: a shape, a dtype, an infinity or a value differs.
    """
    left, left_spec = pytree.tree_flatten(actual)
    right, right_spec = pytree.tree_flatten(expected)
    assert left_spec == right_spec
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if isinstance(a, Tensor)]
    assert pairs
    largest = max(
        (float(b.detach().abs().masked_fill(~b.isfinite(), 0).max()) for _, b in pairs if b.numel()), default=0
    )
    for a, b in pairs:
        unit = torch.finfo(b.dtype).eps * largest
        torch.testing.assert_close(a, b, rtol=0, atol=2 * roundings * unit)
