"""What a kernel may not do, and that what it may do is not reported."""

from types import ModuleType

import numpy as np

from ...kernel import EmulationError, Kernel
from .snippets import error_of, kernel_text

WORD = "mad.wide.u32 %rd1, %r0, 4, %rd90;"  # the address of the lane's word of the array
SHARED = "mov.u32 %r1, data; mad.lo.u32 %r2, %r0, 4, %r1;"  # of the lane's word in shared memory


def check_right_kernels_raise_nothing(machine: ModuleType) -> None:
    assert error_of(machine, f"{WORD} ld.global.u32 %r3, [%rd1]; st.global.u32 [%rd1], %r3;") is None
    exchange = f"{SHARED} st.shared.u32 [%r2], %r0; bar.sync 0; ld.shared.u32 %r3, [data];"
    assert error_of(machine, exchange, threads=64, shared_bytes=256) is None
    assert error_of(machine, f"{WORD} red.global.add.u32 [%rd90], 1;", threads=64, grid=3) is None


def check_addresses(machine: ModuleType) -> None:
    assert error_of(machine, f"{WORD} ld.global.u32 %r3, [%rd1+1024];") == "out of bounds"
    assert error_of(machine, f"{WORD} ld.global.u32 %r3, [%rd1+-4];") == "out of bounds"
    assert error_of(machine, f"{WORD} st.global.u32 [%rd1+2], %r0;") == "misaligned"
    assert error_of(machine, "ld.global.u32 %r3, [%rd90+1024];", threads=1) == "out of bounds"
    assert error_of(machine, "ld.shared.u32 %r3, [data+128];", shared_bytes=128) == "out of bounds"
    assert error_of(machine, "ld.shared.u32 %r3, [data+2];", shared_bytes=128) == "misaligned"
    assert error_of(machine, "ld.shared.u32 %r3, [data];", shared_bytes=128) == "uninitialised"
    assert error_of(machine, f"{WORD} ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd1];") == "misaligned"


def check_read_only_memory(machine: ModuleType) -> None:
    array = np.zeros(32, np.uint32)
    array.flags.writeable = False
    kernel = Kernel(kernel_text(f"{WORD} st.global.u32 [%rd1], %r0;"), machine_module=machine)
    try:
        kernel.launch((1, 1, 1), 32, [array], [array])
    except EmulationError as error:
        assert error.kind == "read-only"
    else:
        raise AssertionError("a store to read-only memory went through")


def check_races(machine: ModuleType) -> None:
    store = "st.shared.u32 [%r2], %r0;"
    neighbour = f"{SHARED} {store} bar.sync 0; {store} xor.b32 %r3, %r2, 128; ld.shared.u32 %r4, [%r3];"
    assert error_of(machine, neighbour, threads=64, shared_bytes=256) == "shared race"
    barrier = neighbour.replace("xor", "bar.sync 0; xor")
    assert error_of(machine, barrier, threads=64, shared_bytes=256) is None
    for writes, reads in (("%p1", "!%p1"), ("!%p1", "%p1")):  # the warp that goes on first, and the other
        setup = f"{SHARED} {store} bar.sync 0; setp.lt.u32 %p1, %r0, 32; xor.b32 %r3, %r2, 128;"
        handed_over = f"{setup} @{writes} {store} @{reads} ld.shared.u32 %r4, [%r3];"
        assert error_of(machine, handed_over, threads=64, shared_bytes=256) == "shared race"
    # Two warps write different values to one word; lanes of a warp without a warp barrier race too.
    assert error_of(machine, "st.shared.u32 [data], %r0;", threads=64, shared_bytes=4) == "shared race"
    assert error_of(machine, "mov.u32 %r1, %ctaid.x; st.global.u32 [%rd90], %r1;", grid=2) == "global race"


def check_some_blocks_run_alone(machine: ModuleType) -> None:
    body = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %rd90; st.global.u32 [%rd1], %r1;"
    array = np.full(8, 99, np.uint32)
    launch = Kernel(kernel_text(body), machine_module=machine).launch
    for schedule in ("fifo", "rev", "rand"):
        launch((8, 1, 1), 1, [array], [array], schedule=schedule, blocks=[6, 3])
        assert array.tolist() == [99, 99, 99, 3, 99, 99, 6, 99]
    try:
        launch((8, 1, 1), 1, [array], [array], blocks=[8])
    except EmulationError as error:
        assert error.kind == "bad launch"
    else:
        raise AssertionError("a block ran that the grid does not have")


def check_copies_are_waited_for(machine: ModuleType) -> None:
    copy = (
        "mad.wide.u32 %rd1, %r0, 16, %rd90; mov.u32 %r1, data; mad.lo.u32 %r2, %r0, 16, %r1; "
        "cp.async.cg.shared.global [%r2], [%rd1], 16; cp.async.commit_group; "
    )
    read = "ld.shared.u32 %r3, [%r2];"
    assert error_of(machine, copy + "cp.async.wait_group 0;" + read, shared_bytes=512) is None
    assert error_of(machine, copy + "cp.async.wait_group 1;" + read, shared_bytes=512) == "copy in flight"
    assert error_of(machine, copy.replace("[%rd1]", "[%rd1+768]"), shared_bytes=512) == "out of bounds"


def check_copies_arrive(machine: ModuleType) -> None:
    """Late and early; what is not read becomes zero."""
    text = kernel_text(
        "mad.wide.u32 %rd1, %r0, 16, %rd90; mov.u32 %r1, data; mad.lo.u32 %r2, %r0, 16, %r1; mov.u32 %r3, 8; "
        "cp.async.cg.shared.global [%r2], [%rd1], 16, %r3; cp.async.commit_group; cp.async.wait_all; "
        "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2]; st.global.v4.u32 [%rd1+512], {%r4, %r5, %r6, %r7};",
        shared_bytes=512,
    )
    for early in (False, True):
        array = np.arange(256, dtype=np.uint32)
        Kernel(text, machine_module=machine).launch((1, 1, 1), 32, [array], [array], early_copies=early)
        rows = array.reshape(2, 32, 4)
        assert np.array_equal(rows[1, :, :2], rows[0, :, :2]) and not rows[1, :, 2:].any()


def check_barriers(machine: ModuleType) -> None:
    half = "setp.lt.u32 %p1, %r0, 32; @%p1 bra SKIP; bar.sync 0, 64; SKIP:"
    assert error_of(machine, half, threads=64) == "deadlock"
    lanes = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffffffff;"
    assert error_of(machine, lanes) == "divergent collective"
    assert error_of(machine, "LOOP: bra LOOP;", instruction_limit=1000) == "no progress"
