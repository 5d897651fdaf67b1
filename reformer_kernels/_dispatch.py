"""Chooses the backend of a call, below torch's dispatcher, and can say why."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._calls import AttentionCall, Call, HashCall, ListCall, OrderCall, SelectCall
from .backends import cpu, cuda, reference, triton
from .backends.missing import warn_of_missing_library


class Backend(Protocol):
    """What the module of a backend offers. Residuals are the same for all, so any forward pairs with any backward."""

    def not_supported_reasons(self, call: Call) -> list[str]: ...
    def describe(self, call: Call) -> str:
        """What ``explain`` adds of a call that is served: how it is launched, or nothing."""

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


BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}
# Blocks of use_backend with their backends, innermost last; the first entry holds outside of blocks.
_Forced = tuple[tuple["use_backend | None", str | None], ...]
_NOT_FORCED: _Forced = ((None, None),)
_forced: ContextVar[_Forced | None] = ContextVar("forced", default=None)
_record: ContextVar[list[tuple[Call, str | None]] | None] = ContextVar("record", default=None)
_CARRIED = "reformer_kernels.use_backend"
_TRACED = (
    "use_backend has no effect inside a function that is compiled or exported: put it around the call, or give "
    "backend= to the function of reformer_kernels"
)


def check_backend(name: str | None, argument: str = "backend") -> None:
    """Raises ValueError if there is no such backend."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")


class use_backend:  # noqa: N801  (used like torch.set_grad_enabled)
    """Serves the ops of this thread (or asyncio task) by one backend: inside a ``with`` block, or from now on.

    Without ``with`` it holds until the block around it ends, or else the thread or task. Other threads do not see it,
    and those started later do not inherit it: each chooses for itself. A task and a forked process (a worker of a
    DataLoader) start with the choice of where they were created.

    What counts is where an op runs. A backward, with what it recomputes, is served by the choice of the caller of
    ``backward()``, also in autograd's threads, and a compiled function by that of its caller. So a block around both
    forward and backward holds for both, and one around the forward alone does not reach the backward. To bind the two,
    or to choose inside a compiled function, give ``backend=`` to the function; it goes first.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``, or None for the best one that supports each call.
            A named backend never falls back: a call that it does not support raises NotImplementedError with the
            reasons.

    Raises:
        ValueError: an unknown name.
        RuntimeError: inside a function that is being compiled or exported.
    """

    def __init__(self, name: str | None) -> None:
        check_backend(name, "name")
        _check_not_traced()
        self._name = name
        _, self._before = _state()
        self._after: _Forced = (*self._before[:-1], (self._before[-1][0], name))
        _force(self._after)

    def __enter__(self) -> use_backend:
        _check_not_traced()
        _, forced = _state()
        if forced is self._after:  # made for this block
            forced = self._before
        _force((*forced, (self, self._name)))
        return self

    def __exit__(self, *exc: object) -> None:
        # Generators may end their blocks in any order, and in another context than they began in.
        _, forced = _state()
        mine = [i for i, (block, _) in enumerate(forced) if block is self]
        if mine:
            _force(forced[: mine[-1]] + forced[mine[-1] + 1 :])


def _check_not_traced() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(_TRACED)


def _state() -> tuple[_Forced | None, _Forced]:
    """What was in force where ``backward()`` was called, in a thread of autograd's, and what is in force here."""
    if torch.compiler.is_dynamo_compiling():  # so that it leaves the frames that call this to Python
        raise RuntimeError(_TRACED)
    carried = None
    if torch._C._is_key_in_tls(_CARRIED):
        thread, forced = torch._C._get_obj_in_tls(_CARRIED)
        carried = None if thread == get_ident() else forced
    return carried, _forced.get() or carried or _NOT_FORCED


def _force(forced: _Forced) -> None:
    carried, _ = _state()
    _forced.set(None if forced == carried else forced)
    if carried is None:  # torch hands what is stashed here to the threads that work for this one
        torch._C._stash_obj_in_tls(_CARRIED, (get_ident(), forced))


def _asked_for(call: Call) -> str | None:
    return call.backend or _state()[1][-1][1]


def reasons_against(name: str, call: Call) -> list[str]:
    """Why a backend does not serve a call; empty if it does."""
    return BACKENDS[name].not_supported_reasons(call)


def select(call: Call) -> Backend:
    """The backend that serves a call.

    Raises:
        NotImplementedError: no backend does, or the named one does not; the message has every reason.
    """
    named = _asked_for(call)
    why = {}
    for name in (named,) if named else BACKENDS:
        reasons = reasons_against(name, call)
        if not reasons:
            if name == "reference" and not named:
                warn_of_missing_library(call)
            return BACKENDS[name]
        why[name] = "; ".join(reasons)
    report = "".join(f"\n  {name}: {reasons}" for name, reasons in why.items())
    raise NotImplementedError(
        f"{call.op} is not supported by {'the backend asked for' if named else 'any backend'}:{report}"
    )


def record(call: Call) -> None:
    """Notes a call for ``explain``."""
    calls = _record.get()
    if calls is not None:
        calls.append((call, _asked_for(call)))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Says which backend would serve each op of ``function(*args, **kwargs)``, and why the others would not.

    Nothing is computed: the function runs on fake tensors of the same shapes, dtypes and devices. If it calls no op of
    this library (attention that is exact, because it is short, is torch's), the one line says so, and names the
    ops of torch that attend.

    Example: ``print(rk.explain(rk.lsh_attention, q, v, causal=True))``
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    is_tensor = lambda x: isinstance(x, Tensor)  # noqa: E731
    args, kwargs = pytree.tree_map_only(
        is_tensor, lambda t: t if _is_host_index(t) else mode.from_tensor(t), (args, kwargs)
    )
    calls: list[tuple[Call, str | None]] = []
    token = _record.set(calls)
    try:
        with mode, torch.no_grad(), _TorchAttention() as torchs:
            function(*args, **kwargs)
    finally:
        _record.reset(token)
    if not calls:
        by = f" by {', '.join(torchs.names)}" if torchs.names else ""
        return f"no op of reformer_kernels is called: torch computes it{by}"
    return "\n".join(line for call, asked in calls for line in _verdicts(call, asked))


class _TorchAttention(TorchDispatchMode):
    """Notes the ops of torch that attend."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.names: dict[str, None] = {}  # an ordered set

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name()
        if any(part in name for part in ("scaled_dot_product", "softmax", "multi_head_attention", "encoder_layer")):
            self.names[name] = None
        return op(*args, **(kwargs or {}))


def _verdicts(call: Call, asked: str | None) -> list[str]:
    lines, served = [f"{call.op} on {call.device}:"], False
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
            if description := BACKENDS[name].describe(call):
                verdict += f": {description}"
        lines.append(f"  {name:<10} {verdict}")
    return lines


def _is_host_index(tensor: Tensor) -> bool:
    # Sequence boundaries and seeds are read while an op is set up, so they keep their values.
    return tensor.device.type == "cpu" and tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 1
