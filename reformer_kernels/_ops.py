"""The logical ops: one schema, fake, autograd, autocast and vmap rule each; backends are chosen below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.autograd import forward_ad

from . import _choices, _dispatch
from ._calls import AttentionCall, HashCall, ListCall, OrderCall, SelectCall, empty_gradients, empty_results

NAMESPACE = "reformer_kernels"
library = torch.library.Library(NAMESPACE, "DEF")

_TYPES: dict[Any, str] = {  # of a call's fields, in a schema
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[int] | None: "SymInt[]?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    bool: "bool",
    str: "str",
}


class _Op(NamedTuple):
    call: type[Any]  # the record whose fields are the op's arguments
    before: tuple[str, ...] = ()  # tensors in front of them
    results: tuple[str, ...] = ()  # tensors; none: a single one

    @property
    def schema(self) -> str:
        fields = get_type_hints(self.call).items()
        arguments = [*(f"Tensor {name}" for name in self.before), *(f"{_TYPES[kind]} {name}" for name, kind in fields)]
        results = ", ".join(f"Tensor {name}" for name in self.results)
        return f"({', '.join(arguments)}) -> {f'({results})' if results else 'Tensor'}"


_GRADIENTS = ("grad_query", "grad_key", "grad_value")
_CHUNK_RESULTS, _LIST_RESULTS = ("out", "lse", "self_only"), ("out", "lse")
_OPS = {
    "hash_buckets": _Op(HashCall),
    "bucket_order": _Op(OrderCall),
    "select_keys": _Op(SelectCall),
    "chunk_attention": _Op(AttentionCall, results=_CHUNK_RESULTS),
    "chunk_attention_backward": _Op(AttentionCall, ("grad_out", *_CHUNK_RESULTS), _GRADIENTS),
    "list_attention": _Op(ListCall, results=_LIST_RESULTS),
    "list_attention_backward": _Op(ListCall, ("grad_out", *_LIST_RESULTS), _GRADIENTS),
}
SCHEMAS = {name: op.schema for name, op in _OPS.items()}
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
_packet = getattr(torch.ops, NAMESPACE)
_hash_op = _packet.hash_buckets.default
_order_op = _packet.bucket_order.default
_select_op = _packet.select_keys.default


# ---- implementations

_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


def _as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function outside autocast: what to cast was decided above."""

    def implementation(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():  # sooner than an empty guard
            return function(*args)
        with _ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*args)

    return implementation


def _implementation(name: str, op: _Op) -> Callable[..., Any]:
    """Calls the backend that serves a call."""
    record, n_before = op.call, len(op.before)

    def implementation(*args: Any) -> Any:
        call = record(*args[n_before:])
        return getattr(_dispatch.select(call), name)(call, *args[:n_before])

    if name in ("hash_buckets", "select_keys"):
        return _as_given(_choices.kept(name, implementation))
    return _as_given(implementation)


for _name, _op in _OPS.items():
    library.impl(_name, _implementation(_name, _op), "CompositeExplicitAutograd")


# ---- shapes and dtypes


def _register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register: Callable[[Callable[..., Any]], Callable[..., Any]]
    register = torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)
    return register


@_register_fake("hash_buckets")
def _hash_fake(*args: Any) -> Tensor:
    call = HashCall(*args)
    _dispatch.record(call)
    batch, heads, length, _ = call.x.shape
    rounds = call.n_hashes if call.rotations is None else call.rotations.shape[3]
    return call.x.new_empty((batch, heads, rounds, length), dtype=torch.int32)


@_register_fake("bucket_order")
def _order_fake(*args: Any) -> Tensor:
    call = OrderCall(*args)
    _dispatch.record(call)
    return call.buckets.new_empty(call.buckets.shape, dtype=torch.int32)


@_register_fake("select_keys")
def _select_fake(*args: Any) -> Tensor:
    call = SelectCall(*args)
    _dispatch.record(call)
    return call.query.new_empty(call.lists_shape, dtype=torch.int32)


@_register_fake("chunk_attention")
def _attention_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*args)
    _dispatch.record(call)
    out, lse = empty_results(call)
    return out, lse, torch.empty_like(lse, dtype=torch.bool)


@_register_fake("chunk_attention_backward")
def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(AttentionCall(*args))


@_register_fake("list_attention")
def _list_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = ListCall(*args)
    _dispatch.record(call)
    return empty_results(call)


@_register_fake("list_attention_backward")
def _list_backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(ListCall(*args))


# ---- torch.func: its transforms need autograd.Functions; they run the same formulas


def _slice(x: Any, dim: Any, index: int) -> Any:
    return x.select(dim, index) if isinstance(x, Tensor) and dim is not None else x


def _loop_over_slices(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule that calls the op once a slice."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if info.batch_size == 0:
            raise ValueError("vmap over a dimension of size 0 is not supported")
        slices = []
        for i in range(info.batch_size):
            slices.append(op(*[_slice(a, d, i) for a, d in zip(args, in_dims, strict=True)]))
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        return tuple(map(torch.stack, zip(*slices, strict=True))), (0,) * len(slices[0])

    return rule


for _without_gradients in (_hash_op, _order_op, _select_op):
    torch.library.register_vmap(_without_gradients.name(), _loop_over_slices(_without_gradients), lib=library)


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


# ---- autograd of an attention op: query, key and value come first, and its outputs are all that its backward op needs


def _tracked(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _nothing_to_save(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "the backward of this attention cannot be differentiated again: second derivatives are not supported by "
        "lsh_attention, local_attention and clustered_attention"
    )


def _no_forward_mode(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "forward-mode derivatives of lsh_attention, local_attention and clustered_attention are not supported "
        "(torch.func.hessian needs them, and second derivatives)"
    )


def _differentiable(name: str) -> Callable[..., Any]:
    """Registers autograd for the op, and returns the op as it is called, with the fields of a call."""
    op, backward_op = getattr(_packet, name).default, getattr(_packet, f"{name}_backward").default

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*output, *tensors)
        ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.mark_non_differentiable(*output[1:])

    def gradients(ctx: Any, grad_out: Tensor, *others: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        residuals, tensors = saved[: 1 + len(others)], saved[1 + len(others) :]
        inputs = [option if tensor is None else tensor for tensor, option in zip(tensors, ctx.options, strict=True)]
        grad_query, grad_key, grad_value = differentiable_backward(grad_out, *residuals, *inputs)
        return (grad_query, None if inputs[1] is None else grad_key, grad_value, *[None] * (len(inputs) - 3))

    def below_autograd(keys: DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    class Below(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: DispatchKeySet, *args: Any) -> Any:
            output = below_autograd(keys, *args)
            save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return (None, *gradients(ctx, *grads))

    def autograd(keys: DispatchKeySet, *args: Any) -> Any:
        # What register_autograd makes of `save` and `gradients`, less its look at the schema in every forward, which
        # costs more than the rest of the dispatch.
        return Below.apply(keys, *args) if _tracked(args) else below_autograd(keys, *args)

    class TransformedBackward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return backward_op(*args)

        setup_context = staticmethod(_nothing_to_save)
        backward = staticmethod(_no_double_backward)
        jvp = staticmethod(_no_forward_mode)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _loop_over_slices(differentiable_backward)(info, in_dims, *args)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            if any(ctx.needs_input_grad[3:]):  # under vmap a mask does not say so before
                raise ValueError("attn_mask must not require a gradient (there is none for it), got one that does")
            save(ctx, inputs, output)

        backward = staticmethod(gradients)
        jvp = staticmethod(_no_forward_mode)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _loop_over_slices(call)(info, in_dims, *args)

    def differentiable_backward(*args: Any) -> Any:
        return TransformedBackward.apply(*args) if _transformed() else backward_op(*args)

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            _no_forward_mode(None)
        if _transformed():
            return Transformed.apply(*args)
        if torch.compiler.is_compiling() or _tracked(args):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # spares a call of `autograd` by the dispatcher
            return op(*args)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}_backward", _no_double_backward, setup_context=_nothing_to_save, lib=library
    )
    return call


# ---- autocast: query, key and value become the autocast dtype, and nothing else does


def _register_autocast(name: str, function: Callable[..., Any], device_type: str, key: DispatchKey) -> None:
    cast_first = 2 if name == "select_keys" else 3

    def autocast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in args[:cast_first]]
        with _ExcludeDispatchKeyGuard(DispatchKeySet(key)):
            return function(*cast, *args[cast_first:])

    library.impl(name, autocast, key.name)


# ---- what the layer above calls, by records whose fields have names

_hash = _choices.noted("hash_buckets", _hash_op)
_select = _choices.noted("select_keys", _select_op)
_order: Callable[..., Tensor] = _order_op
_chunk_attention: Callable[..., tuple[Tensor, Tensor, Tensor]] = _differentiable("chunk_attention")
_list_attention: Callable[..., tuple[Tensor, Tensor]] = _differentiable("list_attention")


def hash_buckets(call: HashCall) -> Tensor:
    """int32 [B, H, R, L]"""
    return _hash(*call)


def bucket_order(call: OrderCall) -> Tensor:
    """int32 [B, H, R, L]"""
    return _order(*call)


def select_keys(call: SelectCall) -> Tensor:
    """``ListCall.key_indices``"""
    return _select(*call)


def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, L, E], lse [B, H, L] and self_only [B, H, L]"""
    return _chunk_attention(*call)


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    """out [B, H, L, E] and lse [B, H, L]"""
    return _list_attention(*call)


for _name, _function in {
    "select_keys": _select_op, "chunk_attention": _chunk_attention, "list_attention": _list_attention,
}.items():  # fmt: skip
    _register_autocast(_name, _function, "cpu", DispatchKey.AutocastCPU)
    _register_autocast(_name, _function, "cuda", DispatchKey.AutocastCUDA)
