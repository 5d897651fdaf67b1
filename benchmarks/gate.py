"""The correctness gate: no number without agreement with the float64 oracle, in outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import _dispatch, testing
from reformer_kernels._calls import AttentionCall

from .cases import Case
from .providers import PROVIDERS, SAME_FUNCTION, inputs

MAX_LENGTH = 65536  # the oracle needs some 5 GB there


def step(function: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The output and the gradients of one call."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]


def recorded(function: Callable[[], Any], op: str = "chunk_attention") -> tuple[Any, str, Any]:
    """The first call of the op by ``function()``, the name of the backend that served it, and the result."""
    calls: list[tuple[Any, str]] = []
    original = {name: getattr(b, op) for name, b in _dispatch.BACKENDS.items() if hasattr(b, op)}

    def spy(name: str) -> Callable[[Any], Any]:
        def attention(call: Any) -> Any:
            detached: dict[str, Any] = {
                field: x.detach() for field, x in call._asdict().items() if isinstance(x, Tensor)
            }
            calls.append((call._replace(**detached), name))
            return original[name](call)

        return attention

    try:
        for name in original:
            setattr(_dispatch.BACKENDS[name], op, spy(name))
        result = function()
    finally:
        for name, attention in original.items():
            setattr(_dispatch.BACKENDS[name], op, attention)
    return (*calls[0], result)


def check_module(name: str, case: Case) -> str:
    """Checks one of our modules on a case, and says what was checked.

    Where it is exact it must agree with the stock module as the stock module agrees with itself in float64. Beyond,
    its attention must agree with the oracle, and it must choose the keys that the oracle would.

    Raises:
        AssertionError: it computes something else.
    """
    from reformer_kernels.backends import reference_lists  # here, as a base revision may lack it

    case = case.shorter(2048)
    tensors, grad_out = inputs("module", case)
    functions = {n: PROVIDERS[n].make("module", case) for n in (name, "nn.MultiheadAttention")}
    ours, stock = functions[name], functions["nn.MultiheadAttention"]
    assert ours is not None and stock is not None
    if case.length <= rk.LSHMultiheadAttention(1, 1).options["budget"]:
        exact = step(stock, [t.detach().double().requires_grad_() for t in tensors], grad_out.double())
        for a, b, e in zip(step(ours, tensors, grad_out), step(stock, tensors, grad_out), exact, strict=True):
            error, peer = (float((x - e).abs().max()) for x in (a, b))
            rounding = torch.finfo(a.dtype).eps * float(e.abs().max())
            assert error <= 2 * peer + rounding, f"{name} is off by {error:.3g}, the stock module by {peer:.3g}"
        return f"as exact as nn.MultiheadAttention (L {case.length})"
    call, backend, _ = recorded(lambda: ours(*tensors), "list_attention")
    testing.assert_matches_oracle(call, call.query.dtype, backend)
    select, _, _ = recorded(lambda: ours(*tensors), "select_keys")
    same = float((reference_lists.select_keys(select) == call.key_indices).all(dim=-1).float().mean())
    assert same > 0.99, f"{same:.2%} of the lists of keys are the oracle's"  # near-ties may fall to either side
    return f"{backend} agrees with the float64 oracle (L {case.length})"


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
