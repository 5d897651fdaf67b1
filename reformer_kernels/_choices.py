"""Discrete choices (buckets, lists of keys) that a recomputation takes over instead of making them again.

A recomputation on reconstructed inputs may round a token into another bucket, and its gradients would then belong to
another function than the one whose output was seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_active = threading.local()
Key = tuple[Any, ...]


class Choices:
    """What one function chose, by the calls that chose it."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.tensors: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Choices made inside are noted, including those that an outer scope replays."""
        outer = _current()

        def choose(key: Key, compute: Callable[[], Tensor]) -> Tensor:
            tensor = outer(key, compute) if outer else compute()
            self.keys.append(key)
            self.tensors.append(tensor)
            return tensor

        with _scope(choose):
            yield

    @contextmanager
    def replayed(self, tensors: list[Tensor]) -> Iterator[None]:
        """Calls inside get these tensors, in the order in which equal calls were made.

        Raises:
            RuntimeError: inside, a call was not recorded, or it is not clear which of several equal ones it repeats.
        """
        used: dict[Key, int] = {}

        def choose(key: Key, compute: Callable[[], Tensor]) -> Tensor:
            made = [tensor for k, tensor in zip(self.keys, tensors, strict=True) if k == key]
            used[key] = used.get(key, 0) + 1
            if len(made) == 1:  # also a second time: gradient checkpointing inside repeats its calls
                return made[0]
            if used[key] > len(made):
                raise RuntimeError(
                    f"the recomputation of a reversible block calls {key[0]} more often than its forward did: "
                    f"{used[key]} times, not {len(made)}; gradient checkpointing inside a block needs layers with "
                    "different hash seeds (hash_seed=None draws them)"
                )
            return made[used[key] - 1]

        with _scope(choose):
            yield


def kept(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op, which within a scope of ``Choices`` is recorded or replayed."""

    def choice(*args: Any) -> Tensor:
        choose = _current()
        if choose is None:
            return op(*args)
        return choose((name, *map(_description, args)), lambda: op(*args))

    return choice


def _description(argument: Any) -> Any:
    """What tells two calls of an op apart: of tensors the shape, of a seed its value."""
    if not isinstance(argument, Tensor):
        return tuple(argument) if isinstance(argument, list) else argument
    return argument.item() if argument.dtype == torch.int64 else tuple(argument.shape)


def _current() -> Any:
    return getattr(_active, "choose", None)


@contextmanager
def _scope(choose: Any) -> Iterator[None]:
    outer = _current()
    _active.choose = choose
    try:
        yield
    finally:
        _active.choose = outer
