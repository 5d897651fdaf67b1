"""What each Triton kernel may cost, as ``budgets`` has it for those of CUDA."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reformer_kernels import testing

from ..attention import Attention
from ..budgets import (
    Resources,
    attention_problems,
    compiled_costs,
    executed_costs,
    hash_problem,
    order_problem,
    select_problem,
)
from ..cases import Case
from ..emulator import Launched
from ..lists import Lists
from .kernels import EmulatedTriton

# Of the ideal, at most: products of float32 read what they multiply from shared memory with conflicts, and those of
# half types read transposed tiles of gradients so on sm_80, which costs less than what L2 takes.
HALF: dict[str, Any] = {"sectors": 1.3, "wavefronts": 1.7}
FLOAT: dict[str, Any] = {"sectors": 1.4, "wavefronts": 3.0}
# As in the CUDA kernels' budgets, of which some shapes are left out: compiling takes seconds for each.
PROBLEMS = [
    replace(problem, **limits)
    for limits, problems in (
        (
            HALF,
            [
                hash_problem(torch.bfloat16, 64, length=1024),
                hash_problem(torch.bfloat16, 64, (32, 16), length=1024),
                hash_problem(torch.bfloat16, 64, (16, 12), length=1024),
                hash_problem(torch.bfloat16, 128, (32, 16), length=1024),
                hash_problem(torch.bfloat16, 64, (64, 128), rounds=1, length=1024),
                hash_problem(torch.bfloat16, 64, (256, 128), length=512),
                *attention_problems(512, 64, 64, torch.bfloat16, forward=1200, backward=3000),
                *attention_problems(1024, 128, 256, torch.bfloat16),
                *attention_problems(512, 64, 128, torch.bfloat16),
            ],
        ),
        (FLOAT, [hash_problem(torch.float32, 64, length=256), *attention_problems(256, 64, 64, torch.float32)]),
        # Slots and key indices are wherever keys say.
        ({"sectors": 2.5}, [order_problem(16384, 512, bytes=50), order_problem(98304, 8192, bytes=100, passes=2)]),
        ({"sectors": 2.5}, [select_problem(1024, 1024, torch.bfloat16)]),
    )
    for problem in problems
]
LISTS: dict[str, Case] = {
    f"lists, {str(dtype)[6:]}, D 64": Lists(150, 64, dtype, grouping="hash", causal=True, chunk_length=64, padded=0.1)
    for dtype in (torch.bfloat16, torch.float32)
}


def release() -> str:
    import triton

    return f"triton {triton.__version__}"


@functools.lru_cache(maxsize=64)
def resources(cubin: bytes) -> Resources:
    """Of a kernel as Triton compiled it; spilled bytes are those of a thread's stack."""
    import triton.backends.nvidia as package

    assert package.__file__
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(package.__file__).parent / "bin" / "cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    uses = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    return Resources(uses["REG"], uses["STACK"] + uses["LOCAL"], uses["SHARED"])


class Measured(EmulatedTriton):
    """Notes what the kernels that it launches were compiled to."""

    binaries = True

    def __init__(self, architecture: str, device_name: str = "") -> None:
        super().__init__(architecture, device_name=device_name)
        self.compiled: dict[str, tuple[Resources, Launched]] = {}

    def launch(self, kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], options: Any) -> None:
        super().launch(kernel, programs, device, args, options)
        uses = resources(self.compile(kernel, args, options).asm["cubin"])
        self.compiled[kernel.__name__] = uses, self.launched[-1]


def launch(case: Case, emulator: EmulatedTriton) -> None:
    """Both passes of a problem. That the results are right is tested elsewhere."""
    if not isinstance(case, Attention | Lists):
        case.check(emulator)
        return
    call = testing.convert(case.call(), case.dtype)
    with emulator.serving():
        testing.results(call, "triton", "triton", torch.randn(*call.query.shape[:3], call.value.shape[3]))


def measure(architecture: str) -> dict[str, dict[str, Any]]:
    """As budgets.measure."""
    kernels: dict[str, Any] = {}
    problems, emulators = {}, dict[Case, Measured]()
    cases = {problem.name: problem.case for problem in PROBLEMS} | LISTS
    for name, case in cases.items():
        if case in emulators:
            continue
        emulators[case] = Measured(architecture)
        launch(case, emulators[case])
        kernels |= {
            f"{kernel} of {name}": compiled_costs(uses, launch, architecture)
            for kernel, (uses, launch) in emulators[case].compiled.items()
        }
    for problem in PROBLEMS:
        problems[problem.name] = executed_costs(problem, emulators[problem.case])
    return {"kernels": kernels, "problems": problems}
