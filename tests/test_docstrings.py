"""Everything public says what it does."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.demo import training
from reformer_kernels.models import outputs

INHERITED = {"extra_repr"}  # documented by nn.Module


def own(module: ModuleType) -> list[Any]:
    return [x for x in vars(module).values() if getattr(x, "__module__", None) == module.__name__]


def public() -> Iterator[tuple[str, Any]]:
    for thing in [*(getattr(rk, name) for name in rk.__all__), *own(outputs), *own(testing), *own(training)]:
        if thing.__name__.startswith("_"):
            continue
        yield thing.__name__, thing
        if not isinstance(thing, type):
            continue
        for base in thing.__mro__:
            if not base.__module__.startswith("reformer_kernels"):
                continue
            for name, member in vars(base).items():
                if name.startswith("_") or name in INHERITED:
                    continue
                if callable(member) or isinstance(member, (classmethod, property)):
                    yield f"{thing.__name__}.{name}", member


MEMBERS = dict(public())


def test_members_are_found() -> None:
    assert {"use_backend", "ReformerConfig.to_json", "LSHMultiheadAttention.reset_parameters", "capture"} <= set(
        MEMBERS
    )


@pytest.mark.parametrize("name", MEMBERS)
def test_docstring(name: str) -> None:
    text = MEMBERS[name].__doc__ or ""
    assert len(text) > 10
    assert not text.startswith(f"{name}("), "what dataclasses make is no docstring"
