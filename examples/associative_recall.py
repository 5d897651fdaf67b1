"""Associative recall: keys and values are listed once, and asked for much later, in another order.

    python examples/associative_recall.py                   # length 512, local and LSH layers in turn
    python examples/associative_recall.py --length 1024 --attention full

A quarter as many keys as the sequence is long stand before their values, ``k v k v ...``; then each key comes again,
and its value is to be said. The first layer has to join a value to the key before it, the second has to find it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from duplication import IGNORED, Batch, parse, run


def recall(count: int, options: argparse.Namespace, generator: torch.Generator) -> Batch:
    """Values are symbols below vocab_size, keys those above; values in the second half are asked for."""
    values = options.vocab_size
    pairs = options.length // 4
    value = torch.randint(values, (count, pairs), generator=generator)  # of each key
    halves = []
    for _ in range(2):
        key = torch.rand((count, pairs), generator=generator).argsort(dim=1)
        halves.append(torch.stack([values + key, value.gather(1, key)], dim=2).flatten(1))
    ids = torch.cat(halves, dim=1)
    labels = ids.masked_fill(ids >= values, IGNORED)
    labels[:, : options.length // 2] = IGNORED
    return Batch(ids, labels)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(
        arguments, __doc__, length=512, vocab_size=64, layers=2, attention=["local", "lsh"], position="rotary",
        steps=1000, heads=2, learning_rate=1e-3, batch=32, shift_keys=True,
    )  # fmt: skip
    run(recall, options, options.vocab_size + options.length // 4)


if __name__ == "__main__":
    main()
