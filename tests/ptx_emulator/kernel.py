"""A kernel of PTX text, launched on arrays of this process."""

import functools
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import numpy as np
from numpy.typing import DTypeLike

from . import build
from .parser import parse
from .syntax import Parameter, RefusedError

MACHINE_SOURCES = Path(__file__).parent / "machine"
MACHINE_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Werror")


class Schedule(TypedDict, total=False):
    """What a GPU leaves open of a launch: arguments of ``Kernel.launch``."""

    schedule: str
    seed: int
    early_copies: bool
    blocks: Sequence[int]


# What a right kernel gives the same result under: the order of warps and blocks, and when asynchronous copies land.
SCHEDULES: tuple[Schedule, ...] = (
    {"schedule": "fifo"},
    {"schedule": "rev"},
    {"schedule": "rand", "seed": 1},
    {"schedule": "fifo", "early_copies": True},
)

_ORDERS = {"fifo": "forward", "rev": "backward", "rand": "random"}
_SCALAR_FORMATS = {"f32": "<f", "f64": "<d"}

_Real = tuple[int, int, bool]  # address, bytes, whether it is writeable
_Sparse = tuple[Any, bool]  # memory of the machine, whether it is writeable


class EmulationError(RuntimeError):
    """What a kernel did wrong, or what of it cannot be emulated. `kind` is one of:

    out of bounds, misaligned, read-only, shared race, global race, copy in flight, uninitialised, deadlock,
    divergent barrier, divergent collective, bad operand, no progress, trap, not emulated (while it runs), refused (its
    text), bad launch.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Counters:
    """What a launch costs in a model of the memory system: no times."""

    warp_instructions: int
    mma: int
    global_requests: int
    global_sectors: int  # of 32 bytes
    ideal_sectors: int  # that would hold the distinct bytes of each request
    global_bytes: int
    shared_wavefronts: int
    ideal_wavefronts: int  # without bank conflicts
    opcodes: dict[str, int] = field(repr=False)  # warp instructions by name as written


@functools.cache
def machine(sources: Path = MACHINE_SOURCES) -> ModuleType:
    """The interpreter. Tests of the tests build it from other sources."""
    return build.extension("ptx_machine", sorted(sources.glob("*.cpp")), MACHINE_FLAGS)


class VirtualRegion:
    """Memory at addresses that do not exist: `size` bytes that hold the pattern `fill` until they are written.

    `base` is a multiple of 64 KB. Takes memory only where it is touched.
    """

    def __init__(
        self,
        base: int,
        size: int,
        fill: bytes = b"\0",
        writeable: bool = True,
        machine_module: ModuleType | None = None,
    ) -> None:
        self.base = base
        self.size = size
        self.writeable = writeable
        self.memory = (machine_module or machine()).SparseMemory(base, size, fill)

    def read(self, offset: int, dtype: DTypeLike, count: int) -> np.ndarray:
        """`count` elements from byte `offset` on."""
        dtype = np.dtype(dtype)
        return np.frombuffer(self.memory.read(offset, count * dtype.itemsize), dtype).copy()

    def write(self, offset: int, values: np.ndarray) -> None:
        self.memory.write(offset, np.ascontiguousarray(values).tobytes())

    @property
    def touched_bytes(self) -> int:
        return int(self.memory.touched_bytes)


class Kernel:
    """`name`: the mangled name of an entry, or a part that only one has; None if there is but one entry."""

    def __init__(self, ptx: str, name: str | None = None, machine_module: ModuleType | None = None) -> None:
        self._machine = machine_module or machine()
        self._ptx = ptx
        try:
            self._parsed = parse(ptx, name, self._machine)
        except RefusedError as refusal:
            where = f" (line {refusal.line})" if refusal.line else ""
            raise EmulationError("refused", f"{refusal.detail}{where}") from None

    @property
    def name(self) -> str:
        return self._parsed.name

    @property
    def parameters(self) -> list[Parameter]:
        return self._parsed.parameters

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int | tuple[int, int, int],
        params: bytes | Sequence[object],
        memory: Sequence[np.ndarray | VirtualRegion],
        shared_bytes: int = 0,
        schedule: str = "fifo",
        early_copies: bool = False,
        seed: int = 0,
        check_uninitialised: bool = True,
        check_block_races: bool = True,
        instruction_limit: int = 10**9,
        blocks: Sequence[int] = (),
    ) -> Counters:
        """Runs all blocks. The kernel may touch `memory` and nothing else, and only read arrays that are not writeable.

        `blocks`: the numbers of those that run, if not all. `params`: the bytes of the parameter space, or one value
        per parameter: a number, an array or a region (its address), the bytes of a struct. `shared_bytes` is the
        dynamic shared memory. `instruction_limit` bounds the warp instructions of a block, for kernels that never end.
        Raises EmulationError.
        """
        shape = (threads, 1, 1) if isinstance(threads, int) else tuple(threads)
        self._check_shape(grid, shape, shared_bytes)
        real, sparse = self._regions(memory)
        launch = self._machine.Launch(
            tuple(grid),
            shape,
            shared_bytes,
            getattr(self._machine.Order, _ORDERS[schedule]),
            instruction_limit,
            seed,
            self._checked_blocks(blocks, grid),
        )
        counters = self._machine.Counters()
        fault = self._machine.run(
            self._parsed.program,
            launch,
            real,
            sparse,
            self._parameter_bytes(params),
            early_copies,
            check_uninitialised,
            check_block_races,
            counters,
        )
        if fault is not None:
            raise EmulationError(fault.kind, self._describe(fault))
        return self._counters(counters)

    def _check_shape(self, grid: Sequence[int], threads: Sequence[int], shared_bytes: int) -> None:
        count = threads[0] * threads[1] * threads[2]
        limit = self._parsed.max_threads
        if len(grid) != 3 or min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
            raise EmulationError("bad launch", f"a grid of {tuple(grid)}")
        if not 1 <= count <= 1024:
            raise EmulationError("bad launch", f"{count} threads a block")
        if limit is not None and (count > limit or (self._parsed.exact_threads and count != limit)):
            raise EmulationError("bad launch", f"{count} threads for a kernel compiled for {limit}")
        if shared_bytes < 0:
            raise EmulationError("bad launch", f"{shared_bytes} bytes of shared memory")

    def _checked_blocks(self, blocks: Sequence[int], grid: Sequence[int]) -> list[int]:
        count = grid[0] * grid[1] * grid[2]
        if any(not 0 <= number < count for number in blocks):
            raise EmulationError("bad launch", f"blocks {list(blocks)} of {count}")
        return list(blocks)

    def _regions(self, memory: Sequence[np.ndarray | VirtualRegion]) -> tuple[list[_Real], list[_Sparse]]:
        real: list[_Real] = []
        sparse: list[_Sparse] = []
        for item in memory:
            if isinstance(item, VirtualRegion):
                sparse.append((item.memory, item.writeable))
            elif item.flags.c_contiguous or item.flags.f_contiguous:
                if item.nbytes:
                    real.append((item.ctypes.data, item.nbytes, item.flags.writeable))
            else:
                raise ValueError("an array with gaps: pass the array that it is a view of")
        return real, sparse

    def _parameter_bytes(self, params: bytes | Sequence[object]) -> bytes:
        parameters = self._parsed.parameters
        size = parameters[-1].offset + parameters[-1].size if parameters else 0
        if isinstance(params, bytes | bytearray | memoryview):
            if len(params) != size:
                raise EmulationError("bad launch", f"{len(params)} bytes of parameters where the kernel has {size}")
            return bytes(params)
        if len(params) != len(parameters):
            raise EmulationError("bad launch", f"{len(params)} parameters where the kernel has {len(parameters)}")
        packed = bytearray(size)
        for parameter, value in zip(parameters, params, strict=True):
            data = _pack(parameter, value)
            packed[parameter.offset : parameter.offset + parameter.size] = data
        return bytes(packed)

    def _describe(self, fault: Any) -> str:
        text = " ".join(self._ptx.split("\n")[fault.line - 1].split()) if fault.line > 0 else ""
        block = ", ".join(map(str, fault.block))
        return f"{fault.detail} (line {fault.line}: {text}) in block ({block}), thread {fault.thread} of {self.name}"

    def _counters(self, counters: Any) -> Counters:
        opcodes: Counter[str] = Counter()
        for opcode, count in zip(self._parsed.opcodes, counters.executed, strict=True):
            if count:
                opcodes[opcode] += count
        names = [name for name in Counters.__dataclass_fields__ if name != "opcodes"]
        return Counters(**{name: getattr(counters, name) for name in names}, opcodes=dict(opcodes))


def _pack(parameter: Parameter, value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        value = value.ctypes.data
    elif isinstance(value, VirtualRegion):
        value = value.base
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
    elif parameter.type in _SCALAR_FORMATS:
        data = struct.pack(_SCALAR_FORMATS[parameter.type], value)
    else:
        data = (int(value) & ((1 << (8 * parameter.size)) - 1)).to_bytes(parameter.size, "little")
    if len(data) != parameter.size:
        raise EmulationError("bad launch", f"{len(data)} bytes for {parameter.name} of {parameter.size}")
    return data
