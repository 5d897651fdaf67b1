"""``python -m benchmarks.run``: our kernels beside their peers, and beside another revision (``--base``).

A case is timed only after our outputs and gradients agreed with the float64 oracle. Runs of the providers are
interleaved in one process and medians reported; peak memory comes from a fresh process per provider.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import gate, kernels, report
from .base import Pair, checked_out, resolve
from .cases import SUITES, Case, Suite
from .machine import available_bytes, environment, fma_peak
from .memory import measure_in_fresh_process
from .providers import PROVIDERS, SAME_FUNCTION
from .timing import Timer, build, interleaved, provider_spec

Row = dict[str, Any]


def reason_to_skip(name: str, target: str, case: Case, gflops: float, max_seconds: float) -> str | None:
    """Why a provider is not measured on a case; None if it is."""
    provider = PROVIDERS[name]
    if provider.backend and provider.backend not in kernels.backends_available():
        return f"no backend {provider.backend}"
    if getattr(provider, target) is None:
        return f"has no {target}"
    cost = provider.cost(case)
    if (seconds := cost.flop / gflops * 1e-9) > max_seconds:
        return f"too slow: an estimated {seconds:.0f} s"
    if cost.bytes > 0.9 * available_bytes():
        return f"too big: an estimated {cost.bytes / 2**30:.0f} GB"
    return None


def measure_case(case: Case, target: str, suite: Suite, gflops: float, options: argparse.Namespace) -> Row:
    """Interleaved times of all providers of a suite."""
    timers: dict[str, Timer] = {}
    row: Row = {"case": vars(case), "target": target, "seconds": {}, "skipped": {}}
    for name in suite.providers:
        reason = reason_to_skip(name, target, case, gflops, options.max_seconds)
        if reason:
            row["skipped"][name] = reason
            continue
        try:
            timers[name] = build(provider_spec(name, target, case))
        except ImportError as error:
            row["skipped"][name] = str(error)
    row["seconds"] = interleaved(timers, options.repeats)
    if target == "layer" and all(name in timers for name in SAME_FUNCTION):
        row["distance"] = gate.distance(case.shorter(4096))
    return row


def compare_with_base(case: Case, target: str, pair: Pair, repeats: int) -> Row:
    times = interleaved(pair.timers(provider_spec("ours", target, case)), repeats)
    ratios = {f"ratio_{part}": times["now"][part] / times["base"][part] for part in ("forward", "both")}
    return {**times, **ratios}


def measure_memory(case: Case, target: str, suite: Suite, gflops: float, options: Any, base: Path | None) -> list[Row]:
    rows: list[Row] = []
    for name in suite.providers:
        if reason_to_skip(name, target, case, gflops, options.max_seconds) is None:
            measured = measure_in_fresh_process(name, target, case)
            rows.append({"case": vars(case), "target": target, "provider": name, **measured})
            if name == "ours" and base:
                measured = measure_in_fresh_process(name, target, case, base)
                rows.append({"case": vars(case), "target": target, "provider": "ours, base", **measured})
    return rows


def run(suite: Suite, options: argparse.Namespace, pair: Pair | None) -> Row:
    """All measurements of a suite, printed as they come.

    Raises:
        AssertionError: the correctness gate.
    """
    env = environment()
    print(", ".join(f"{key} {value}" for key, value in env.items()), flush=True)
    if env["busy_cores"] > 0.2:  # each parallel region then waits for a time slice of the scheduler, about 8 ms
        print(f"WARNING: other processes keep {env['busy_cores']} cores busy: all times are suspect", flush=True)
    threads = torch.get_num_threads()
    peaks = fma_peak(1, threads)
    print("float32 multiply-add peak, GFLOP/s by threads:", peaks or "not measured, no C++ compiler", flush=True)
    gflops = peaks.get(str(threads), 50.0 * threads)  # for estimates only
    results: Row = {"suite": options.suite, "environment": env, "fma_peak_gflops": peaks}
    results |= {"cases": [], "memory": [], "kernels": []}

    def note(key: str, row: Row) -> None:
        results[key].append(row)
        print(report.line(key, row), flush=True)

    for case in suite.cases:
        checked = [name for name in suite.providers if name.startswith("ours")]
        check = gate.check_module if suite.targets == ("module",) else gate.check_provider
        verdicts = {name: check(name, case) for name in checked}
        print(f"\n{case}: {'; '.join(verdicts.values())}", flush=True)
        for target in suite.targets:
            row = measure_case(case, target, suite, gflops, options) | {"gate": verdicts}
            if pair:
                row["base"] = compare_with_base(case, target, pair, options.repeats)
            note("cases", row)
    for case in suite.memory:
        if case not in suite.cases:
            print(f"\n{case}: {gate.check_provider('ours', case)}", flush=True)
        for target in suite.targets:
            for row in measure_memory(case, target, suite, gflops, options, pair.base_tree if pair else None):
                note("memory", row)
    if suite.kernels:
        counts = list(dict.fromkeys((1, threads)))
        for row in kernels.measure_variants(suite.kernels, counts, peaks, options.repeats, pair):
            note("kernels", row)
        results["hash_and_sort"], results["calls"] = [], []
        for count in counts:
            note("hash_and_sort", kernels.hash_and_sort(kernels.HASH_LENGTH[suite.kernels], count))
        for row in kernels.calls():
            note("calls", row)
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="default", help="what to measure (default: default)")
    parser.add_argument("--providers", help=f"only these, separated by semicolons, of: {'; '.join(PROVIDERS)}")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each (default 5; 1 above 20 s)")
    parser.add_argument("--max-seconds", type=float, default=600, help="skip what is estimated to take longer a run")
    parser.add_argument("--base", metavar="REV", help="also build and measure this revision, and print now / base")
    parser.add_argument("--out", type=report.file_to_write, help="JSON file for the results; its folder must exist")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.base:
        try:
            options.base = resolve(options.base)
        except RuntimeError as error:
            parser.error(f"--base: {error}")
    if options.providers:
        options.providers = tuple(name.strip() for name in options.providers.split(";"))
        if unknown := set(options.providers) - set(PROVIDERS):
            parser.error(f"--providers: unknown {sorted(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    suite = SUITES[options.suite]
    if options.providers:
        suite = replace(suite, providers=options.providers)
    with contextlib.ExitStack() as stack:
        pair = None
        if options.base:
            print(f"building {options.base[:12]} ...", flush=True)
            pair = Pair(stack.enter_context(checked_out(options.base)))
            stack.callback(pair.close)
        try:
            results = run(suite, options, pair)
        except AssertionError as error:
            sys.exit(f"correctness gate: {error}")
    if options.base:
        results["base"] = options.base
    print("\n" + report.markdown(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
