"""The CUDA kernels: loads the library, checks what it serves, allocates what it writes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._calls import AttentionCall, Call, HashCall, ListCall, OrderCall, SelectCall, empty_results, n_sequences
from . import _native, _sentinels
from ._common import (
    chunk_reasons,
    clustered_reasons,
    device_bounds,
    new_gradients,
    per_key,
    rest_sums,
    row_reasons,
    wrong_device,
)

# As in csrc/kernels/cuda/plan.h.
MAX_HEAD_DIM, MAX_FACTORS, MAX_CHUNKS = 128, 8, 1023
LIST_TILE = 64  # entries of lists
_ops = _native.CUDA_OPS


@functools.cache
def library() -> dict[str, Any]:
    """Versions and architectures of the library, and under "error" the reason why it cannot be used."""
    libraries = sorted(Path(__file__).resolve().parent.parent.glob("_cuda*.so"))
    if not libraries:
        return {"error": _native.reason_against_cuda() or "not built"}
    # It needs libraries that such a torch does not bring; what the loader says of that does not say why.
    if not torch.version.cuda:
        return {"error": f"torch {torch.__version__} is not a CUDA build"}
    if reason := _native.load(libraries[0]):
        return {"error": reason}
    built = _ops.facts()
    reason = misfit(built["cuda"], torch.version.cuda)
    return {"error": reason, **built} if reason else built


def misfit(built: str, runtime: str) -> str | None:
    """Why a library built for one version of CUDA does not run with the other; None if it does.

    Within a major version the runtime may be newer, not older (CUDA's minor version compatibility).
    """
    (major, minor), (has, has_minor) = (tuple(map(int, version.split(".")[:2])) for version in (built, runtime))
    if major == has and minor <= has_minor:
        return None
    return f"built for CUDA {built}, but this torch has {runtime}"


def not_supported_reasons(call: Call) -> list[str]:
    if reasons := wrong_device(call, "cuda"):
        return reasons
    reasons = kernel_reasons(call)
    if error := library().get("error"):
        return [f"the CUDA library: {error}", *reasons]
    if torch.cuda.is_available():
        reasons += memory_reasons(call, device_numbers(call))
    return reasons


def kernel_reasons(call: Call) -> list[str]:
    """Why the kernels do not serve a call, wherever its tensors are."""
    if isinstance(call, HashCall):
        reasons = row_reasons(MAX_HEAD_DIM, call.x)
        if len(call.factors) > MAX_FACTORS:
            reasons.append(f"n_buckets has {len(call.factors)} factors; the kernels take up to {MAX_FACTORS}")
        return reasons
    if isinstance(call, OrderCall):
        return []
    if isinstance(call, AttentionCall):
        return chunk_reasons(MAX_HEAD_DIM, MAX_CHUNKS, call)
    return clustered_reasons(MAX_HEAD_DIM, call, LIST_TILE)


Device = tuple[int, int, int]  # multiprocessors, bytes of shared memory of a block and of a multiprocessor
PARTS = ("forward", "gradients of queries", "gradients of keys")
LAUNCH = ("blocks", "threads", "shared bytes")  # what plans begin with


def device_numbers(call: Call) -> Device:
    found: Any = torch.cuda.get_device_properties(call.device)
    return found.multi_processor_count, found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor


def memory_reasons(call: Call, device: Device) -> list[str]:
    """Whether a kernel needs more shared memory than a device has."""
    if not isinstance(call, AttentionCall | ListCall):
        return []
    most = max(_attention_plan(call, part, device)[2] for part in range(len(PARTS)))
    if most <= device[1]:
        return []
    return [f"the kernels need {most} bytes of shared memory for these rows, and the GPU has {device[1]}"]


def _attention_plan(call: AttentionCall | ListCall, part: int, device: Device) -> list[int]:
    flags = _native.chunk_flags(call) if isinstance(call, AttentionCall) else _native.list_flags(call)
    window = (call.chunk_length, 0, 0)
    lists, sequences, longest = 0, 1, call.query.shape[2]
    if isinstance(call, AttentionCall):
        window = (call.chunk_length, call.chunks_before, call.chunks_after)
        sequences, longest = n_sequences(call.cu_seqlens), call.longest
    else:
        lists = call.key_indices.shape[3]
    plan: list[int] = _ops.attention_plan(
        {
            "shape": call.query.shape,
            "width": call.value.shape[3],
            "key_heads": 0 if call.key is None else call.key.shape[1],
            "rounds": 1 if call.order is None else call.order.shape[2],
            "element_size": call.query.element_size(),
            "window": window,
            "list_length": lists,
            "flags": flags,
            "n_sequences": sequences,
            "longest": longest,
            "part": part,
            "device": device,
        }
    )
    return plan


def describe(call: Call, device: Device | None = None) -> str:
    """The launches of a call that is served.

    Args:
        device: None: the call's GPU.
    """
    device = device or device_numbers(call)
    if isinstance(call, HashCall):
        rounds = call.n_hashes if call.rotations is None else call.rotations.shape[3]
        plan = _ops.hash_plan(
            {
                "shape": call.x.shape,
                "rounds": rounds,
                "element_size": call.x.element_size(),
                "factors": call.factors,
                "device": device,
            }
        )
        return _named(
            plan, *LAUNCH, "head steps", "column tiles of a round", "rounds of a block",
            "column tiles in shared memory", "tokens of a block",
        )  # fmt: skip
    if isinstance(call, OrderCall):
        plan = _ops.order_plan(
            {
                "shape": call.buckets.shape,
                "n_sequences": n_sequences(call.cu_seqlens),
                "longest": call.longest,
                "n_buckets": call.n_buckets,
                "device": device,
            }
        )
        return _named(plan, *LAUNCH, "passes", "base", "keys of a block", "blocks of a sequence", "sorting warps")
    if isinstance(call, SelectCall):
        plan = _ops.select_plan(
            {
                "shape": call.query.shape,
                "keys": call.key.shape[2],
                "key_heads": call.key.shape[1],
                "context_keys": call.context_keys,
                "element_size": call.query.element_size(),
                "chunk_length": call.chunk_length,
                "budget": call.budget,
            }
        )
        step = ("CTAs", "CTAs at a time", "candidates", "shared bytes")
        steps = [f"weights of keys: {_named(plan[7:11], *step)}"]
        if plan[1]:
            steps.insert(0, f"weights of blocks of keys: {_named(plan[3:7], *step)}")
        sizes = _named([*plan[:3], plan[11]], "head steps", "blocks of keys", "chosen ones", "bytes of scratch memory")
        return f"{sizes}; {'; '.join(steps)}"
    names = (*LAUNCH, "head steps", "stages", "diagonal first", "tiles of a block", "rounds")
    plans = (_named(_attention_plan(call, part, device), *names) for part in range(len(PARTS)))
    return "; ".join(f"{name}: {plan}" for name, plan in zip(PARTS, plans, strict=True))


def _named(plan: list[int], *names: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, plan, strict=True))


def hash_buckets(call: HashCall) -> Tensor:
    arguments = _native.hash_arguments(call)
    _ops.hash_buckets(arguments)
    buckets: Tensor = arguments["buckets"]
    return buckets


def bucket_order(call: OrderCall) -> Tensor:
    """Buckets are not checked, for which the host would have to wait: one out of range counts as the last."""
    arguments = _native.order_arguments(call._replace(cu_seqlens=device_bounds(call)))
    _ops.bucket_order({**arguments, "longest": call.longest})
    order: Tensor = arguments["order"]
    return order


def _seed(call: AttentionCall | ListCall) -> Tensor | None:
    """The seed of dropout where the tensors are."""
    return None if call.dropout_seed is None else call.dropout_seed.to(call.device, non_blocking=True)


def chunk_arguments(call: AttentionCall) -> dict[str, Any]:
    """What forward and backward of the library take."""
    on_device = call._replace(cu_seqlens=device_bounds(call), dropout_seed=_seed(call))
    return {**_native.chunk_arguments(on_device), "longest": call.longest}


@_sentinels.forward
def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    arguments = chunk_arguments(call)
    out, lse = empty_results(call)
    self_only = torch.empty_like(lse, dtype=torch.bool)
    _ops.chunk_attention_forward({**arguments, "out": out, "lse": lse, "self_only": self_only})
    return out, lse, self_only


@_sentinels.backward
def chunk_attention_backward(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = new_gradients(call)
    _ops.chunk_attention_backward(
        {
            **chunk_arguments(call),
            **_native.residuals(out, lse),
            **_native.gradients(grad_out, grads),
            "self_only": self_only.contiguous(),
        }
    )
    return grads


def select_keys(call: SelectCall) -> Tensor:
    lists = torch.empty(call.lists_shape, dtype=torch.int32, device=call.device)
    _ops.select_keys({**_native.select_arguments(call), "lists": lists})
    return lists


def _list_arguments(call: ListCall) -> tuple[ListCall, dict[str, Any], dict[str, Tensor | None]]:
    """The call without a rest key if there are no keys for it, its arguments, and the sums of the rest key."""
    sums = rest_sums(call)
    call = call._replace(dropout_seed=_seed(call), rest_term=sums is not None)
    named = dict(zip(("key_sums", "value_sums", "counts"), sums or (None, None, None), strict=True))
    return call, _native.list_arguments(call), named


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    _, arguments, sums = _list_arguments(call)
    out, lse = empty_results(call)
    _ops.list_attention_forward({**arguments, **sums, "out": out, "lse": lse})
    return out, lse


def list_attention_backward(
    call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    call, arguments, sums = _list_arguments(call)
    arguments |= _native.residuals(out, lse)
    grads = new_gradients(call)
    if 0 in call.query.shape[:3]:
        return grads
    given = _native.gradients(grad_out, grads)
    key_grads = value_grads = None
    if call.rest_term:
        query_terms, value_terms = (lse.new_empty((*lse.shape, x.shape[3])) for x in (call.query, call.value))
        _ops.list_rest_backward(
            {
                **arguments,
                **sums,
                "grad_out": given["grad_out"],
                "grad_query": given["grad_query"],
                "query_terms": query_terms,
                "value_terms": value_terms,
            }
        )
        key_grads, value_grads = per_key(call, query_terms), per_key(call, value_terms)
    _ops.list_attention_backward({**arguments, **given, "key_grads": key_grads, "value_grads": value_grads})
    return grads
