"""Our ops on DTensors: each rank computes its part of the batch and of the heads.

Imported when the first DTensor is met, since ``torch.distributed.tensor`` takes long to import.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ._calls import HashCall
from ._checks import is_readable
from ._ops import NAMESPACE, SCHEMAS, library

_OF_ROWS = ("key_padding_mask", "query_padding_mask")  # [B, L]
_WHOLE = ("cu_seqlens", "dropout_seed", "hash_seed")  # every rank has all of it, also as plain tensors
_BROADCAST = ("attn_mask", "rotations")  # whose batch or heads may be 1
_SEED_STEP = 0x9E3779B97F4A7C15 - 2**64  # odd, so that all shards have different seeds


def _dispatch(cls: type, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """The op where the query (or what is hashed or sorted) is sharded by batch or heads; otherwise replicated.

    Everything else follows the query. The result is that of one device, but for dropout, which each shard draws from a
    seed of its own.
    """
    names = [argument.name for argument in op._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    main_name = next(name for name in ("query", "x", "buckets") if name in names)
    main = given[main_name]
    for name, x in given.items():
        if isinstance(x, Tensor) and not isinstance(x, DTensor) and name not in _WHOLE:
            raise TypeError(
                f"{name} must be a DTensor, as another argument is, got {type(x).__name__}: make it one by "
                "distribute_tensor, or call the function by torch.distributed.tensor.experimental.local_map"
            )
    mesh, placements = main.device_mesh, _placements(main, given)
    if "rotations" in given and given["rotations"] is None and Shard(1) in placements:
        call = HashCall(*(given[name] for name in names))
        if call.hash_seed is not None and is_readable(call.hash_seed):
            rotations, factors = call.resolve()
            whole = DTensor.from_local(rotations, mesh, [Replicate()] * mesh.ndim, run_check=False)
            given |= {"rotations": whole, "hash_seed": None, "n_buckets": list(factors)}
        else:  # each head has its own rotations, which come from the seed where the op runs
            placements = [Replicate() if p == Shard(1) else p for p in placements]
    local = {
        name: _local(x, mesh, _of_argument(name, x, placements)) if isinstance(x, DTensor) else x
        for name, x in given.items()
    }
    if given.get("dropout_p"):
        seed = local["dropout_seed"]
        local["dropout_seed"] = seed + torch.full_like(seed, _shard(mesh, placements)) * _SEED_STEP  # wraps around
    results = op(*(local[name] for name in names))
    single = isinstance(results, Tensor)
    wrapped = []
    for result, returned in zip([results] if single else results, op._schema.returns, strict=True):
        rows = (
            given["key"] if returned.name == "grad_key" else given["value"] if returned.name == "grad_value" else main
        )
        wrapped.append(_distributed(result, rows, mesh, placements))
    return wrapped[0] if single else tuple(wrapped)


def _placements(main: DTensor, given: dict[str, Any]) -> list[Placement]:
    """Where the op runs: as the query lies, as far as that is by batch and heads."""
    placements: list[Placement] = [p if p in (Shard(0), Shard(1)) else Replicate() for p in main.placements]
    key = given.get("key")
    if key is not None and key.shape[1] != main.shape[1]:  # a key head has to be where its query heads are
        parts = math.prod(n for n, p in zip(main.device_mesh.shape, placements, strict=True) if p == Shard(1))
        if key.shape[1] % parts:
            placements = [Replicate() if p == Shard(1) else p for p in placements]
    return placements


def _of_argument(name: str, x: Tensor, placements: list[Placement]) -> list[Placement]:
    of_rows = name in _OF_ROWS or (name == "cu_seqlens" and x.dim() == 2)
    dims = 1 if of_rows else 0 if name in _WHOLE else 2
    return [
        p if isinstance(p, Shard) and p.dim < dims and not (name in _BROADCAST and x.shape[p.dim] == 1) else Replicate()
        for p in placements
    ]


def _local(x: DTensor, mesh: Any, placements: list[Placement]) -> Tensor:
    with torch.no_grad():
        return x.redistribute(mesh, placements).to_local()


def _shard(mesh: Any, placements: list[Placement]) -> int:
    """The number of this rank's shard."""
    number = 0
    for size, coordinate, placement in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        if isinstance(placement, Shard):
            number = number * size + coordinate
    return number


def _distributed(local: Tensor, rows: Tensor | None, mesh: Any, placements: list[Placement]) -> DTensor:
    """A result with the batch and the heads of ``rows``; without these (no elements) a replicated one."""
    if rows is None:
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    shape = torch.Size((*rows.shape[:2], *local.shape[2:]))
    strides, step = [1] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):  # laid out as the part is
        strides[dim], step = step, step * shape[dim]
    with torch.no_grad():
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=tuple(strides))


for _name in SCHEMAS:
    torch.library.register_torch_dispatch(f"{NAMESPACE}::{_name}", DTensor, _dispatch, lib=library)
