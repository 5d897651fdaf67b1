"""What the hash and sort kernels of any device must compute, in float64 or exactly."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def assert_hashes(
    buckets: Tensor, x: Tensor, rotations: Tensor, factors: Sequence[int], padding: Tensor | None = None
) -> None:
    """Each digit is that of a largest projection, up to what float32 sums may differ by.

    Args:
        buckets: int32 [B, H, R, L].
        x: [B, H, L, D] as the kernel got it; rotations: float32 [B|1, H|1, D, R, sum(factors) / 2].
        padding: bool [B, L].

    Raises:
        AssertionError: a digit belongs to a projection that is too small, or a padded token is not in the last bucket.
    """
    x, rotations = x.double().cpu(), rotations.double().cpu().expand(x.shape[0], x.shape[1], -1, -1, -1)
    rest, start, total = buckets.cpu().long(), 0, 1
    padded = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool) if padding is None else padding.cpu()
    padded = padded[:, None, None].expand_as(rest)
    for factor in factors:
        digit, rest = rest % factor, rest // factor
        part = rotations[..., start : start + factor // 2]
        y = torch.einsum("bhld,bhdrf->bhrlf", x, part)
        # Either sum has a rounding for each of its products, of which half types have two, and their rotations lack
        # 2^-18, 32 units.
        sizes = torch.einsum("bhld,bhdrf->bhrlf", x.abs(), part.abs()).amax(-1)
        allowed = 2 * (2 * x.shape[3] + 32) * torch.finfo(torch.float32).eps * sizes
        chosen = torch.cat([y, -y], dim=-1).gather(-1, digit[..., None]).squeeze(-1)
        short = y.abs().amax(-1) - chosen - allowed
        assert (short.masked_fill(padded, 0) <= 0).all(), f"a projection is short of the largest by {short.max():.3g}"
        start, total = start + factor // 2, total * factor
    assert (buckets.cpu().masked_fill(padded, 0) < total).all()
    assert (buckets.cpu()[padded] == total).all()


def stable_order(buckets: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
    """Positions sorted by (bucket, position), int32 [B, H, R, L]; packed sequences one by one, each with all rounds."""
    bounds = (0, buckets.shape[3]) if bounds is None else bounds
    parts = [
        torch.sort(buckets[..., start:end].cpu(), dim=-1, stable=True).indices.flatten(2)
        for start, end in pairwise(bounds)
    ]
    return torch.cat(parts, dim=-1).to(torch.int32).view(buckets.shape)
