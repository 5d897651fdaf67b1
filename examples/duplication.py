"""The Reformer paper's synthetic task (arXiv 2001.04451, section 5): what LSH attention finds that is far away.

    python examples/duplication.py                  # length 128: about a minute on 2 cores
    python examples/duplication.py --length 512 --steps 1400

A sequence is ``0 w 0 w``, w being random symbols. The second half can only be said by looking them up in the first. One
layer is trained on the loss of the second half, and tested with more and fewer hashes than it was trained with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import reformer_kernels as rk

IGNORED = -100  # a label that does not count
TEST_SEQUENCES = 128


def sequences(count: int, length: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """int64 [count, length]: ``0 w 0 w``, of symbols 1 to vocab_size - 1."""
    half = torch.randint(1, vocab_size, (count, length // 2), generator=generator)
    half[:, 0] = 0
    return torch.cat([half, half], dim=1)


def second_half(ids: Tensor) -> Tensor:
    """Labels: the symbols of the second w."""
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2 + 1] = IGNORED
    return labels


def make_model(options: argparse.Namespace) -> rk.ReformerLM:
    torch.manual_seed(options.seed)
    return rk.ReformerLM(
        rk.ReformerConfig(
            vocab_size=options.vocab_size, embed_dim=options.width, num_layers=options.layers, num_heads=options.heads,
            attention=tuple(options.attention), feed_forward_dim=options.width, n_hashes=options.hashes,
            lsh_chunk_length=options.chunk_length, local_chunk_length=options.chunk_length, alignment=options.alignment,
            n_buckets=options.buckets, position="learned", max_length=options.length, reversible=False,
        )
    )  # fmt: skip


def train(model: rk.ReformerLM, options: argparse.Namespace) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98))
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / options.warm_up))
    generator = torch.Generator().manual_seed(options.seed)
    model.train()
    with tqdm(total=options.steps, desc="training", unit="step", mininterval=1.0) as bar:
        for _ in range(options.steps):
            ids = sequences(options.batch, options.length, options.vocab_size, generator)
            loss = model(ids, labels=second_half(ids)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            warm_up.step()
            bar.set_postfix(loss=f"{loss.detach():.3f}", refresh=False)
            bar.update()


@torch.no_grad()
def accuracy(model: rk.ReformerLM, options: argparse.Namespace, hashes: int | None) -> float:
    """The share of symbols of second halves, of sequences that are in no training, that get the largest logit."""
    generator = torch.Generator().manual_seed(options.seed + 2**32)
    ids = sequences(TEST_SEQUENCES, options.length, options.vocab_size, generator)
    first = options.length // 2  # logits here are of the first symbol of the second w
    model.eval()
    right = [
        (model(batch, n_hashes=hashes).logits[:, first:-1].argmax(-1) == batch[:, first + 1 :]).float().mean(1)
        for batch in ids.split(options.batch)
    ]
    return float(torch.cat(right).mean())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = {
        "length": (128, "of a sequence, an even number"), "vocab_size": (128, "symbols"), "steps": (300, "of training"),
        "batch": (16, "sequences a step"), "hashes": (4, "hash rounds in training"), "layers": (1, "of attention"),
        "width": (128, "of the model and its feed-forward layer"), "heads": (4, "of attention"),
        "chunk_length": (32, "of LSH and local layers"), "warm_up": (200, "steps until the learning rate is reached"),
    }  # fmt: skip
    for name, (default, text) in integers.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--eval-hashes", type=int, nargs="+", default=[1, 2, 4, 8], help="in tests (default 1 2 4 8)")
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=("lsh", "local", "full"),
        default=["lsh"],
        help="layers, in turn (default lsh)",
    )
    parser.add_argument("--alignment", choices=("ring", "bucket"), default="ring", help="(default ring, as published)")
    parser.add_argument("--buckets", type=int, help="of a hash (default in a ring: twice as many as chunks)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(default 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and sequences (default 0)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)
    for name in integers:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.length < 4 or options.length % 2:
        parser.error(f"--length must be an even number of at least 4, got {options.length}")
    if options.vocab_size < 2:
        parser.error(f"--vocab-size must be at least 2, got {options.vocab_size}")
    if min(options.eval_hashes) < 1:
        parser.error(f"--eval-hashes must be at least 1, got {min(options.eval_hashes)}")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out: the folder {str(options.out.parent)!r} does not exist")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    model = make_model(options)
    begin = time.perf_counter()
    train(model, options)
    seconds = time.perf_counter() - begin
    has_hashes = "lsh" in model.config.layers
    tests = {str(n): accuracy(model, options, n) for n in options.eval_hashes} if has_hashes else {}
    tests = tests or {"none": accuracy(model, options, None)}
    print(f"\nlength {options.length}, {'+'.join(options.attention)}, {options.steps} steps in {seconds:.0f} s")
    for name, value in (("hashes in tests", "accuracy"), *((n, f"{share:.2%}") for n, share in tests.items())):
        print(f"{name:>16}{value:>12}")
    if options.out:
        result: dict[str, Any] = {**vars(options), "out": None, "seconds": seconds, "accuracy": tests}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
