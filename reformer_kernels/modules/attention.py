"""The Reformer's attention layers: shared-QK LSH attention and local attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._checks import check_choice, check_fraction, check_int
from ..rules import AttentionRules

_SEED_RANGE = 2**63 - 1


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A seed as an int64 tensor of one element."""
    # From torch's generator on the CPU: reproducible by torch.manual_seed, replayed by checkpointing, no device sync.
    return torch.randint(_SEED_RANGE, (1,), dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def check_hash_seed(hash_seed: Any) -> None:
    if hash_seed is not None:
        check_int("hash_seed", hash_seed, -(2**63), 2**63 - 1)


def seed_of(hash_seed: int | None, training: bool) -> int | Tensor:
    """The hash seed of one forward: None draws new ones in training, and is 0 in evaluation."""
    if hash_seed is not None:
        return hash_seed
    return draw_seed() if training else 0


class _SelfAttention(nn.Module):
    """What both layers share: heads, output projection, dropout."""

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int | None, dropout: float, bias: bool, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        check_int("embed_dim", embed_dim, 1)
        check_int("num_heads", num_heads, 1)
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
            head_dim = embed_dim // num_heads
        check_int("head_dim", head_dim, 1)
        check_fraction("dropout", dropout)
        self.embed_dim, self.num_heads, self.head_dim, self.dropout = embed_dim, num_heads, head_dim, dropout
        self._linear = {"bias": bias, **factory}
        self.output = nn.Linear(num_heads * head_dim, embed_dim, **self._linear)

    def _projection(self) -> nn.Linear:
        return nn.Linear(self.embed_dim, self.num_heads * self.head_dim, **self._linear)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, H * D] -> [B, H, L, D], a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        return self.output(x.transpose(1, 2).flatten(2))

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x must have shape [B, L, {self.embed_dim}], got {list(x.shape)}")

    def _dropout(self, device: torch.device) -> dict[str, Any]:
        if not self.training or self.dropout == 0:
            return {}
        return {"dropout_p": self.dropout, "dropout_seed": draw_seed(device)}

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout}"


class LSHSelfAttention(_SelfAttention):
    """The Reformer's LSH attention layer: one projection for queries and keys (arXiv 2001.04451, section 2).

    Args:
        embed_dim: E, size of the input and the output.
        num_heads: H.
        head_dim: D; None: ``embed_dim // num_heads``.
        n_hashes, n_buckets, chunk_length, chunks_before, chunks_after, causal, rules, alignment, backend: as in
            ``functional.lsh_attention``.
        dropout: probability of dropping an attention weight, in training.
        bias: give the projections a bias.
        hash_seed: an int fixes the rotations; None draws new ones in every training forward, as the published
            Reformers do, and uses seed 0 in evaluation.
        device, dtype: of the parameters.

    Shape: x [B, L, E] -> [B, L, E].

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        n_hashes: int = 4,
        n_buckets: int | Sequence[int] | None = None,
        chunk_length: int = 64,
        chunks_before: int = 1,
        chunks_after: int = 0,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        rules: AttentionRules | None = None,
        alignment: str = "ring",
        hash_seed: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, head_dim, dropout, bias, factory)
        self.query_key, self.value = self._projection(), self._projection()
        check_choice("alignment", alignment, ("ring", "bucket"))
        check_int("n_hashes", n_hashes, 1)
        check_int("chunk_length", chunk_length, 1)
        check_hash_seed(hash_seed)
        self.n_hashes = n_hashes
        self.hash_seed = hash_seed
        self.options: dict[str, Any] = {
            "n_buckets": n_buckets,
            "chunk_length": chunk_length,
            "chunks_before": chunks_before,
            "chunks_after": chunks_after,
            "causal": causal,
            "rules": AttentionRules() if rules is None else rules,
            "alignment": alignment,
            "backend": backend,
        }

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        num_queries: int | None = None,
        n_hashes: int | None = None,
        buckets: Tensor | None = None,
        return_buckets: bool = False,
    ) -> Any:
        """x [B, L, E]; masks as in ``functional.lsh_attention``; ``n_hashes`` overrides the layer's.

        Returns [B, num_queries, E], with ``return_buckets`` also the buckets, which a recomputation may pass again.
        """
        self._check_input(x)
        result = functional.lsh_attention(
            self._heads(self.query_key(x)),
            self._heads(self.value(x)),
            n_hashes=self.n_hashes if n_hashes is None else n_hashes,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            num_queries=num_queries,
            hash_seed=seed_of(self.hash_seed, self.training),
            buckets=buckets,
            return_buckets=return_buckets,
            **self.options,
            **self._dropout(x.device),
        )
        if return_buckets:
            return self._merge(result[0]), result[1]
        return self._merge(result)

    def extra_repr(self) -> str:
        shown = {"n_hashes": self.n_hashes, **self.options, "hash_seed": self.hash_seed}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in shown.items())])


class LocalSelfAttention(_SelfAttention):
    """The Reformer's local attention layer: each chunk attends itself and its neighbours.

    Args:
        embed_dim, num_heads, head_dim, dropout, bias, device, dtype: as in ``LSHSelfAttention``.
        chunk_length, chunks_before, chunks_after, causal, scale, backend: as in ``functional.local_attention``.

    Shape: x [B, L, E] -> [B, L, E].

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        chunk_length: int = 64,
        chunks_before: int = 1,
        chunks_after: int = 0,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        scale: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, head_dim, dropout, bias, factory)
        check_int("chunk_length", chunk_length, 1)
        self.query, self.key, self.value = self._projection(), self._projection(), self._projection()
        self.options: dict[str, Any] = {
            "chunk_length": chunk_length,
            "chunks_before": chunks_before,
            "chunks_after": chunks_after,
            "causal": causal,
            "scale": scale,
            "backend": backend,
        }

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x [B, L, E]; masks as in ``functional.local_attention``. Returns [B, L, E]."""
        self._check_input(x)
        out = functional.local_attention(
            self._heads(self.query(x)),
            self._heads(self.key(x)),
            self._heads(self.value(x)),
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            **self.options,
            **self._dropout(x.device),
        )
        return self._merge(out)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.options.items())])
