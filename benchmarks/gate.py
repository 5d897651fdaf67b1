"""The correctness gate: no number without agreement with the float64 oracle, in outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _dispatch, testing
from reformer_kernels._calls import AttentionCall

from .cases import Case
from .providers import PROVIDERS, SAME_FUNCTION, inputs

MAX_LENGTH = 65536  # the oracle needs some 5 GB there


def step(function: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The output and the gradients of one call."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]


def recorded(function: Callable[[], Any]) -> tuple[AttentionCall, str, Any]:
    """The first attention call of ``function()``, the name of the backend that served it, and the result."""
    calls: list[tuple[AttentionCall, str]] = []
    original = {name: b.chunk_attention for name, b in _dispatch.BACKENDS.items() if b is not None}

    def spy(name: str) -> Callable[[AttentionCall], Any]:
        def chunk_attention(call: AttentionCall) -> Any:
            detached: dict[str, Any] = {
                field: x.detach() for field, x in call._asdict().items() if isinstance(x, Tensor)
            }
            calls.append((call._replace(**detached), name))
            return original[name](call)

        return chunk_attention

    try:
        for name in original:
            setattr(_dispatch.BACKENDS[name], "chunk_attention", spy(name))  # noqa: B010  (it is a Protocol)
        result = function()
    finally:
        for name, chunk_attention in original.items():
            setattr(_dispatch.BACKENDS[name], "chunk_attention", chunk_attention)  # noqa: B010
    return (*calls[0], result)


def check_provider(name: str, case: Case) -> str:
    """Checks one of our providers on one head of a case, and says what was checked.

    Its call is compared with the oracle under the tests' tolerance, and the provider itself must then give the very
    bits of that call: the kernels are deterministic.

    Raises:
        AssertionError: it computes something else.
    """
    case = case.one_head().shorter(MAX_LENGTH)
    tensors, grad_out = inputs("attention", case)
    function = PROVIDERS[name].make("attention", case)
    assert function is not None
    call, backend, (out, grad_qk, grad_v) = recorded(lambda: step(function, tensors, grad_out))
    assert call.causal and call.chunk_length == case.chunk_length and call.query.shape[2] == case.length
    testing.assert_matches_oracle(call, call.query.dtype, backend)
    expected = testing.results(call, backend, backend, grad_out)
    for what, x in {"out": out, "grad_query": grad_qk, "grad_value": grad_v}.items():
        assert torch.equal(x, expected[what]), f"{name}: {what} is not what its backend {backend} computed"
    return f"{backend} agrees with the float64 oracle (one head, L {case.length})"


def check_call(call: AttentionCall, backend: str) -> str:
    """Checks a kernel on a call, in the call's own dtype.

    Raises:
        AssertionError: it differs from the oracle.
    """
    testing.assert_matches_oracle(call, call.query.dtype, backend)
    return f"{backend} agrees with the float64 oracle (L {call.query.shape[2]})"


def distance(case: Case) -> float:
    """The largest relative norm by which outputs and gradients of the two layers of the same function differ.

    Not a gate: a hash that rounds to another bucket moves the chunk borders of its neighbours.
    """
    results = []
    for name in SAME_FUNCTION:
        function = PROVIDERS[name].make("layer", case)
        assert function is not None
        results.append(step(function, *inputs("layer", case)))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
