"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ReformerOutput:
    """``last_hidden_state`` [B, L, hidden_dim of the configuration]."""

    last_hidden_state: Tensor


@dataclass
class LMOutput:
    """``loss``, a scalar, with labels; ``logits`` [B, L, V] without labels, or if they were asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class ClassifierOutput:
    """``logits`` [B, num_labels], and ``loss``, a scalar, with labels."""

    logits: Tensor
    loss: Tensor | None = None


@dataclass
class QuestionAnsweringOutput:
    """``start_logits`` and ``end_logits`` [B, L], and ``loss``, a scalar, with positions."""

    start_logits: Tensor
    end_logits: Tensor
    loss: Tensor | None = None


@dataclass
class Seq2SeqOutput(LMOutput):
    """Of the decoder; and ``encoder_last_hidden_state`` [B, S, hidden_dim of the encoder]."""

    encoder_last_hidden_state: Tensor | None = None
