"""Stable counting sort of buckets: tiles of keys are counted by digit, the counts summed up, and the keys placed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._calls import OrderCall, n_sequences
from .. import _common
from ._launch import Config, launch
from ._windows import row_stride

TILE_BITS = 10
LEAST_BITS, MOST_BITS = 4, 10  # of a digit; keys have as few and as equal digits as that allows
SIZES = ["tiles", "bounds_stride", "sequences", "heads", "rounds", "length", "n_buckets", "shift"]
WHOLE_BITS = 30 - TILE_BITS  # of the digits of keys that fit in one tile, which is sorted by digit and place


@triton.jit
def _segment(number, cu_seqlens, bounds_stride, sequences, heads, rounds, length):
    """Of a sequence in a round of a row: where its buckets and its order begin, and how many they are."""
    sequence, rest = number % sequences, number // sequences
    r, row = rest % rounds, (rest // rounds).to(tl.int64)
    start, count = 0, length
    if cu_seqlens is not None:
        bounds = cu_seqlens + row // heads * bounds_stride + sequence
        start = tl.load(bounds)
        count = tl.load(bounds + 1) - start
    return (row * rounds + r) * length + start, row * rounds * length + start * rounds + r * count, count


@triton.jit
def _digits(buckets, before, source, target, tile, count, n_buckets, shift, MASK: tl.constexpr, BLOCK_M: tl.constexpr):
    """The digits of a tile of keys in the order that earlier digits gave; one out of range counts as the last."""
    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = at < count
    position = at
    if before is not None:
        position = tl.load(before + target + at, mask=mask, other=0)
    bucket = tl.load(buckets + source + position, mask=mask, other=0)
    bucket = tl.where((bucket < 0) | (bucket >= n_buckets), n_buckets - 1, bucket)
    return (bucket >> shift) & MASK, mask


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    buckets, before, counts, cu_seqlens, tiles, bounds_stride, sequences, heads, rounds, length, n_buckets, shift,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """counts [segments, digits, tiles]"""
    tile, number = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    source, target, count = _segment(number, cu_seqlens, bounds_stride, sequences, heads, rounds, length)
    digit, mask = _digits(buckets, before, source, target, tile, count, n_buckets, shift, BLOCK_N - 1, BLOCK_M)
    found = tl.histogram(digit, BLOCK_N, mask=mask)
    tl.store(counts + (number.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)) * tiles + tile, found)


@triton.jit(do_not_specialize=["tiles"])
def scan_kernel(counts, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Each count becomes the sum of those before it in its segment."""
    total = tiles * BLOCK_N
    counts += tl.program_id(0).to(tl.int64) * total
    before = 0
    for start in range(0, total, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        found = tl.load(counts + at, mask=at < total, other=0)
        tl.store(counts + at, before + tl.cumsum(found, 0) - found, mask=at < total)
        before += tl.sum(found, 0)


@triton.jit(do_not_specialize=SIZES)
def place_kernel(
    buckets, before, offsets, cu_seqlens, order, tiles, bounds_stride, sequences, heads, rounds, length, n_buckets,
    shift, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Places a tile's keys by one digit; offsets None: of the segment's only tile."""
    tile, number = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    source, target, count = _segment(number, cu_seqlens, bounds_stride, sequences, heads, rounds, length)
    digit, mask = _digits(buckets, before, source, target, tile, count, n_buckets, shift, (1 << BITS) - 1, BLOCK_M)
    i = tl.arange(0, BLOCK_M)
    ordered = tl.sort(tl.where(mask, digit * BLOCK_M + i, 2147483647))
    mask = i < count - tile * BLOCK_M
    position = tile * BLOCK_M + (ordered & (BLOCK_M - 1))
    to = i
    if offsets is not None:
        found = tl.histogram(digit, BLOCK_N, mask=tile * BLOCK_M + i < count)
        digit = (ordered // BLOCK_M) & (BLOCK_N - 1)
        first = tl.load(offsets + (number.to(tl.int64) * BLOCK_N + digit) * tiles + tile, mask=mask, other=0)
        to = first + i - tl.gather(tl.cumsum(found, 0) - found, digit, 0)
    if before is not None:
        position = tl.load(before + target + position, mask=mask, other=0)
    tl.store(order + target + to, position, mask=mask)


def bucket_order(call: OrderCall) -> Tensor:
    """Buckets are not checked, for which the host would have to wait: one out of range counts as the last."""
    return sort(call.buckets.contiguous(), _common.device_bounds(call), call.longest, call.n_buckets)


def sort(buckets: Tensor, cu_seqlens: Tensor | None, longest: int, n_buckets: int) -> Tensor:
    """Positions of buckets [B, H, R, L], sorted; ``longest``: keys of a segment at most."""
    batch, heads, rounds, length = buckets.shape
    sequences, bounds_stride = n_sequences(cu_seqlens), row_stride(cu_seqlens)
    tile = 1 << TILE_BITS
    tiles, segments = triton.cdiv(longest, tile), batch * heads * rounds * sequences
    whole, bits = tiles <= 1, (n_buckets - 1).bit_length()
    passes = max(1, triton.cdiv(bits, WHOLE_BITS if whole else MOST_BITS))
    digit = WHOLE_BITS if whole else max(LEAST_BITS, triton.cdiv(bits, passes))
    plan = Config(tile, 1 if whole else 1 << digit, num_stages=1)
    counts = None
    if not whole:
        counts = torch.empty((segments, plan.block_n, tiles), dtype=torch.int32, device=buckets.device)
    before, order = None, buckets
    for i in range(passes):
        sizes = tiles, bounds_stride, sequences, heads, rounds, length, n_buckets, i * digit
        if counts is not None:
            launch(
                count_kernel, segments * tiles, buckets.device, buckets, before, counts, cu_seqlens, *sizes, config=plan
            )
            launch(scan_kernel, segments, buckets.device, counts, tiles, config=plan)
        order = torch.empty_like(buckets)
        launch(
            place_kernel, segments * tiles, buckets.device, buckets, before, counts, cu_seqlens, order, *sizes,
            config=plan, BITS=digit,
        )  # fmt: skip
        before = order
    return order
