"""Integer and float arithmetic, comparisons, selection."""

import operator
from collections.abc import Callable
from types import ModuleType

import numpy as np

from .snippets import assert_same_bits, bfloat16_bits, from_bfloat16, lanes, random_floats, random_words

INTEGERS = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


def _wrapped(values: list[int], dtype: type) -> np.ndarray:
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([value & ((1 << bits) - 1) for value in values], np.dtype(f"u{bits // 8}")).view(dtype)


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _upper_half(bits: int) -> Callable[[int, int, int], int]:
    return lambda x, y, z: x * y >> bits


def check_integers(machine: ModuleType) -> None:
    for type_, dtype in INTEGERS.items():
        a, b, c = (random_words(seed, dtype, 64) for seed in range(3))
        b[b == 0] = 3
        exact: dict[str, Callable[[int, int, int], int]] = {
            f"add.{type_} d, a0, a1;": lambda x, y, z: x + y,
            f"sub.{type_} d, a0, a1;": lambda x, y, z: x - y,
            f"mul.lo.{type_} d, a0, a1;": lambda x, y, z: x * y,
            f"mul.hi.{type_} d, a0, a1;": _upper_half(8 * np.dtype(dtype).itemsize),
            f"mad.lo.{type_} d, a0, a1, a2;": lambda x, y, z: x * y + z,
            f"min.{type_} d, a0, a1;": lambda x, y, z: min(x, y),
            f"max.{type_} d, a0, a1;": lambda x, y, z: max(x, y),
            f"div.{type_} d, a0, a1;": lambda x, y, z: _quotient(x, y),
            f"rem.{type_} d, a0, a1;": lambda x, y, z: x - y * _quotient(x, y),
        }
        if type_[0] == "s":
            exact[f"neg.{type_} d, a0;"] = lambda x, y, z: -x
            exact[f"abs.{type_} d, a0;"] = lambda x, y, z: abs(x)
        if type_ == "s32":
            exact["min.relu.s32 d, a0, a1;"] = lambda x, y, z: max(min(x, y), 0)
            exact["max.relu.s32 d, a0, a1;"] = lambda x, y, z: max(x, y, 0)
        for body, function in exact.items():
            want = [function(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
            assert_same_bits(lanes(machine, body, [a, b, c], dtype), _wrapped(want, dtype), body)


def check_wide_products(machine: ModuleType) -> None:
    for type_, narrow, wide in (
        ("u16", np.uint16, np.uint32),
        ("s16", np.int16, np.int32),
        ("u32", np.uint32, np.uint64),
        ("s32", np.int32, np.int64),
    ):
        a, b, c = random_words(0, narrow), random_words(1, narrow), random_words(2, wide)
        products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
        got = lanes(machine, f"mul.wide.{type_} d, a0, a1;", [a, b], wide)
        assert_same_bits(got, _wrapped(products, wide), type_)
        got = lanes(machine, f"mad.wide.{type_} d, a0, a1, a2;", [a, b, c], wide)
        assert_same_bits(got, _wrapped([p + int(z) for p, z in zip(products, c, strict=True)], wide), type_)


def check_floats(machine: ModuleType) -> None:
    a, b, c = (random_floats(seed) for seed in range(3))
    with np.errstate(all="ignore"):
        double = a.astype(np.float64)
        cases = {
            "add.f32 d, a0, a1;": a + b,
            "sub.rn.f32 d, a0, a1;": a - b,
            "mul.f32 d, a0, a1;": a * b,
            "div.rn.f32 d, a0, a1;": a / b,
            "fma.rn.f32 d, a0, a1, 0f3F800000;": (double * b + 1).astype(np.float32),
            "neg.f32 d, a0;": -a,
            "abs.f32 d, a0;": np.abs(a),
            "sqrt.rn.f32 d, a0;": np.sqrt(a),
            "rcp.rn.f32 d, a0;": np.float32(1) / a,
            "min.f32 d, a0, a1;": np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.minimum(a, b))),
            "max.f32 d, a0, a1;": np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b))),
            "max.NaN.f32 d, a0, a1;": np.maximum(a, b),
        }
        approximate = {
            "ex2.approx.f32 d, a0;": np.exp2(double),
            "lg2.approx.f32 d, a0;": np.log2(double),
            "rsqrt.approx.f32 d, a0;": 1 / np.sqrt(double),
            "tanh.approx.f32 d, a0;": np.tanh(double),
        }
        for body, want in cases.items():
            assert_same_bits(lanes(machine, body, [a, b, c], np.float32), want, body)
        for body, want in approximate.items():
            got, want = lanes(machine, body, [a], np.float32), want.astype(np.float32)
            assert np.array_equal(np.isnan(got), np.isnan(want)), body
            # The C library's functions are within 2 units of the exact value, and the other one within half a unit.
            number = ~np.isnan(want)
            np.testing.assert_array_max_ulp(got[number], want[number], maxulp=2)


def check_denormals_are_flushed_on_request(machine: ModuleType) -> None:
    a = np.full(32, 1e-40, np.float32)
    assert_same_bits(lanes(machine, "add.f32 d, a0, a0;", [a], np.float32), a + a)
    assert_same_bits(lanes(machine, "add.ftz.f32 d, a0, a0;", [a], np.float32), np.zeros(32, np.float32))
    tiny = np.full(32, 1e-30, np.float32)
    assert_same_bits(lanes(machine, "mul.ftz.f32 d, a0, a1;", [tiny, np.full(32, 1e-9, np.float32)], np.float32), 0 * a)


def check_directed_rounding(machine: ModuleType) -> None:
    a, b, c = (random_floats(seed)[16:240] for seed in range(3))
    exact = a.astype(np.longdouble) * b + c  # 64 bits: exact unless the exponents are far apart
    nearest = exact.astype(np.float32)
    down = np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    up = np.where(nearest < exact, np.nextafter(nearest, np.float32(np.inf)), nearest)
    inexact = nearest.astype(np.longdouble) != exact
    assert inexact.mean() > 0.5
    for mode, want in (("rm", down), ("rp", up), ("rz", np.where(exact < 0, up, down))):
        assert_same_bits(lanes(machine, f"fma.{mode}.f32 d, a0, a1, a2;", [a, b, c], np.float32), want, mode)
    down_sum = lanes(machine, "add.rm.f32 d, a0, a1;", [a, b], np.float32)
    assert (down_sum.astype(np.float64) <= a.astype(np.float64) + b).all()


def check_half_precision(machine: ModuleType) -> None:
    x, y = random_floats(5)[16:], random_floats(6)[16:]
    x, y = np.resize(x, 256), np.resize(y, 256)
    brain_x, brain_y = bfloat16_bits(x), bfloat16_bits(y)
    with np.errstate(all="ignore"):
        half_x, half_y = x.astype(np.float16), y.astype(np.float16)
        for op, function in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)):
            got = lanes(machine, f"{op}.f16 d, a0, a1;", [half_x, half_y], np.float16)
            assert_same_bits(got, function(half_x, half_y), op)
            exact = function(from_bfloat16(brain_x).astype(np.float64), from_bfloat16(brain_y))
            got = lanes(machine, f"{op}.bf16 d, a0, a1;", [brain_x, brain_y], np.uint16)
            assert_same_bits(got, bfloat16_bits(exact), op)
            pairs = [np.stack([v, np.roll(v, 1)], 1).view(np.uint32)[:, 0] for v in (brain_x, brain_y)]
            got = lanes(machine, f"{op}.bf16x2 d, a0, a1;", pairs, np.uint32)
            want = np.stack([bfloat16_bits(exact), np.roll(bfloat16_bits(exact), 1)], 1).view(np.uint32)[:, 0]
            assert_same_bits(got, want, op)
        fused = from_bfloat16(brain_x).astype(np.float64) * from_bfloat16(brain_y) + from_bfloat16(brain_x)
        got = lanes(machine, "fma.rn.bf16 d, a0, a1, a0;", [brain_x, brain_y], np.uint16)
        assert_same_bits(got, bfloat16_bits(fused), "fma")


def check_comparisons(machine: ModuleType) -> None:
    a, b = random_floats(7), random_floats(8)
    b[:64] = a[:64]
    either_nan = np.isnan(a) | np.isnan(b)
    for name, function in (
        ("eq", np.equal),
        ("ne", np.not_equal),
        ("lt", np.less),
        ("le", np.less_equal),
        ("gt", np.greater),
        ("ge", np.greater_equal),
    ):
        ordered = function(a, b) & ~either_nan
        for suffix, want in ((name, ordered), (f"{name}u", ordered | either_nan)):
            body = f"setp.{suffix}.f32 %p1, a0, a1; selp.u32 d, 1, 0, %p1;"
            assert_same_bits(lanes(machine, body, [a, b], np.uint32), want, suffix)
        for type_, dtype in (("u32", np.uint32), ("s32", np.int32), ("s64", np.int64)):
            x, y = random_words(1, dtype), random_words(2, dtype)
            y[:64] = x[:64]
            body = f"setp.{name}.{type_} %p1, a0, a1; selp.u32 d, 1, 0, %p1;"
            assert_same_bits(lanes(machine, body, [x, y], np.uint32), function(x, y), body)


def check_predicates(machine: ModuleType) -> None:
    """Combined comparisons, their opposites, guards and logic."""
    a, b = random_words(1, np.int32), random_words(2, np.int32)
    odd = (b & 1) != 0
    odd_code = "and.b32 %r1, a1, 1; setp.ne.s32 %p1, %r1, 0;"
    for op, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for negation, other in (("", odd), ("!", ~odd)):
            body = f"{odd_code} setp.lt.{op}.s32 %p2|%p3, a0, 7, {negation}%p1; selp.u32 %r2, 1, 0, %p2;"
            body += "selp.u32 %r3, 2, 0, %p3; or.b32 d, %r2, %r3;"
            want = function(a < 7, other) + 2 * function(a >= 7, other)
            assert_same_bits(lanes(machine, body, [a, b], np.uint32), want, body)
    body = f"{odd_code} mov.u32 d, 5; @%p1 mov.u32 d, 6; @!%p1 add.u32 d, d, 2;"
    assert_same_bits(lanes(machine, body, [a, b], np.uint32), np.where(odd, 6, 7))
    body = f"{odd_code} not.pred %p2, %p1; xor.pred %p3, %p1, %p2; and.pred %p4, %p3, %p2; selp.u32 d, 1, 0, %p4;"
    assert_same_bits(lanes(machine, body, [a, b], np.uint32), ~odd)
    for truth in ("1", "-1"):  # nvcc writes either
        body = f"{odd_code} xor.pred %p2, %p1, {truth}; or.pred %p3, %p2, 0; selp.u32 d, 1, 0, %p3;"
        assert_same_bits(lanes(machine, body, [a, b], np.uint32), ~odd)
