"""Numbers of buckets and random rotations of the LSH scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FACTORISE_ABOVE = 128  # hashing costs D * n_buckets a token: above this two factors are cheaper than one


def bucket_factors(n_buckets: int | Sequence[int] | None, length: int, chunk_length: int) -> tuple[int, ...]:
    """The factors of the number of buckets.

    None follows trax: ``2 * max(1, length // chunk_length)`` buckets, in two factors when there are more than 128.

    Raises:
        ValueError: a factor is not a positive even integer.
    """
    if n_buckets is None:
        n = 2 * max(1, length // chunk_length)
        if n <= FACTORISE_ABOVE:
            return (n,)
        first = 2 ** math.ceil(math.log2(math.sqrt(n)))
        return (first, 2 * (n // (2 * first)))
    factors = tuple(n_buckets) if isinstance(n_buckets, (tuple, list)) else (n_buckets,)
    if not factors or any(isinstance(f, bool) or not isinstance(f, int) or f < 2 or f % 2 for f in factors):
        raise ValueError(f"n_buckets must be a positive even integer or a sequence of them, got {n_buckets!r}")
    if math.prod(factors) >= 2**31 - 1:
        raise ValueError(f"n_buckets must have a product below 2**31 - 1, got {n_buckets!r}")
    return factors


@lru_cache(maxsize=16)
def _normals(hash_seed: int, heads: int, head_dim: int, n_hashes: int, columns: int) -> np.ndarray:
    # numpy's Philox is a counter-based generator whose raw stream is fixed, so a seed means the same values everywhere.
    count = heads * head_dim * n_hashes * columns
    raw = np.random.Philox(key=hash_seed % 2**64).random_raw(2 * ((count + 1) // 2))
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]
    return normal.astype(np.float32).reshape(1, heads, head_dim, n_hashes, columns)


@lru_cache(maxsize=16)
def _device_rotations(device: torch.device, *key: int) -> Tensor:
    return torch.from_numpy(_normals(*key)).to(device)


def cached_rotations(
    hash_seed: int, heads: int, head_dim: int, n_hashes: int, factors: Sequence[int], device: torch.device
) -> Tensor:
    """Rotations [1, H, D, R, sum(factors) / 2] of a seed, kept per device. Not to be written to."""
    return _device_rotations(device, hash_seed, heads, head_dim, n_hashes, sum(factors) // 2)


def random_rotations(
    hash_seed: int, heads: int, head_dim: int, n_hashes: int, n_buckets: int | Sequence[int]
) -> Tensor:
    """Random projections for ``hash_buckets``: a pure function of its arguments, on every device and version.

    Args:
        hash_seed: any integer; taken modulo 2**64.
        heads, head_dim, n_hashes: H, D and R, at least 1.
        n_buckets: an even integer, or even factors.

    Returns:
        float32 [1, H, D, R, sum(n_buckets) / 2] of independent standard normals.

    Raises:
        TypeError, ValueError: an argument is not an integer in its range.
    """
    for name, value in (("heads", heads), ("head_dim", head_dim), ("n_hashes", n_hashes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(hash_seed, bool) or not isinstance(hash_seed, int):
        raise TypeError(f"hash_seed must be an int, got {hash_seed!r}")
    if n_buckets is None:
        raise TypeError("n_buckets must be a positive even integer or a sequence of them, got None")
    factors = bucket_factors(n_buckets, 1, 1)
    return torch.from_numpy(_normals(hash_seed, heads, head_dim, n_hashes, sum(factors) // 2).copy())
