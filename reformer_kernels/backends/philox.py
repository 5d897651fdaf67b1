"""Philox4x32-10 (Salmon et al. 2011) on integer tensors: the dropout bits of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b  # int64 wraps like uint64
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Four 32-bit words [..., 4] (int64) for a counter of four broadcastable words and a one-element int64 seed."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def drop_threshold(dropout_p: float) -> int:
    """A word below this is dropped."""
    return min(round(dropout_p * 2**32), _MASK)


def keep_factor(dropout_p: float) -> float:
    """What a kept probability is multiplied by."""
    return 0.0 if dropout_p >= 1 else 1.0 / (1.0 - dropout_p)
