"""Nested tensors, strided and jagged, as padded ones and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(name: str, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """A nested [B, ..., L_i, D] as [B, ..., L, D] with zeros behind, bool [B, L] (True: behind), and the lengths."""
    rows = x.unbind()
    shapes = {(*row.shape[:-2], row.shape[-1]) for row in rows}
    if len(shapes) > 1 or x.dim() < 3:
        got = [list(row.shape) for row in rows[:4]]
        raise ValueError(f"{name} must be nested in the last dimension but one only, got shapes {got}")
    lengths = [row.shape[-2] for row in rows]
    dense = torch.stack([F.pad(row, (0, 0, 0, max(lengths) - row.shape[-2])) for row in rows])
    behind = torch.arange(max(lengths), device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
    return dense, behind, lengths


def nested_like(x: Any, dense: Tensor, lengths: list[int]) -> Tensor:
    """[B, ..., L, E] as a nested tensor with the layout and lengths of x."""
    rows = [row[..., :length, :] for row, length in zip(dense.unbind(), lengths, strict=True)]
    if x.layout == torch.strided:
        return torch.nested.as_nested_tensor(rows, layout=torch.strided)
    # Values are ragged in their first dimension; x's own offsets make sums with x possible.
    values = torch.cat([row.transpose(0, -2) for row in rows])
    offsets = x.offsets() if x.lengths() is None else torch.tensor([0, *lengths], device=x.device).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, -2)
