"""Buffers of a function that is computed twice: they change once, and the second time finds what they held before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Place = tuple[dict[str, Any], str]  # a table of a module, and a name in it


class Buffers:
    """Buffers around one call, for another one."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self.held: list[Tensor] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Around the first call."""
        before = [(table[name], table[name].detach().clone()) for table, name in self.places]
        yield
        # By their values: a batch norm does not say that it changes its statistics. Only what changed is kept twice.
        self.held = [
            t if table[name] is t and _equal(t, copy) else copy
            for (table, name), (t, copy) in zip(self.places, before, strict=True)
        ]
        self.copied = [t is copy for t, (_, copy) in zip(self.held, before, strict=True)]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Around another call: it finds what the first one found, and what it changes is nobody's."""
        values = [t.clone() if copied else t for t, copied in zip(self.held, self.copied, strict=True)]
        with replaced(self.places, values):
            yield

    def contexts(self) -> tuple[Any, Any]:
        """For ``torch.utils.checkpoint``: of forward, and of the recomputation, of which there may be several."""
        return self.noted(), _Repeatedly(self.restored)


class _Repeatedly(contextlib.AbstractContextManager[None]):
    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.context = context

    def __enter__(self) -> None:
        self.entered = self.context()
        self.entered.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.__exit__(*error)


def buffer_places(function: Any) -> list[Place]:
    """Of a module; a function has none that one could find."""
    modules = function.modules() if isinstance(function, nn.Module) else ()
    return [(m._buffers, name) for m in modules for name, b in m._buffers.items() if b is not None]


@contextlib.contextmanager
def replaced(places: list[Place], values: list[Tensor]) -> Iterator[None]:
    """Within, these values are at these places."""
    with contextlib.ExitStack() as stack:
        for (table, name), value in zip(places, values, strict=True):
            if table.get(name, value) is not value:  # FSDP1 takes parameters out of their table
                stack.callback(table.__setitem__, name, table[name])
                table[name] = value
        yield


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or isinstance(b, FakeTensor) or torch.equal(a, b)
