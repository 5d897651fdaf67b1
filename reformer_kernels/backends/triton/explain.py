"""What ``rk.explain`` says of a call: the configurations of its kernels."""

from __future__ import annotations

from ..._calls import Call, HashCall, OrderCall, SelectCall
from ._launch import block_width
from .attention import kind_of
from .configs import Kind, choose
from .order import TILE_BITS


def kinds_of(call: Call) -> list[Kind]:
    if isinstance(call, OrderCall):
        return []
    if isinstance(call, HashCall):
        return [Kind("hash", call.x.element_size(), block_width(call.x.shape[3]))]
    if isinstance(call, SelectCall):
        return [Kind("weigh", call.key.element_size(), block_width(call.key.shape[3]))]
    return [kind_of(kernel, call) for kernel in ("forward", "grad_query", "grad_keys")]


def describe(call: Call) -> str:
    """The tiles of a call that is served: rows, and columns that are visited at a time."""
    if isinstance(call, OrderCall):
        return f"tiles of {1 << TILE_BITS} keys"
    plans = ((kind.kernel, choose(kind, call.device)) for kind in kinds_of(call))
    return "; ".join(
        f"{kernel}: tiles of {c.block_m} by {c.block_n}, {c.num_warps} warps, {c.num_stages} stages"
        for kernel, c in plans
    )
