"""Chooses the backend of a call, below torch's dispatcher, and can say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ._calls import AttentionCall, Call, HashCall, ListCall, OrderCall, SelectCall
from .backends import cuda, native, reference, triton


class Backend(Protocol):
    """What a backend offers; one that refuses an op need not have it.

    Residuals are the same for all, so any forward pairs with any backward.
    """

    def not_supported_reasons(self, call: Call) -> list[str]: ...
    def hash_buckets(self, call: HashCall) -> Tensor: ...
    def bucket_order(self, call: OrderCall) -> Tensor: ...
    def chunk_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]: ...
    def chunk_attention_backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def select_keys(self, call: SelectCall) -> Tensor: ...
    def list_attention(self, call: ListCall) -> tuple[Tensor, Tensor]: ...
    def list_attention_backward(
        self, call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


BACKENDS: dict[str, Backend] = {
    "cpu": cast(Backend, native),
    "cuda": cast(Backend, cuda),
    "triton": cast(Backend, triton),
    "reference": cast(Backend, reference),
}
_forced: str | None = None
_record: list[Call] | None = None


def check_backend(name: str | None, argument: str = "backend") -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")


class use_backend:  # noqa: N801  (used like torch.set_grad_enabled)
    """Serves every op of the process by one backend, from now on or inside a ``with`` block.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``, or None for the best one that supports each call.
            A named backend never falls back: a call that it does not support raises NotImplementedError with the
            reasons. The ``backend=`` argument of a function goes first.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        check_backend(name, "name")
        self._name, self._previous, self._entered = name, _forced, False
        _forced = name

    def __enter__(self) -> use_backend:
        global _forced
        if self._entered:  # used again
            self._previous = _forced
        self._entered, _forced = True, self._name
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._previous


def reasons_against(name: str, call: Call) -> list[str]:
    """Why a backend does not serve a call; empty if it does."""
    return BACKENDS[name].not_supported_reasons(call)


def select(call: Call) -> Backend:
    """The backend that serves a call.

    Raises:
        NotImplementedError: no backend does, or the named one does not; the message has every reason.
    """
    named = call.backend or _forced
    why = {}
    for name in (named,) if named else BACKENDS:
        reasons = reasons_against(name, call)
        if not reasons:
            return BACKENDS[name]
        why[name] = "; ".join(reasons)
    report = "".join(f"\n  {name}: {reasons}" for name, reasons in why.items())
    raise NotImplementedError(
        f"{call.op} is not supported by {'the backend asked for' if named else 'any backend'}:{report}"
    )


def record(call: Call) -> None:
    """Notes a call for ``explain``."""
    if _record is not None:
        _record.append(call)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Says which backend would serve each op of ``function(*args, **kwargs)``, and why the others would not.

    Nothing is computed: the function runs on fake tensors of the same shapes, dtypes and devices.

    Example: ``print(rk.explain(rk.lsh_attention, q, v, causal=True))``
    """
    global _record
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    is_tensor = lambda x: isinstance(x, Tensor)  # noqa: E731
    args, kwargs = pytree.tree_map_only(
        is_tensor, lambda t: t if _is_host_index(t) else mode.from_tensor(t), (args, kwargs)
    )
    previous, _record = _record, []
    try:
        with mode, torch.no_grad():
            function(*args, **kwargs)
        calls = _record
    finally:
        _record = previous
    lines = []
    for call in calls:
        lines.append(f"{call.op} on {call.device}:")
        asked = call.backend or _forced
        served = False
        for name in BACKENDS:
            reasons = reasons_against(name, call)
            if asked and name != asked:
                verdict = f"not asked for ({asked} is)"
            elif reasons:
                verdict = "no: " + "; ".join(reasons)
            elif served:
                verdict = "could, but comes later in the order of preference"
            else:
                verdict, served = "serves it", True
                if describe := getattr(BACKENDS[name], "describe", None):
                    verdict += f": {describe(call)}"
            lines.append(f"  {name:<10} {verdict}")
    return "\n".join(lines)


def _is_host_index(tensor: Tensor) -> bool:
    # Sequence boundaries and seeds are read while an op is set up, so they keep their values.
    return tensor.device.type == "cpu" and tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 1
