"""What a causal model keeps of earlier tokens, for all its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_int, check_tensor
from ..modules.cache import LayerCache, Step


class Cache:
    """The state of a batch of sequences: ``model(ids, cache=cache)`` goes on with them. Made by ``model.new_cache()``.

    Each row has as many tokens as it was fed, any number at a time, without padding. Bounded, however long the
    sequences get, are local layers (their last windows) and LSH layers with ``alignment="bucket"`` (two chunks of
    every bucket). Full layers, and LSH layers with ``alignment="ring"``, keep all tokens.

    Attributes:
        lengths: int64 [B], tokens of each row; None before the first ones.
        max_crop: ``crop`` can forget so many of the last tokens that were ever there.
    """

    def __init__(self, layers: list[LayerCache | None], max_crop: int, longest: int | None) -> None:
        self.layers, self.max_crop, self.lengths = layers, max_crop, None
        self._longest = longest  # tokens that the model takes
        self._fed = 0  # no row has more tokens
        self._left = max_crop  # tokens of each row that layers can still forget

    lengths: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(x.nbytes for layer in self.layers if layer is not None for x in layer.tensors().values())

    def begin(self, valid: Tensor) -> Step:
        """The step of new tokens, valid [B, N]: the first ones of each row."""
        batch, length = valid.shape
        if self.lengths is not None and len(self.lengths) != batch:
            raise ValueError(f"the cache is of {len(self.lengths)} sequences, got input of {batch}")
        if self._longest is not None and self._fed + length > self._longest:
            raise ValueError(
                f"the sequence must be at most max_length {self._longest} tokens long, got {length} new ones behind "
                f"{self._fed} of the cache"
            )
        if self.lengths is None:
            self.lengths = valid.new_zeros(batch, dtype=torch.int64)
        position = self.lengths[:, None] + torch.arange(length, device=valid.device)
        return Step(position, valid, self._fed + length)

    def end(self, step: Step, padded: bool) -> None:
        """padded: a row may have fewer new tokens than others."""
        assert self.lengths is not None
        new = step.valid.sum(1)
        self.lengths = self.lengths + new
        if padded:  # only then is it worth waiting for a GPU
            self._fed = int(self.lengths.max())
            self._left = min(self.max_crop, self._left + int(new.min()))
        else:
            self._fed = step.longest
            self._left = min(self.max_crop, self._left + step.valid.shape[1])

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was: int64 [B'], for beams, or to repeat rows.

        Raises:
            TypeError, ValueError: rows has a wrong dtype or shape.
        """
        check_tensor("rows", rows, "B", (torch.int64,))
        if self.lengths is None:
            return
        self.lengths = self.lengths.index_select(0, rows)
        for layer in self.layers:
            if layer is not None:
                layer.reorder(rows)

    def crop(self, tokens: int) -> None:
        """Forgets the last ``tokens`` of each row. Of all that were ever there, the last ``max_crop`` can be forgotten.

        Raises:
            TypeError, ValueError: tokens is no int, or more than can be forgotten or than a row has.
        """
        check_int("tokens", tokens, 0, self._left)
        if self.lengths is None or tokens == 0:
            check_int("tokens", tokens, 0, 0)
            return
        check_int("tokens", tokens, 0, int(self.lengths.min()))
        self.lengths = self.lengths - tokens
        self._left -= tokens
        self._fed -= tokens
        for layer in self.layers:
            if layer is not None:
                layer.crop(self.lengths, tokens)


def check_cache(cache: Any, layers: int) -> None:
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of new_cache(), got {type(cache).__name__}")
    if len(cache.layers) != layers:
        raise ValueError(f"cache must be of a model with {layers} halves of blocks, got one of {len(cache.layers)}")
