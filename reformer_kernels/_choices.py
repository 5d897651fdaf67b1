"""Discrete choices (buckets, lists of keys) that a recomputation takes over instead of making them again.

A recomputation on reconstructed inputs may round a token into another bucket, and its gradients would then belong to
another function than the one whose output was seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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

        with _scope(choose, self):
            yield

    @contextmanager
    def replayed(self, tensors: list[Tensor], later: bool = False) -> Iterator[None]:
        """Calls inside get these tensors, in the order in which equal calls were made.

        ``later``: so do calls from then on in the same backward pass (of gradient checkpointing inside of the function,
        which computes its own once more), until ``forget_later``.

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
        if later and self.keys:
            self.forget_later()
            _active.later = _Later(self, torch._C._current_graph_task_id(), choose, _later())

    def forget_later(self) -> None:
        """These choices have no calls to come."""
        outer = _later()
        while outer is not None and outer.choices is self:
            outer = outer.outer
        _active.later = outer


class _Later(NamedTuple):
    choices: Choices
    graph_task: int  # the backward pass that they are for
    choose: Any
    outer: _Later | None


def kept(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op, which within a scope of ``Choices`` is recorded or replayed."""

    def choice(*args: Any) -> Tensor:
        choose = _current()
        if choose is None:
            return op(*args)
        chosen: Tensor = choose((name, *map(_description, args)), lambda: op(*args))
        return chosen

    return choice


def noted(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op as it is called, which calls what is ``kept``; if a dispatch mode answers instead, that is recorded.

    Selective checkpoints do so: what they saved, they do not compute again.
    """

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or (choices := getattr(_active, "recording", None)) is None:
            return op(*args)
        before = len(choices.tensors)
        out = op(*args)
        if len(choices.tensors) == before and type(out) is Tensor:  # fake tensors are nothing to keep
            _current()((name, *map(_description, args)), lambda: out)
        return out

    return call


def _description(argument: Any) -> Any:
    """What tells two calls of an op apart: of tensors the shape, of a seed its value."""
    if not isinstance(argument, Tensor):
        return tuple(argument) if isinstance(argument, list) else argument
    if argument.dtype != torch.int64:
        return tuple(argument.shape)
    return argument.numpy().item()  # not by an op, which a dispatch mode would take for one of the function


def _current() -> Any:
    choose = getattr(_active, "choose", None)
    if choose is None and (later := _later()) is not None:
        return later.choose
    return choose


def _later() -> _Later | None:
    later = getattr(_active, "later", None)
    return later if later is not None and later.graph_task == torch._C._current_graph_task_id() else None


@contextmanager
def _scope(choose: Any, recording: Choices | None = None) -> Iterator[None]:
    outer = getattr(_active, "choose", None), getattr(_active, "recording", None)
    _active.choose, _active.recording = choose, recording
    try:
        yield
    finally:
        _active.choose, _active.recording = outer
