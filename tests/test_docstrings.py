"""Everything public says what it does."""

from collections.abc import Iterator
from typing import Any

import pytest

import reformer_kernels as rk
from reformer_kernels.models import outputs

INHERITED = {"extra_repr"}  # documented by nn.Module


def public() -> Iterator[tuple[str, Any]]:
    kinds = [getattr(rk, name) for name in rk.__all__]
    kinds += [
        kind for kind in vars(outputs).values() if isinstance(kind, type) and issubclass(kind, outputs.ModelOutput)
    ]
    for kind in kinds:
        yield kind.__name__, kind
        if not isinstance(kind, type):
            continue
        for base in kind.__mro__:
            if not base.__module__.startswith("reformer_kernels"):
                continue
            for name, member in vars(base).items():
                if (
                    not name.startswith("_")
                    and name not in INHERITED
                    and (callable(member) or isinstance(member, (classmethod, property)))
                ):
                    yield f"{kind.__name__}.{name}", member


MEMBERS = dict(public())


@pytest.mark.parametrize("name", MEMBERS)
def test_docstring(name: str) -> None:
    text = MEMBERS[name].__doc__ or ""
    assert len(text) > 10
    assert not text.startswith(f"{name}("), "what dataclasses make is no docstring"
