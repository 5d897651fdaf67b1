"""The CUDA kernels of this repository, launched by their own launchers and executed by the PTX emulator.

A launcher runs in the host module, which records what it would launch: the mangled name of the kernel, the shape, and
the bytes of its arguments, pointers into numpy arrays. The emulator then runs the entry of that name in nvcc's output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from reformer_kernels._calls import n_sequences
from reformer_kernels.backends import cuda

from ...ptx_emulator import Kernel, build
from ...ptx_emulator.syntax import module
from ..build import CSRC, HOST, host_include_dirs
from ..emulator import Emulator, Launched, Memory, as_array, read_only, storage

SOURCES = {
    name: CSRC / "kernels" / "cuda" / f"{name}.cu"
    for name in ("hash", "order", "attention", "lists", "select", "gather")
}
Device = tuple[int, int, int]  # multiprocessors, bytes of shared memory of a block and of a multiprocessor
DEVICES: dict[str, Device] = {
    "A100": (108, 166912, 167936),
    "H100": (132, 232448, 233472),
    "RTX": (82, 101376, 102400),
    # No GPU: little shared memory, and few blocks, so that each has several tiles of tokens.
    "one": (1, 61440, 61440),
    "little": (4, 80000, 81920),
    "single": (1, 232448, 233472),  # the same with much
}

UNWRITTEN = 0xF7, 0xFF  # as a byte: integers that no kernel computes, and NaN


@functools.cache
def host() -> ModuleType:
    """The launchers, compiled for the CPU."""
    flags = ("-DRK_HOST", "-fvisibility=default", "-Wno-unknown-pragmas", "-x", "c++")
    parts = sorted(path for path in HOST.glob("*.cpp") if not path.stem.endswith("main"))
    launchers = build.extension("host", [*parts, *SOURCES.values()], flags, host_include_dirs())
    launchers.set_mode("record")
    return launchers


@functools.lru_cache(maxsize=32)
def ptx(source: Path, architecture: str, csrc: Path = CSRC) -> str:
    """Read once: a launch must not look for changes of megabytes of text."""
    return build.ptx(source, architecture, include_dirs=[csrc])


def entries(source: Path, architecture: str) -> set[str]:
    """The mangled names of all kernel instances that a source is compiled to."""
    return set(module(ptx(source, architecture)).kernels)


@functools.lru_cache(maxsize=32)
def _kernel(text: str, name: str) -> Kernel:
    return Kernel(text, name)


@dataclass
class EmulatedCuda(Emulator):
    """Runs the launches of the backend "cuda" on tensors of the CPU."""

    device: Device = DEVICES["H100"]  # of the plan
    csrc: Path = CSRC  # of the kernels, not of their launchers
    backend: ClassVar[str] = "cuda"

    @contextmanager
    def serving(self) -> Iterator[None]:
        with (
            patch.object(cuda, "_ops", EmulatedOps(self)),
            patch.object(cuda, "not_supported_reasons", cuda.kernel_reasons),
        ):
            yield

    def gather_rows(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        out = np.full((len(index), rows.shape[1]), 255, rows.dtype)
        host().gather_rows(rows, index, out)
        self.run("gather", [read_only(rows), read_only(index), out])
        return out

    def run(self, sources: str, memory: Memory) -> None:
        """Executes the launches that were recorded, of kernels of these sources."""
        paths = [self.csrc / SOURCES[source].relative_to(CSRC) for source in sources.split()]
        texts = [ptx(path, self.architecture, self.csrc) for path in paths]
        for launch in host().take_recorded():
            text = next(text for text in texts if launch["name"] in module(text).kernels)
            kernel = _kernel(text, launch["name"])
            counters = kernel.launch(
                launch["grid"], launch["threads"], launch["params"], memory, launch["shared_bytes"], **self.schedule
            )
            self.launched.append(Launched(launch["name"], launch["threads"], launch["shared_bytes"], counters))


class Recorder(EmulatedCuda):
    """Notes what would be launched; results are zeros."""

    def run(self, sources: str, memory: Memory) -> None:
        for array in memory:
            if isinstance(array, np.ndarray) and array.flags.writeable:
                array[:] = 0
        self.launched += [
            Launched(launch["name"], launch["threads"], launch["shared_bytes"], None)
            for launch in host().take_recorded()
        ]


class EmulatedOps:
    """What ``torch.ops.reformer_kernels_cuda`` has, for tensors of the CPU."""

    def __init__(self, emulator: EmulatedCuda) -> None:
        self._emulator = emulator

    def hash_buckets(self, arguments: dict[str, Any]) -> None:
        x, buckets = arguments["x"], arguments["buckets"]
        outputs = unwritten(buckets)
        host().hash_buckets(
            as_array(x), str(x.dtype)[6:], as_array(arguments["rotations"]), as_array(arguments["key_padding_mask"]),
            list(arguments["n_buckets"]), as_array(buckets), self._emulator.device,
        )  # fmt: skip
        self._emulator.run("hash", read_by(arguments, ["buckets"]) + outputs)

    def bucket_order(self, arguments: dict[str, Any]) -> None:
        names = "buckets", "cu_seqlens", "longest", "n_buckets", "order"
        buckets, cu_seqlens, longest, n_buckets, order = (arguments[name] for name in names)
        device, sequences = self._emulator.device, n_sequences(cu_seqlens)
        plan = host().order_plan(list(buckets.shape), sequences, longest, n_buckets, device)
        sizes = buckets.numel() if plan["passes"] > 1 else 0, plan["counts"]
        scratch = [torch.empty(size, dtype=torch.int32) for size in sizes]
        outputs = unwritten(order, *scratch)
        host().bucket_order(
            as_array(buckets), as_array(cu_seqlens), longest, n_buckets, *map(as_array, (order, *scratch)), device
        )
        self._emulator.run("order", read_by(arguments, ["order"]) + outputs)

    def chunk_attention_forward(self, arguments: dict[str, Any]) -> None:
        self._chunk_attention(False, arguments, ["out", "lse", "self_only"])
        assert (arguments["self_only"].view(torch.uint8) < 2).all(), "a row of self_only was not written"

    def chunk_attention_backward(self, arguments: dict[str, Any]) -> None:
        if arguments["key"] is None:
            del arguments["grad_key"]
        self._chunk_attention(True, arguments, [name for name in GRADIENTS if name in arguments])

    def _chunk_attention(self, backward: bool, arguments: dict[str, Any], written: list[str]) -> None:
        given = arguments_of(arguments)
        scratch = torch.empty(host().attention_scratch(given, backward), dtype=torch.uint8)
        outputs = unwritten(*(arguments[name] for name in written), scratch)
        host().attention(given, backward, arguments["longest"], as_array(scratch), self._emulator.device)
        self._emulator.run("attention", read_by(arguments, written) + outputs)

    def list_attention_forward(self, arguments: dict[str, Any]) -> None:
        outputs = unwritten(arguments["out"], arguments["lse"])
        host().list_attention_forward(arguments_of(arguments), self._emulator.device)
        self._emulator.run("attention lists", read_by(arguments, ["out", "lse"]) + outputs)

    def list_rest_backward(self, arguments: dict[str, Any]) -> None:
        written = ["grad_query", "query_terms", "value_terms"]
        outputs = unwritten(*(arguments[name] for name in written))
        host().list_rest_backward(arguments_of(arguments))
        self._emulator.run("lists", read_by(arguments, written) + outputs)

    def list_attention_backward(self, arguments: dict[str, Any]) -> None:
        given = arguments_of(arguments)
        scratch = torch.empty(host().list_scratch(given, self._emulator.device), dtype=torch.uint8)
        # The rest key has begun the gradient of the query.
        begun = arguments["key_grads"] is not None
        fresh = [arguments[name] for name in GRADIENTS if not (begun and name == "grad_query")]
        outputs = unwritten(*fresh, scratch)
        if begun:
            outputs.append(storage(arguments["grad_query"], writeable=True))
        host().list_attention_backward(given, as_array(scratch), self._emulator.device)
        self._emulator.run("attention order lists", read_by(arguments, GRADIENTS) + outputs)

    def select_keys(self, arguments: dict[str, Any]) -> None:
        given = arguments_of(arguments)
        scratch = torch.empty(host().select_scratch(given), dtype=torch.uint8)
        outputs = unwritten(arguments["lists"], scratch)
        host().select_keys(given, as_array(scratch))
        self._emulator.run("select", read_by(arguments, ["lists"]) + outputs)


GRADIENTS = ("grad_query", "grad_key", "grad_value")
FIELDS = {"key_padding_mask": "padding", "query_padding_mask": "query_padding"}  # that have other names than arguments


def arguments_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Fields of the kernels' parameters by name, with arrays for tensors, of a native op's arguments."""
    fields = {FIELDS.get(name, name): as_array(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    return {"element": str(arguments["query"].dtype)[6:]} | fields


def read_by(arguments: dict[str, Any], written: Sequence[str]) -> list[np.ndarray]:
    return memory_of(*(x for name, x in arguments.items() if name not in written))


def unwritten(*outputs: Tensor) -> list[np.ndarray]:
    """Memory of outputs (and of scratch, bytes), all of which is set to what no kernel writes."""
    memory = [storage(x, writeable=True) for x in outputs]
    for x, whole in zip(outputs, memory, strict=True):
        whole[:] = UNWRITTEN[x.is_floating_point() or x.dtype == torch.uint8]
    return memory


def memory_of(*values: Any) -> list[np.ndarray]:
    """What the tensors among these may be read from; views of one storage have it once."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    return list({x.untyped_storage().data_ptr(): storage(x) for x in tensors}.values())
