"""Validation of public arguments: an error names the argument, its value and what is allowed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_readable(x: Tensor) -> bool:
    """Whether there are values to look at, and looking costs no synchronisation."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or torch._C._are_functorch_transforms_active():
        return False
    return x.device.type == "cpu" and x.numel() > 0


_ADVICE = {  # of tensors that mean something else than what their memory holds, by their class
    "torch.nn.attention.bias.CausalBias": "give causality as an argument; scaled_dot_product_attention takes these",
    "torch.masked.maskedtensor.core.MaskedTensor": "give its data, and its mask as a mask of attention",
    "torch.nn.parameter.UninitializedTensorMixin": "initialize it first",
}


def check_kind(name: str, x: Any) -> None:
    """x is a dense tensor, of a class that means what it holds or that answers itself when an op of ours is called."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pad it, and say by a mask what is padding")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}: make it one by to_dense()")
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return
    for kind in type(x).__mro__:
        path = f"{kind.__module__}.{kind.__qualname__}"
        if path == "torch.distributed.tensor.DTensor":
            from . import _sharding  # noqa: F401  (makes our ops take them)
        if path in _ADVICE:
            raise TypeError(f"{name} must be a tensor of values, got a {kind.__qualname__}: {_ADVICE[path]}")


def check_tensor(name: str, x: Any, dims: str, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """x is a tensor with one dimension for each name in ``dims`` and one of the dtypes."""
    check_kind(name, x)
    rank = len(dims.split())
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions [{', '.join(dims.split())}], got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")


def check_width(name: str, x: Tensor) -> None:
    """The rows of x are not empty."""
    if x.shape[-1] < 1:
        raise ValueError(f"{name} must have a last dimension of at least 1, got shape {list(x.shape)}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x has the device of the other tensor."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def check_shape(name: str, x: Tensor, expected: tuple[Any, ...]) -> None:
    """The shape of x; a tuple in ``expected`` lists the sizes allowed in that place."""
    for size, allowed in zip(x.shape, expected, strict=True):
        if size not in allowed if isinstance(allowed, tuple) else size != allowed:
            text = ", ".join(" or ".join(map(str, e)) if isinstance(e, tuple) else str(e) for e in expected)
            raise ValueError(f"{name} must have shape [{text}], got {list(x.shape)}")


def check_key_heads(query: Tensor, key: Tensor) -> None:
    """Grouped queries: every key head serves the same number of query heads."""
    heads, key_heads = query.shape[1], key.shape[1]
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"key must have a number of heads that divides the query's, {heads}, got {key_heads}")


def dtypes_with(query: Tensor) -> tuple[torch.dtype, ...]:
    """What key and value may be: autocast makes them equal, otherwise the caller has to."""
    device = query.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast to ask for
    return FLOATING if autocast else (query.dtype,)


def check_separate(query: Any, key: Any, value: Any, n_keys: int | None = None) -> None:
    """query [B, H, L, D], key [B, Hk, S, D] and value [B, Hk, S, E] go together; ``n_keys``: what S has to be."""
    check_tensor("query", query, "B H L D")
    check_tensor("key", key, "B Hk S D", dtypes_with(query))
    check_tensor("value", value, "B Hk S E", dtypes_with(query))
    for name, x in (("key", key), ("value", value)):
        check_like(name, x, "query", query)
    check_width("query", query)
    check_width("value", value)
    check_key_heads(query, key)
    batch, key_heads, size, _ = key.shape
    check_shape("key", key, (query.shape[0], key_heads, size if n_keys is None else n_keys, query.shape[3]))
    check_shape("value", value, (batch, key_heads, size, value.shape[3]))


def check_int(name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    """An integer (or symbolic integer) in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least or value > most:
        limit = f"at least {least}" if most == 2**31 - 1 and value < least else f"between {least} and {most}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def check_shift_keys(shift_keys: Any, causal: bool) -> None:
    check_bool("shift_keys", shift_keys)
    if shift_keys and not causal:
        raise ValueError("shift_keys must be False without causal (the next token would be seen), got True")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_dropout(dropout_p: Any, dropout_seed: Any, device: torch.device | None = None) -> None:
    """A probability, and a seed where it is needed: functions never touch the global random state."""
    check_fraction("dropout_p", dropout_p)
    if dropout_seed is None:
        if dropout_p > 0:
            raise ValueError(
                f"dropout_seed must be an int64 tensor of one element when dropout_p is {dropout_p}, got None"
            )
        return
    if not isinstance(dropout_seed, Tensor):
        raise TypeError(f"dropout_seed must be an int64 tensor of one element, got {dropout_seed!r}")
    check_kind("dropout_seed", dropout_seed)
    if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
        raise ValueError(
            f"dropout_seed must be an int64 tensor of one element, got {dropout_seed.dtype} {list(dropout_seed.shape)}"
        )
    if device is not None and dropout_seed.device != device:
        raise ValueError(f"dropout_seed must be on the device of the query, {device}, got {dropout_seed.device}")


def check_scale(scale: Any) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {scale!r}")
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be finite in float32, got {scale}")


def check_padding_mask(mask: Any, rows_name: str, rows: Tensor, name: str = "key_padding_mask") -> None:
    """bool [B, L] for rows [B, H, L, D]."""
    if mask is None:
        return
    check_tensor(name, mask, "B L", (torch.bool,))
    check_like(name, mask, rows_name, rows)
    check_shape(name, mask, (rows.shape[0], rows.shape[2]))


def check_attn_mask(mask: Any, query_name: str, query: Tensor, n_queries: int, n_keys: int | None = None) -> None:
    """A mask of n_queries and n_keys; None: as many keys as rows of query."""
    if mask is None:
        return
    batch, heads = query.shape[:2]
    length = query.shape[2] if n_keys is None else n_keys
    check_tensor("attn_mask", mask, "B|1 H|1 L S", (torch.bool, *FLOATING))
    check_like("attn_mask", mask, query_name, query)
    check_shape("attn_mask", mask, ((batch, 1), (heads, 1), n_queries, length))
    if mask.requires_grad:
        raise ValueError("attn_mask must not require a gradient (there is none for it), got requires_grad=True")


def check_cu_seqlens(cu_seqlens: Any, query: Tensor) -> None:
    """int32 boundaries on the CPU: they decide the launch, so they are read on the host."""
    if cu_seqlens is None:
        return
    check_tensor("cu_seqlens", cu_seqlens, "n+1", (torch.int32,))
    if cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens must be on the CPU (it is read on the host), got {cu_seqlens.device}")
    if torch.compiler.is_compiling():
        return  # values are not known while tracing; backends check them before they use them
    check_bounds(cu_seqlens, query.shape[2])


def check_bounds(cu_seqlens: Tensor, length: int) -> None:
    """Packed sequences are those of all tokens: kernels go where their bounds say."""
    bounds = cu_seqlens.tolist()
    ordered = all(a <= b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or not ordered:
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {bounds[:8]}")
