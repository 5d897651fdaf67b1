"""The CUDA kernels: loads the library, checks what it serves, allocates what it writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._calls import Call, HashCall, OrderCall
from . import native

MAX_HEAD_DIM, MAX_FACTORS = 128, 8  # kHashMaxDim and kHashMaxFactors of csrc/kernels/cuda/plan.h
_ops = torch.ops.reformer_kernels_cuda


@functools.cache
def library() -> dict[str, Any]:
    """Versions and architectures of the library, and under "error" the reason why it cannot be used."""
    libraries = sorted(Path(__file__).resolve().parent.parent.glob("_cuda*.so"))
    if not libraries:
        return {"error": native.build_info().get("no_cuda_because") or "not built"}
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return {"error": f"{libraries[0].name} cannot be loaded: {error}"}
    built = json.loads(_ops.build_info())
    if built["cuda"] != torch.version.cuda:
        return {"error": f"built for CUDA {built['cuda']}, but this torch has {torch.version.cuda}", **built}
    return built


def not_supported_reasons(call: Call) -> list[str]:
    if call.device.type != "cuda":
        return [f"tensors are on {call.device}, not on a GPU"]
    reasons = []
    if error := library().get("error"):
        reasons.append(f"the CUDA library: {error}")
    if isinstance(call, HashCall):
        head_dim, factors = call.x.shape[3], call.factors
        if call.x.dtype == torch.float64:
            reasons.append("x is float64; the kernels take float32, bfloat16 and float16")
        if head_dim > MAX_HEAD_DIM:
            reasons.append(f"the head size is {head_dim}; the kernels take up to {MAX_HEAD_DIM}")
        if len(factors) > MAX_FACTORS:
            reasons.append(f"n_buckets has {len(factors)} factors; the kernels take up to {MAX_FACTORS}")
    elif not isinstance(call, OrderCall):
        reasons.append(f"this version has no CUDA kernels for {call.op}")
    return reasons


def describe(call: Call, device: tuple[int, int, int] | None = None) -> str:
    """The launch of a call that is served.

    Args:
        device: multiprocessors, bytes of shared memory of a block and of a multiprocessor; None: of the call's GPU.
    """
    if device is None:
        found: Any = torch.cuda.get_device_properties(call.device)
        device = (
            found.multi_processor_count, found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor,
        )  # fmt: skip
    if isinstance(call, HashCall):
        rounds = call.n_hashes if call.rotations is None else call.rotations.shape[3]
        plan = _ops.hash_plan(call.x.shape, rounds, call.x.element_size(), call.factors, device)
        names = (
            "blocks", "threads", "shared bytes", "depth / 16", "column tiles of a round", "rounds of a block",
            "column tiles in shared memory", "tokens of a block",
        )  # fmt: skip
    else:
        assert isinstance(call, OrderCall)
        longest = call.longest
        sequences = 1 if call.cu_seqlens is None else len(call.cu_seqlens) - 1
        plan = _ops.order_plan(call.buckets.shape, sequences, longest, call.n_buckets, device)
        names = (
            "blocks", "threads", "shared bytes", "passes", "base", "keys of a block", "blocks of a sequence",
            "sorting warps",
        )  # fmt: skip
    return ", ".join(f"{name} {value}" for name, value in zip(names, plan, strict=True))


def hash_buckets(call: HashCall) -> Tensor:
    rotations, factors = call.resolve()
    x = native.rows(call.x)
    batch, heads, length, _ = x.shape
    buckets = torch.empty((batch, heads, rotations.shape[3], length), dtype=torch.int32, device=x.device)
    _ops.hash_buckets(x, rotations.float().contiguous(), native.contiguous(call.key_padding_mask), factors, buckets)
    return buckets


def bucket_order(call: OrderCall) -> Tensor:
    """Buckets are not checked, for which the host would have to wait: one out of range counts as the last."""
    order = torch.empty_like(call.buckets, memory_format=torch.contiguous_format)
    bounds = call.cu_seqlens if call.cu_seqlens is None else call.cu_seqlens.to(call.device, non_blocking=True)
    _ops.bucket_order(call.buckets.contiguous(), bounds, call.longest, call.n_buckets, order)
    return order
