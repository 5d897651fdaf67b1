"""Short PTX kernels around a few instructions, and number formats that numpy lacks."""

import re
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ...kernel import EmulationError, Kernel

LANES = 32
HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"


def kernel_text(body: str, parameters: Sequence[str] = ("u64",), shared_bytes: int = 0, registers: str = "") -> str:
    """An entry `k` with the registers %r, %rd, %f, %rs and %p, %r0 = %tid.x, and the parameters in %rd90, %rd91, ..."""
    declared = ",\n".join(f".param .{type_} k_param_{i}" for i, type_ in enumerate(parameters))
    loads = "\n".join(
        f"ld.param.{type_} {'%rd' if type_ == 'u64' else '%r'}{90 + i}, [k_param_{i}];"
        for i, type_ in enumerate(parameters)
    )
    shared = f".shared .align 128 .b8 data[{shared_bytes}];" if shared_bytes else ""
    return f"""{HEADER}
.visible .entry k(\n{declared}\n)
{{
.reg .pred %p<10>; .reg .b16 %rs<100>; .reg .b32 %r<100>; .reg .f32 %f<100>; .reg .b64 %rd<100>;
{registers}
{shared}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def kernel(
    machine: ModuleType, body: str, parameters: Sequence[str] = ("u64",), shared_bytes: int = 0, registers: str = ""
) -> Kernel:
    return Kernel(kernel_text(body, parameters, shared_bytes, registers), machine_module=machine)


_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def lanes(machine: ModuleType, body: str, inputs: Sequence[np.ndarray], out: np.typing.DTypeLike) -> np.ndarray:
    """The register `d` after `body`, with inputs[i] ([n], a multiple of 32 up to 1,024) in the registers a0, a1, ...

    All are raw bits of the dtypes' sizes.
    """
    count = len(inputs[0])
    result = np.zeros(count, out)
    sizes = [array.dtype.itemsize for array in inputs]
    declarations = [f".reg .{_REGISTERS[size]} a{i};" for i, size in enumerate(sizes)]
    declarations.append(f".reg .{_REGISTERS[result.dtype.itemsize]} d;")
    code = []
    for i, size in enumerate(sizes):
        code.append(f"mad.wide.u32 %rd{i}, %r0, {size}, %rd{90 + i}; ld.global.u{8 * size} a{i}, [%rd{i}];")
    code.append(body)
    size = result.dtype.itemsize
    code.append(f"mad.wide.u32 %rd80, %r0, {size}, %rd{90 + len(sizes)}; st.global.u{8 * size} [%rd80], d;")
    arrays = [*map(np.ascontiguousarray, inputs), result]
    k = kernel(machine, "\n".join(code), ["u64"] * len(arrays), registers="\n".join(declarations))
    k.launch((1, 1, 1), count, arrays, arrays)
    return result


def error_of(
    machine: ModuleType,
    body: str,
    threads: int = 32,
    grid: int = 1,
    shared_bytes: int = 0,
    instruction_limit: int = 10**9,
) -> str | None:
    """The kind of error that a kernel with one array of 1,024 bytes raises, or None."""
    array = np.zeros(1024, np.uint8)
    k = kernel(machine, body, shared_bytes=shared_bytes)
    try:
        k.launch((grid, 1, 1), threads, [array], [array], instruction_limit=instruction_limit)
    except EmulationError as error:
        # Every error says where: the line of the text, the block, the thread.
        assert re.search(r"\(line \d+: .+\) in block \(\d+, \d+, \d+\), thread \d+ of k$", str(error)), str(error)
        return error.kind
    return None


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, from float64, without double rounding: by comparing the two neighbours."""
    x = np.asarray(x, np.float64)
    with np.errstate(over="ignore"):
        low = x.astype(np.float32).view(np.uint32) & 0xFFFF0000
    below = np.where(np.abs(low.view(np.float32).astype(np.float64)) > np.abs(x), low - 0x10000, low).astype(np.uint32)
    above = (below + 0x10000).astype(np.uint32)
    to_below = np.abs(x - below.view(np.float32))
    to_above = np.abs(above.view(np.float32) - x)
    even = np.where((below >> 16) & 1, above, below)
    nearest = np.where(to_below < to_above, below, np.where(to_below > to_above, above, even))
    return (nearest >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def random_floats(seed: int, count: int = 256) -> np.ndarray:
    """Of many magnitudes, with special values in front."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(count) * np.exp2(rng.integers(-20, 20, count))).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 1.0, -1.0], np.float32)
    values[: len(special)] = rng.permutation(special)
    return values


def random_words(seed: int, dtype: np.typing.DTypeLike, count: int = 256) -> np.ndarray:
    info = np.iinfo(dtype)
    values = np.random.default_rng(seed).integers(info.min, info.max, count, dtype, endpoint=True)
    values[:4] = [info.min, info.max, 0, 1]
    return values


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Equal, with any NaN equal to any other."""
    want = np.asarray(want, got.dtype)
    both_nan = np.isnan(got) & np.isnan(want) if got.dtype.kind == "f" else np.zeros(got.shape, bool)
    bits = np.dtype(f"u{got.dtype.itemsize}")
    wrong = np.flatnonzero((got.view(bits) != want.view(bits)) & ~both_nan)
    assert wrong.size == 0, f"{what}: element {wrong[:5]}: {got[wrong[:5]]} where {want[wrong[:5]]} is right"
