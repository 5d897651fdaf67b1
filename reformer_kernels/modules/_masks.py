"""The masks of nn.MultiheadAttention as attention takes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_MASKED = -1e4  # added to a score, this leaves no weight in any dtype; float16's most negative number is -65504


def four_dimensional(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, sizes: tuple[int, int], context_keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """The masks as [B, S] and [B or 1, H or 1, L, S], where S counts context keys; views if there are none."""
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, sizes)
    if context_keys:
        key_padding_mask, attn_mask = (
            None if mask is None else F.pad(mask, (0, context_keys)) for mask in (key_padding_mask, attn_mask)
        )
    return key_padding_mask, attn_mask


def split_padding(key_padding_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``key_padding_mask`` [B, S] as a bool mask, and what else a float one adds to the scores, [B, S]."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return key_padding_mask, None
    ignored = key_padding_mask <= _MASKED
    bias = key_padding_mask.masked_fill(ignored, 0.0)
    return ignored, None if _is_zero_for_good(bias) else bias


def with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, L, D + 1] and k [B, H, S, D + 1], whose scores are those of D columns plus the bias [B, S] of the keys.

    So the keys are also selected by it, and nothing of size L x S is made.
    """
    constant = 2.0 ** round(-math.log2(scale))  # exact in every dtype, and keeps the keys' column in float16's range
    column = (bias / (scale * constant)).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
    return F.pad(q, (0, 1), value=constant), torch.cat([k, column], -1)


def add_bias(attn_mask: Tensor | None, bias: Tensor, length: int) -> Tensor:
    """``attn_mask`` [B or 1, H or 1, L, S] plus the bias [B, S] of the keys."""
    bias = bias[:, None, None]
    if attn_mask is None:
        return bias.expand(-1, -1, length, -1)
    return torch.where(attn_mask, float("-inf"), bias) if attn_mask.dtype == torch.bool else attn_mask + bias


def _is_zero_for_good(x: Tensor) -> bool:
    """Whether x is zero and nothing else depends on it: no derivative. False where its values cannot be read."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    if torch._C._are_functorch_transforms_active() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if x.requires_grad or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None):
        return False
    return not bool(x.any())
