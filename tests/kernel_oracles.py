"""What the kernels of any device that compute integers must compute, in float64 or exactly."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from reformer_kernels._calls import SelectCall
from reformer_kernels.backends import reference, reference_lists


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


def stable_order(buckets: Tensor, bounds: Sequence[Any] | None = None) -> Tensor:
    """Positions sorted by (bucket, position), int32 [B, H, R, L]; packed sequences one by one, each with all rounds.

    Args:
        bounds: of the sequences, or of those of each batch row.
    """
    bounds = (0, buckets.shape[3]) if bounds is None else bounds
    if not isinstance(bounds[0], int):
        return torch.cat([stable_order(row[None], of_row) for row, of_row in zip(buckets, bounds, strict=True)])
    parts = [
        torch.sort(buckets[..., start:end].cpu(), dim=-1, stable=True).indices.flatten(2)
        for start, end in pairwise(bounds)
    ]
    return torch.cat(parts, dim=-1).to(torch.int32).view(buckets.shape)


def assert_best(call: SelectCall, key_indices: Tensor) -> None:
    """Each list has its local window, and no key that was left out weighs more than the least of those taken, but for
    rounding.

    Args:
        key_indices: int32 [B, H, R * chunks, W], as the kernel wrote it for the call.

    Raises:
        AssertionError: a list is not the context, then rising keys, then -1; has too few keys, or not the best.
    """
    exact = call._replace(query=call.query.double(), key=call.key.double())
    score = reference_lists.selection_scores(exact)
    wanted = reference.select_keys(exact)
    size, n = call.key.shape[2], score.shape[2]
    rounds = key_indices.unflatten(2, (-1, n))
    for i, expected in enumerate(wanted.unflatten(2, (-1, n)).unbind(2)):
        context = call.context_keys if i == 0 else 0
        found = rounds[:, :, i].long()
        assert ((found >= -1) & (found < size)).all()
        assert torch.equal(found >= 0, expected >= 0)
        assert torch.equal(found[..., :context], expected[..., :context].long())
        keys = found[..., context:]
        assert ((keys[..., 1:] > keys[..., :-1]) | (keys[..., 1:] < 0)).all()
    if size == call.context_keys:
        return  # there are no others
    # With two rounds the first is a window, with one the window is among the keys.
    if rounds.shape[2] == 2:
        assert torch.equal(rounds[:, :, 0], wanted.unflatten(2, (-1, n))[:, :, 0])
    last = rounds[:, :, -1].long()
    taken = torch.zeros(*score.shape[:3], size + 1, dtype=torch.bool)
    taken = taken.scatter(3, torch.where(last < 0, size, last), True)[..., : score.shape[3]]
    if rounds.shape[2] == 1:
        keys = torch.arange(size - call.context_keys)
        windows = call.windows
        window = (keys >= windows[..., :1]) & (keys < windows[..., 1:2])  # [B, n, S']
        window = window[:, None].expand_as(taken)
        if call.key_padding_mask is not None:
            window = window & ~call.key_padding_mask[:, None, None, : len(keys)]
        assert (taken | ~window).all()
        score = score.masked_fill(window, 0.0)
    least = score.masked_fill(~taken | (score == 0), float("inf")).amin(dim=-1)
    best_left = score.masked_fill(taken, 0.0).amax(dim=-1)
    # A weight is an exponential: its relative error is the absolute one of a score, a sum of D products. Of a mean the
    # two half types that stand for it leave out less than 2^-17.
    largest = abs(call.scale) * call.query.double().norm(dim=-1).max() * call.key.double().norm(dim=-1).max()
    rounding = torch.finfo(torch.float32).eps * (call.query.shape[3] + 8)
    if call.query.element_size() == 2:
        rounding += 2**-17
    assert bool((best_left * (1 - 2 * rounding * (1 + largest)) <= least).all())
