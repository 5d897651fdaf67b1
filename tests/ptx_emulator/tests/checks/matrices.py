"""ldmatrix, stmatrix, mma and wgmma against products in numpy."""

from types import ModuleType

import numpy as np

from ...kernel import Kernel
from .snippets import bfloat16_bits, from_bfloat16, kernel

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def _load_words(count: int, first_register: int, parameter: int) -> str:
    """%r[first + i] of a lane: word i of its row of `count` words."""
    code = [f"mad.wide.u32 %rd1, %r0, {4 * count}, %rd{90 + parameter};"]
    code += [f"ld.global.u32 %r{first_register + i}, [%rd1+{4 * i}];" for i in range(count)]
    return "\n".join(code)


def _fragments_of_mma(a: np.ndarray, b: np.ndarray, words: type) -> tuple[np.ndarray, np.ndarray]:
    """a [16, K], b [K, 8] as raw elements -> registers [32, n] of each lane, as in the PTX manual."""
    per = 4 // a.dtype.itemsize
    k = a.shape[1]
    a_words, b_words = [], []
    for block in range(k // (4 * per)):
        columns = block * 4 * per + MEMBER[:, None] * per + np.arange(per)
        a_words += [a[GROUP[:, None], columns], a[GROUP[:, None] + 8, columns]]
        b_words.append(b[columns, GROUP[:, None]])

    def registers(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.ascontiguousarray(part).view(words)[:, 0] for part in parts], 1)

    return registers(a_words), registers(b_words)


def assert_is_product(
    out: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> None:
    """These elements of a @ b + c: a float32 sum of exact products, with a rounding for each of its terms."""
    a, b, c = (x.astype(np.float64) for x in (a, b, c))
    error = np.abs(out - (a @ b + c)[rows, columns])
    allowed = np.finfo(np.float32).eps * (a.shape[1] + 1) * (np.abs(a) @ np.abs(b) + np.abs(c))[rows, columns]
    assert (error <= allowed).all(), (a.shape, error.max())


def check_mma(machine: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for type_, k in (("bf16", 16), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)):
        a, b = rng.standard_normal((16, k)).astype(np.float32), rng.standard_normal((k, 8)).astype(np.float32)
        c = rng.standard_normal((16, 8)).astype(np.float32)
        if type_ == "bf16":
            raw_a, raw_b = bfloat16_bits(a), bfloat16_bits(b)
            a, b = from_bfloat16(raw_a), from_bfloat16(raw_b)
        elif type_ == "f16":
            raw_a, raw_b = a.astype(np.float16), b.astype(np.float16)
            a, b = raw_a.astype(np.float32), raw_b.astype(np.float32)
        else:  # the hardware ignores the low 13 bits
            raw_a, raw_b = a, b
            a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
        registers_a, registers_b = _fragments_of_mma(raw_a, raw_b, np.uint32)
        rows, columns = GROUP[:, None] + [0, 0, 8, 8], MEMBER[:, None] * 2 + [0, 1, 0, 1]
        registers_c = np.ascontiguousarray(c[rows, columns])
        n, m = registers_a.shape[1], registers_b.shape[1]
        code = [_load_words(n, 10, 0), _load_words(m, 20, 1), _load_words(4, 30, 2)]
        sources = [", ".join(f"%r{first + i}" for i in range(count)) for first, count in ((10, n), (20, m), (30, 4))]
        code.append(
            f"mma.sync.aligned.m16n8k{k}.row.col.f32.{type_}.{type_}.f32 "
            f"{{%r40, %r41, %r42, %r43}}, {{{sources[0]}}}, {{{sources[1]}}}, {{{sources[2]}}};"
        )
        code.append("mad.wide.u32 %rd1, %r0, 16, %rd93; st.global.v4.u32 [%rd1], {%r40, %r41, %r42, %r43};")
        out = np.zeros((32, 4), np.float32)
        arrays = [np.ascontiguousarray(x) for x in (registers_a, registers_b, registers_c)] + [out]
        counters = kernel(machine, "\n".join(code), ["u64"] * 4).launch((1, 1, 1), 32, arrays, arrays)
        assert counters.mma == 1
        assert_is_product(out, a, b, c, rows, columns)


def _matrix_kernel(machine: ModuleType, code: str) -> Kernel:
    """Four 8 x 8 matrices, [4, 8, 8] of 2 bytes, in shared memory; %r1: the address of the lane's row."""
    fill = """
        shl.b32 %r2, %r0, 4; mov.u32 %r1, data; add.u32 %r1, %r1, %r2;
        mad.wide.u32 %rd1, %r0, 16, %rd90; ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1];
        st.shared.v4.u32 [%r1], {%r10, %r11, %r12, %r13}; bar.warp.sync 0xffffffff;
    """
    return kernel(machine, fill + code, ["u64", "u64"], shared_bytes=1024)


def check_ldmatrix(machine: ModuleType) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    for count in (1, 2, 4):
        for transposed in (False, True):
            registers = ", ".join(f"%r{20 + i}" for i in range(count))
            stores = " ".join(f"st.global.u32 [%rd2+{4 * i}], %r{20 + i};" for i in range(count))
            k = _matrix_kernel(
                machine,
                f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16 {{{registers}}}, [%r1];"
                f"mad.wide.u32 %rd2, %r0, {4 * count}, %rd91; {stores}",
            )
            out = np.zeros((32, count, 2), np.uint16)
            arrays = [matrices, out]
            k.launch((1, 1, 1), 32, arrays, arrays)
            expected = matrices.swapaxes(1, 2) if transposed else matrices
            want = expected[:count, GROUP][:, LANE[:, None], MEMBER[:, None] * 2 + [0, 1]].swapaxes(0, 1)
            assert np.array_equal(out, want), (count, transposed)


def check_stmatrix(machine: ModuleType) -> None:
    """Loading and storing gives the matrices back, the second time transposed."""
    matrices = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    for transposed in (False, True):
        registers = "{%r20, %r21, %r22, %r23}"
        k = _matrix_kernel(
            machine,
            f"""ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers}, [%r1]; bar.warp.sync 0xffffffff;
            stmatrix.sync.aligned.m8n8.x4{".trans" * transposed}.shared.b16 [%r1+512], {registers};
            bar.warp.sync 0xffffffff; ld.shared.v4.u32 {registers}, [%r1+512];
            mad.wide.u32 %rd2, %r0, 16, %rd91; st.global.v4.u32 [%rd2], {registers};""",
        )
        out = np.zeros_like(matrices)
        k.launch((1, 1, 1), 32, [matrices, out], [matrices, out])
        assert np.array_equal(out, matrices.swapaxes(1, 2) if transposed else matrices)


def check_wgmma(machine: ModuleType) -> None:
    """64 x 8 x 16 without swizzle: operands as 8 x 8 blocks of 128 bytes; a from shared memory, then from registers."""
    rng = np.random.default_rng(0)
    a, b = (bfloat16_bits(rng.standard_normal(shape)) for shape in ((64, 16), (8, 16)))  # b: columns, k
    blocks_a = a.reshape(8, 8, 2, 8).swapaxes(1, 2)  # [row block, k block, 8 rows, 8 k]
    blocks_b = b.reshape(1, 8, 2, 8).swapaxes(1, 2)
    memory = np.concatenate([blocks_a.ravel(), blocks_b.ravel()])  # 2,304 bytes
    fill = """
        mov.u32 %r1, %r0;
        FILL: shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd1, %r2; add.u64 %rd1, %rd1, %rd90;
        ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1];
        st.shared.v4.u32 [%r2], {%r10, %r11, %r12, %r13};
        add.u32 %r1, %r1, 128; setp.lt.u32 %p1, %r1, 144; @%p1 bra FILL;
        bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;
        mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
    """

    # Blocks are 128 bytes apart in k and 256 bytes apart in rows.
    def descriptor(start: int) -> int:
        return start >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32

    registers_a = ", ".join(f"%r{20 + i}" for i in range(4))
    row_code = """
        shr.u32 %r3, %r0, 5; shl.b32 %r3, %r3, 9; and.b32 %r4, %r0, 31; shr.u32 %r5, %r4, 2; shl.b32 %r5, %r5, 4;
        and.b32 %r4, %r4, 3; shl.b32 %r4, %r4, 2; add.u32 %r3, %r3, %r5; add.u32 %r3, %r3, %r4;
        ld.shared.u32 %r20, [%r3]; ld.shared.u32 %r21, [%r3+256];
        ld.shared.u32 %r22, [%r3+128]; ld.shared.u32 %r23, [%r3+384];
    """
    for scale, a_in_registers in ((1, False), (0, False), (1, True)):
        source = f"{{{registers_a}}}" if a_in_registers else str(descriptor(0))
        flags = "1, 1, 0" if a_in_registers else "1, 1, 0, 0"
        code = f"""{fill} {row_code} setp.ne.b32 %p2, {scale}, 0;
            wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
            {{%f1, %f2, %f3, %f4}}, {source}, {descriptor(2048)}, %p2, {flags};
            wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
            mad.wide.u32 %rd2, %r0, 16, %rd91; st.global.v4.f32 [%rd2], {{%f1, %f2, %f3, %f4}};"""
        out = np.zeros((4, 32, 4), np.float32)
        kernel(machine, code, ["u64", "u64"], shared_bytes=2304).launch((1, 1, 1), 128, [memory, out], [memory, out])
        rows = np.arange(4)[:, None, None] * 16 + GROUP[:, None] + [0, 0, 8, 8]
        columns = MEMBER[:, None] * 2 + [0, 1, 0, 1]
        assert_is_product(out, from_bfloat16(a), from_bfloat16(b).T, np.full((64, 8), scale), rows, columns)
