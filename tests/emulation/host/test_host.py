"""Kernels compiled by g++ run on fibers, right and wrong, on every schedule and under sanitizers.

Sample kernels show what the host's own machinery does and sees; those of this repository come with their launchers.
"""

import os
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ...ptx_emulator import build
from ...ptx_emulator.testing import needs_nvcc
from ..attention import PAPER, Attention
from ..build import CSRC, HOST, host_include_dirs, program
from ..cases import Case, Hash, Order
from ..cuda import kernels
from ..emulator import Memory
from ..lists import Lists
from ..mutation import Mutation
from ..select import Select
from .mutations import LITTLE_ROOM, MUTATIONS

RUNTIME = tuple(HOST / f"{part}.cpp" for part in ("block", "fibers", "launch"))
SAMPLES = HOST / "sample_kernels.cpp"
# Recorded launches name exported kernels; and a library must not take its shared variables from another one.
FLAGS = ("-DRK_HOST", "-fvisibility=default", "-fno-gnu-unique")
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
SHARED_LIMIT = 227 * 1024
SCHEDULES = [(order, copies) for order in ("fifo", "lifo", "rev", "rand") for copies in ("late", "early")]

pytestmark = [
    needs_nvcc(),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="fibers are written for x86-64"),
]
every_schedule = pytest.mark.parametrize(("order", "copies"), SCHEDULES)
full = pytest.mark.full  # under sanitizers all is compiled once more, which takes minutes


@pytest.fixture(scope="module")
def module() -> ModuleType:
    sources = [HOST / "module.cpp", HOST / "samples.cpp", SAMPLES, *RUNTIME]
    return build.extension("host", sources, FLAGS, host_include_dirs())


@pytest.fixture
def host(module: ModuleType) -> Iterator[ModuleType]:
    """The module, which afterwards is as it was when it was loaded."""
    yield module
    module.set_mode("run")
    module.set_schedule()
    module.set_shared_limit(SHARED_LIMIT)
    module.take_recorded()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- results


@every_schedule
def test_a_barrier_orders_shared_memory(host: ModuleType, rng: np.random.Generator, order: str, copies: str) -> None:
    x = rng.integers(-1000, 1000, (5, 64), dtype=np.int32)
    host.set_schedule(order, copies=copies)
    np.testing.assert_array_equal(host.block_sums(x), x.sum(1))


@every_schedule
def test_lanes_exchange_values(host: ModuleType, rng: np.random.Generator, order: str, copies: str) -> None:
    keys = rng.integers(0, 6, 64, dtype=np.int32)
    host.set_schedule(order, copies=copies)
    ranks, odd, sums, following = host.warp_ranks(keys)
    warps = keys.reshape(2, 32)
    np.testing.assert_array_equal(ranks, [(warp[:i] == warp[i]).sum() for warp in warps for i in range(32)])
    np.testing.assert_array_equal(odd, (warps % 2).sum(1).repeat(32))
    np.testing.assert_array_equal(sums, warps.sum(1).repeat(32))
    np.testing.assert_array_equal(following, np.c_[warps[:, 1:], warps[:, -1]].ravel())


@pytest.mark.parametrize("n", [1, 127, 128, 1000])
@every_schedule
def test_copies_arrive_in_two_buffers(
    host: ModuleType, rng: np.random.Generator, order: str, copies: str, n: int
) -> None:
    x = rng.standard_normal(n, dtype=np.float32)
    host.set_schedule(order, copies=copies)
    np.testing.assert_array_equal(host.doubled(x), 2 * x)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
@every_schedule
def test_fragments_make_a_product(
    host: ModuleType, rng: np.random.Generator, order: str, copies: str, bfloat16: bool
) -> None:
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((32, 64), (64, 24)))
    a_bits, b_bits = (bits_of(m, bfloat16) for m in (a, b))
    a, b = (values_of(m, bfloat16) for m in (a_bits, b_bits))
    host.set_schedule(order, copies=copies)
    product = host.product(a_bits, b_bits, bfloat16=bfloat16)
    # The products of halves are exact; each of 64 additions rounds.
    assert (abs(product - a @ b) <= 64 * 2**-24 * (abs(a) @ abs(b))).all()


def bits_of(x: np.ndarray, bfloat16: bool) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else x.astype(np.float16).view(np.uint16)


def values_of(bits: np.ndarray, bfloat16: bool) -> np.ndarray:
    x = (bits.astype(np.uint32) << 16).view(np.float32) if bfloat16 else bits.view(np.float16)
    return x.astype(np.float64)


@pytest.mark.parametrize("seed", range(1, 6))
def test_random_order_depends_on_its_seed_only(host: ModuleType, rng: np.random.Generator, seed: int) -> None:
    x = rng.integers(0, 10, (2, 64), dtype=np.int32)
    host.set_schedule("rand", seed)
    without_barriers = host.block_sums(x, fault="no_barrier")
    np.testing.assert_array_equal(host.block_sums(x, fault="no_barrier"), without_barriers)
    host.set_schedule("rand", seed + 100)
    assert (host.block_sums(x, fault="no_barrier") != without_barriers).any()
    np.testing.assert_array_equal(host.block_sums(x), x.sum(1))


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("amount", [0, 1, 5])
def test_shuffles(host: ModuleType, rng: np.random.Generator, amount: int, width: int) -> None:
    x = rng.integers(-(2**31), 2**31, 32, dtype=np.int32)
    shuffled, _, _ = host.warp_words(x, amount, width)
    lane = np.arange(32)
    within, first = lane % width, lane - lane % width
    np.testing.assert_array_equal(shuffled[0], x[first + amount % width])
    np.testing.assert_array_equal(shuffled[1], x[np.where(within < amount, lane, lane - amount)])
    np.testing.assert_array_equal(shuffled[2], x[np.where(within + amount >= width, lane, (lane + amount) % 32)])
    np.testing.assert_array_equal(shuffled[3], x[np.where((lane ^ amount) >= first + width, lane, lane ^ amount)])
    np.testing.assert_array_equal(shuffled[4, ::2], x[2 * amount])


def test_words(host: ModuleType, rng: np.random.Generator) -> None:
    x = rng.integers(-(2**31), 2**31, 32, dtype=np.int32)
    x[:4] = 0, 1, -1, -(2**31)
    _, words, counters = host.warp_words(x, 1, 32)
    binary = [f"{word:032b}" for word in x.view(np.uint32)]
    total = x.sum(dtype=np.int32)
    whole = [total, x.min(), x.max(), *(f.reduce(x) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)), 1, 0]
    np.testing.assert_array_equal(words[0], [b.count("1") for b in binary])
    np.testing.assert_array_equal(words[1], [len(b) - len(b.lstrip("0")) for b in binary])
    np.testing.assert_array_equal(words[2], [b[::-1].find("1") + 1 for b in binary])
    np.testing.assert_array_equal(words[3].view(np.uint32), [int(b[::-1], 2) for b in binary])
    np.testing.assert_array_equal(words[4:12], np.repeat(np.array(whole)[:, None], 32, 1))
    np.testing.assert_array_equal(words[12:], [x.clip(max=0), x.clip(min=0)])
    np.testing.assert_array_equal(counters, [*whole[:5], x[1]])


# ---- faults

ARGUMENTS = {
    "block_sums": (np.ones((2, 64), np.int32),),
    "warp_ranks": (np.arange(64, dtype=np.int32),),
    "doubled": (np.ones(300, np.float32),),
    "product": (np.zeros((16, 32), np.uint16), np.zeros((32, 8), np.uint16), True),
}


@every_schedule
@pytest.mark.parametrize(
    ("sample", "fault", "message"),
    [
        ("warp_ranks", "divergent", "other lanes of the mask are at"),
        ("warp_ranks", "lane_missing", "deadlock: 31 threads at __shfl_xor_sync, 33 finished"),
        ("warp_ranks", "wrong_mask", "__ballot_sync: the mask leaves the calling lane out"),
        ("doubled", "beyond_shared", "copy_async: the address is outside the dynamic shared memory"),
        ("doubled", "misaligned_copy", "copy_async: the global address is no multiple of 16"),
        ("product", "misaligned_row", "load_matrices: the shared address is no multiple of 16"),
    ],
)
def test_a_fault_is_an_error(host: ModuleType, order: str, copies: str, sample: str, fault: str, message: str) -> None:
    host.set_schedule(order, copies=copies)
    run = getattr(host, sample)
    expected = rf"{sample}_kernel.*: .*{message}.*\(block \d+,\d+,\d+ thread \d+\)"
    with pytest.raises(host.KernelError, match=expected):
        run(*ARGUMENTS[sample], fault=fault)
    run(*ARGUMENTS[sample])  # an error leaves nothing behind


def test_only_late_copies_show_that_a_wait_is_missing(host: ModuleType) -> None:
    (x,) = ARGUMENTS["doubled"]
    host.set_schedule(copies="early")
    np.testing.assert_array_equal(host.doubled(x, fault="no_wait"), 2 * x)
    host.set_schedule(copies="late")
    with pytest.raises(host.KernelError, match="asynchronous copies are in flight at exit"):
        host.doubled(x, fault="no_wait")


def test_some_order_shows_that_a_barrier_is_missing(host: ModuleType) -> None:
    x = np.ones((2, 64), np.int32)
    host.set_schedule("fifo")
    assert (host.block_sums(x, fault="no_barrier") != 64).all()
    host.set_schedule("lifo")  # here the threads happen to run in the order that the barriers would give
    assert (host.block_sums(x, fault="no_barrier") == 64).all()


def test_shared_memory_is_limited(host: ModuleType) -> None:
    host.set_shared_limit(256)
    assert host.block_sums(np.ones((1, 64), np.int32)) == 64
    host.set_shared_limit(255)
    for mode in ("run", "record"):
        host.set_mode(mode)
        with pytest.raises(host.KernelError, match=r"block_sums_kernel.*256 bytes .* may have 255"):
            host.block_sums(np.ones((1, 64), np.int32))


def test_an_empty_grid_is_an_invalid_configuration(host: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="error 9"):
        host.block_sums(np.empty((0, 64), np.int32))


def test_a_setting_must_be_known(host: ModuleType) -> None:
    with pytest.raises(ValueError, match="mode must be one of record, run, got both"):
        host.set_mode("both")
    with pytest.raises(ValueError, match="order must be one of fifo, lifo, rand, rev, got best"):
        host.set_schedule("best")
    with pytest.raises(ValueError, match="copies must be one of early, late, got never"):
        host.set_schedule(copies="never")


# ---- recorded launches


def test_a_recorded_launch_is_not_executed(host: ModuleType) -> None:
    x = np.ones((7, 64), np.int32)
    host.set_mode("record")
    sums = host.block_sums(x)
    assert (sums == -1).all()
    (launch,) = host.take_recorded()
    assert host.take_recorded() == []
    params = launch.pop("params")
    name = "_ZN2rk7samples17block_sums_kernelENS0_9BlockSumsE"
    assert launch == {"name": name, "grid": (7, 1, 1), "threads": 64, "shared_bytes": 256}
    assert struct.unpack("PPii", params) == (x.ctypes.data, sums.ctypes.data, 7, 0)


def test_recorded_names_are_those_of_nvcc(host: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "samples.cu"
    source.write_text(f'#include "host/{SAMPLES.name}"\n')
    entries = re.findall(r"\.entry (\w+)\(", build.ptx(source, include_dirs=[CSRC, HOST.parent]))
    host.set_mode("record")
    for sample, arguments in ARGUMENTS.items():
        getattr(host, sample)(*arguments)
    host.product(*ARGUMENTS["product"][:2], bfloat16=False)
    host.warp_words(np.zeros(32, np.int32), 0, 32)
    assert sorted(launch["name"] for launch in host.take_recorded()) == sorted(entries)


def test_settings_belong_to_a_thread(host: ModuleType) -> None:
    x, results = np.ones((1, 64), np.int32), []
    host.set_mode("record")
    thread = threading.Thread(target=lambda: results.append(host.block_sums(x)))
    thread.start()
    thread.join()
    assert results == [64]
    assert host.take_recorded() == []


# ---- sanitizers


def run_driver(sanitizer: str, main: str, argument: str, csrc: Path = CSRC, **environment: str) -> tuple[int, str]:
    """Exit status and output of `main`: samples_main with the sample kernels, or kernels_main with those in csrc."""
    sources = [csrc / path.relative_to(CSRC) for path in kernels.SOURCES.values()]
    if main == "samples_main":
        sources = [SAMPLES]
    flags = ["-O1", "-g", *FLAGS, *SANITIZERS[sanitizer], "-x", "c++"]
    driver = program(
        f"host-{main}-{sanitizer}", [HOST / f"{main}.cpp", *sources, *RUNTIME], flags, host_include_dirs(csrc)
    )
    result = subprocess.run([driver, argument], capture_output=True, text=True, env=os.environ | environment)
    output = result.stdout + result.stderr
    if "unexpected memory mapping" in output:
        pytest.skip("ThreadSanitizer does not run with this kernel's address space")
    return result.returncode, output


def is_reported(report: str, place: str, output: str) -> bool:
    reports = re.split(r"^(?=.*(?:ERROR: Address|WARNING: Thread)Sanitizer)", output, flags=re.MULTILINE)[1:]
    return any(report in text and place in text for text in reports)


@full
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing_in_right_kernels(sanitizer: str) -> None:
    assert run_driver(sanitizer, "samples_main", "none") == (0, "")


@full
def test_addresses_of_frames_are_known_on_every_stack() -> None:
    assert run_driver("address", "samples_main", "none", ASAN_OPTIONS="detect_stack_use_after_return=1") == (0, "")


@full
@pytest.mark.parametrize("fault", ["divergent", "lane_missing", "no_wait", "misaligned_row"])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing_in_the_end_of_a_failed_block(sanitizer: str, fault: str) -> None:
    code, output = run_driver(sanitizer, "samples_main", fault)
    assert code == 2
    assert re.fullmatch(r"KernelError: .*\n", output)


@full
@pytest.mark.parametrize(
    ("sanitizer", "fault", "report", "place"),
    [
        ("address", "shared_overflow", "heap-buffer-overflow", "block_sums_kernel"),
        ("address", "beyond_global", "heap-buffer-overflow", "doubled_kernel"),
        ("thread", "no_barrier", "data race", "block_sums_kernel"),
        ("thread", "no_barrier", "data race", "product_kernel"),
        ("thread", "duplicate_store", "data race", "block_sums_kernel"),
        ("thread", "blocks_collide", "data race", "block_sums_kernel"),
    ],
)
def test_sanitizers_report_a_fault(sanitizer: str, fault: str, report: str, place: str) -> None:
    code, output = run_driver(sanitizer, "samples_main", fault)
    assert code != 0
    assert is_reported(report, place, output), output


# ---- the kernels of this repository


@pytest.fixture
def kernels_run() -> Iterator[ModuleType]:
    """The module of the launchers, which otherwise only records what they launch."""
    module = kernels.host()
    module.set_mode("run")
    yield module
    module.set_mode("record")
    module.set_schedule()


class Host(kernels.EmulatedCuda):
    """Where a launcher has run its kernels itself."""

    def run(self, sources: str, memory: Memory) -> None:
        assert kernels.host().take_recorded() == []


@every_schedule
@pytest.mark.parametrize(
    "case",
    [
        Hash(70, 40, (6, 10, 4), heads=2, padded=True),
        Hash(140, 64, dtype=torch.float32, layout="B L H D"),
        Order(1000, 65, heads=2, rounds=2),
        Order(700, 20000, rounds=2, bounds=(0, 1, 1, 400, 700)),
        Attention(70, 32, chunk_length=32, causal=True, dropout=0.2),
        Attention(70, 40, torch.float32, rules=PAPER, n_buckets=4, chunk_length=16, after=1),
        Lists(70, 32, causal=True, grouping="hash"),
        Select(70, 32, padded=0.3),
    ],
    ids=str,
)
def test_launchers_run_their_kernels(kernels_run: ModuleType, case: Case, order: str, copies: str) -> None:
    kernels_run.set_schedule(order, copies=copies)
    case.check(Host(device=kernels.DEVICES[case.device]))


@full
@pytest.mark.parametrize("source", kernels.SOURCES)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing_in_the_kernels(sanitizer: str, source: str) -> None:
    assert run_driver(sanitizer, "kernels_main", source) == (0, "")


def mutated(folder: Path, mutation: Mutation) -> Path:
    """A copy of csrc with the mutation."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    mutation.apply(csrc / "kernels" / "cuda")
    return csrc


@full
def test_keys_are_chosen_a_slice_at_a_time(tmp_path: Path) -> None:
    assert run_driver("address", "kernels_main", "select", mutated(tmp_path, LITTLE_ROOM)) == (0, "")


@full
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_sanitizers_report_a_fault_of_a_kernel(tmp_path: Path, mutation: Mutation) -> None:
    csrc = mutated(tmp_path, mutation)
    source = mutation.file.partition(".")[0]
    code, output = run_driver(mutation.problem, "kernels_main", source, csrc, TSAN_OPTIONS="halt_on_error=1")
    assert code != 0
    assert is_reported(mutation.shown_as, f"{source}_", output), output
