"""ReformerSeq2Seq: an encoder, and a decoder that attends to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PretrainedModel, check_ids, padding_mask
from .cache import Cache
from .config import ReformerConfig
from .decoding import Generates
from .lm import IGNORED, apply_head, check_labels, make_head, tie_head
from .outputs import Seq2SeqOutput
from .reformer import Reformer, check_context, for_model


class ReformerSeq2Seq(PretrainedModel, Generates):
    """An encoder and a causal decoder with attention to it (arXiv 2001.04451, section 5).

    Source and target may have different lengths, and padding each. Attention to the encoder is softmax attention to
    all of it.

    Args:
        encoder_config: the encoder's architecture; never causal, whatever it says.
        decoder_config: the decoder's; None: the encoder's. Always causal, and its ``context_dim`` is the encoder's
            ``hidden_dim``.

    Raises:
        TypeError: an argument is no ``ReformerConfig``.
    """

    config_names = ("encoder_config", "decoder_config")

    def __init__(self, encoder_config: ReformerConfig, decoder_config: ReformerConfig | None = None) -> None:
        super().__init__()
        decoder_config = encoder_config if decoder_config is None else decoder_config
        self.encoder = Reformer(for_model("encoder_config", encoder_config, causal=False))
        self.encoder_config = self.encoder.config
        width = self.encoder_config.hidden_dim
        self.decoder = Reformer(for_model("decoder_config", decoder_config, causal=True, context_dim=width))
        self.decoder_config = self.decoder.config
        self.head = make_head(self.decoder)

    def _tie_weights(self) -> None:
        tie_head(self.decoder, self.head)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        encoder_last_hidden_state: Tensor | None = None,
        n_hashes: int | None = None,
        cache: Cache | None = None,
        return_logits: bool = False,
    ) -> Seq2SeqOutput:
        """Logits of the target, or with labels the loss.

        Args:
            input_ids: int64 or int32 [B, S], the source.
            attention_mask: [B, S], 1: a token, 0: padding; also where ``encoder_last_hidden_state`` is given.
            decoder_input_ids: [B, L], the target so far, from ``decoder_start_token_id``. None: the labels, shifted
                right by one.
            decoder_attention_mask: [B, L].
            labels: int64 [B, L]: what the decoder is to say at each place, or -100 where that does not count.
            encoder_last_hidden_state: [B, S, hidden_dim of the encoder], of an earlier call, in the place of
                ``input_ids``.
            n_hashes: of both sides, in the place of the configurations'.
            cache: of ``new_cache``: the target goes on with what it has. The first step takes the source; later ones
                need none.
            return_logits: also with labels. They are [B, L, V], which the loss alone never holds.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value, or a sequence is too long.
        """
        context = encoder_last_hidden_state
        going_on = cache is not None and cache.lengths is not None
        if (input_ids is None) == (context is None) and not (going_on and context is None and input_ids is None):
            raise ValueError("input_ids or encoder_last_hidden_state must be given, and not both")
        if context is None and not going_on:
            context = self.encoder(input_ids, attention_mask, n_hashes=n_hashes).last_hidden_state
        name = "decoder_input_ids"
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids or labels must be given, got neither")
            decoder_input_ids = self._shifted_right(labels)
            name = "labels"
        check_ids(name, decoder_input_ids, self.decoder_config.vocab_size)
        if context is not None:
            if len(decoder_input_ids) != len(context):
                got = len(decoder_input_ids)
                raise ValueError(f"{name} must have {len(context)} sequences, as the source, got {got}")
            # Here they have the names of this call; the decoder sees a context.
            check_context("encoder_last_hidden_state", context, decoder_input_ids, self.encoder_config.hidden_dim)
            padding_mask(attention_mask, context)
        padding_mask(decoder_attention_mask, decoder_input_ids, "decoder_attention_mask")
        streams = self.decoder.streams(
            decoder_input_ids,
            decoder_attention_mask,
            context=context,
            context_mask=attention_mask,
            n_hashes=n_hashes,
            cache=cache,
        )
        loss, logits = apply_head(self.decoder, self.head, streams, labels, return_logits)
        return Seq2SeqOutput(loss, logits, context)

    @property
    def pad_token_id(self) -> int:
        return self.decoder_config.pad_token_id

    def new_cache(self, *, max_crop: int = 0) -> Cache:
        """As ``Reformer.new_cache``, of the decoder."""
        return self.decoder.new_cache(max_crop=max_crop)

    def _prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, None]:
        check_ids("input_ids", input_ids, self.encoder_config.vocab_size)
        start = self.decoder_config.decoder_start_token_id
        return input_ids.new_full((len(input_ids), 1), start, dtype=torch.int64), None

    def _prompt_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor:
        start, _ = self._prompt(input_ids, None)
        return self._next_logits(start, cache, input_ids=input_ids, attention_mask=attention_mask)

    def _token_logits(self, token_ids: Tensor, cache: Cache) -> Tensor:
        return self._next_logits(token_ids[:, None], cache)

    def _next_logits(self, decoder_input_ids: Tensor, cache: Cache, **source: Any) -> Tensor:
        logits = self(decoder_input_ids=decoder_input_ids, cache=cache, **source).logits
        assert isinstance(logits, Tensor)
        return logits[:, -1]

    def _shifted_right(self, labels: Tensor) -> Tensor:
        check_labels(labels)
        config = self.decoder_config
        known = labels.masked_fill(labels == IGNORED, config.pad_token_id)
        return F.pad(known[:, :-1], (1, 0), value=config.decoder_start_token_id)
