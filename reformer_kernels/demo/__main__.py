"""The options of ``python -m reformer_kernels.demo``, and the order in which its parts run."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import __version__
from ..backends import cpu
from ..models.lm import ReformerLM
from . import cost, figure, swap, training
from .model import make_configs
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
        description="Measures LSH attention against torch SDPA and a stock model before and after the one-line swap, "
        "then trains a ReformerLM over bytes with LSH attention and one with SDPA for the same time, and writes a "
        "figure, the numbers and a sample.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("demo_out"),
        help="folder for attention.png, results.json and sample.txt, made if missing",
    )
    add("--text", metavar="FILE", help="text to learn instead of the help topics of CPython, pydoc_data.topics")
    add("--seed", type=partial(_integer, 0), default=0, help="of the initial weights, the windows and the sample")
    part = parser.add_argument_group("one attention layer")
    part.add_argument(
        "--lengths", type=_lengths, default="1024,2048,4096,8192,16384", help="sequence lengths, with commas between"
    )
    part.add_argument("--repeats", type=count, default=5, help="timed calls of each, after a first one")
    part.add_argument(
        "--point-seconds", type=_positive, default=12.0, help="no further repeat once a point has taken this long"
    )
    part = parser.add_argument_group("one-line swap")
    part.add_argument("--swap-length", type=count, default=8192, help="sequence length of the model that is converted")
    part.add_argument("--swap-repeats", type=count, default=2, help="timed steps before and after")
    part = parser.add_argument_group("language model")
    part.add_argument("--seconds", type=_positive, default=100.0, help="training time of each model")
    part.add_argument("--context", type=partial(_integer, 2), default=4096, help="bytes in a window")
    part.add_argument("--width", type=count, default=128, help="size of a token's vector")
    part.add_argument("--layers", type=count, default=2, help="layers; local and LSH attention take turns")
    part.add_argument("--heads", type=count, default=2, help="attention heads")
    part.add_argument("--hashes", type=count, default=2, help="hash rounds of LSH layers in training and generation")
    part.add_argument("--eval-hashes", type=count, default=4, help="hash rounds in evaluation")
    # Swept at 0.0015, 0.003, 0.006, 0.012, with fixed numbers of steps so that a busy machine could not favour one.
    # Held-out bits per byte: 2.57, 2.50, 2.57, 2.82 after 450 steps with LSH attention; 3.37, 3.37, 3.28, 3.52 after
    # 170 steps with SDPA.
    swept = "best of 0.0015, 0.003, 0.006, 0.012"
    part.add_argument("--lr", type=_positive, default=0.003, help=f"peak learning rate with LSH attention, {swept}")
    part.add_argument("--sdpa-lr", type=_positive, default=0.006, help=f"peak learning rate with SDPA, {swept}")
    part = parser.add_argument_group("sample")
    part.add_argument("--generate", type=count, default=300, metavar="BYTES", help="bytes to generate")
    part.add_argument("--temperature", type=_positive, default=0.5, help="of the sampling; lower is more cautious")
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
    library = cpu.build_info()
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


def _print_swap(result: dict[str, Any]) -> None:
    stock, swapped = result["seconds"]["stock"], result["seconds"]["swapped"]
    print(f"\nThe one-line swap, rk.convert_attention(model): {swap.SETTINGS}")
    print(
        f"{result['length']:8,}  {stock:8.3f} s -> {swapped:.3f} s a training step, {stock / swapped:.1f}x\n"
        f"{result['short_length']:8,}  the same function: outputs differ by {result['short_difference']:.1e} at most"
    )


def _train(options: argparse.Namespace, data: tuple[Tensor, Tensor], tqdm: Any) -> dict[str, training.Run]:
    """Both models after their training, by name."""
    runs = {}
    learning_rates = {"lsh": options.lr, "sdpa": options.sdpa_lr}
    configs = make_configs(options.context, options.width, options.layers, options.heads, options.hashes)
    for name, config in configs.items():
        torch.manual_seed(options.seed)
        runs[name] = training.Run(
            ReformerLM(config), *data, seconds=options.seconds, context=options.context,
            learning_rate=learning_rates[name], eval_hashes=options.eval_hashes, seed=options.seed,
        )  # fmt: skip
    bar_format = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=2 * options.seconds, desc="training both in turn", bar_format=bar_format) as bar:
        training.train_together(runs, bar)
    return runs


def _describe(run: training.Run) -> dict[str, Any]:
    return {
        "parameters": sum(x.numel() for x in run.model.parameters()),
        "learning_rate": run.learning_rate,
        "steps": run.steps,
        "seconds": run.elapsed,
        "before": run.curve[0][1],
        "after": run.curve[-1][1],
        "curve": run.curve,
    }


def _print_training(results: dict[str, dict[str, Any]], bits: float, spread: float) -> None:
    print(f"{'':23}  {'parameters':>10}  {'steps':>6}  {'time':>8}    bits per byte of held-out text")
    for name, result in results.items():
        print(
            f"{figure.MODELS[name]:23}  {result['parameters']:10,}  {result['steps']:6,}  {result['seconds']:6.1f} s"
            f"    {result['before']:.3f} -> {result['after']:.3f}"
        )
    steps = f"{results['lsh']['steps'] / results['sdpa']['steps']:.1f} steps with LSH for each with SDPA"
    print(f"{_verdict(bits, spread)} at equal time; {steps}")


def _verdict(bits: float, spread: float) -> str:
    """What LSH attention less SDPA, in bits per byte, comes to."""
    of = "two standard deviations, of other text and other runs"
    if not abs(bits) > spread:
        return f"no difference: {abs(bits):.3f} bits per byte are within the spread of {spread:.3f} ({of})"
    return (
        f"{figure.MODELS['lsh' if bits < 0 else 'sdpa']} wins by {abs(bits):.3f} +- {spread:.3f} bits per byte ({of})"
    )


class _Results:
    """What is finished, in results.json, which is written anew with every part."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.finished = folder, dict[str, Any]()
        self.about: dict[str, Any] = {}

    def keep(self, part: str, result: Any) -> None:
        if not self.finished:  # of an earlier run, and of other numbers
            for name in ("attention.png", "sample.txt"):
                (self.folder / name).unlink(missing_ok=True)
        self.finished[part] = result
        text = json.dumps(self.about | self.finished, indent=2)
        (self.folder / "results.json").write_text(text + "\n")


def _run(options: argparse.Namespace, results: _Results) -> None:
    if options.width % (2 * options.heads):  # rotary positions rotate pairs
        raise DemoError(f"--width must be divisible by twice --heads, got {options.width} and {options.heads}")
    tqdm = partial(_import_extras(), dynamic_ncols=True, mininterval=0.5)
    train_data, held_out = split_text(read_text(options.text), options.context)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the folder {str(options.out)!r}: {error.strerror}") from None
    if not os.access(options.out, os.W_OK):
        raise DemoError(f"cannot write to the folder {str(options.out)!r}")
    environment = _environment()
    instructions = environment["isa"] or f"no native library ({environment['library'].get('error')})"
    note = f"torch {torch.__version__}, {environment['threads']} threads, {platform.machine()}, {instructions}"
    print(note, flush=True)
    note = f"Layer: {cost.SETTINGS}.  Model: {options.layers} layers, width {options.width}.  {note}"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    results.about = {"environment": environment, "options": shown}

    attention: list[dict[str, Any]] = []
    progress = partial(tqdm, desc="one attention layer", unit="L")
    try:
        for rows in cost.measure(options.lengths, options.repeats, options.point_seconds, progress):
            attention += rows
            results.keep("attention", attention)
    finally:
        if attention:
            _print_cost(attention)
    swapped = swap.measure(
        options.swap_length, options.swap_repeats, options.seed, partial(tqdm, desc="one-line swap", unit="pair")
    )
    results.keep("swap", swapped)
    _print_swap(swapped)
    print(
        f"\nA language model of {options.layers} layers, width {options.width}, context {options.context:,}, on "
        f"{len(train_data):,} bytes of text; held out: the last {len(held_out):,}",
        flush=True,
    )
    runs = _train(options, (train_data, held_out), tqdm)
    trained = {name: _describe(run) for name, run in runs.items()}
    bits, spread = training.difference(runs["lsh"].held_out_bits, runs["sdpa"].held_out_bits)
    results.keep("training", trained)
    results.keep("difference", {"bits": bits, "spread": spread})
    _print_training(trained, bits, spread)
    figure.draw(options.out / "attention.png", attention, trained, options.context, note)

    # Without the white space behind the last word, or the sample is likely to begin with a screenful of it.
    first = bytes(held_out[: min(_PROMPT_BYTES, options.context)].tolist())
    prompt = held_out[: len(first.rstrip()) or len(first)]
    sample = training.generate(
        runs["lsh"].model, prompt, options.generate, temperature=options.temperature, seed=options.seed,
        progress=partial(tqdm, desc="generating", unit="B"),
    )  # fmt: skip
    prompt_text = bytes(prompt.tolist()).decode(errors="replace")
    sample_text = sample.decode(errors="replace")
    (options.out / "sample.txt").write_bytes(sample)
    results.keep("sample", {"prompt": prompt_text, "text": sample_text})
    print(
        f"\nHeld-out text, and behind the bar what the LSH model makes of it, with its cache and the "
        f"{options.hashes} hashes of the training:\n{prompt_text}\u2588{sample_text}"
    )
    print(f"\nWritten to {options.out}: attention.png, results.json, sample.txt")


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code: 0, 2 after one line that says what to change, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may have characters that the terminal lacks
    results = _Results(options.out)
    try:
        _run(options, results)
    except DemoError as error:
        print(f"reformer_kernels.demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        finished = ", ".join(results.finished)
        kept = (
            f"{results.folder / 'results.json'} has what was finished: {finished}" if finished else "nothing finished"
        )
        print(f"\nreformer_kernels.demo: interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
