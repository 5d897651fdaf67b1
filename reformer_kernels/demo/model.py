"""The byte-level language model of the demo, with Reformer layers or with torch's SDPA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.attention import LocalSelfAttention, LSHSelfAttention
from ..modules.full_attention import FullAttention
from ..modules.position import AxialPositionEmbedding

VOCABULARY = 256  # one token per byte
_STEM_BYTES = 6
_POSITION_COLUMNS = 64
_BUCKET_TOKENS = 64  # in the mean: a chunk


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a plain residual. [B, L, E] -> [B, L, E]."""

    def __init__(self, width: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
        for name, parameter in self.named_parameters():
            if name in ("attention.output.weight", "mlp.2.weight"):
                nn.init.zeros_(parameter)  # a block starts as the identity, which bears higher learning rates

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class ByteLM(nn.Module):
    """A causal language model over bytes. int64 [B, L] -> logits [B, L, 256].

    Args:
        attention: "lsh": local and LSH layers in turn; "sdpa": full causal attention in every layer.
        context: the longest L.
        width, layers, heads: E, the number of blocks, and H.
        hashes: hash rounds of the LSH layers in training.
        eval_hashes: hash rounds in evaluation.
    """

    def __init__(
        self, attention: str, context: int, width: int, layers: int, heads: int, hashes: int, eval_hashes: int
    ) -> None:
        super().__init__()
        self.hashes, self.eval_hashes = hashes, eval_hashes
        self.n_buckets = 2 * max(1, context // (2 * _BUCKET_TOKENS))
        self.embedding = nn.Embedding(VOCABULARY, width)
        # A token is a byte and the few before it: attention would spend the whole minute on learning to look there.
        self.stem = nn.Linear(_STEM_BYTES * width, width)
        # In a few hundred steps one vector for each of 4,096 positions would hardly be trained, but a column is met 64
        # times in every window.
        axes = (math.ceil(context / _POSITION_COLUMNS), _POSITION_COLUMNS)
        self.position = AxialPositionEmbedding(width, axes, init_std=0.05)
        self.blocks = nn.ModuleList(self._block(attention, layer, width, heads) for layer in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def _block(self, attention: str, layer: int, width: int, heads: int) -> Block:
        hidden = 4 * width
        if attention == "sdpa":
            return Block(width, FullAttention(width, heads, causal=True), hidden)
        if layer % 2 == 0:
            return Block(width, LocalSelfAttention(width, heads, causal=True), hidden)
        # Buckets that are cut into chunks one by one are strictly causal: in the ring of the published models, later
        # tokens move the borders of the chunks, from which bits per byte could profit.
        module = LSHSelfAttention(
            width, heads, causal=True, n_hashes=self.hashes, alignment="bucket", n_buckets=self.n_buckets
        )
        # The MLP gets the weights that the projection shared by queries and keys saves, so that the models are equal.
        return Block(width, module, hidden + width // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, L, 256] of the next bytes, of tokens int64 [B, L]."""
        recent = F.pad(tokens, (_STEM_BYTES - 1, 0)).unfold(1, _STEM_BYTES, 1)  # [B, L, _STEM_BYTES]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.stem(self.embedding(recent).flatten(2)) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def train(self, mode: bool = True) -> ByteLM:
        """Also sets the hash rounds of the LSH layers: few are enough in training, more see more in evaluation."""
        for module in self.modules():
            if isinstance(module, LSHSelfAttention):
                module.n_hashes = self.hashes if mode else self.eval_hashes
        super().train(mode)
        return self
