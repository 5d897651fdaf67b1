"""Softmax attention to everything, in the same sequence or in another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_bool, check_int, check_like, check_padding_mask, check_shape, check_tensor
from .._exact import scaled_dot_product_attention
from .attention import AttentionBase, check_is_causal
from .cache import ContextCache, FullCache, Step


class FullAttention(AttentionBase):
    """Softmax attention by ``F.scaled_dot_product_attention``, with the projections of ``LocalSelfAttention``.

    Time grows with L x S. So does the memory for ``causal`` with a padding mask (bool [B, 1, L, S]); otherwise there is
    no mask of that size.

    Args:
        embed_dim: E, size of the input and the output.
        num_heads: H.
        head_dim: D; None: ``embed_dim // num_heads``.
        context_dim: size of the rows of another sequence that keys and values are made of; None: self-attention.
        causal: query i sees the keys 0 ... i.
        dropout: probability of dropping an attention weight, in training; drawn from torch's random state.
        bias: give the projections a bias.
        memory_keys: number of learned rows beside the input of the keys and values, seen by every query and not
            rotated. The parameter ``memory``, [memory_keys, context_dim or E], starts normal with a standard deviation
            of ``1 / sqrt`` of its width.
        rotary_base: rotate queries and keys by their positions (``RotaryPositionEmbedding`` with this base, usually
            10000); None: no rotation.
        device, dtype: of the parameters.

    Shape: x [B, L, E], context [B, S, context_dim] -> [B, L, E]. A query that sees no key gives 0 (``output.bias``).

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value, or does not go with ``context_dim``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        memory_keys: int = 0,
        rotary_base: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, head_dim, dropout, bias, rotary_base, factory)
        check_bool("causal", causal)
        if context_dim is not None:
            check_int("context_dim", context_dim, 1)
            if causal:
                raise ValueError("causal must be False with context_dim (a context has no order of its own), got True")
            if rotary_base is not None:
                raise ValueError(
                    f"rotary_base must be None with context_dim (there is no distance to a context), got {rotary_base}"
                )
        self.context_dim, self.causal = context_dim, causal
        self.query = self._projection()
        self.key, self.value = self._projection(context_dim), self._projection(context_dim)
        self._add_memory(memory_keys, embed_dim if context_dim is None else context_dim, factory)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        context: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, E], and with ``context_dim`` a context [B, S, context_dim]. Returns [B, L, E].

        Args:
            key_padding_mask: bool, True: ignored as key; [B, S] of the context, or of x if there is none, [B, L].
            positions: integers [L] or [B, L], used with ``rotary_base`` only; None: 0 ... L - 1.
        """
        self._check_input(x)
        source = self._source(x, context)
        check_padding_mask(key_padding_mask, "x" if context is None else "context", source[:, None])
        positions = self._positions(x, positions)
        mask, sees_none = self._mask(key_padding_mask)
        if self.memory is not None:
            source = torch.cat([self._memory_rows(source), source], 1)
        q = self._rotated(self._heads(self.query(x)), positions)
        if positions is not None:
            positions = F.pad(positions, (self.memory_keys, 0))  # position 0 is not rotated
        k = self._rotated(self._heads(self.key(source)), positions)
        v = self._heads(self.value(source))
        is_causal = self.causal and mask is None
        if is_causal:
            # Queries for the memory, too: the causal mask of a square takes its first query and its first key together.
            q = F.pad(q, (0, 0, self.memory_keys, 0))
        out = scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal)
        if is_causal:
            out = out[:, :, self.memory_keys :]
        if sees_none is not None:
            out = out.masked_fill(sees_none, 0.0)
        return self._merge(out)

    def _source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What keys and values are made of."""
        if self.context_dim is None:
            if context is not None:
                raise ValueError(f"context must be None without context_dim, got shape {list(context.shape)}")
            return x
        if context is None:
            raise ValueError(f"context must be given with context_dim, [B, S, {self.context_dim}], got None")
        check_tensor("context", context, "B S C")
        check_like("context", context, "x", x)
        check_shape("context", context, (x.shape[0], context.shape[1], self.context_dim))
        return context

    def _mask(self, key_padding_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """True: seen, [B, 1, L or 1, memory_keys + S], and True: sees no key, [B, 1, L or 1, 1]; None: all see all.

        A query that sees no key gets all keys, and its output is to be masked: torch's kernels need not agree on the
        softmax of nothing, and its gradient.
        """
        if key_padding_mask is None:
            return None, None
        seen = ~key_padding_mask[:, None, None]
        if self.causal:
            length = seen.shape[-1]
            seen = seen & torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
        if self.memory_keys:
            return F.pad(seen, (self.memory_keys, 0), value=True), None
        sees_none = ~seen.any(-1, keepdim=True)
        return seen | sees_none, sees_none

    def new_cache(self, max_crop: int = 0) -> FullCache | ContextCache:
        """As ``LSHSelfAttention.new_cache``; with ``context_dim`` it keeps the keys and values of the context."""
        if self.context_dim is not None:
            return ContextCache()
        check_is_causal(self.causal)
        if self.memory is None:
            return FullCache()
        rows = self.memory[None]
        return FullCache((self._heads(self.key(rows)), self._heads(self.value(rows))))

    def step(
        self,
        x: Tensor,
        cache: FullCache | ContextCache,
        step: Step,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """As ``LSHSelfAttention.step``. The context and its mask count in the first step."""
        self._check_input(x)
        query = self._heads(self.query(x))
        if isinstance(cache, FullCache):
            key = self._rotated(self._heads(self.key(x)), step.position)
            return self._merge(cache.attend(self._rotated(query, step.position), key, self._heads(self.value(x)), step))
        if cache.keys is None or cache.values is None:
            source = self._source(x, context)
            check_padding_mask(key_padding_mask, "context", source[:, None])
            cache.sees, cache.sees_none = self._mask(key_padding_mask)
            if self.memory is not None:
                source = torch.cat([self._memory_rows(source), source], 1)
            cache.keys, cache.values = self._heads(self.key(source)), self._heads(self.value(source))
        out = scaled_dot_product_attention(query, cache.keys, cache.values, cache.sees, 0.0, False)
        if cache.sees_none is not None:
            out = out.masked_fill(cache.sees_none, 0.0)
        return self._merge(out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, context_dim={self.context_dim}, causal={self.causal}"
