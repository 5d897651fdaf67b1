"""The logical ops: one schema, fake, autograd, autocast and vmap rule each; backends are chosen below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.autograd import forward_ad

from . import _choices, _dispatch
from ._calls import AttentionCall, HashCall, ListCall, OrderCall, SelectCall, empty_gradients, empty_results

NAMESPACE = "reformer_kernels"
library = torch.library.Library(NAMESPACE, "DEF")

_ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor value, Tensor? order, Tensor? buckets, Tensor? key_padding_mask, "
    "Tensor? attn_mask, Tensor? cu_seqlens, Tensor? dropout_seed, SymInt chunk_length, SymInt chunks_before, "
    "SymInt chunks_after, bool causal, SymInt? num_queries, float scale, float dropout_p, str alignment, str rules, "
    "str backend"
)
_LIST_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? order, Tensor key_indices, Tensor? key_padding_mask, "
    "Tensor? attn_mask, Tensor? dropout_seed, SymInt chunk_length, SymInt context_keys, bool causal, bool rest_term, "
    "float scale, float dropout_p, str backend"
)
_GRADIENTS = "(Tensor grad_query, Tensor grad_key, Tensor grad_value)"
SCHEMAS = {
    "hash_buckets": "(Tensor x, Tensor? rotations, Tensor? key_padding_mask, Tensor? hash_seed, SymInt[]? n_buckets, "
    "SymInt n_hashes, SymInt chunk_length, str backend) -> Tensor",
    "bucket_order": "(Tensor buckets, Tensor? cu_seqlens, SymInt n_buckets, str backend) -> Tensor",
    "select_keys": "(Tensor query, Tensor key, Tensor? order, Tensor? query_padding_mask, "
    "Tensor? key_padding_mask, Tensor? attn_mask, SymInt chunk_length, SymInt budget, SymInt local, "
    "SymInt context_keys, bool causal, float scale, str backend)"
    " -> Tensor",
    "chunk_attention": f"({_ATTENTION_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor self_only)",
    "chunk_attention_backward": f"(Tensor grad_out, Tensor out, Tensor lse, Tensor self_only, {_ATTENTION_ARGUMENTS})"
    f" -> {_GRADIENTS}",
    "list_attention": f"({_LIST_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    "list_attention_backward": f"(Tensor grad_out, Tensor out, Tensor lse, {_LIST_ARGUMENTS}) -> {_GRADIENTS}",
}
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
        with _ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*args)

    return implementation


def _implementation(name: str, kind: Callable[..., Any], n_residuals: int = 0) -> Callable[..., Any]:
    """Calls the backend that serves a call; gradients and residuals come before the call's own arguments."""

    def implementation(*args: Any) -> Any:
        call = kind(*args[n_residuals:])
        return getattr(_dispatch.select(call), name)(call, *args[:n_residuals])

    if name in ("hash_buckets", "select_keys"):
        return _as_given(_choices.kept(name, implementation))
    return _as_given(implementation)


for _name, _kind, _n_residuals in (
    ("hash_buckets", HashCall, 0),
    ("bucket_order", OrderCall, 0),
    ("select_keys", SelectCall, 0),
    ("chunk_attention", AttentionCall, 0),
    ("chunk_attention_backward", AttentionCall, 4),
    ("list_attention", ListCall, 0),
    ("list_attention_backward", ListCall, 3),
):
    library.impl(_name, _implementation(_name, _kind, _n_residuals), "CompositeExplicitAutograd")


# ---- shapes and dtypes


def _register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)


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


for _name, _op in (("hash_buckets", _hash_op), ("bucket_order", _order_op), ("select_keys", _select_op)):
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _loop_over_slices(_op), lib=library)


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
    """Registers autograd for the op, and returns what the layer above calls."""
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


# ---- what the layer above calls

hash_buckets: Callable[..., Tensor] = _choices.noted("hash_buckets", _hash_op)
bucket_order: Callable[..., Tensor] = _order_op
select_keys: Callable[..., Tensor] = _choices.noted("select_keys", _select_op)
chunk_attention = _differentiable("chunk_attention")
"""out [B, H, L, E], lse [B, H, L] and self_only [B, H, L] of an ``AttentionCall``'s arguments."""
list_attention = _differentiable("list_attention")
"""out [B, H, L, E] and lse [B, H, L] of a ``ListCall``'s arguments."""

for _name, _function in {
    "select_keys": _select_op, "chunk_attention": chunk_attention, "list_attention": list_attention,
}.items():  # fmt: skip
    _register_autocast(_name, _function, "cpu", DispatchKey.AutocastCPU)
    _register_autocast(_name, _function, "cuda", DispatchKey.AutocastCUDA)
