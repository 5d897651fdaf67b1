"""Language models: ReformerLM predicts the next token, ReformerMaskedLM tokens that were replaced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_shape, check_tensor
from ..modules.feed_forward import chunked_cross_entropy
from .base import check_ids, initialize, padding_mask, token_at
from .cache import Cache
from .config import ReformerConfig
from .decoding import Generates
from .outputs import LMOutput
from .reformer import Reformer, ReformerModel

IGNORED = -100


def check_labels(labels: Any) -> None:
    check_tensor("labels", labels, "B L", (torch.int64,))


def make_head(trunk: Reformer) -> nn.Linear:
    """The last layer of a language model: hidden state -> logits."""
    config = trunk.config
    head = initialize(nn.Linear(config.hidden_dim, config.vocab_size), config.initializer_range)
    tie_head(trunk, head)
    return head


def tie_head(trunk: Reformer, head: nn.Linear) -> None:
    """The head gets the weights of the embedding, if the configuration says so."""
    if trunk.config.tie_embeddings:
        head.weight = trunk.embedding.weight


def apply_head(
    trunk: Reformer, head: nn.Linear, streams: tuple[Tensor, Tensor], labels: Tensor | None, return_logits: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The loss of labels, computed in chunks, and logits where there are no labels or they are asked for."""
    to_logits = nn.Sequential(trunk.merge, head)
    loss = None
    if labels is not None:
        length = trunk.config.head_chunk_length
        loss = chunked_cross_entropy(streams, to_logits, labels, chunk_length=length, ignore_index=IGNORED)
    return loss, to_logits(torch.cat(streams, dim=-1)) if labels is None or return_logits else None


class _LanguageModel(ReformerModel):
    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config)
        self.head = make_head(self.reformer)

    def _tie_weights(self) -> None:
        tie_head(self.reformer, self.head)

    def _targets(self, labels: Tensor) -> Tensor:
        """What each position is to predict."""
        return labels

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        n_hashes: int | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        return_logits: bool = False,
    ) -> LMOutput:
        """Logits, or with labels the loss.

        Args:
            input_ids, attention_mask, inputs_embeds, n_hashes, position_ids, cache: as in ``Reformer``.
            labels: int64 [B, L], between 0 and V - 1, or -100 where there is nothing to predict.
            return_logits: also with labels. They are [B, L, V], which the loss alone never holds.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value, or a sequence is too long.
        """
        streams = self.reformer.streams(
            input_ids, attention_mask, inputs_embeds, n_hashes=n_hashes, position_ids=position_ids, cache=cache
        )
        if labels is not None:
            check_labels(labels)
            check_shape("labels", labels, tuple(streams[0].shape[:2]))
            labels = self._targets(labels)
        return LMOutput(*apply_head(self.reformer, self.head, streams, labels, return_logits))


class ReformerLM(_LanguageModel, Generates):
    """A language model: ``logits[:, i]`` predict token i + 1.

    Labels are the tokens themselves (``labels=input_ids``): they are shifted inside. Logits of a prefix are those of
    the whole, but with ``alignment="ring"``, where later tokens have a say in which earlier ones an LSH layer offers to
    a query, as in every published Reformer.

    Args:
        config: the architecture; the model's own ``config`` is causal, whatever this one says.

    Raises:
        TypeError: config is no ``ReformerConfig``.
    """

    causal = True

    def _targets(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    @property
    def pad_token_id(self) -> int:
        return self.config.pad_token_id

    def new_cache(self, *, max_crop: int = 0) -> Cache:
        """As ``Reformer.new_cache``."""
        return self.reformer.new_cache(max_crop=max_crop)

    def _prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check_ids("input_ids", input_ids, self.config.vocab_size)
        padding = padding_mask(attention_mask, input_ids)
        if padding is not None and padding.all(1).any():
            row = int(padding.all(1).nonzero()[0])
            raise ValueError(f"attention_mask must leave a token in each row to go on with, got none in row {row}")
        return input_ids, attention_mask

    def _prompt_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor:
        both = torch.cat(self.reformer.streams(input_ids, attention_mask, cache=cache), -1)
        return self._logits(token_at("last", both, attention_mask))

    def _token_logits(self, token_ids: Tensor, cache: Cache) -> Tensor:
        return self._logits(torch.cat(self.reformer.streams(token_ids[:, None], None, cache=cache), -1)[:, 0])

    def _logits(self, both: Tensor) -> Tensor:
        logits: Tensor = self.head(self.reformer.merge(both))
        return logits


class ReformerMaskedLM(_LanguageModel):
    """A masked language model (BERT's): ``logits[:, i]`` predict the token at i.

    Labels are the true tokens where the input was replaced, and -100 elsewhere.

    Args:
        config: the architecture; the model's own ``config`` is not causal, whatever this one says.

    Raises:
        TypeError: config is no ``ReformerConfig``.
    """

    causal = False
