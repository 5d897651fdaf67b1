"""The logical ops: one schema, fake, autograd, autocast and vmap rule each; backends are chosen below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.autograd import forward_ad

from . import _dispatch
from ._calls import AttentionCall, HashCall, OrderCall, empty_rows

NAMESPACE = "reformer_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

_ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor value, Tensor? order, Tensor? buckets, Tensor? key_padding_mask, "
    "Tensor? attn_mask, Tensor? cu_seqlens, Tensor? dropout_seed, SymInt chunk_length, SymInt chunks_before, "
    "SymInt chunks_after, bool causal, SymInt? num_queries, float scale, float dropout_p, str alignment, str rules, "
    "str backend"
)
_SCHEMAS = {
    "hash_buckets": "(Tensor x, Tensor? rotations, Tensor? key_padding_mask, Tensor? hash_seed, SymInt[]? n_buckets, "
    "SymInt n_hashes, SymInt chunk_length, str backend) -> Tensor",
    "bucket_order": "(Tensor buckets, Tensor? cu_seqlens, SymInt n_buckets, str backend) -> Tensor",
    "chunk_attention": f"({_ATTENTION_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor self_only)",
    "chunk_attention_backward": f"(Tensor grad_out, Tensor out, Tensor lse, Tensor self_only, {_ATTENTION_ARGUMENTS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
_packet = getattr(torch.ops, NAMESPACE)
_hash_op = _packet.hash_buckets.default
_order_op = _packet.bucket_order.default
_attention_op = _packet.chunk_attention.default
_backward_op = _packet.chunk_attention_backward.default


# ---- implementations

_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


def _as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function outside autocast: what to cast was decided above."""

    def implementation(*args: Any) -> Any:
        with _ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*args)

    return implementation


def _hash_impl(*args: Any) -> Tensor:
    call = HashCall(*args)
    return _dispatch.select(call).hash_buckets(call)


def _order_impl(*args: Any) -> Tensor:
    call = OrderCall(*args)
    return _dispatch.select(call).bucket_order(call)


def _attention_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*args)
    return _dispatch.select(call).chunk_attention(call)


def _backward_impl(grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = AttentionCall(*args)
    return _dispatch.select(call).chunk_attention_backward(call, grad_out, out, lse, self_only)


for _name, _impl in {
    "hash_buckets": _hash_impl,
    "bucket_order": _order_impl,
    "chunk_attention": _attention_impl,
    "chunk_attention_backward": _backward_impl,
}.items():
    _library.impl(_name, _as_given(_impl), "CompositeExplicitAutograd")


# ---- shapes and dtypes


def _register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


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


@_register_fake("chunk_attention")
def _attention_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*args)
    _dispatch.record(call)
    batch, heads = call.query.shape[:2]
    rows = (batch, heads, call.n_queries)
    lse_dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    return (
        empty_rows(call.query, call.n_queries, call.value.shape[3]),
        call.query.new_empty(rows, dtype=lse_dtype),
        call.query.new_empty(rows, dtype=torch.bool),
    )


@_register_fake("chunk_attention_backward")
def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = AttentionCall(*args)
    grad_query, grad_value = (empty_rows(x, x.shape[2], x.shape[3]) for x in (call.query, call.value))
    grad_key = call.query.new_empty((0,)) if call.key is None else empty_rows(call.key, *call.key.shape[2:])
    return grad_query, grad_key, grad_value


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*output, *tensors)
    ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Any, ...]:
    out, lse, self_only, *tensors = ctx.saved_tensors
    inputs = [option if tensor is None else tensor for tensor, option in zip(tensors, ctx.options, strict=True)]
    grad_query, grad_key, grad_value = _differentiable_backward(grad_out, out, lse, self_only, *inputs)
    key_gradient = None if inputs[1] is None else grad_key
    return (grad_query, key_gradient, grad_value, *[None] * (len(inputs) - 3))


def _nothing_to_save(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "the backward of chunk_attention cannot be differentiated again: second derivatives are not supported by "
        "lsh_attention and local_attention"
    )


class _AttentionBelow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: DispatchKeySet, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _below_autograd(keys, *args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None, *_backward(ctx, *grads))


def _below_autograd(keys: DispatchKeySet, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return _attention_op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _tracked(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _attention_autograd(keys: DispatchKeySet, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    # What register_autograd makes of _setup_context and _backward, less its look at the schema in every forward, which
    # costs more than the rest of the dispatch.
    return _AttentionBelow.apply(keys, *args) if _tracked(args) else _below_autograd(keys, *args)


_library.impl("chunk_attention", _attention_autograd, "Autograd", with_keyset=True)
torch.library.register_autograd(
    f"{NAMESPACE}::chunk_attention_backward", _no_double_backward, setup_context=_nothing_to_save, lib=_library
)


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


for _name, _op in (("hash_buckets", _hash_op), ("bucket_order", _order_op)):
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _loop_over_slices(_op), lib=_library)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward_op(*args)

    setup_context = staticmethod(_nothing_to_save)
    backward = staticmethod(_no_double_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _loop_over_slices(_differentiable_backward)(info, in_dims, *args)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _attention_op(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _loop_over_slices(chunk_attention)(info, in_dims, *args)


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _differentiable_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Backward.apply(*args) if _transformed() else _backward_op(*args)


# ---- autocast: query, key and value become the autocast dtype, and nothing else does


def _register_autocast(device_type: str, key: DispatchKey) -> None:
    def attention(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in args[:3]]
        with _ExcludeDispatchKeyGuard(DispatchKeySet(key)):
            return chunk_attention(*cast, *args[3:])

    _library.impl("chunk_attention", attention, key.name)


_register_autocast("cpu", DispatchKey.AutocastCPU)
_register_autocast("cuda", DispatchKey.AutocastCUDA)


# ---- what the layer above calls


def chunk_attention(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, L, E], lse [B, H, L] and self_only [B, H, L] of an ``AttentionCall``'s arguments."""
    if forward_ad._current_level >= 0 and any(map(_has_tangent, args[:3])):
        raise RuntimeError("forward-mode derivatives of lsh_attention and local_attention are not supported")
    if _transformed():
        return _Attention.apply(*args)
    if torch.compiler.is_compiling() or _tracked(args):
        return _attention_op(*args)
    with torch._C._AutoDispatchBelowAutograd():  # spares a call of _attention_autograd by the dispatcher
        return _attention_op(*args)


hash_buckets: Callable[..., Tensor] = _hash_op
bucket_order: Callable[..., Tensor] = _order_op
