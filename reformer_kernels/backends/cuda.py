"""The CUDA kernels: loads the library, checks what it serves, allocates what it writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._calls import AttentionCall, Call, HashCall, ListCall, OrderCall, SelectCall, empty_results, n_sequences
from ..rules import CHOICES
from . import cpu

MAX_HEAD_DIM, MAX_FACTORS, MAX_CHUNKS = 128, 8, 1023  # as in csrc/kernels/cuda/plan.h
MAX_SLOTS = 2**30  # which kernels count in 32 bits, with windows beyond both ends
NO_MASK = "the kernels take no attn_mask"
_ops = torch.ops.reformer_kernels_cuda


@functools.cache
def library() -> dict[str, Any]:
    """Versions and architectures of the library, and under "error" the reason why it cannot be used."""
    libraries = sorted(Path(__file__).resolve().parent.parent.glob("_cuda*.so"))
    if not libraries:
        return {"error": cpu.build_info().get("no_cuda_because") or "not built"}
    # It needs libraries that such a torch does not bring; what the loader says of that does not say why.
    if not torch.version.cuda:
        return {"error": f"torch {torch.__version__} is not a CUDA build"}
    if reason := cpu.load(libraries[0]):
        return {"error": reason}
    built = json.loads(_ops.build_info())
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
    if call.device.type != "cuda":
        return [f"tensors are on {call.device}, not on a GPU"]
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
        rows = row_reasons(MAX_HEAD_DIM, call.query, call.value)
        return [*rows, *chunk_reasons(MAX_CHUNKS, call), *rule_reasons(call)]
    return clustered_reasons(MAX_HEAD_DIM, call)


def clustered_reasons(max_head_dim: int, call: SelectCall | ListCall) -> list[str]:
    reasons = row_reasons(max_head_dim, call.query, call.value if isinstance(call, ListCall) else call.key)
    if call.attn_mask is not None:
        reasons.append(NO_MASK)
    if isinstance(call, ListCall):
        rows, width = call.key_indices.shape[2:]
        reasons += slot_reasons("places in its lists", rows * width)
    return reasons


def slot_reasons(name: str, slots: int) -> list[str]:
    if slots <= MAX_SLOTS:
        return []
    return [f"a head has {slots} {name}; the kernels take up to {MAX_SLOTS}"]


def row_reasons(max_head_dim: int, *rows: Tensor) -> list[str]:
    """Why kernels for rows of up to a head size do not serve these."""
    reasons, head_dim = [], max(x.shape[3] for x in rows)
    if rows[0].dtype == torch.float64:
        reasons.append("the dtype is float64; the kernels take float32, bfloat16 and float16")
    if head_dim > max_head_dim:
        reasons.append(f"the head size is {head_dim}; the kernels take up to {max_head_dim}")
    return reasons


def chunk_reasons(max_chunks: int, call: AttentionCall) -> list[str]:
    """Why kernels that count own keys up to a number do not serve a call."""
    rounds = 1 if call.order is None else call.order.shape[2]
    reasons = slot_reasons("tokens in all rounds", rounds * call.query.shape[2])
    chunks = rounds * (call.chunks_before + 1 + call.chunks_after)
    if chunks > max_chunks:
        reasons.append(f"the windows of all rounds have {chunks} chunks; the kernels take up to {max_chunks}")
    return reasons


def rule_reasons(call: AttentionCall) -> list[str]:
    """Which rules of a call the kernels of a GPU do not have."""
    reasons, rules, shared = [], call.rules, call.key is None
    if call.attn_mask is not None:
        reasons.append(NO_MASK)
    if call.order is not None and call.key is not None and call.key.shape[1] != call.query.shape[1]:
        reasons.append("queries are sorted, and share key heads")
    served = {
        "own_position": ("last_resort",) if shared else CHOICES["own_position"],
        "combine_rounds": ("softmax",),
        "window_order": CHOICES["window_order"] if call.chunks_before == 0 else ("position",),
    }
    for name, values in served.items():
        if (value := getattr(rules, name)) not in values:
            reasons.append(f"the kernels have no rules.{name}={value!r}")
    return reasons


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
    flags = cpu.chunk_flags(call) if isinstance(call, AttentionCall) else cpu.list_flags(call)
    window = (call.chunk_length, 0, 0)
    lists, sequences, longest = 0, 1, call.query.shape[2]
    if isinstance(call, AttentionCall):
        window = (call.chunk_length, call.chunks_before, call.chunks_after)
        sequences, longest = n_sequences(call.cu_seqlens), call.longest
    else:
        lists = call.key_indices.shape[3]
    return _ops.attention_plan(
        call.query.shape, call.value.shape[3], 0 if call.key is None else call.key.shape[1],
        1 if call.order is None else call.order.shape[2], call.query.element_size(), window, lists, flags,
        sequences, longest, part, device,
    )  # fmt: skip


def describe(call: Call, device: Device | None = None) -> str:
    """The launches of a call that is served.

    Args:
        device: None: the call's GPU.
    """
    device = device or device_numbers(call)
    if isinstance(call, HashCall):
        rounds = call.n_hashes if call.rotations is None else call.rotations.shape[3]
        plan = _ops.hash_plan(call.x.shape, rounds, call.x.element_size(), call.factors, device)
        return _named(
            plan, *LAUNCH, "depth / 16", "column tiles of a round", "rounds of a block",
            "column tiles in shared memory", "tokens of a block",
        )  # fmt: skip
    if isinstance(call, OrderCall):
        plan = _ops.order_plan(call.buckets.shape, n_sequences(call.cu_seqlens), call.longest, call.n_buckets, device)
        return _named(plan, *LAUNCH, "passes", "base", "keys of a block", "blocks of a sequence", "sorting warps")
    if isinstance(call, SelectCall):
        plan = _ops.select_plan(
            call.query.shape, call.key.shape[2], call.key.shape[1], call.context_keys, call.query.element_size(),
            call.chunk_length, call.budget,
        )  # fmt: skip
        step = ("blocks", "blocks at a time", "candidates", "shared bytes")
        steps = [f"weights of keys: {_named(plan[7:11], *step)}"]
        if plan[1]:
            steps.insert(0, f"weights of blocks of keys: {_named(plan[3:7], *step)}")
        sizes = _named([*plan[:3], plan[11]], "depth / 16", "blocks of keys", "chosen ones", "bytes of scratch memory")
        return f"{sizes}; {'; '.join(steps)}"
    names = (*LAUNCH, "depth / 16", "tiles in shared memory", "own ones among them", "tiles of a block", "rounds")
    plans = (_named(_attention_plan(call, part, device), *names) for part in range(len(PARTS)))
    return "; ".join(f"{name}: {plan}" for name, plan in zip(PARTS, plans, strict=True))


def _named(plan: list[int], *names: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, plan, strict=True))


def hash_buckets(call: HashCall) -> Tensor:
    rotations, factors = call.resolve()
    x = cpu.rows(call.x)
    batch, heads, length, _ = x.shape
    buckets = torch.empty((batch, heads, rotations.shape[3], length), dtype=torch.int32, device=x.device)
    _ops.hash_buckets(x, rotations.float().contiguous(), cpu.contiguous(call.key_padding_mask), factors, buckets)
    return buckets


def bucket_order(call: OrderCall) -> Tensor:
    """Buckets are not checked, for which the host would have to wait: one out of range counts as the last."""
    order = torch.empty_like(call.buckets, memory_format=torch.contiguous_format)
    bounds = cpu.contiguous(_to_device(call.cu_seqlens, call))
    _ops.bucket_order(call.buckets.contiguous(), bounds, call.longest, call.n_buckets, order)
    return order


def _to_device(x: Tensor | None, call: OrderCall | AttentionCall | ListCall) -> Tensor | None:
    return None if x is None else x.to(call.device, non_blocking=True)


def _inputs(call: AttentionCall) -> tuple[Any, ...]:
    """What forward and backward of the library take first."""
    on_device = call._replace(
        cu_seqlens=_to_device(call.cu_seqlens, call), dropout_seed=_to_device(call.dropout_seed, call)
    )
    return *cpu.chunk_arguments(on_device), call.longest


def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _inputs(call)
    out, lse = empty_results(call)
    self_only = torch.empty_like(lse, dtype=torch.bool)
    _ops.chunk_attention_forward(*inputs, out, lse, self_only)
    return out, lse, self_only


def chunk_attention_backward(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = cpu.new_gradients(call)
    _ops.chunk_attention_backward(
        *_inputs(call), cpu.rows(grad_out), cpu.rows(out), lse.contiguous(), self_only.contiguous(), *grads
    )
    return grads


def select_keys(call: SelectCall) -> Tensor:
    lists = torch.empty(call.lists_shape, dtype=torch.int32, device=call.device)
    _ops.select_keys(*cpu.select_arguments(call), lists)
    return lists


def _list_inputs(call: ListCall) -> tuple[ListCall, tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The call without a rest term where there are no keys for it, its arguments, and the sums of the rest term."""
    sums = rest_sums(call)
    call = call._replace(dropout_seed=_to_device(call.dropout_seed, call), rest_term=sums is not None)
    return call, cpu.list_arguments(call), sums or (None, None, None)


def rest_sums(call: ListCall) -> tuple[Tensor, Tensor, Tensor] | None:
    """Sums of key and value [B, Hk, n, D] and how many they are [B, n]: at each position, or of all keys.

    None: the call has no rest term, or no keys for it.
    """
    batch, keys = call.key.shape[0], call.key.shape[2] - call.context_keys
    if not call.rest_term or keys <= 0:
        return None
    counted = torch.ones(batch, keys, dtype=torch.int32, device=call.device)
    if call.key_padding_mask is not None:
        counted = counted.masked_fill(call.key_padding_mask[:, :keys], 0)
    rows = [x[:, :, :keys].float().masked_fill((counted == 0)[:, None, :, None], 0.0) for x in (call.key, call.value)]
    if call.causal:
        return rows[0].cumsum(2), rows[1].cumsum(2), counted.cumsum(1, dtype=torch.int32)
    return rows[0].sum(2, keepdim=True), rows[1].sum(2, keepdim=True), counted.sum(1, keepdim=True, dtype=torch.int32)


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    _, arguments, sums = _list_inputs(call)
    out, lse = empty_results(call)
    _ops.list_attention_forward(*arguments, out, lse, *sums)
    return out, lse


def list_attention_backward(
    call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    call, arguments, sums = _list_inputs(call)
    arguments = *arguments, cpu.rows(out), lse.contiguous()
    grad_out, grads = cpu.rows(grad_out), cpu.new_gradients(call)
    if 0 in call.query.shape[:3]:
        return grads
    rest: tuple[Tensor | None, Tensor | None] = (None, None)
    if call.rest_term:
        terms = [lse.new_empty((*lse.shape, x.shape[3])) for x in (call.query, call.value)]
        _ops.list_rest_backward(*arguments, *sums, grad_out, grads[0], *terms)
        rest = tuple(per_key(call, x) for x in terms)  # type: ignore[assignment]
    _ops.list_attention_backward(*arguments, grad_out, *rest, *grads)
    return grads


def per_key(call: ListCall, terms: Tensor) -> Tensor:
    """[B, Hk, n, D] of terms [B, H, L, D]: the sum of those of all queries that may see a key, or any key."""
    terms = terms.unflatten(1, (call.key.shape[1], -1)).sum(2)
    if not call.causal:
        return terms.sum(2, keepdim=True)
    # Keys after the last query get nothing.
    missing = max(0, call.key.shape[2] - call.context_keys - terms.shape[2])
    return torch.nn.functional.pad(terms.flip(2).cumsum(2).flip(2), (0, 0, 0, missing))
