"""ReformerSequenceClassifier and ReformerQuestionAnswering: heads on the trunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.feed_forward import chunked_cross_entropy
from .base import initialize, token_at
from .config import ReformerConfig
from .outputs import ClassifierOutput, QuestionAnsweringOutput
from .reformer import ReformerModel


class ReformerSequenceClassifier(ReformerModel):
    """A class, several classes, or numbers for each sequence.

    The hidden state of one token, or the mean (``config.pooling``), through dropout, a tanh layer, dropout and the
    output layer (as BERT and Hugging Face's Reformer).

    Args:
        config: the architecture.

    Raises:
        TypeError: config is no ``ReformerConfig``.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config)
        config = self.config
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.dense = initialize(nn.Linear(config.hidden_dim, config.embed_dim), config.initializer_range)
        self.output = initialize(nn.Linear(config.embed_dim, config.num_labels), config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> ClassifierOutput:
        """Logits [B, num_labels], and with labels the loss.

        Args:
            input_ids, attention_mask, inputs_embeds, n_hashes: as in ``Reformer``.
            labels: int64 [B]: a class each (cross entropy). Floating [B] or [B, num_labels]: with ``num_labels=1``
                a number each (squared error), else the probability of every class (binary cross entropy).

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value, or a sequence is too long.
        """
        hidden = self.reformer(input_ids, attention_mask, inputs_embeds=inputs_embeds, n_hashes=n_hashes)
        pooled = self.dropout(_pool(hidden.last_hidden_state, attention_mask, self.config.pooling))
        logits = self.output(self.dropout(torch.tanh(self.dense(pooled))))
        return ClassifierOutput(None if labels is None else _classification_loss(logits, labels), logits)


class ReformerQuestionAnswering(ReformerModel):
    """The answer to a question as the first and the last token of a span (SQuAD).

    Args:
        config: the architecture.

    Raises:
        TypeError: config is no ``ReformerConfig``.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config)
        config = self.config
        self.output = initialize(nn.Linear(config.hidden_dim, 2), config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> QuestionAnsweringOutput:
        """Logits of the span's ends, [B, L] each; padding has that of the dtype's smallest number.

        Args:
            input_ids, attention_mask, inputs_embeds, n_hashes: as in ``Reformer``.
            start_positions, end_positions: int64 [B]; both or none. -100: no answer in this sequence, which does not
                count. The loss is the mean of both cross entropies.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value, or a sequence is too long.
        """
        hidden = self.reformer(input_ids, attention_mask, inputs_embeds=inputs_embeds, n_hashes=n_hashes)
        logits = self.output(hidden.last_hidden_state)
        if attention_mask is not None:
            logits = logits.masked_fill((attention_mask == 0).unsqueeze(-1), torch.finfo(logits.dtype).min)
        start, end = logits.unbind(dim=-1)
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        given = {name: labels for name, labels in positions.items() if labels is not None}
        if len(given) == 1:
            raise ValueError(f"start_positions and end_positions must be given together, got {next(iter(given))} alone")
        if not given:
            return QuestionAnsweringOutput(None, start, end)
        for name, labels in given.items():
            _check_classes(name, labels, start)
        losses = [_cross_entropy(x, labels) for x, labels in zip((start, end), given.values(), strict=True)]
        return QuestionAnsweringOutput((losses[0] + losses[1]) / 2, start, end)


def _pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """[B, L, E] -> [B, E]."""
    if pooling != "mean":
        return token_at(pooling, hidden, attention_mask)
    if attention_mask is None:
        return hidden.mean(dim=1)
    weights = (attention_mask != 0).to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _check_classes(name: str, labels: Any, logits: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"{name} must have shape [{logits.shape[0]}], got {list(labels.shape)}")


def _classification_loss(logits: Tensor, labels: Any) -> Tensor:
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        _check_classes("labels", labels, logits)
        return _cross_entropy(logits, labels)
    expected = [list(logits.shape)] if logits.shape[1] > 1 else [list(logits.shape[:1]), list(logits.shape)]
    if list(labels.shape) not in expected:
        raise ValueError(f"floating labels must have shape {' or '.join(map(str, expected))}, got {list(labels.shape)}")
    labels = labels.to(logits.dtype).view_as(logits)
    return F.mse_loss(logits, labels) if logits.shape[1] == 1 else F.binary_cross_entropy_with_logits(logits, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return chunked_cross_entropy(logits, nn.Identity(), labels, chunk_length=None)  # 0, not nan, if none counts
