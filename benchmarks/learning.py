"""What models learn with each kind of attention: ``python -m benchmarks.learning PART ...``.

The trainings of ``examples``, equal but for the kinds of their layers. In ``language`` short ones choose the learning
rate of each kind, and long ones with two seeds are the result. All go to ``benchmarks/results/learning.json``,
one after the other: what is there is not done again, and a training that was stopped goes on. ``docs/learning.md``
shows them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import reformer_kernels as rk

from .examples import FOLDER, load_example
from .machine import environment
from .report import file_to_write, table

RESULTS = Path(__file__).parent / "results" / "learning.json"
# As published, the key of a token is its own.
KINDS = {
    "local": "local", "local and LSH": "local lsh", "LSH": "lsh", "full": "full",
    "local and LSH, own keys": "local lsh --no-shift-keys", "LSH, own keys": "lsh --no-shift-keys",
}  # fmt: skip
RATES = (2e-3, 4e-3, 1e-3)
SWEEP_STEPS = 300
STEPS = 1000
SEEDS = (1, 2)  # with seed 0 half of the text that is held out would be one file of prose
MODEL = "--batch 1 --context 4096 --layers 4 --width 128 --heads 2 --hashes 4 --store-activations --validate-every 250"
WINDOWS = 64  # held out, of the context's length, in the tests of trained models
POSITIONS = 16  # equal parts of the context, over which losses are averaged
REPEATED = 12  # bytes that stand earlier in the window already, and
FAR = 512  # so many bytes before: what a stack of four local layers of 64-byte chunks sees


class Language(NamedTuple):
    """A language model of ``examples/train_lm.py``."""

    kind: str
    rate: float
    seed: int
    steps: int = STEPS
    alignment: str = "bucket"

    @property
    def name(self) -> str:
        return f"language, {self.kind}, {self.alignment}, {self.steps} steps, rate {self.rate:g}, seed {self.seed}"

    def arguments(self, out: Path) -> list[str]:
        if (out / "checkpoint.pt").exists():
            return ["train_lm.py", "--resume", str(out)]
        chosen = {
            "--steps": self.steps, "--learning-rate": self.rate, "--seed": self.seed, "--alignment": self.alignment,
            "--validation-batches": 16, "--out": out, "--sample": 100,
        }  # fmt: skip
        own = [str(x) for pair in chosen.items() for x in pair]
        return ["train_lm.py", *MODEL.split(), *own, "--attention", *KINDS[self.kind].split()]

    def result(self, out: Path) -> dict[str, Any]:
        return tested(out, briefly=self.steps == SWEEP_STEPS)


class Synthetic(NamedTuple):
    """One of the tasks of ``examples/duplication.py`` and ``examples/associative_recall.py``."""

    task: str
    length: int
    kind: str
    options: str = ""

    @property
    def name(self) -> str:
        return f"{self.task}, {self.length}, {self.kind} {self.options}".strip()

    def arguments(self, out: Path) -> list[str]:
        out.parent.mkdir(parents=True, exist_ok=True)
        chosen = [f"{self.task}.py", "--length", str(self.length), *self.options.split(), "--out", str(out)]
        return [*chosen, "--attention", *KINDS[self.kind].split()]

    def result(self, out: Path) -> dict[str, Any]:
        return dict(json.loads(out.read_text()))


# With 4 hashes and chunks of an eighth of the sequence, windows of all rounds together are as long as the sequence: why
# that counts is in docs/learning.md, which has the other ones to show it.
DUPLICATION = [
    Synthetic("duplication", 128, "LSH, own keys", "--hashes 4 --chunk-length 16 --steps 300"),
    Synthetic("duplication", 256, "LSH, own keys", "--hashes 4 --chunk-length 32 --steps 300"),
    Synthetic("duplication", 512, "LSH, own keys", "--hashes 4 --chunk-length 64 --steps 400"),
    Synthetic("duplication", 512, "full", "--steps 400"),
    Synthetic("duplication", 512, "LSH, own keys", "--hashes 4 --chunk-length 32 --steps 400"),
    Synthetic("duplication", 512, "LSH, own keys", "--hashes 2 --chunk-length 64 --steps 1000"),
    Synthetic("duplication", 512, "LSH, own keys", "--hashes 1 --chunk-length 64 --steps 2000"),
    Synthetic("duplication", 1024, "LSH, own keys", "--hashes 4 --chunk-length 128 --steps 1000"),
]
# As many tokens a step at any length.
RECALL = [
    Synthetic("associative_recall", length, kind, f"--batch {2**14 // length} --steps 1000")
    for length in (512, 1024, 2048, 4096)
    for kind in KINDS
]


def best_rate(done: dict[str, Any], kind: str) -> float:
    return min(RATES, key=lambda rate: float(done[Language(kind, rate, SEEDS[0], SWEEP_STEPS).name]["loss"]))


def language(done: dict[str, Any]) -> Iterator[list[Language]]:
    """The runs, in groups; later ones depend on what earlier ones have given."""
    yield [Language(kind, rate, SEEDS[0], SWEEP_STEPS) for rate in RATES for kind in KINDS]
    for seed in SEEDS:
        yield [Language(kind, best_rate(done, kind), seed) for kind in KINDS]
    # Full attention in the time that local and LSH layers take.
    times = done["seconds a step"]
    steps = round(STEPS * times["local and LSH"] / times["full"])
    yield [Language("full", best_rate(done, "full"), seed, steps) for seed in SEEDS]
    rate = best_rate(done, "local and LSH")
    yield [Language("local and LSH", rate, seed, alignment="ring") for seed in SEEDS]


@torch.no_grad()
def losses(model: rk.ReformerLM, windows: Tensor, **options: Any) -> Tensor:
    """Nats that each byte of windows [n, L] but the first takes: float64 [n, L - 1]."""
    model.eval()
    rows = [F.cross_entropy(model(x[None], **options).logits[0, :-1], x[1:], reduction="none") for x in windows]
    return torch.stack(rows).double()


def far_repeats(windows: Tensor) -> Tensor:
    """Bytes of windows [n, L] after ``REPEATED`` ones that stood there before, last ``FAR`` or more bytes ago.

    Returns bool [n, L - 1], of the bytes but the first.
    """
    found = torch.zeros(windows.shape[0], windows.shape[1] - 1, dtype=torch.bool)
    for row, window in enumerate(windows.to(torch.uint8)):
        text, last = window.numpy().tobytes(), dict[bytes, int]()
        for i in range(REPEATED, len(text)):
            before = text[i - REPEATED : i]
            found[row, i - 1] = i - last.get(before, i) >= FAR
            last[before] = i
    return found


def without_lsh(model: rk.ReformerLM) -> list[Any]:
    """The hooks by which LSH layers add nothing."""
    layers = [module for module in model.modules() if isinstance(module, rk.LSHSelfAttention)]
    return [layer.register_forward_hook(lambda module, given, out: torch.zeros_like(out)) for layer in layers]


def tested(out: Path, briefly: bool = False) -> dict[str, Any]:
    """What a trained language model says of the held-out windows; briefly: their loss alone."""
    train_lm = load_example("train_lm")
    options, _ = train_lm.parse(["--resume", str(out)])
    options.validation_batches = WINDOWS
    windows = train_lm.validation_windows(train_lm.Text(options), options)
    model = rk.ReformerLM.from_pretrained(out / "model")
    whole = losses(model, windows)
    if briefly:
        return {"loss": float(whole.mean())}
    repeats = far_repeats(windows)

    def means(found: Tensor) -> dict[str, float]:
        return {"loss": float(found.mean()), "of far repeats": float(found[repeats].mean())}

    result = {
        **means(whole),
        "far repeats": int(repeats.sum()),
        "by position": [float(part.mean()) for part in whole.tensor_split(POSITIONS, dim=1)],
        "curve": [
            (int(row["step"]), row["validation_loss"])
            for row in train_lm.read_log(out / "log.csv")
            if row["validation_loss"] is not None
        ],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if "lsh" in model.config.layers:
        result["by hashes"] = {n: means(losses(model, windows, n_hashes=n)) for n in (1, 2, 4, 8)}
        hooks = without_lsh(model)
        result["without LSH"] = means(losses(model, windows))
        for hook in hooks:
            hook.remove()
    return result


def step_seconds(rounds: int = 7) -> dict[str, float]:
    """Median seconds of a training step of each kind, in turn."""
    train_lm, models = load_example("train_lm"), {}
    for name, kinds in KINDS.items():
        options = train_lm.make_parser().parse_args([*MODEL.split(), "--attention", *kinds.split()])
        models[name] = rk.ReformerLM(train_lm.make_config(options, 256))
    ids = torch.randint(256, (options.batch, options.context))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model(ids, labels=ids).loss.backward()
            model.zero_grad()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def read() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def write(name: str, value: Any) -> None:
    RESULTS.write_text(json.dumps({**read(), name: value}, indent=1) + "\n")


def train(run: Language | Synthetic, out: Path) -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script, *arguments = run.arguments(out)
    command = [sys.executable, str(FOLDER / script), *arguments]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{run.name}: {ran.stderr}")


Losses = list[float] | tuple[float, ...]


def draw_duplication(by_length: Any, by_window: Any, done: dict[str, Any]) -> None:
    """The losses of the trainings, step by step: by length, and by what the windows see."""
    for run in DUPLICATION:
        result = done.get(run.name)
        if result is None:
            continue
        window = 2 * result["chunk_length"] / run.length
        curve = [i * max(1, result["steps"] // 100) for i in range(len(result["losses"]))], result["losses"]
        if run.kind != "full" and result["hashes"] * window == 1:
            by_length.plot(*curve, label=f"{run.length:,}")
        if run.length == 512 and run.kind != "full":
            by_window.plot(*curve, label=f"hashes: {result['hashes']}, windows: {window:.3g} of the sequence")
        elif run.length == 512:
            by_window.plot(*curve, label="full attention", color="black")
    by_length.set_title("Length; 4 hashes, windows of a quarter of it", fontsize=10)
    by_window.set_title("Length 512", fontsize=10)
    by_length.set_ylabel("loss, nats per symbol")
    for axes in (by_length, by_window):
        axes.set(xlabel="step", xlim=(0, None))


def trained(done: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The results of long trainings of a kind, in the order of the seeds."""
    names = [Language(kind, rate, seed).name for seed in SEEDS for rate in RATES]
    return [done[name] for name in names if name in done]


def draw_language(by_step: Any, by_position: Any, done: dict[str, Any]) -> None:
    """The loss of held-out text, by step and by position in the context: the mean of the seeds, and their range."""

    def line(axes: Any, x: Losses, seeds: list[Losses], label: str) -> None:
        of_points = list(zip(*seeds, strict=True))
        (drawn,) = axes.plot(x, [statistics.mean(point) for point in of_points], label=label)
        low, high = ([f(point) for point in of_points] for f in (min, max))
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)

    for kind in KINDS:
        results = trained(done, kind)
        if not results:
            continue
        steps = [step for step, _ in results[0]["curve"]]
        line(by_step, steps, [[loss for _, loss in result["curve"]] for result in results], kind)
        positions = [(i + 0.5) * 4096 / POSITIONS for i in range(POSITIONS)]
        line(by_position, positions, [result["by position"] for result in results], kind)
    by_step.set(xlabel="step", ylabel="loss of held-out text, nats per byte")
    by_position.set(xlabel="position in the context, bytes")


def draw(file: Path, part: str, done: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    PLOTS[part](left, right, done)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def language_table(done: dict[str, Any]) -> str:
    """What long trainings gave, in nats per byte, for each seed."""
    rows = []
    for kind in KINDS:
        results = trained(done, kind)

        def each(*path: str, results: list[dict[str, Any]] = results) -> str:
            found = [functools.reduce(lambda part, name: part.get(name, {}), path, result) for result in results]
            return ", ".join(f"{x:.3f}" for x in found if x != {})

        by_hashes = [each("by hashes", n, "loss") for n in ("1", "2", "4", "8")]
        rows.append([kind, each("loss"), each("of far repeats"), each("without LSH", "loss"), *by_hashes])
    return table(["layers", "loss", "far repeats", "without LSH", "1 hash", "2", "4", "8"], rows)


PLOTS: dict[str, Callable[[Any, Any, dict[str, Any]], None]] = {
    "duplication": draw_duplication,
    "language": draw_language,
}
PARTS: dict[str, Callable[[dict[str, Any]], Iterable[Sequence[Language | Synthetic]]]] = {
    "duplication": lambda done: [DUPLICATION],
    "recall": lambda done: [RECALL],
    "language": language,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PARTS]
    known = f"of {', '.join(names)}; and time: of a step, on a quiet machine, which language needs"
    parser.add_argument("parts", nargs="+", choices=(*names, "time"), metavar="PART", help=known)
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"), help="of the trainings' files")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores (default 2)")
    parser.add_argument("--plot", type=file_to_write, help="PNG file for a plot of what there is of a part")
    parser.add_argument("--table", action="store_true", help="print what the long trainings of language have given")
    options = parser.parse_args()
    drawn = [part for part in options.parts if part in PLOTS]
    if options.plot and len(drawn) != 1:
        parser.error(f"--plot: name one of {', '.join(PLOTS)}, got {' '.join(options.parts)}")
    if (
        "language" in options.parts
        and "time" not in options.parts
        and not {*KINDS} <= {*read().get("seconds a step", {})}
    ):
        parser.error("PART: language needs what time measures, once: python -m benchmarks.learning time language")
    if "time" in options.parts:
        write("machine", environment())
        write("seconds a step", step_seconds())
    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    done = read()
    for group in (group for part in options.parts if part != "time" for group in PARTS[part](done)):
        with ThreadPoolExecutor(options.jobs) as pool:
            outs = {run: options.folder / run.name.replace(" ", "_") for run in group if run.name not in done}
            started = {pool.submit(train, run, out): run for run, out in outs.items()}
            try:
                for future in as_completed(started):
                    future.result()
                    run = started[future]
                    write(run.name, run.result(outs[run]))
                    done |= read()
                    print(run.name, flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    if options.table:
        print(language_table(done))
    if options.plot:
        draw(options.plot, drawn[0], done)


if __name__ == "__main__":
    main()
