"""The Reformer paper's synthetic task (arXiv 2001.04451, section 5): what LSH attention finds that is far away.

    python examples/duplication.py                  # length 128: about a minute on 2 cores
    python examples/duplication.py --length 512 --chunk-length 64 --steps 400

A sequence is ``0 w 0 w``, w being random symbols. The second half can only be said by looking them up in the first. One
layer is trained on the loss of the second half, and tested with more and fewer hashes than it was trained with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import reformer_kernels as rk

IGNORED = -100  # a label that does not count
TEST_SEQUENCES = 128
POSITIONS = ("learned", "axial", "sinusoidal", "rotary")


class Batch(NamedTuple):
    """Both int64 [count, length]; labels are IGNORED where nothing is asked for."""

    ids: Tensor
    labels: Tensor


Task = Callable[[int, argparse.Namespace, torch.Generator], Batch]


def duplication(count: int, options: argparse.Namespace, generator: torch.Generator) -> Batch:
    """``0 w 0 w``, of symbols 1 to vocab_size - 1; the second w is asked for."""
    half = torch.randint(1, options.vocab_size, (count, options.length // 2), generator=generator)
    half[:, 0] = 0
    ids = torch.cat([half, half], dim=1)
    labels = ids.clone()
    labels[:, : options.length // 2 + 1] = IGNORED
    return Batch(ids, labels)


def make_model(options: argparse.Namespace, vocab_size: int) -> rk.ReformerLM:
    torch.manual_seed(options.seed)
    return rk.ReformerLM(
        rk.ReformerConfig(
            vocab_size=vocab_size, embed_dim=options.width, num_layers=options.layers, num_heads=options.heads,
            attention=tuple(options.attention), feed_forward_dim=options.width, n_hashes=options.hashes,
            lsh_chunk_length=options.chunk_length, local_chunk_length=options.chunk_length, alignment=options.alignment,
            n_buckets=options.buckets, position=options.position, max_length=options.length, reversible=False,
            shift_keys=options.shift_keys,
        )
    )  # fmt: skip


def train(model: rk.ReformerLM, task: Task, options: argparse.Namespace) -> list[float]:
    """The losses of all steps."""
    optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98))
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / options.warm_up))
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    model.train()
    with tqdm(total=options.steps, desc="training", unit="step", mininterval=1.0) as bar:
        for _ in range(options.steps):
            ids, labels = task(options.batch, options, generator)
            loss = model(ids, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            warm_up.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return losses


@torch.no_grad()
def accuracy(model: rk.ReformerLM, task: Task, options: argparse.Namespace, hashes: int | None) -> float:
    """The share of what is asked for, in sequences that are in no training, that gets the largest logit."""
    ids, labels = task(TEST_SEQUENCES, options, torch.Generator().manual_seed(options.seed + 2**32))
    model.eval()
    right = asked = 0
    for part, expected in zip(ids.split(options.batch), labels.split(options.batch), strict=True):
        counts = expected[:, 1:] != IGNORED
        said = model(part, n_hashes=hashes).logits[:, :-1].argmax(-1)
        right += int((said == expected[:, 1:])[counts].sum())
        asked += int(counts.sum())
    return right / asked


def parse(arguments: Sequence[str] | None, text: str | None = __doc__, **defaults: Any) -> argparse.Namespace:
    """The options, where another task may have other defaults."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = {
        "length": (128, "of a sequence"), "vocab_size": (128, "symbols"), "steps": (300, "of training"),
        "batch": (16, "sequences a step"), "hashes": (4, "hash rounds in training"), "layers": (1, "of attention"),
        "width": (128, "of the model and its feed-forward layer"), "heads": (4, "of attention"),
        "chunk_length": (32, "of LSH and local layers"), "warm_up": (200, "steps until the learning rate is reached"),
    }  # fmt: skip
    for name, (default, what) in integers.items():
        value = defaults.get(name, default)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help=f"{what} (default {value})"
        )  # fmt: skip
    add = parser.add_argument
    add("--eval-hashes", type=int, nargs="+", default=[1, 2, 4, 8], help="in tests (default 1 2 4 8)")
    kinds = defaults.get("attention", ["lsh"])
    add("--attention", nargs="+", choices=("lsh", "local", "full"), default=kinds,
        help=f"layers, in turn (default {' '.join(kinds)})")  # fmt: skip
    add("--alignment", choices=("ring", "bucket"), default="ring", help="(default ring, as published)")
    shifts = defaults.get("shift_keys", False)
    add("--shift-keys", action=argparse.BooleanOptionalAction, default=shifts,
        help=f"of LSH layers: those of the token before (default {'yes' if shifts else 'no'})")  # fmt: skip
    add("--buckets", type=int, help="of a hash (default: twice as many as chunks)")
    position = defaults.get("position", "learned")
    add("--position", choices=POSITIONS, default=position, help=f"(default {position})")
    rate = defaults.get("learning_rate", 3e-3)
    add("--learning-rate", type=float, default=rate, help=f"(default {rate:g})")
    add("--seed", type=int, default=0, help="of parameters and sequences (default 0)")
    add("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)
    for name in integers:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.length % 4:
        parser.error(f"--length must be a multiple of 4, got {options.length}")
    if options.vocab_size < 2:
        parser.error(f"--vocab-size must be at least 2, got {options.vocab_size}")
    if min(options.eval_hashes) < 1:
        parser.error(f"--eval-hashes must be at least 1, got {min(options.eval_hashes)}")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out: the folder {str(options.out.parent)!r} does not exist")
    return options


def run(task: Task, options: argparse.Namespace, vocab_size: int) -> None:
    """Trains, tests, prints, and writes ``--out``; vocab_size: of the model."""
    model = make_model(options, vocab_size)
    begin = time.perf_counter()
    losses = train(model, task, options)
    seconds = time.perf_counter() - begin
    has_hashes = "lsh" in model.config.layers
    tests = {str(n): accuracy(model, task, options, n) for n in options.eval_hashes} if has_hashes else {}
    tests = tests or {"none": accuracy(model, task, options, None)}
    print(f"\nlength {options.length}, {'+'.join(options.attention)}, {options.steps} steps in {seconds:.0f} s")
    for name, value in (("hashes in tests", "accuracy"), *((n, f"{share:.2%}") for n, share in tests.items())):
        print(f"{name:>16}{value:>12}")
    if options.out:
        result: dict[str, Any] = {
            **vars(options), "out": None, "seconds": seconds, "accuracy": tests,
            "losses": [round(loss, 4) for loss in losses[:: max(1, len(losses) // 100)]],
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    run(duplication, options, options.vocab_size)


if __name__ == "__main__":
    main()
