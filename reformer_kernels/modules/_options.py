"""The options of the drop-ins, and which of them go with which nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import clustered
from .._checks import check_bool, check_choice, check_fraction, check_int
from .._dispatch import check_backend
from ..hashing import bucket_factors
from .attention import check_hash_seed


def check_clustered_options(
    budget: Any,
    local_fraction: Any,
    chunk_length: Any,
    grouping: Any,
    rest_term: Any,
    hash_seed: Any,
    backend: Any,
    exact_below: Any,
) -> None:
    """The options that modules and ``scaled_dot_product_attention`` share."""
    check_int("budget", budget, 1)
    check_fraction("local_fraction", local_fraction)
    if chunk_length is not None:
        check_int("chunk_length", chunk_length, 1)
    check_choice("grouping", grouping, clustered.GROUPINGS)
    check_bool("rest_term", rest_term)
    check_hash_seed(hash_seed)
    check_backend(backend)
    if exact_below is not None:
        check_int("exact_below", exact_below, 0)


def check_reformer_options(shared_qk: bool, n_hashes: Any, n_buckets: Any, exact_below: Any) -> None:
    if not shared_qk:
        for name, value in (("n_hashes", n_hashes), ("n_buckets", n_buckets)):
            if value is not None:
                raise ValueError(f"{name} must be None without shared_qk=True, got {value!r}")
        return
    if exact_below is not None:
        raise ValueError(f"exact_below must be None with shared_qk=True (it is never exact), got {exact_below!r}")
    if n_hashes is not None:
        check_int("n_hashes", n_hashes, 1)
    if n_buckets is not None:
        bucket_factors(n_buckets, 1, 1)


def not_supported_reasons(module: nn.MultiheadAttention, options: dict[str, Any]) -> list[str]:
    """Why a module with these arguments of ``nn.MultiheadAttention`` cannot have the options; empty if it can."""
    if not options["shared_qk"]:
        return []
    reasons = []
    if module.bias_k is not None:
        reasons.append("add_bias_kv must be False with shared_qk=True, got True")
    if module.add_zero_attn:
        reasons.append("add_zero_attn must be False with shared_qk=True, got True")
    if not module._qkv_same_embed_dim:
        sizes = f"{module.embed_dim}, got {module.kdim} and {module.vdim}"
        reasons.append(f"kdim and vdim must be embed_dim with shared_qk=True, {sizes}")
    return reasons
