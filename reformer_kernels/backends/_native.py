"""What the two native libraries have in common: how they are loaded, and their ops' arguments by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .._calls import AttentionCall, HashCall, ListCall, OrderCall, SelectCall, compute_dtype
from ._common import contiguous, rows
from .philox import drop_threshold, keep_factor


def load(library: Path) -> str | None:
    """Registers the ops of a library; the reason why it cannot be loaded, if it cannot."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        has = f"which has CUDA {torch.version.cuda}" if torch.version.cuda else "which has no CUDA"
        # torch hides what the loader said.
        return f"{library.name} cannot be loaded beside torch {torch.__version__}, {has}: {error.__cause__ or error}"
    return None


class Ops:
    """The ops of a loaded library. Each takes its arguments as a dict, by the names of its schema.

    They are put into its order here, which is read once: torch takes longer to sort keywords in every call.
    """

    def __init__(self, namespace: str) -> None:
        self._packets = getattr(torch.ops, namespace)

    def __getattr__(self, name: str) -> Callable[[dict[str, Any]], Any]:
        op = getattr(self._packets, name).default
        names = [argument.name for argument in op._schema.arguments]
        in_order = itemgetter(*names) if len(names) > 1 else lambda given: [given[name] for name in names]

        def call(given: dict[str, Any]) -> Any:
            if len(given) != len(names):
                raise TypeError(f"{name} takes {', '.join(names)}, got {', '.join(given)}")
            return op(*in_order(given))

        setattr(self, name, call)
        return call

    def facts(self) -> dict[str, Any]:
        """What the library was built with."""
        return cast(dict[str, Any], json.loads(self.build_info({})))


CPU_OPS, CUDA_OPS = Ops("reformer_kernels_cpu"), Ops("reformer_kernels_cuda")


def reason_against_cuda() -> str | None:
    """Why the build left out the CUDA library, as the CPU library knows if it is loaded."""
    loaded = hasattr(torch.ops.reformer_kernels_cpu, "build_info")
    return CPU_OPS.facts().get("no_cuda_because") if loaded else None


# ---- arguments

FLAGS = {  # rk::Flag
    "causal": 1,
    "l2_norm": 2,
    "mask_padded_queries": 4,
    "within_bucket": 8,
    "dedup": 16,
    "bucket_aligned": 32,
    "rest_key": 64,
}


def _flags(**flags: bool) -> int:
    return sum([FLAGS[name] for name, is_set in flags.items() if is_set])


def chunk_flags(call: AttentionCall) -> int:
    rules = call.rules
    return _flags(
        causal=call.causal,
        l2_norm=rules.key_norm == "l2",
        mask_padded_queries=rules.mask_padded_queries,
        within_bucket=call.masks_other_buckets,
        dedup=call.counts_meetings,
        bucket_aligned=not call.is_ring,
    )


def list_flags(call: ListCall) -> int:
    return _flags(causal=call.causal, rest_key=call.rest_term)


def _threshold(call: AttentionCall | ListCall) -> int:
    return drop_threshold(call.dropout_p) if call.dropout_p > 0 else 0


def hash_arguments(call: HashCall) -> dict[str, Any]:
    """What both libraries take, with new buckets."""
    rotations, factors = call.resolve()
    x = rows(call.x)
    batch, heads, length, _ = x.shape
    return {
        "x": x,
        "rotations": rotations.to(compute_dtype(x)).contiguous(),
        "key_padding_mask": contiguous(call.key_padding_mask),
        "n_buckets": factors,
        "buckets": torch.empty((batch, heads, rotations.shape[3], length), dtype=torch.int32, device=x.device),
    }


def order_arguments(call: OrderCall) -> dict[str, Any]:
    """What both libraries take, with a new order."""
    return {
        "buckets": call.buckets.contiguous(),
        "cu_seqlens": contiguous(call.cu_seqlens),
        "n_buckets": call.n_buckets,
        "order": torch.empty_like(call.buckets, memory_format=torch.contiguous_format),
    }


def chunk_arguments(call: AttentionCall) -> dict[str, Any]:
    """What forward and backward of both libraries take."""
    return {
        "query": rows(call.query),
        "key": None if call.key is None else rows(call.key),
        "value": rows(call.value),
        "order": contiguous(call.order),
        "buckets": contiguous(call.buckets),
        "key_padding_mask": contiguous(call.key_padding_mask),
        "cu_seqlens": contiguous(call.cu_seqlens),
        "chunk_length": call.chunk_length,
        "chunks_before": call.chunks_before,
        "chunks_after": call.chunks_after,
        "n_queries": call.n_queries,
        "scale": call.scale,
        "flags": chunk_flags(call),
        "dropout_seed": call.dropout_seed,
        "drop_threshold": _threshold(call),
        "keep_factor": keep_factor(call.dropout_p),
    }


def list_arguments(call: ListCall) -> dict[str, Any]:
    """What forward and backward of both libraries take."""
    return {
        "query": rows(call.query),
        "key": rows(call.key),
        "value": rows(call.value),
        "order": contiguous(call.order),
        "key_indices": call.key_indices.contiguous(),
        "key_padding_mask": contiguous(call.key_padding_mask),
        "chunk_length": call.chunk_length,
        "context_keys": call.context_keys,
        "scale": call.scale,
        "flags": list_flags(call),
        "dropout_seed": call.dropout_seed,
        "drop_threshold": _threshold(call),
        "keep_factor": keep_factor(call.dropout_p),
    }


def select_arguments(call: SelectCall) -> dict[str, Any]:
    """What both libraries take."""
    return {
        "query": rows(call.query),
        "key": rows(call.key),
        "order": contiguous(call.order),
        "query_padding_mask": contiguous(call.query_padding_mask),
        "key_padding_mask": contiguous(call.key_padding_mask),
        "windows": call.windows,
        "chunk_length": call.chunk_length,
        "budget": call.budget,
        "context_keys": call.context_keys,
        "scale": call.scale,
        "flags": _flags(causal=call.causal),
    }


def residuals(out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """What a backward takes of its forward's results."""
    return {"out": rows(out), "lse": lse.contiguous()}


def gradients(grad_out: Tensor, grads: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The incoming gradient, and the gradients that a backward writes."""
    return {"grad_out": rows(grad_out), **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))}
