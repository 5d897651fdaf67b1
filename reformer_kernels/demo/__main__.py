"""The options of ``python -m reformer_kernels.demo``, and the order in which its parts run."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import __version__
from ..backends import native
from . import cost, figure, training
from .model import ByteLM
from .text import DemoError, read_text, split_text

_PROMPT_BYTES = 200


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reformer_kernels.demo: {message}\n")  # one line, without the usage that argparse adds


def _integer(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _lengths(text: str) -> list[int]:
    return sorted({_integer(1, part) for part in text.split(",")})


def _parser() -> argparse.ArgumentParser:
    count = partial(_integer, 1)
    parser = _Parser(
        prog="python -m reformer_kernels.demo",
        description="Measures LSH attention against torch SDPA, then trains a byte-level language model with each of "
        "them for the same time, and writes a figure, the numbers and a sample.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_out"), help="folder for attention.png, results.json and sample.txt")
    add("--text", metavar="FILE", help="text to learn (default: the help topics of CPython, pydoc_data.topics)")
    add("--seed", type=partial(_integer, 0), default=0, help="of the initial weights, the windows and the sample")
    part = parser.add_argument_group("one attention layer")
    part.add_argument(
        "--lengths", type=_lengths, default="1024,2048,4096,8192,16384", help="sequence lengths, with commas between"
    )
    part.add_argument("--repeats", type=count, default=5, help="timed calls of each, after a first one")
    part.add_argument(
        "--point-seconds", type=_positive, default=12.0, help="no further repeat once a point has taken this long"
    )
    part = parser.add_argument_group("language model")
    part.add_argument("--seconds", type=_positive, default=100.0, help="training time of each model")
    part.add_argument("--context", type=partial(_integer, 2), default=4096, help="bytes in a window")
    part.add_argument("--width", type=count, default=128, help="size of a token's vector")
    part.add_argument("--layers", type=count, default=2, help="blocks; local and LSH attention take turns")
    part.add_argument("--heads", type=count, default=2, help="attention heads")
    part.add_argument("--hashes", type=count, default=2, help="hash rounds of the LSH layers in training")
    part.add_argument("--eval-hashes", type=count, default=4, help="hash rounds in evaluation and generation")
    # Swept by steps, so that a busy machine could not favour one: held-out bits per byte after 312 steps with LSH
    # attention 2.06, 1.97, 1.92, 1.94 and after 181 steps with SDPA (not swept at 0.003), 2.30, 2.29, 2.54.
    part.add_argument(
        "--lr",
        type=_positive,
        default=0.012,
        help="peak learning rate with LSH attention, best of 0.003, 0.006, 0.012, 0.024",
    )
    part.add_argument(
        "--sdpa-lr", type=_positive, default=0.012, help="peak learning rate with SDPA, best of 0.006, 0.012, 0.024"
    )
    part = parser.add_argument_group("sample")
    part.add_argument("--generate", type=count, default=300, metavar="BYTES", help="bytes to generate")
    part.add_argument("--temperature", type=_positive, default=0.7, help="of the sampling; lower is more cautious")
    return parser


def _import_extras() -> Any:
    """tqdm; fails before minutes of work are done if it or matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
        from tqdm import tqdm
    except ImportError as error:
        raise DemoError(f"{error.name} is missing: pip install reformer_kernels[demo]") from None
    return tqdm


def _environment() -> dict[str, Any]:
    library = native.build_info()
    return {
        "reformer_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": library.get("isa_in_use"),
        "library": library,
    }


def _print_cost(rows: list[dict[str, Any]]) -> None:
    print(f"One attention layer, forward + backward ({cost.SETTINGS})")
    print(f"{'L':>8}  {'LSH':>10}  {'SDPA':>10}  {'SDPA/LSH':>9}    {'LSH':>10}  {'SDPA':>10}    calls timed")
    by_length: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_length.setdefault(row["length"], {})[row["name"]] = row
    for length, row in by_length.items():
        lsh, sdpa = row["lsh"], row["sdpa"]
        print(
            f"{length:8,}  {lsh['seconds']:8.3f} s  {sdpa['seconds']:8.3f} s  {sdpa['seconds'] / lsh['seconds']:8.2f}x"
            f"    {lsh['extra_bytes'] / 2**20:6.0f} MiB  {sdpa['extra_bytes'] / 2**20:6.0f} MiB"
            f"    {lsh['calls']} and {sdpa['calls']}"
        )


def _train(name: str, options: argparse.Namespace, data: tuple[Any, Any], tqdm: Any) -> tuple[ByteLM, dict[str, Any]]:
    torch.manual_seed(options.seed)
    model = ByteLM(
        name, options.context, options.width, options.layers, options.heads, options.hashes, options.eval_hashes
    )
    parameters = sum(x.numel() for x in model.parameters())
    bar_format = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=options.seconds, desc=f"training, {figure.MODELS[name]}", bar_format=bar_format) as bar:
        run = training.train(
            model, *data, seconds=options.seconds, context=options.context,
            learning_rate=options.lr if name == "lsh" else options.sdpa_lr, seed=options.seed, bar=bar,
        )  # fmt: skip
    before, after = run["curve"][0][1], run["curve"][-1][1]
    print(
        f"{figure.MODELS[name]:>22}: {before:.3f} -> {after:.3f} bits per byte of held-out text, "
        f"{run['steps']} steps in {run['seconds']:.1f} s, {parameters:,} parameters",
        flush=True,
    )
    return model, {"parameters": parameters, "before": before, "after": after, **run}


def _verdict(runs: dict[str, dict[str, Any]]) -> str:
    lsh, sdpa = runs["lsh"], runs["sdpa"]
    steps = f"it made {lsh['steps'] / sdpa['steps']:.1f} times as many steps"
    if lsh["after"] < sdpa["after"]:
        return f"LSH attention wins by {sdpa['after'] - lsh['after']:.3f} bits per byte at equal time: {steps}."
    return f"SDPA wins by {lsh['after'] - sdpa['after']:.3f} bits per byte at equal time with LSH, although {steps}."


def _run(options: argparse.Namespace) -> None:
    if options.width % options.heads:
        raise DemoError(f"--width must be divisible by --heads, got {options.width} and {options.heads}")
    tqdm = partial(_import_extras(), dynamic_ncols=True, mininterval=0.5)
    train_data, held_out = split_text(read_text(options.text), options.context)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the folder {str(options.out)!r}: {error.strerror}") from None
    environment = _environment()
    instructions = environment["isa"] or f"no native library ({environment['library'].get('error')})"
    note = f"torch {torch.__version__}, {environment['threads']} threads, {platform.machine()}, {instructions}"
    print(note, flush=True)
    note = f"Layer: {cost.SETTINGS}.  Model: {options.layers} layers, width {options.width}.  {note}"

    attention = cost.measure(
        options.lengths, options.repeats, options.point_seconds, partial(tqdm, desc="one attention layer", unit="L")
    )
    _print_cost(attention)
    print(
        f"\nA language model of {options.layers} layers, width {options.width}, context {options.context:,}, on "
        f"{len(train_data):,} bytes of text; held out: the last {len(held_out):,}",
        flush=True,
    )
    model, lsh = _train("lsh", options, (train_data, held_out), tqdm)
    runs = {"lsh": lsh, "sdpa": _train("sdpa", options, (train_data, held_out), tqdm)[1]}
    print(_verdict(runs), flush=True)

    prompt = held_out[: min(_PROMPT_BYTES, options.context)]
    sample = training.generate(
        model, prompt, options.generate, context=options.context, temperature=options.temperature, seed=options.seed,
        progress=partial(tqdm, desc="generating", unit="B"),
    )  # fmt: skip
    prompt_text = bytes(prompt.tolist()).decode(errors="replace")
    sample_text = sample.decode(errors="replace")
    print(f"\nHeld-out text, and behind the bar what the LSH model makes of it:\n{prompt_text}\u2588{sample_text}")

    figure.draw(options.out / "attention.png", attention, runs, options.context, note)
    (options.out / "sample.txt").write_bytes(sample)
    results = {
        "environment": environment,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "attention": attention,
        "training": runs,
        "sample": {"prompt": prompt_text, "text": sample_text},
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nWritten to {options.out}: attention.png, results.json, sample.txt")


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code: 0, or 2 after one line that says what to change."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except DemoError as error:
        print(f"reformer_kernels.demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
