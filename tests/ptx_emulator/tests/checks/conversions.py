"""cvt."""

from types import ModuleType

import numpy as np

from .snippets import assert_same_bits, bfloat16_bits, from_bfloat16, lanes, random_floats, random_words


def check_integer_conversions(machine: ModuleType) -> None:
    a = random_words(1, np.int32)
    for body, out, want in (
        ("cvt.s64.s32 d, a0;", np.int64, a.astype(np.int64)),
        ("cvt.u64.u32 d, a0;", np.uint64, a.view(np.uint32).astype(np.uint64)),
        ("cvt.s32.s8 d, a0;", np.int32, a.astype(np.int8).astype(np.int32)),
        ("cvt.u32.u16 d, a0;", np.uint32, a.astype(np.uint16).astype(np.uint32)),
        ("cvt.sat.s16.s32 %r1, a0; cvt.s32.s16 d, %r1;", np.int32, np.clip(a, -(2**15), 2**15 - 1)),
    ):
        assert_same_bits(lanes(machine, body, [a], out), want, body)
    wide = random_words(2, np.int64)
    assert_same_bits(lanes(machine, "cvt.u32.u64 d, a0;", [wide], np.uint32), wide.astype(np.uint32))


def check_float_to_integer(machine: ModuleType) -> None:
    a = random_floats(3)
    a[20:60] = np.arange(-10, 10, 0.5)  # ties
    finite = np.nan_to_num(a, nan=0.0, posinf=1e30, neginf=-1e30).astype(np.float64)
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        whole = function(finite)
        want = np.clip(whole, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.int32)
        assert_same_bits(lanes(machine, f"cvt.{mode}.s32.f32 d, a0;", [a], np.int32), want, mode)
        want = np.clip(whole, 0, 2.0**32 - 1).astype(np.uint64).astype(np.uint32)
        assert_same_bits(lanes(machine, f"cvt.{mode}.u32.f32 d, a0;", [a], np.uint32), want, mode)
        assert_same_bits(lanes(machine, f"cvt.{mode}.f32.f32 d, a0;", [a], np.float32), function(a), mode)


def check_integer_to_float(machine: ModuleType) -> None:
    a = random_words(4, np.int32)
    assert_same_bits(lanes(machine, "cvt.rn.f32.s32 d, a0;", [a], np.float32), a.astype(np.float32))
    assert_same_bits(lanes(machine, "cvt.rn.f32.u32 d, a0;", [a], np.float32), a.view(np.uint32).astype(np.float32))
    assert_same_bits(lanes(machine, "cvt.rn.bf16.s32 d, a0;", [a], np.uint16), bfloat16_bits(a))


def check_half_conversions(machine: ModuleType) -> None:
    a = random_floats(5)
    a = np.where(np.isfinite(a) & (np.abs(a) < 1e38) & (np.abs(a) > 1e-30), a, np.float32(1.5))
    ties = np.float32(1) + np.arange(32, dtype=np.float32) * np.float32(2**-8)  # between two bfloat16
    a[:32] = ties
    with np.errstate(over="ignore"):
        half = a.astype(np.float16)
    assert_same_bits(lanes(machine, "cvt.rn.f16.f32 d, a0;", [a], np.float16), half)
    assert_same_bits(lanes(machine, "cvt.rn.bf16.f32 d, a0;", [a], np.uint16), bfloat16_bits(a))
    assert_same_bits(lanes(machine, "cvt.rz.bf16.f32 d, a0;", [a], np.uint16), (a.view(np.uint32) >> 16))
    assert_same_bits(lanes(machine, "cvt.f32.f16 d, a0;", [half], np.float32), half.astype(np.float32))
    brain = bfloat16_bits(a)
    assert_same_bits(lanes(machine, "cvt.f32.bf16 d, a0;", [brain], np.float32), from_bfloat16(brain))
    # The first source becomes the upper half.
    b = np.roll(a, 1)
    want = bfloat16_bits(a).astype(np.uint32) << 16 | bfloat16_bits(b)
    assert_same_bits(lanes(machine, "cvt.rn.bf16x2.f32 d, a0, a1;", [a, b], np.uint32), want)


def check_tf32(machine: ModuleType) -> None:
    a = np.abs(random_floats(6)[32:64])
    got = lanes(machine, "cvt.rna.tf32.f32 d, a0;", [a], np.float32)
    step = np.exp2(np.floor(np.log2(a.astype(np.float64))) - 10)
    assert_same_bits(got, (np.floor(a / step + 0.5) * step).astype(np.float32))


def check_saturation(machine: ModuleType) -> None:
    a = random_floats(7)
    want = np.where(a > 0, np.minimum(a, np.float32(1)), np.float32(0))
    assert_same_bits(lanes(machine, "cvt.sat.f32.f32 d, a0;", [a], np.float32), want)
