"""Angular LSH: tiles of tokens are projected onto the rotations of all rounds; the largest projection is the bucket."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._calls import HashCall
from .. import _common
from ._launch import block_width, launch, rows
from .configs import Kind, choose


@triton.jit
def _project(x, rotation):
    """x @ rotation in float32; of half types the rotation is two terms, so that buckets are those of float32."""
    if x.dtype == tl.float32:
        return tl.dot(x, rotation, input_precision="ieee")
    else:
        high = rotation.to(x.dtype)
        low = (rotation - high.to(tl.float32)).to(x.dtype)
        return tl.dot(x, high, acc=tl.dot(x, low))


@triton.jit
def _better(best, index, projected, start):
    """The largest so far and where it is, the first one of equals."""
    largest, at = tl.max(projected, 1, return_indices=True, return_indices_tie_break_left=True)
    index = tl.where(largest > best, start + at, index)
    return tl.maximum(best, largest), index


@triton.jit(do_not_specialize=["heads", "length", "rounds", "columns", "padded_bucket", "factors"])
def hash_kernel(
    x, rotations, padding, buckets, factors, rotations_stride_b, rotations_stride_h, heads, length, rounds, columns,
    padded_bucket, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x: Rows; rotations [B|1, H|1, D, R, columns]; buckets [B, H, R, L]; a program: a tile of tokens of a head."""
    tiles = tl.cdiv(length, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    token, d, n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask = token < length
    at = b * x.stride_b + h * x.stride_h + token.to(tl.int64)[:, None] * x.stride_l + d[None, :]
    row = tl.load(x.data + at, mask=mask[:, None] & (d[None, :] < D), other=0.0)
    rotations += b * rotations_stride_b + h * rotations_stride_h
    if padding is not None:
        ignored = tl.load(padding + b * length + token, mask=mask, other=0) != 0
    for r in range(rounds):
        bucket = tl.zeros((BLOCK_M,), tl.int32)
        radix, begin = 1, r * columns
        for i in tl.static_range(len(factors)):
            half = factors[i] // 2
            best, index = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.int32)
            best_negative, index_negative = best, index
            for start in range(0, half, BLOCK_N):
                column = start + n
                valid = column < half
                rotation = tl.load(
                    rotations + d[:, None] * (rounds * columns) + begin + column[None, :],
                    mask=(d[:, None] < D) & valid[None, :], other=0.0,
                )  # fmt: skip
                # Wide rows are kept out of registers; see attention.anew.
                x_rows = tl.where(start >= 0, row, 0.0) if BLOCK_D > 128 else row
                projected = _project(x_rows, rotation)  # columns beyond the factor give 0, which is the last of equals
                best, index = _better(best, index, projected, start)
                best_negative, index_negative = _better(best_negative, index_negative, -projected, start)
            digit = tl.where(best_negative > best, half + index_negative, index)
            bucket += radix * tl.minimum(digit, 2 * half - 1)  # of rows of NaN, too
            radix *= factors[i]
            begin += half
        if padding is not None:
            bucket = tl.where(ignored, padded_bucket, bucket)
        tl.store(buckets + (head.to(tl.int64) * rounds + r) * length + token, bucket, mask=mask)


def hash_buckets(call: HashCall) -> Tensor:
    rotations, factors = call.resolve()
    x = _common.rows(call.x)
    batch, heads, length, head_dim = x.shape
    rotations = rotations.float().contiguous()
    rounds, columns = rotations.shape[3:]
    strides = [0 if rotations.shape[i] == 1 else rotations.stride(i) for i in range(2)]
    buckets = torch.empty((batch, heads, rounds, length), dtype=torch.int32, device=x.device)
    width = block_width(head_dim)
    plan = choose(Kind("hash", x.element_size(), width), x.device)
    plan = plan._replace(block_n=min(plan.block_n, block_width(max(factors) // 2)))
    padded_bucket = 1
    for factor in factors:
        padded_bucket *= factor
    launch(
        hash_kernel, batch * heads * triton.cdiv(length, plan.block_m), x.device,
        rows(x), rotations, _common.contiguous(call.key_padding_mask), buckets, factors, *strides, heads, length,
        rounds, columns, padded_bucket, config=plan, D=head_dim, BLOCK_D=width,
    )  # fmt: skip
    return buckets
