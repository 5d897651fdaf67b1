"""Exchanges in a warp, divergence and special registers."""

from types import ModuleType

import numpy as np

from .snippets import assert_same_bits, lanes, random_words

LANE = np.arange(32)
FULL = "0xffffffff"


def check_shuffles(machine: ModuleType) -> None:
    a = random_words(1, np.uint32, 32)
    for width in (32, 8):
        segment = 32 - width
        first, last = LANE & segment, (LANE & segment) | (31 & ~segment)
        up_clamp, clamp = segment << 8, segment << 8 | 31
        for mode, bound, source in (
            ("up", up_clamp, np.where(LANE - 3 >= first, LANE - 3, LANE)),
            ("down", clamp, np.where(LANE + 3 <= last, LANE + 3, LANE)),
            ("bfly", clamp, np.where((LANE ^ 3) <= last, LANE ^ 3, LANE)),
            ("idx", clamp, first | (3 & ~segment)),
        ):
            body = f"shfl.sync.{mode}.b32 d, a0, 3, {bound}, {FULL};"
            assert_same_bits(lanes(machine, body, [a], np.uint32), a[source], body)
    body = f"shfl.sync.down.b32 %r1|%p1, a0, 5, 31, {FULL}; selp.u32 d, 1, 0, %p1;"
    assert_same_bits(lanes(machine, body, [a], np.uint32), LANE + 5 <= 31)


def check_votes(machine: ModuleType) -> None:
    a = random_words(2, np.uint32, 32)
    odd = (a & 1) == 1
    code = "and.b32 %r1, a0, 1; setp.eq.u32 %p1, %r1, 1;"
    ballot = int((odd * (1 << LANE.astype(np.int64))).sum())
    got = lanes(machine, f"{code} vote.sync.ballot.b32 d, %p1, {FULL};", [a], np.uint32)
    assert_same_bits(got, np.full(32, ballot))
    for kind, want in (("any", odd.any()), ("all", odd.all())):
        body = f"{code} vote.sync.{kind}.pred %p2, %p1, {FULL}; selp.u32 d, 1, 0, %p2;"
        assert_same_bits(lanes(machine, body, [a], np.uint32), np.full(32, want), kind)
    got = lanes(machine, f"{code} vote.sync.ballot.b32 d, !%p1, {FULL};", [a], np.uint32)
    assert_same_bits(got, np.full(32, ~np.uint32(ballot)))


def check_matches_and_reductions(machine: ModuleType) -> None:
    a = np.random.default_rng(3).integers(-3, 3, 32).astype(np.int32)
    peers = ((a[:, None] == a[None]) * (1 << LANE.astype(np.int64))).sum(1)
    assert_same_bits(lanes(machine, f"match.any.sync.b32 d, a0, {FULL};", [a], np.uint32), peers)
    for op, type_, want in (
        ("add", "s32", a.sum()),
        ("min", "s32", a.min()),
        ("max", "s32", a.max()),
        ("max", "u32", a.view(np.uint32).max()),
        ("xor", "b32", np.bitwise_xor.reduce(a)),
    ):
        body = f"redux.sync.{op}.{type_} d, a0, {FULL};"
        got = lanes(machine, body, [a], np.uint32)
        assert_same_bits(got, np.full(32, int(want) & 0xFFFFFFFF), body)


def check_divergent_lanes_meet_again(machine: ModuleType) -> None:
    """Odd lanes loop `lane` times, even ones not at all; then all shuffle."""
    body = f"""
        and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0;
        @%p1 bra DONE;
        LOOP: add.u32 %r2, %r2, a0; add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, %r0; @%p2 bra LOOP;
        DONE: shfl.sync.bfly.b32 d, %r2, 1, 31, {FULL};
    """
    a = random_words(4, np.uint32, 32)
    total = np.where(LANE % 2 == 1, a * LANE.astype(np.uint32), 0).astype(np.uint32)
    assert_same_bits(lanes(machine, body, [a], np.uint32), total[LANE ^ 1])


def check_halves_of_a_warp_use_their_own_masks(machine: ModuleType) -> None:
    a = np.arange(32, dtype=np.uint32)
    body = "and.b32 %r1, %r0, 16; shl.b32 %r2, 0xffff, %r1; redux.sync.add.u32 d, a0, %r2;"
    assert_same_bits(lanes(machine, body, [a], np.uint32), np.where(LANE < 16, a[:16].sum(), a[16:].sum()))


def check_special_registers(machine: ModuleType) -> None:
    a = np.zeros(64, np.uint32)
    thread = np.arange(64)
    for name, want in (
        ("laneid", thread % 32),
        ("warpid", thread // 32),
        ("ntid.x", np.full(64, 64)),
        ("nctaid.y", np.full(64, 1)),
        ("lanemask_lt", (1 << thread % 32) - 1),
        ("lanemask_ge", 0x100000000 - (1 << thread % 32)),
    ):
        assert_same_bits(lanes(machine, f"mov.u32 d, %{name};", [a], np.uint32), want.astype(np.uint32), name)
