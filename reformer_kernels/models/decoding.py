"""``generate`` and ``stream`` of language models, with a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .cache import Cache
from .generation import GenerationOptions, generate, stream


def make_options(options: dict[str, Any], pad_token_id: int) -> GenerationOptions:
    """Of keyword arguments of ``generate``."""
    known = list(GenerationOptions.__dataclass_fields__)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{unknown[0]} is no option of generate, which has {', '.join(known)}")
    if "max_new_tokens" not in options:
        raise TypeError("max_new_tokens must be given")
    return GenerationOptions(**{"pad_token_id": pad_token_id, **options})


class CachedDecoder:
    """The rows of a batch behind a model's cache, for the loop of ``generation``."""

    def __init__(self, model: Generates, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self._model, self._prompt, self._cache = model, (input_ids, attention_mask), model.new_cache()

    def start(self, rows: int) -> Tensor:
        logits = self._model._prompt_logits(*self._prompt, self._cache)
        if rows == len(logits):
            return logits
        index = torch.arange(len(logits), device=logits.device).repeat_interleave(rows // len(logits))
        self._cache.reorder(index)
        return logits.index_select(0, index)

    def step(self, token_ids: Tensor) -> Tensor:
        return self._model._token_logits(token_ids, self._cache)

    def reorder(self, rows: Tensor) -> None:
        self._cache.reorder(rows)


class Generates(nn.Module, ABC):
    """``generate`` and ``stream`` of a model with a cache."""

    @property
    @abstractmethod
    def pad_token_id(self) -> int:
        """What follows the end of a sequence."""

    @abstractmethod
    def new_cache(self, *, max_crop: int = 0) -> Cache:
        """As ``Reformer.new_cache``."""

    @abstractmethod
    def _prompt_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor:
        """[B, V]: of the first new token, behind what is given to ``generate``."""

    @abstractmethod
    def _token_logits(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """[B, V]: of what follows another token, int64 [B]."""

    def _prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What new tokens follow, [B, L], and its mask."""
        return input_ids, attention_mask

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """New tokens, by a cache. Names and defaults are those of Hugging Face's ``generate``.

        Every row is what it would be alone. The model is in evaluation mode meanwhile.

        Args:
            input_ids: int64 or int32 [B, L], what the tokens go on with; of ``ReformerSeq2Seq`` the source.
            attention_mask: [B, L], 1: a token, 0: padding, on either side.
            generator: the random state of ``do_sample``; None: torch's.
            options: ``max_new_tokens``, and other fields of ``GenerationOptions``: ``min_new_tokens``, ``do_sample``,
                ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``,
                ``early_stopping``, ``num_return_sequences``, ``eos_token_id``, and ``pad_token_id``, which the
                configuration has, too.

        Returns:
            int64 [B * num_return_sequences, L + N]: the prompt (of ``ReformerSeq2Seq``: the start token) and up to
            max_new_tokens more; ``pad_token_id`` behind the end of a sequence.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value, or a sequence gets too long.
            NotImplementedError: the model's rules are not those of a cache, see ``new_cache``.
        """
        chosen = make_options(options, self.pad_token_id)
        with evaluating(self):
            prompt, mask = self._prompt(input_ids, attention_mask)
            new = generate(CachedDecoder(self, input_ids, attention_mask), prompt, mask, chosen, generator)
        return torch.cat([prompt.repeat_interleave(len(new) // len(prompt), 0), new], 1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """The new tokens of ``generate``, each as soon as it is there, until all rows have ended.

        Args:
            input_ids, attention_mask, generator, options: as in ``generate``; one beam, one sequence a row.

        Returns:
            An iterator of int64 [B].

        Raises:
            TypeError, ValueError, NotImplementedError: as ``generate``; before the first token.
        """
        chosen = make_options(options, self.pad_token_id)
        prompt, mask = self._prompt(input_ids, attention_mask)
        decoder = CachedDecoder(self, input_ids, attention_mask)
        return self._tokens(stream(decoder, prompt, mask, chosen, generator))

    def _tokens(self, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        while True:
            with evaluating(self):  # not between tokens, when the model is its user's
                token = next(tokens, None)
            if token is None:
                return
            yield token


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
