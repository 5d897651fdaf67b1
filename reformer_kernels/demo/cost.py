"""Time and memory of one attention call, forward and backward, each (function, length) in a process of its own.

Run as a module this is that process: it makes the call once for every line on its standard input and answers with one
line of JSON. A long-lived process lets the parent interleave the functions, so that a slow minute of a shared machine
hits all of them; a fresh one starts without memory that an earlier call has left to the allocator.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import lsh_attention
from .text import DemoError

BATCH, HEADS, HEAD_DIM = 1, 8, 64
N_HASHES, CHUNK_LENGTH = 4, 64
SETTINGS = f"causal, B {BATCH}, H {HEADS}, D {HEAD_DIM}, float32, {N_HASHES} hashes, chunks of {CHUNK_LENGTH}"
NAMES = {"lsh": "LSH attention", "sdpa": "torch SDPA"}
_WARM_UP_LENGTH = 256


def _prepare(name: str, length: int) -> Callable[[], None]:
    """One call forward and backward on fresh inputs of that length."""
    shape = (BATCH, HEADS, length, HEAD_DIM)
    n_inputs = 2 if name == "lsh" else 3  # query_key and value, or query, key and value
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(n_inputs)]
    grad = torch.randn(shape)

    def attend() -> Tensor:
        if name == "lsh":
            query_key, value = inputs
            return lsh_attention(query_key, value, n_hashes=N_HASHES, chunk_length=CHUNK_LENGTH, causal=True)
        query, key, value = inputs
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def call() -> None:
        for x in inputs:
            x.grad = None
        attend().backward(grad)

    return call


def _status_bytes(field: str) -> int | None:
    """A size in /proc/self/status; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _peak_bytes() -> int:
    """The largest resident size of this process so far."""
    # Linux hands the parent's ru_maxrss down to its children, so there VmHWM, which starts anew, is the honest one.
    peak = _status_bytes("VmHWM:")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _serve(name: str, length: int, threads: int) -> None:
    torch.set_num_threads(threads)
    _prepare(name, _WARM_UP_LENGTH)()  # loads code and starts threads, which is not the call's memory
    call = _prepare(name, length)
    before = _peak_bytes()
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "extra_bytes": _peak_bytes() - before}), flush=True)


class _Point:
    """The process of one function at one length."""

    def __init__(self, stack: ExitStack, name: str, length: int) -> None:
        arguments = [name, str(length), str(torch.get_num_threads())]
        self.title = f"{NAMES[name]} at L {length:,}"
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", __name__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # or Ctrl-C would reach it, too, and it would print a traceback
            )
        )
        stack.callback(self.process.kill)  # runs before the wait above ends, also after an error or Ctrl-C
        self.answers: list[dict[str, Any]] = []

    def run(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(b"\n")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise DemoError(f"{self.title} could not be measured: its process ended with code {self.process.wait()}")
        self.answers.append(json.loads(answer))

    def spent(self) -> float:
        return float(sum(answer["seconds"] for answer in self.answers))


def measure(lengths: list[int], repeats: int, point_seconds: float, progress: Any) -> Iterator[list[dict[str, Any]]]:
    """Median seconds and extra peak bytes of both functions, one length after the other.

    Args:
        repeats: timed calls after the first one, which is counted only if it stays alone.
        point_seconds: no more calls of a function at a length that has taken this long.
        progress: ``progress(iterable)`` of lengths, shows how far this is.
    """
    for length in progress(lengths):
        with ExitStack() as stack:
            points = {name: _Point(stack, name, length) for name in NAMES}
            for point in points.values():
                point.run()  # one after the other, the first call also measures memory
            for _ in range(repeats):
                for point in points.values():
                    if point.spent() < point_seconds:
                        point.run()
        rows = []
        for name, point in points.items():
            times = [answer["seconds"] for answer in point.answers]
            rows.append(
                {
                    "name": name,
                    "length": length,
                    "seconds": statistics.median(times[1:] or times),
                    "calls": len(times[1:] or times),
                    "extra_bytes": point.answers[0]["extra_bytes"],
                }
            )
        yield rows


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
