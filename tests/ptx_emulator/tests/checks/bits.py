"""Logic, shifts, fields, permutations, packing."""

from types import ModuleType

import numpy as np

from .snippets import assert_same_bits, lanes, random_words


def check_shifts(machine: ModuleType) -> None:
    a = random_words(1, np.uint32)
    amount = np.random.default_rng(0).integers(0, 70, 256).astype(np.uint32)
    python = [(int(x), int(n)) for x, n in zip(a, amount, strict=True)]
    signed = [(int(x), int(n)) for x, n in zip(a.view(np.int32), amount, strict=True)]
    wide = a.astype(np.uint64) << 20 | 5
    cases = {
        "shl.b32 d, a0, a1;": [x << n & 0xFFFFFFFF for x, n in python],
        "shr.u32 d, a0, a1;": [x >> n for x, n in python],
        "shr.s32 d, a0, a1;": [x >> n & 0xFFFFFFFF for x, n in signed],
        "shf.l.wrap.b32 d, a0, 77, a1;": [(((77 << 32) | x) << (n % 32) >> 32) & 0xFFFFFFFF for x, n in python],
        "shf.r.clamp.b32 d, a0, 77, a1;": [(((77 << 32) | x) >> min(n, 32)) & 0xFFFFFFFF for x, n in python],
    }
    for body, want in cases.items():
        assert_same_bits(lanes(machine, body, [a, amount], np.uint32), np.array(want, np.uint32), body)
    want = [int(x) << int(n) & (2**64 - 1) for x, n in zip(wide, amount, strict=True)]
    assert_same_bits(lanes(machine, "shl.b64 d, a0, a1;", [wide, amount], np.uint64), np.array(want, np.uint64))


def check_fields(machine: ModuleType) -> None:
    rng = np.random.default_rng(1)
    a, b = random_words(1, np.uint32), random_words(2, np.uint32)
    start, count = (rng.integers(0, 40, 256).astype(np.uint32) for _ in range(2))
    extracted, extended, inserted = [], [], []
    for x, y, s, n in zip(*(v.tolist() for v in (a, b, start, count)), strict=True):
        field = (x >> s) & ((1 << n) - 1)
        sign = (x >> min(s + n - 1, 31)) & 1 if n else 0
        kept = max(0, min(n, 32 - s))
        extracted.append(field)
        extended.append((field | (~((1 << kept) - 1) if sign else 0)) & 0xFFFFFFFF)
        mask = ((1 << n) - 1) << s
        inserted.append(((y & ~mask) | ((x << s) & mask)) & 0xFFFFFFFF)
    for body, want in (
        ("bfe.u32 d, a0, a2, a3;", extracted),
        ("bfe.s32 d, a0, a2, a3;", extended),
        ("bfi.b32 d, a0, a1, a2, a3;", inserted),
    ):
        got = lanes(machine, body, [a, b, start, count], np.uint32)
        assert_same_bits(got, np.array(want, np.uint32), body)


def check_counts(machine: ModuleType) -> None:
    a = random_words(3, np.uint32)
    for body, function in (
        ("popc.b32 d, a0;", lambda x: bin(x).count("1")),
        ("clz.b32 d, a0;", lambda x: 32 - x.bit_length()),
        ("bfind.u32 d, a0;", lambda x: x.bit_length() - 1 & 0xFFFFFFFF),
        ("brev.b32 d, a0;", lambda x: int(f"{x:032b}"[::-1], 2)),
        ("bmsk.clamp.b32 d, 3, a0;", lambda x: ((1 << min(x, 32)) - 1) << 3 & 0xFFFFFFFF),
    ):
        want = np.array([function(int(x)) for x in a], np.uint32)
        assert_same_bits(lanes(machine, body, [a], np.uint32), want, body)


def check_logic(machine: ModuleType) -> None:
    a, b, c = (random_words(seed, np.uint32) for seed in (4, 5, 6))
    for body, want in (
        ("and.b32 d, a0, a1;", a & b),
        ("or.b32 d, a0, a1;", a | b),
        ("xor.b32 d, a0, a1;", a ^ b),
        ("not.b32 d, a0;", ~a),
        ("lop3.b32 d, a0, a1, a2, 0xCA;", (a & b) | (~a & c)),
        ("lop3.b32 d, a0, a1, a2, 0x96;", a ^ b ^ c),
    ):
        assert_same_bits(lanes(machine, body, [a, b, c], np.uint32), want, body)


def check_permutation(machine: ModuleType) -> None:
    a, b, selector = (random_words(seed, np.uint32) for seed in (7, 8, 9))
    want = []
    for x, y, s in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True):
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        picked = []
        for i in range(4):
            nibble = s >> (4 * i) & 15
            byte = source[nibble & 7]
            picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        want.append(int.from_bytes(bytes(picked), "little"))
    assert_same_bits(lanes(machine, "prmt.b32 d, a0, a1, a2;", [a, b, selector], np.uint32), np.array(want, np.uint32))


def check_packing(machine: ModuleType) -> None:
    a, b = random_words(10, np.uint32), random_words(11, np.uint32)
    got = lanes(machine, "mov.b64 d, {a0, a1};", [a, b], np.uint64)
    assert_same_bits(got, a | b.astype(np.uint64) << np.uint64(32))
    got = lanes(machine, "mov.b32 {%rs1, %rs2}, a0; mov.b32 d, {%rs2, %rs1};", [a], np.uint32)
    assert_same_bits(got, a >> 16 | a << 16)
    got = lanes(machine, "mov.b64 {_, d}, a0;", [a.astype(np.uint64) << 32], np.uint32)
    assert_same_bits(got, a)
