"""``python -m benchmarks.run``: forward and backward of one attention layer beside its peers, in one process.

The correctness gate goes first: a case is timed only if our outputs and gradients agree with the float64 oracle.
Runs of the providers are interleaved, and medians reported.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.backends import native

from .cases import SUITES, Case
from .providers import PROVIDERS, SAME_FUNCTION, Layer


def inputs(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = case.heads * case.head_dim
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tensors = [normal(case.batch, case.length, width), *(normal(width, width) / width**0.5 for _ in range(2))]
    return [t.requires_grad_() for t in tensors]


def step(layer: Layer, tensors: list[Tensor]) -> list[Tensor]:
    out = layer(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def gate(case: Case) -> None:
    """Raises AssertionError unless outputs and gradients of one head are within the tests' tolerance of the oracle."""
    generator = torch.Generator().manual_seed(0)
    query_key, value = torch.randn(2, 1, 1, case.length, case.head_dim, generator=generator)
    options = {"causal": True, "n_hashes": case.n_hashes, "chunk_length": case.chunk_length}
    call = testing.capture(rk.lsh_attention, query_key, value, **options)
    testing.assert_matches_oracle(call, torch.float32, "cpu")


def distance(case: Case, layers: dict[str, Layer]) -> float:
    """The largest relative norm by which outputs and gradients of the two layers of the same function differ.

    Not a gate: a hash that rounds to another bucket moves the chunk borders of its neighbours.
    """
    pairs = zip(*(step(layers[name], inputs(case)) for name in SAME_FUNCTION), strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


def time_case(case: Case, layers: dict[str, Layer], repeats: int) -> dict[str, dict[str, float]]:
    tensors = inputs(case)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in layers}
    for _ in range(repeats):
        for name, layer in layers.items():
            start = time.perf_counter()
            with torch.no_grad():
                layer(*tensors)
            middle = time.perf_counter()
            step(layer, tensors)
            times[name]["forward"].append(middle - start)
            times[name]["both"].append(time.perf_counter() - middle)
    return {name: {key: statistics.median(values) for key, values in t.items()} for name, t in times.items()}


def environment() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    return {
        "reformer_kernels": rk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.build_info().get("isa_in_use"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="default", help="the cases to run")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each provider (default 3)")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    env = environment()
    print(", ".join(f"{k} {v}" for k, v in env.items()))
    for case in SUITES[options.suite]:
        layers = {name: provide(case) for name, provide in PROVIDERS.items()}
        try:
            gate(case)
        except AssertionError as error:
            sys.exit(f"correctness gate: {error}")
        times = time_case(case, layers, options.repeats)
        off = distance(case, layers)
        print(
            f"\n{case}: seconds, and how many times as long as ours ({' and '.join(SAME_FUNCTION)} differ by {off:.1e})"
        )
        for name, t in times.items():
            ratio = t["both"] / times["ours"]["both"]
            print(f"  {name:<18} forward {t['forward']:8.4f}   forward+backward {t['both']:8.4f}   {ratio:6.2f}")
        bare = times["projections alone"]["both"]
        for name in PROVIDERS:
            if name not in ("ours", "projections alone"):
                ratio = (times[name]["both"] - bare) / (times["ours"]["both"] - bare)
                print(f"  without the projections that both contain, {name} takes {ratio:.1f} times as long")
        results.append({"case": vars(case), "seconds": times, "distance": off})
    if options.out:
        options.out.write_text(json.dumps({"environment": env, "results": results}, indent=1))


if __name__ == "__main__":
    main()
