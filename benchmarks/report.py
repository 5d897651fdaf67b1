"""``python -m benchmarks.report results.json``: the results as Markdown tables, as in the README."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .cases import Case

Row = dict[str, Any]
ALONE = "projections alone"
TITLES = {
    "attention": "Attention alone",
    "layer": "Layer, with the projections to queries and values",
    "module": "Self-attention module with all its projections, not causal, without weights",
}


def file_to_write(text: str) -> Path:
    """The argument of an option; refused before anything is measured if the file cannot be written afterwards."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}")
    return path


def length_name(length: int) -> str:
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def number(value: float) -> str:
    """Two digits, or all that stand before the point."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def megabytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MB"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def shape_name(case: Row) -> str:
    return str(Case(**case)).split(" ", 2)[2]  # without the length


def line(key: str, row: Row) -> str:
    """One result in one line or a few, as the run prints it."""
    return "\n".join(LINES[key](row))


def _case_lines(row: Row) -> list[str]:
    lines = [f" {row['target']}, seconds:"]
    ours = row["seconds"].get("ours")
    for name, t in row["seconds"].items():
        ratio = f"   {t['both'] / ours['both']:7.2f} times ours" if ours else ""
        seconds = f"forward {t['forward']:9.4f}   forward+backward {t['both']:9.4f}"
        lines.append(f"  {name:<18} {seconds}{ratio}   ({t['repeats']} runs)")
    lines += [f"  {name:<18} skipped: {reason}" for name, reason in row["skipped"].items() if "has no" not in reason]
    if "base" in row:
        b = row["base"]
        lines.append(f"  now / base: forward {b['ratio_forward']:.3f}, forward+backward {b['ratio_both']:.3f}")
    return lines


def _memory_lines(row: Row) -> list[str]:
    what = f" {row['target']}, {Case(**row['case'])}, {row['provider']:<18}"
    if "error" in row:
        return [f"{what} failed: {row['error']}"]
    return [f"{what} peak extra memory {megabytes(row['extra_bytes'])} (one step {row['seconds']:.2f} s)"]


def _kernel_lines(row: Row) -> list[str]:
    name = row["variant"]["name"]
    if "skipped" in row:
        return [f" {name:<22} skipped: {row['skipped']}"]
    parts = (f"{part} {_kernel_cell(row[part])}" for part in ("forward", "backward"))
    base = row.get("base")
    ratio = f"   now / base {base['ratio_forward']:.3f}, {base['ratio_backward']:.3f}" if base else ""
    return [f" {name:<22} {row['threads']} threads: {'; '.join(parts)}{ratio}"]


def _kernel_cell(part: Row) -> str:
    of_peak = f", {part['of_peak']:.0%}" if "of_peak" in part else ""
    return f"{part['ns']:.0f} ns, {part['gflops']:.0f} GFLOP/s{of_peak}"


def _hash_lines(row: Row) -> list[str]:
    return [
        f" {row['threads']} threads: hash {row['hash_ns']:.1f} ns a token, head and round; "
        f"sort {row['sort_gkeys_per_core']:.3f} Gkey/s a core at {row['buckets']} buckets"
    ]


def _call_lines(row: Row) -> list[str]:
    return [f" {row['call']:<50} L {row['length']:<4} {row['us']:8.1f} us a call"]


LINES: dict[str, Callable[[Row], list[str]]] = {
    "cases": _case_lines, "memory": _memory_lines, "kernels": _kernel_lines, "hash_and_sort": _hash_lines,
    "calls": _call_lines,
}  # fmt: skip


def times_table(rows: list[Row]) -> str:
    """Our seconds, and how many times as long the others take; cases are columns."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != ALONE))
    body = []
    for name in names:
        cells = [_time_cell(row, name) for row in rows]
        body.append([name if name == "ours" else f"{name} takes", *cells])
    return table(["forward and backward", *(length_name(row["case"]["length"]) for row in rows)], body)


def _time_cell(row: Row, name: str) -> str:
    times, ours = row["seconds"].get(name), row["seconds"].get("ours")
    if times is None:
        return "skipped"
    if name == "ours" or ours is None:
        return f"{number(times['both'])} s"
    cell = f"{number(times['both'] / ours['both'])} times as long"
    bare = row["seconds"].get(ALONE)
    if bare:
        without = (times["both"] - bare["both"]) / (ours["both"] - bare["both"])
        cell += f" ({number(without)})"
    return cell


def memory_table(rows: list[Row]) -> str:
    body = [[row["provider"], row["target"], length_name(row["case"]["length"]), _memory_cell(row)] for row in rows]
    return table(["", "", "L", "peak extra memory, forward and backward"], body)


def _memory_cell(row: Row) -> str:
    return str(row["error"]) if "error" in row else megabytes(row["extra_bytes"])


def kernels_table(rows: list[Row]) -> str:
    body = [
        [
            row["variant"]["name"], f"{row['seen_keys']:.0f} of {row['window_keys']:.0f}", str(row["threads"]),
            *(_kernel_cell(row[part]) for part in ("forward", "backward")),
        ]
        for row in rows
        if "skipped" not in row
    ]  # fmt: skip
    return table(["attention kernel", "keys used", "threads", "forward", "backward"], body)


def markdown(results: Row) -> str:
    """All tables of a run."""
    env = results["environment"]
    peaks = ", ".join(f"{gflops:.0f} with {n} threads" for n, gflops in results["fma_peak_gflops"].items())
    parts = [
        f"{env['cpu']}, {env['cores']} cores, {env['isa']} kernels, torch {env['torch']}, revision {env['revision']}, "
        f"{env['date'][:10]}; float32 multiply-add peak in GFLOP/s: {peaks or 'not measured'}.\n"
    ]
    if env["busy_cores"] > 0.2:
        parts.append(f"**Other processes kept {env['busy_cores']} cores busy: all times are suspect.**\n")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results["cases"]:
        groups.setdefault((row["target"], shape_name(row["case"])), []).append(row)
    for (target, shape), rows in groups.items():
        bracket = " (in brackets: without the projections)" if any(ALONE in row["seconds"] for row in rows) else ""
        parts.append(f"{TITLES[target]}, {shape}{bracket}:\n\n{times_table(rows)}")
    if results["memory"]:
        parts.append(memory_table(results["memory"]))
    if results["kernels"]:
        parts.append(
            "Per token, head and round; useful work counts the whole window of a query, of which causal attention uses "
            f"half, and is given as a share of the peak:\n\n{kernels_table(results['kernels'])}"
        )
    for key in ("hash_and_sort", "calls"):
        if results.get(key):
            parts.append("\n".join("*" + text for row in results[key] for text in LINES[key](row)) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what benchmarks.run --out wrote")
    print(markdown(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
