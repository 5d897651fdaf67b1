"""Which keys each chunk of queries attends: its local window, and the keys to which its queries give most weight.

A chunk is divided into sub-groups, and a mean query stands for each. The weight of a key is the sum over sub-groups of
the mean query's softmax over the keys, times the share of the sub-group's queries to which the key is new: visible,
and not in their local window. A kernel weighs the candidates of chunks in two walks over them and writes a total for
each. Another kernel takes the largest totals. If there are many keys, blocks of keys are chosen first, by their means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._calls import SelectCall
from .. import _common
from ..reference_lists import CHOSEN_BLOCKS, EXACT_KEYS, KEY_BLOCK, SUBGROUPS
from ._launch import Config, Rows, block_width, launch, rows
from ._windows import Range
from .attention import LOG2E, anew, load_rows, multiply
from .configs import Kind, choose

BLOCK = tl.constexpr(KEY_BLOCK)
GROUPS = tl.constexpr(SUBGROUPS)
LEAST = tl.constexpr(1e-30)  # added to weights, so that 0 differs from a key that must not be taken
LOWEST = tl.constexpr(-1e30)
INT_MAX = tl.constexpr(2147483647)
TOTALS_BYTES = 256 << 20  # most scratch memory for totals, but at least that of one program
SUMS = Config(16, 256, num_stages=1)  # rows summed at a time, and queries looked at
TAKE = Config(1024, 256, num_stages=1)  # candidates at a time, and values of a digit


class Chunks(NamedTuple):
    """What all kernels take first."""

    order: Tensor | None  # int32 [B, H, R * L]
    query_padding: Tensor | None  # bool [B, L]
    padding: Tensor | None  # bool [B, S]
    windows: Tensor  # int32 [B, chunks, 3]: begin and end of the local window, and the most keys to take
    members: Tensor  # int32 [B, H, L], by chunk: positions of the queries that choose its keys
    counts: Tensor  # int32 [B, H, chunks, sub-groups], how many they are
    smallest: Tensor  # int32 [B, H, chunks, sub-groups], their smallest position
    largest: Tensor  # int32 [B, H, chunks, sub-groups], the last position that they see; -1: they see nothing
    means: Tensor  # float32 [B * H * chunks * sub-groups, D]
    heads: int
    group: int
    length: int
    size: int  # S
    keys: int  # without context keys
    rounds: int
    chunk_length: int
    chunks: int
    subgroup: int
    scale: float
    causal: Any  # constexpr


class Candidates(NamedTuple):
    rows: Rows  # [B, key heads, n, D]: keys, or means of blocks
    n: int
    keys_per_candidate: int  # 1, or those of a block
    sizes: Tensor | None  # int32 [B, key heads, n], keys of each block that are no padding
    chosen: Tensor | None  # int32 [B, H, chunks, n_chosen], blocks that have the candidates, rising
    n_chosen: int
    filled: Tensor | None  # int32 [B, H, chunks], how many blocks are chosen


class Lists(NamedTuple):
    """What is taken."""

    lists: Tensor  # int32 [B, H, rows, length]; written from first_row on
    filled: Tensor | None  # int32 [B, H, chunks]
    rows: int
    first_row: int
    length: int
    wanted: int  # keys or blocks to take, besides the local window; -1: windows say it
    context_keys: int  # a list begins with so many context keys
    with_window: bool


@triton.jit
def window_of(p, b, chunk):
    """The local window of a chunk in the order of positions."""
    at = p.windows + (b.to(tl.int64) * p.chunks + chunk) * 3
    return Range(tl.load(at), tl.load(at + 1))


@triton.jit
def is_no_key(p, b, key, mask):
    if p.padding is None:
        return ~mask
    else:
        return ~mask | (tl.load(p.padding + b.to(tl.int64) * p.size + key, mask=mask, other=1) != 0)


@triton.jit
def find_members(p, padding, b, head, begin, BLOCK_N: tl.constexpr):
    """Writes the queries of a chunk that are no padding. Returns how many they are."""
    slots, count = tl.minimum(p.chunk_length, p.length - begin), 0
    for start in range(0, slots, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        chooses, position = i < slots, begin + i
        if p.order is not None:
            row = (head.to(tl.int64) * p.rounds + p.rounds - 1) * p.length
            position = tl.load(p.order + row + begin + i, mask=chooses, other=0)
        if padding is not None:
            chooses &= tl.load(padding + b.to(tl.int64) * p.length + position, mask=chooses, other=1) == 0
        one = chooses.to(tl.int32)
        to = count + tl.cumsum(one, 0) - one
        tl.store(p.members + head.to(tl.int64) * p.length + begin + to, position, mask=chooses)
        count += tl.sum(one, 0)
    return count


@triton.jit(do_not_specialize=["p"])
def means_kernel(p, query, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Finds the queries of a chunk that choose its keys (all of them, if all are padding), and mean queries."""
    head, begin = tl.program_id(0) // p.chunks, tl.program_id(0) % p.chunks * p.chunk_length
    b, h = head // p.heads, head % p.heads
    count = find_members(p, p.query_padding, b, head, begin, BLOCK_N)
    if count == 0:
        count = find_members(p, None, b, head, begin, BLOCK_N)
    tl.debug_barrier()  # all members are written
    d = tl.arange(0, BLOCK_D)
    for i in range(GROUPS):
        n = tl.minimum(tl.maximum(count - i * p.subgroup, 0), p.subgroup)
        members = p.members + head.to(tl.int64) * p.length + begin + i * p.subgroup
        total, smallest, largest = tl.zeros((BLOCK_D,), tl.float32), INT_MAX + n * 0, n * 0 - 1
        for start in range(0, n, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            position = tl.load(members + j, mask=j < n, other=0)
            total += tl.sum(load_rows(query, b, h, position, j < n, D, BLOCK_D).to(tl.float32), 0)
            smallest = tl.minimum(smallest, tl.min(tl.where(j < n, position, INT_MAX)))
            largest = tl.maximum(largest, tl.max(tl.where(j < n, position, -1)))
        if not p.causal:
            largest = tl.where(n > 0, INT_MAX, -1)
        row = tl.program_id(0).to(tl.int64) * GROUPS + i
        tl.store(p.counts + row, n)
        tl.store(p.smallest + row, smallest)
        tl.store(p.largest + row, largest)
        tl.store(p.means + row * D + d, total / tl.maximum(n, 1), mask=d < D)


@triton.jit(do_not_specialize=["p", "blocks"])
def blocks_kernel(p, key, means, sizes, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """The mean of a block's keys that are no padding, and how many they are."""
    head, first, key_heads = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK, p.heads // p.group
    b, h, d = head // key_heads, head % key_heads, tl.arange(0, BLOCK_D)
    total, n = tl.zeros((BLOCK_D,), tl.float32), 0
    for start in range(0, BLOCK, BLOCK_M):
        at = first + start + tl.arange(0, BLOCK_M)
        mask = ~is_no_key(p, b, at, at < p.keys)
        total += tl.sum(load_rows(key, b, h, at, mask, D, BLOCK_D).to(tl.float32), 0)
        n += tl.sum(mask.to(tl.int32), 0)
    tl.store(means + tl.program_id(0).to(tl.int64) * D + d, total / tl.maximum(n, 1), mask=d < D)
    tl.store(sizes + tl.program_id(0), n)


@triton.jit
def seen(c, position):
    """How many candidates are seen from a position."""
    return tl.where(position < 0, 0, tl.minimum(position // c.keys_per_candidate, c.n - 1) + 1)


@triton.jit
def key_of(c, chunk_row, i, mask):
    """Which key (or block) candidate i of a chunk is."""
    if c.chosen is None:
        return i
    else:
        return tl.load(c.chosen + chunk_row * c.n_chosen + i // BLOCK, mask=mask, other=0) * BLOCK + i % BLOCK


@triton.jit
def take_scores(
    p, c, b, key_head, chunk_row, start, candidates, high, low, largest, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys of candidates, and scores of mean queries (in two terms), base 2. -infinity: must not be taken."""
    i = start + tl.arange(0, BLOCK_N)
    mask = i < candidates
    key = key_of(c, chunk_row, i, mask)
    mask &= key < c.n
    if c.sizes is None:
        extra = tl.where(is_no_key(p, b, key, mask), float("-inf"), 0.0)
    else:
        head = (b * (p.heads // p.group) + key_head).to(tl.int64)
        size = tl.load(c.sizes + head * c.n + key, mask=mask, other=0)
        extra = tl.where(size > 0, tl.log2(tl.maximum(size, 1).to(tl.float32)), float("-inf"))
    key_rows = tl.trans(load_rows(c.rows, b, key_head, key, mask, D, BLOCK_D))
    score = multiply(anew(high, start), key_rows)
    if low is not None:
        score += multiply(low, key_rows)
    score = score * (p.scale * LOG2E) + extra[None, :]
    sees = (extra > float("-inf"))[None, :] & ((key * c.keys_per_candidate)[None, :] <= largest[:, None])
    return key, tl.where(sees, score, float("-inf"))


@triton.jit
def new_shares(p, b, members, count, smallest, key, WINDOWS: tl.constexpr):
    """The share of a sub-group's queries that have not seen each key yet."""
    share = (count > 0).to(tl.float32)[:, None] + (key * 0)[None, :].to(tl.float32)
    if p.causal or WINDOWS:
        if WINDOWS or tl.min(smallest) < tl.max(key):
            new = (count * 0)[:, None] + (key * 0)[None, :]
            for i in range(tl.max(count)):
                position = tl.load(members + i, mask=i < count, other=-1)
                is_new = (position >= 0)[:, None] & (key >= 0)[None, :]
                if p.causal:
                    is_new &= key[None, :] <= position[:, None]
                if WINDOWS:
                    window = window_of(p, b, tl.maximum(position, 0) // p.chunk_length)
                    is_new &= ~((key[None, :] >= window.begin[:, None]) & (key[None, :] < window.end[:, None]))
                new += is_new.to(tl.int32)
            share = new.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)[:, None]
    return share


@triton.jit(do_not_specialize=["p", "c", "first_program", "stride"])
def weigh_kernel(
    p, c, totals, first_program, stride, CHUNKS: tl.constexpr, WINDOWS: tl.constexpr, NEW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """totals [programs, CHUNKS, stride]: the totals of the candidates of each chunk of a program."""
    programs = tl.cdiv(p.chunks, CHUNKS)  # of a head
    program = first_program + tl.program_id(0)
    head, first_chunk = program // programs, program % programs * CHUNKS
    b, key_head = head // p.heads, head % p.heads // p.group
    row = tl.arange(0, BLOCK_M)
    chunk = first_chunk + row // GROUPS
    mask = (row < CHUNKS * GROUPS) & (chunk < p.chunks)
    chunk_row = (head * p.chunks + first_chunk).to(tl.int64)
    at = chunk_row * GROUPS + row
    count = tl.load(p.counts + at, mask=mask, other=0)
    smallest = tl.load(p.smallest + at, mask=mask, other=INT_MAX)
    largest = tl.load(p.largest + at, mask=mask, other=-1)
    d = tl.arange(0, BLOCK_D)[None, :]
    mean = tl.load(p.means + at[:, None] * D + d, mask=mask[:, None] & (d < D), other=0.0)
    high = mean.to(c.rows.data.dtype.element_ty)
    low = None if c.rows.data.dtype.element_ty == tl.float32 else (mean - high.to(tl.float32)).to(high.dtype)
    candidates = seen(c, tl.max(largest))
    if c.chosen is not None:
        candidates = tl.load(c.filled + chunk_row) * BLOCK
    top, exponentials = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, candidates, BLOCK_N):
        _, score = take_scores(p, c, b, key_head, chunk_row, start, candidates, high, low, largest, D, BLOCK_D, BLOCK_N)
        higher = tl.maximum(top, tl.max(score, 1))
        exponentials = exponentials * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        top = higher
    # A sub-group that sees nothing, or has scores of NaN, chooses nothing.
    count = tl.where(exponentials > 0, count, 0)
    top += tl.log2(tl.where(exponentials > 0, exponentials, 1.0))
    members = p.members + head.to(tl.int64) * p.length + chunk * p.chunk_length + row % GROUPS * p.subgroup
    nth = tl.arange(0, BLOCK_M // GROUPS)
    written = (nth < CHUNKS) & (first_chunk + nth < p.chunks)
    to = totals + (tl.program_id(0) * CHUNKS + nth).to(tl.int64)[:, None] * stride
    for start in range(0, candidates, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        key, score = take_scores(
            p, c, b, key_head, chunk_row, start, candidates, high, low, largest, D, BLOCK_D, BLOCK_N
        )
        share = (count > 0).to(tl.float32)[:, None]
        if NEW:
            share = new_shares(p, b, members, count, smallest, key, WINDOWS)
        chooses = (score > float("-inf")) & (count > 0)[:, None]
        # What is selected is not fused with the sum; see attention.row_products.
        total = tl.where(chooses, share * (tl.exp2(score - top[:, None]) + LEAST), 0.0)
        of_chunk = tl.sum(tl.reshape(total, (BLOCK_M // GROUPS, GROUPS, BLOCK_N)), 1)
        tl.store(to + i[None, :], of_chunk, mask=written[:, None] & (i < candidates)[None, :])


@triton.jit
def bits_of(c, totals, chunk_row, window, i, candidates):
    """Keys of candidates i, and the bits of their totals, which are ordered like these. 0: must not be taken."""
    mask = i < candidates
    key = key_of(c, chunk_row, i, mask)
    total = tl.load(totals + i, mask=mask, other=0.0)
    total = tl.where((total > 0) & ~((key >= window.begin) & (key < window.end)), total, 0.0)
    return key, total.to(tl.int32, bitcast=True)


@triton.jit
def window_keys(p, b, to, window, writes, BLOCK_M: tl.constexpr):
    """Counts the keys of a window that are no padding, and writes them if asked to."""
    count = 0
    for start in range(window.begin, window.end, BLOCK_M):
        key = start + tl.arange(0, BLOCK_M)
        one = (~is_no_key(p, b, key, key < window.end)).to(tl.int32)
        tl.store(to + count + tl.cumsum(one, 0) - one, key, mask=(one != 0) & writes)
        count += tl.sum(one, 0)
    return count


@triton.jit
def find_least(c, totals, chunk_row, window, candidates, wanted, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bits of the `wanted`-th largest total, found digit by digit, and how many totals with these bits to take. If
    there are fewer candidates all are taken."""
    found, equal, take_all, digits = 0, wanted, wanted < 0, tl.arange(0, BLOCK_N)
    for digit_index in range(4):
        shift = 24 - 8 * digit_index
        counts = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, candidates, BLOCK_M):
            _, x = bits_of(c, totals, chunk_row, window, start + tl.arange(0, BLOCK_M), candidates)
            counted = (x > 0) & (((x ^ found) >> shift) < BLOCK_N)  # earlier digits are those found
            counts += tl.histogram((x >> shift) & (BLOCK_N - 1), BLOCK_N, mask=counted)
        so_many = tl.cumsum(counts, 0, reverse=True)  # candidates with this digit or a larger one
        take_all |= (digit_index == 0) & (tl.max(so_many) <= wanted)
        digit = tl.maximum(tl.sum((so_many >= equal).to(tl.int32), 0) - 1, 0)
        found |= digit << shift
        equal -= tl.sum(tl.where(digits == digit, so_many - counts, 0), 0)
    return tl.where(take_all, 1, found), equal


@triton.jit(do_not_specialize=["p", "c", "t", "first_program", "stride"])
def take_kernel(
    p, c, t, totals, first_program, stride, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the list of a chunk: context keys, then the window and the best candidates in rising order, then -1."""
    programs, program = tl.cdiv(p.chunks, CHUNKS), first_program + tl.program_id(0) // CHUNKS
    head, chunk = program // programs, program % programs * CHUNKS + tl.program_id(0) % CHUNKS
    if chunk >= p.chunks:
        return
    b, chunk_row = head // p.heads, head.to(tl.int64) * p.chunks + chunk
    window = window_of(p, b, chunk)
    window = Range(tl.where(t.with_window, window.begin, 0), tl.where(t.with_window, window.end, 0))
    most = tl.where(t.wanted >= 0, t.wanted, tl.load(p.windows + (b.to(tl.int64) * p.chunks + chunk) * 3 + 2))
    if c.chosen is None:
        group = tl.arange(0, GROUPS)
        candidates = seen(c, tl.max(tl.load(p.largest + chunk_row * GROUPS + group)))
    else:
        candidates = tl.load(c.filled + chunk_row) * BLOCK
    totals += tl.program_id(0).to(tl.int64) * stride
    lists = t.lists + (head.to(tl.int64) * t.rows + t.first_row + chunk) * t.length
    n = tl.arange(0, BLOCK_M)
    for start in range(0, t.context_keys, BLOCK_M):
        tl.store(lists + start + n, p.keys + start + n, mask=start + n < t.context_keys)
    to = lists + t.context_keys
    local = window_keys(p, b, to, window, False, BLOCK_M)
    wanted = most - local
    # No candidate has such bits, so none is taken.
    least, ties = tl.where(wanted > 0, 0, INT_MAX), 0
    if wanted > 0:
        least, ties = find_least(c, totals, chunk_row, window, candidates, wanted, BLOCK_M, BLOCK_N)
    written, tied, below = 0, 0, 0
    for start in range(0, candidates, BLOCK_M):
        key, x = bits_of(c, totals, chunk_row, window, start + n, candidates)
        same = (x == least).to(tl.int32)
        taken = (x > least) | ((same != 0) & (tied + tl.cumsum(same, 0) <= ties))
        one = taken.to(tl.int32)
        entry = written + tl.cumsum(one, 0) - one + tl.where(key >= window.end, local, 0)
        tl.store(to + entry, key, mask=taken)
        written, tied = written + tl.sum(one, 0), tied + tl.sum(same, 0)
        below += tl.sum((taken & (key < window.begin)).to(tl.int32), 0)
    window_keys(p, b, to + below, window, True, BLOCK_M)
    for start in range(t.context_keys + local + written, t.length, BLOCK_M):
        tl.store(lists + start + n, n * 0 - 1, mask=start + n < t.length)
    if t.filled is not None:
        tl.store(t.filled + chunk_row, written)


def take(p: Chunks, c: Candidates, lists: Lists, batch: int, widths: dict[str, int]) -> None:
    """Weighs candidates, if there are any, and takes the best ones. It does so for all chunks, a slice at a time."""
    plan = choose(Kind("weigh", c.rows.data.element_size(), widths["BLOCK_D"]), p.members.device)
    chunks, windows = 1, p.rounds > 1  # chunks: of a program
    if c.chosen is not None:
        plan = plan._replace(block_m=16)
    else:
        chunks = plan.block_m // SUBGROUPS
    stride = c.n if c.chosen is None else c.n_chosen * KEY_BLOCK
    programs = batch * p.heads * triton.cdiv(p.chunks, chunks)
    at_a_time = min(programs, max(1, TOTALS_BYTES // max(1, 4 * chunks * stride)))
    totals = p.means.new_empty(at_a_time * chunks * stride)
    for first in range(0, programs, at_a_time):
        n = min(at_a_time, programs - first)
        if stride:
            launch(
                weigh_kernel, n, totals.device, p, c, totals, first, stride, config=plan, CHUNKS=chunks,
                WINDOWS=windows, NEW=c.keys_per_candidate == 1 and (windows or p.causal.value), **widths,
            )  # fmt: skip
        launch(take_kernel, n * chunks, totals.device, p, c, lists, totals, first, stride, config=TAKE, CHUNKS=chunks)


def take_chunks(call: SelectCall, query: Tensor, widths: dict[str, int]) -> Chunks:
    batch, heads, length, head_dim = query.shape
    chunk_length, size = min(call.chunk_length, length), call.key.shape[2]
    chunks = triton.cdiv(length, chunk_length)

    def numbers(*shape: int) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=torch.int32, device=query.device)

    order = _common.contiguous(call.order)
    p = Chunks(
        order=order, query_padding=_common.contiguous(call.query_padding_mask),
        padding=_common.contiguous(call.key_padding_mask), windows=call.windows, members=numbers(length),
        counts=numbers(chunks, SUBGROUPS),
        smallest=numbers(chunks, SUBGROUPS), largest=numbers(chunks, SUBGROUPS),
        means=query.new_empty((batch * heads * chunks * SUBGROUPS, head_dim), dtype=torch.float32), heads=heads,
        group=heads // call.key.shape[1], length=length, size=size, keys=size - call.context_keys,
        rounds=1 if order is None else order.shape[2], chunk_length=chunk_length, chunks=chunks,
        subgroup=min(triton.cdiv(call.chunk_length, SUBGROUPS), length), scale=call.scale,
        causal=tl.constexpr(call.causal),
    )  # fmt: skip
    launch(means_kernel, batch * heads * chunks, query.device, p, rows(query), config=SUMS, **widths)
    return p


def choose_blocks(call: SelectCall, p: Chunks, key: Tensor, widths: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Of each chunk the blocks of keys that have candidates, rising, and how many they are."""
    batch, key_heads, _, head_dim = key.shape
    blocks = triton.cdiv(p.keys, KEY_BLOCK)
    n_chosen = min(blocks, max(CHOSEN_BLOCKS, 2 * triton.cdiv(call.budget, KEY_BLOCK)))
    means = key.new_empty((batch, key_heads, blocks, head_dim), dtype=torch.float32)
    sizes = p.members.new_empty((batch, key_heads, blocks))
    launch(
        blocks_kernel, batch * key_heads * blocks, key.device, p, rows(key), means, sizes, blocks, config=SUMS, **widths
    )
    chosen, filled = (p.members.new_empty((batch, p.heads, p.chunks, *width)) for width in ((n_chosen,), ()))
    take(
        p, Candidates(rows(means), blocks, KEY_BLOCK, sizes, None, 0, None),
        Lists(chosen, filled, p.chunks, 0, n_chosen, n_chosen, 0, False), batch, widths,
    )  # fmt: skip
    return chosen, filled


def select_keys(call: SelectCall) -> Tensor:
    lists = torch.empty(call.lists_shape, dtype=torch.int32, device=call.device)
    if 0 in lists.shape[:3]:
        return lists
    query, key = _common.rows(call.query), _common.rows(call.key)
    widths = {"D": query.shape[3], "BLOCK_D": block_width(query.shape[3])}
    p, batch = take_chunks(call, query, widths), len(query)
    keys = Candidates(rows(key), p.keys, 1, None, None, 0, None)
    taken = Lists(lists, None, lists.shape[2], 0, lists.shape[3], -1, call.context_keys, True)
    if p.rounds == 2:  # the first has the windows
        take(p, keys._replace(n=0), taken._replace(wanted=0), batch, widths)
        taken = taken._replace(first_row=p.chunks, wanted=-1, context_keys=0, with_window=False)
    if p.keys > EXACT_KEYS:
        chosen, filled = choose_blocks(call, p, key, widths)
        keys = keys._replace(chosen=chosen, n_chosen=chosen.shape[3], filled=filled)
    take(p, keys, taken, batch, widths)
    return lists
