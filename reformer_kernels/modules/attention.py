"""Attention layers: the Reformer's shared-QK LSH attention and local attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._checks import (
    check_attn_mask,
    check_choice,
    check_fraction,
    check_int,
    check_kind,
    check_padding_mask,
    check_shift_keys,
)
from ..hashing import bucket_factors
from ..rules import AttentionRules
from .cache import BucketCache, LocalCache, RingCache, Step
from .position import RotaryPositionEmbedding, check_base, check_row_positions

_SEED_RANGE = 2**63 - 1


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A seed as an int64 tensor of one element."""
    # From torch's generator on the CPU: reproducible by torch.manual_seed, replayed by checkpointing, no device sync.
    return torch.randint(_SEED_RANGE, (1,), dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def check_is_causal(causal: bool) -> None:
    if not causal:
        raise ValueError("causal must be True for a cache (earlier tokens must not see later ones), got False")


def check_hash_seed(hash_seed: Any) -> None:
    if hash_seed is not None:
        check_int("hash_seed", hash_seed, -(2**63), 2**63 - 1)


def seed_of(hash_seed: int | None, training: bool) -> int | Tensor:
    """The hash seed of one forward: None draws new ones in training, and is 0 in evaluation."""
    if hash_seed is not None:
        return hash_seed
    return draw_seed() if training else 0


class AttentionBase(nn.Module):
    """What all layers share: heads, rotation, memory, output projection, dropout."""

    memory: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None,
        dropout: float,
        bias: bool,
        rotary_base: float | None,
        factory: dict[str, Any],
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
        self.rotary: RotaryPositionEmbedding | None = None
        if rotary_base is not None:
            check_base("rotary_base", rotary_base)
            self.rotary = RotaryPositionEmbedding(head_dim, rotary_base)
        self.register_parameter("memory", None)
        self.memory_keys = 0

    def _projection(self, width: int | None = None) -> nn.Linear:
        return nn.Linear(self.embed_dim if width is None else width, self.num_heads * self.head_dim, **self._linear)

    def _add_memory(self, memory_keys: int, width: int, factory: dict[str, Any]) -> None:
        check_int("memory_keys", memory_keys, 0)
        self.memory_keys = memory_keys
        if memory_keys:
            self.memory = nn.Parameter(torch.empty(memory_keys, width, **factory))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the memory as the constructor does; the projections have their own ``reset_parameters``."""
        if self.memory is not None:
            nn.init.normal_(self.memory, std=self.memory.shape[1] ** -0.5)

    def _memory_rows(self, x: Tensor) -> Tensor:
        """[B, memory_keys, E] for x [B, L, E], in its dtype."""
        assert self.memory is not None
        return self.memory.to(x.dtype).expand(x.shape[0], -1, -1)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, H * D] -> [B, H, L, D], a view."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return heads

    def _positions(self, x: Tensor, positions: Tensor | None) -> Tensor | None:
        """The positions of x [B, L, E], if anything depends on them."""
        if self.rotary is None:
            return None
        if positions is None:
            return torch.arange(x.shape[1], device=x.device)
        check_row_positions("positions", positions, x)
        return positions

    def _rotated(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """x [B, H, L, D] as it is seen from its positions."""
        return x if self.rotary is None or positions is None else self.rotary(x, positions)

    def _merge(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(x.transpose(1, 2).flatten(2))
        return out

    def _check_input(self, x: Tensor) -> None:
        check_kind("x", x)
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x must have shape [B, L, {self.embed_dim}], got {list(x.shape)}")

    def _dropout(self, device: torch.device) -> dict[str, Any]:
        if not self.training or self.dropout == 0:
            return {}
        return {"dropout_p": self.dropout, "dropout_seed": draw_seed(device)}

    def extra_repr(self) -> str:
        memory = f", memory_keys={self.memory_keys}" if self.memory_keys else ""
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout}{memory}"


class LSHSelfAttention(AttentionBase):
    """The Reformer's LSH attention layer: one projection for queries and keys (arXiv 2001.04451, section 2).

    What makes a row depend on its batch is said in ``functional.lsh_attention``.

    Args:
        embed_dim: E, size of the input and the output.
        num_heads: H.
        head_dim: D; None: ``embed_dim // num_heads``.
        n_hashes, n_buckets, chunk_length, chunks_before, chunks_after, causal, rules, alignment, shift_keys, backend:
            as in ``functional.lsh_attention``.
        dropout: probability of dropping an attention weight, in training.
        bias: give the projections a bias.
        hash_seed: an int fixes the rotations; None draws new ones in every training forward, as the published
            Reformers do, and uses seed 0 in evaluation.
        rotary_base: rotate the shared rows by their positions before hashing (``RotaryPositionEmbedding`` with this
            base, usually 10000), as trax can; None: no rotation.
        memory_keys: number of learned rows before x that every query may see, as lucidrains' ``num_mem_kv``. They are
            hashed like other keys, but not rotated. The parameter ``memory``, [memory_keys, E], starts normal with
            standard deviation ``E ** -0.5``.
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
        rotary_base: float | None = None,
        memory_keys: int = 0,
        shift_keys: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, head_dim, dropout, bias, rotary_base, factory)
        self.query_key, self.value = self._projection(), self._projection()
        check_choice("alignment", alignment, ("ring", "bucket"))
        check_int("n_hashes", n_hashes, 1)
        check_int("chunk_length", chunk_length, 1)
        check_hash_seed(hash_seed)
        check_shift_keys(shift_keys, causal)
        self._add_memory(memory_keys, embed_dim, factory)
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
            "shift_keys": shift_keys,
            "backend": backend,
        }

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        num_queries: int | None = None,
        n_hashes: int | None = None,
        buckets: Tensor | None = None,
        return_buckets: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, L, E]; masks as in ``functional.lsh_attention``; ``n_hashes`` overrides the layer's.

        ``positions``, integers [L] or [B, L], are used with ``rotary_base`` only; None: 0 ... L - 1. Masks and
        ``num_queries`` are about the rows of x: ``memory_keys`` come on top of them.

        Returns [B, num_queries, E], with ``return_buckets`` also the buckets, which a recomputation may pass again:
        int32 [B, H, n_hashes, memory_keys + L].
        """
        self._check_input(x)
        positions = self._positions(x, positions)
        if self.memory is not None:
            rows = x[:, None].expand(-1, self.num_heads, -1, -1)
            num_queries = x.shape[1] if num_queries is None else num_queries
            check_int("num_queries", num_queries, 0, x.shape[1])
            check_padding_mask(key_padding_mask, "x", rows)
            check_attn_mask(attn_mask, "x", rows, num_queries)
            key_padding_mask, positions = (
                # for masks 0 means visible, and position 0 is not rotated
                None if of_rows is None else F.pad(of_rows, (self.memory_keys, 0))
                for of_rows in (key_padding_mask, positions)
            )
            if attn_mask is not None:
                attn_mask = F.pad(attn_mask, (self.memory_keys, 0, self.memory_keys, 0))
            # First, and queries too, whose outputs nobody needs: so with ``causal`` all see it, and what comes later
            # does not move it out of a window.
            x = torch.cat([self._memory_rows(x), x], 1)
            num_queries += self.memory_keys
        result = functional.lsh_attention(
            self._rotated(self._heads(self.query_key(x)), positions),
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
        out, buckets = result if isinstance(result, tuple) else (result, None)
        out = self._merge(out[:, :, self.memory_keys :])
        return out if buckets is None else (out, buckets)

    def new_cache(self, max_crop: int = 0) -> BucketCache | RingCache:
        """For ``step``, which goes on with new tokens. ``max_crop``: tokens that the cache may be asked to forget.

        Raises:
            ValueError: the layer is not causal.
            NotImplementedError: its rules are not those of a cache.
        """
        options = self.options
        check_is_causal(options["causal"])
        memory = None
        if self.memory is not None:
            rows = self.memory[None]
            memory = self._heads(self.query_key(rows)), self._heads(self.value(rows))
        seed = seed_of(self.hash_seed, False)
        if options["alignment"] == "ring":
            return RingCache({**options, "n_hashes": self.n_hashes, "hash_seed": seed}, memory)
        rules: AttentionRules = options["rules"]
        if rules.own_position != "last_resort" or rules.combine_rounds != "softmax" or not rules.padding_bucket:
            raise NotImplementedError(f"a cache does not go with rules {rules.differences()}")
        return BucketCache(
            n_hashes=self.n_hashes,
            n_buckets=list(bucket_factors(options["n_buckets"], 1, 1)),
            chunk_length=options["chunk_length"],
            chunks_before=options["chunks_before"],
            rules=rules,
            hash_seed=seed,
            max_crop=max_crop,
            shift_keys=options["shift_keys"],
            backend=options["backend"],
            memory=memory,
        )

    def step(self, x: Tensor, cache: BucketCache | RingCache, step: Step) -> Tensor:
        """The output [B, N, E] of new tokens x [B, N, E], as ``forward`` has it of all; without gradients."""
        self._check_input(x)
        rows = self._rotated(self._heads(self.query_key(x)), step.position)
        return self._merge(cache.attend(rows, self._heads(self.value(x)), step))

    def extra_repr(self) -> str:
        shown = {"n_hashes": self.n_hashes, **self.options, "hash_seed": self.hash_seed}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in shown.items())])


class LocalSelfAttention(AttentionBase):
    """The Reformer's local attention layer: each chunk attends itself and its neighbours.

    Padding at the end of a row is cut off, as in ``functional.lsh_attention``.

    Args:
        embed_dim, num_heads, head_dim, dropout, bias, device, dtype: as in ``LSHSelfAttention``.
        chunk_length, chunks_before, chunks_after, causal, scale, backend: as in ``functional.local_attention``.
        rotary_base: rotate queries and keys by their positions (``RotaryPositionEmbedding`` with this base, usually
            10000); None: no rotation.

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
        rotary_base: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, head_dim, dropout, bias, rotary_base, factory)
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

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, E]; masks as in ``functional.local_attention``. Returns [B, L, E].

        ``positions``, integers [L] or [B, L], are used with ``rotary_base`` only; None: 0 ... L - 1.
        """
        self._check_input(x)
        positions = self._positions(x, positions)
        out = functional.local_attention(
            self._rotated(self._heads(self.query(x)), positions),
            self._rotated(self._heads(self.key(x)), positions),
            self._heads(self.value(x)),
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            **self.options,
            **self._dropout(x.device),
        )
        return self._merge(out)

    def new_cache(self, max_crop: int = 0) -> LocalCache:
        """As ``LSHSelfAttention.new_cache``. It needs ``chunks_before`` of at most 1 and ``chunks_after=0``, too."""
        options = self.options
        check_is_causal(options["causal"])
        if options["chunks_after"]:
            raise NotImplementedError(
                "chunks_after must be 0 for a cache (the last chunk sees the first ones, and others become the last), "
                f"got {options['chunks_after']}"
            )
        if options["chunks_before"] > 1:
            raise NotImplementedError(
                "chunks_before must be at most 1 for a cache (in a text of no more chunks, forward meets some twice), "
                f"got {options['chunks_before']}"
            )
        return LocalCache(
            options["chunk_length"], options["chunks_before"], options["scale"], max_crop, options["backend"]
        )

    def step(self, x: Tensor, cache: LocalCache, step: Step) -> Tensor:
        """As ``LSHSelfAttention.step``."""
        self._check_input(x)
        query, key = (self._rotated(self._heads(f(x)), step.position) for f in (self.query, self.key))
        return self._merge(cache.attend(query, key, self._heads(self.value(x)), step))

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.options.items())])
