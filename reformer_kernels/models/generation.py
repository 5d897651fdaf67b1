"""The loop of ``generate``, as in Hugging Face's GenerationMixin: greedy, by sampling, or by beam search."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .base import padding_mask

NEVER = -1e9  # a score below that of any sequence, but finite, as Hugging Face's


class Decoder(Protocol):
    """A model with the state of a batch of sequences."""

    def start(self, rows: int) -> Tensor:
        """Logits [rows, V] of the token after the prompt, each of whose B rows is repeated ``rows // B`` times."""

    def step(self, token_ids: Tensor) -> Tensor:
        """Appends a token (int64 [rows]) to each row, and returns the logits [rows, V] of the next one."""

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` (int64 [rows]) was; ``rows`` may repeat some and leave out others."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How tokens are chosen, and when a sequence ends. Names, defaults and meaning are Hugging Face's.

    Args:
        max_new_tokens: after so many tokens every sequence ends.
        min_new_tokens: none ends with ``eos_token_id`` before it has so many tokens.
        do_sample: draw tokens by their probability, rather than take the best one.
        temperature: logits are divided by it; of sampling only, as the next two.
        top_k: draw one of so many best tokens (and those equal to the last of them); None or 0: of all.
        top_p: draw one of the fewest best tokens whose probabilities sum up to it.
        repetition_penalty: logits of tokens in the prompt or generated so far are divided by it, or multiplied if they
            are negative. In beam search, log probabilities are.
        num_beams: sequences that beam search follows for each row; 1: no beam search.
        length_penalty: beam search divides the log probability of a sequence by (new tokens) ** length_penalty.
        early_stopping: beam search ends a row with the first ``num_beams`` ended sequences; else when the best open one
            is worse than those.
        num_return_sequences: for each row: samples, or the best beams.
        eos_token_id: a token, or one of several, that ends a sequence; None: none does.
        pad_token_id: what follows an ended sequence.

    Raises:
        TypeError, ValueError: a field has a wrong type or value, or two do not fit.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            check.check_int(name, getattr(self, name), 1)
        for name in ("min_new_tokens", "pad_token_id"):
            check.check_int(name, getattr(self, name), 0)
        if self.top_k is not None:
            check.check_int("top_k", self.top_k, 0)
        for name in ("do_sample", "early_stopping"):
            check.check_bool(name, getattr(self, name))
        for name in ("temperature", "repetition_penalty"):
            _check_number(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _check_number("length_penalty", self.length_penalty)
        check.check_fraction("top_p", self.top_p)
        if not isinstance(self.eos_token_id, (int, Sequence, type(None))):
            raise TypeError(f"eos_token_id must be an int, a sequence of them or None, got {self.eos_token_id!r}")
        for token_id in self.eos_token_ids:
            check.check_int("eos_token_id", token_id, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens, {self.max_new_tokens}, got {self.min_new_tokens}"
            )
        self._check_sequences()
        if not self.do_sample:
            self._warn_of("do_sample=True", "temperature", "top_k", "top_p")
        if self.num_beams == 1:
            self._warn_of("num_beams above 1", "length_penalty", "early_stopping")

    def _warn_of(self, needed: str, *names: str) -> None:
        for name in names:
            default = self.__dataclass_fields__[name].default
            if getattr(self, name) != default:
                warnings.warn(f"{name}={getattr(self, name)} has no effect without {needed}", stacklevel=4)

    def _check_sequences(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"num_beams must be 1 with do_sample=True (beams are not sampled), got {self.num_beams}")
        if self.do_sample or self.num_return_sequences <= self.num_beams:
            return
        if self.num_beams > 1:
            raise ValueError(
                f"num_return_sequences must be at most num_beams, {self.num_beams}, got {self.num_return_sequences}"
            )
        raise ValueError(
            "num_return_sequences must be 1 without do_sample=True or num_beams (there is one greedy sequence), "
            f"got {self.num_return_sequences}"
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    options: GenerationOptions,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens that follow each row of the prompt: int64 [B * num_return_sequences, N], N at most max_new_tokens.

    The sequences of a row are beside each other, of beam search the best one first. The longest one has N tokens.

    Args:
        decoder: has read the prompt, or does so when it is started. It is started once.
        prompt_ids: int64 or int32 [B, L], whose tokens ``repetition_penalty`` counts.
        prompt_mask: [B, L], 1: a token, 0: padding.
        options: how to choose tokens.
        generator: what samples are drawn by, on the device of the logits; None: torch's own.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """
    padding = _check(prompt_ids, prompt_mask, options)
    if options.num_beams > 1:
        return _search_beams(decoder, prompt_ids, padding, options)
    return torch.stack(list(_choose_tokens(decoder, prompt_ids, padding, options, generator)), dim=1)


def stream(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    options: GenerationOptions,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The columns of ``generate``, int64 [B], each as soon as it is there, until all rows have ended.

    Args:
        decoder, prompt_ids, prompt_mask, options, generator: as in ``generate``, with one sequence for each row and no
            beams.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """
    padding = _check(prompt_ids, prompt_mask, options)
    for name in ("num_beams", "num_return_sequences"):
        if getattr(options, name) != 1:
            raise ValueError(f"{name} must be 1 to stream tokens, got {getattr(options, name)}")
    return _choose_tokens(decoder, prompt_ids, padding, options, generator)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check(prompt_ids: Tensor, prompt_mask: Tensor | None, options: GenerationOptions) -> Tensor | None:
    """bool [B, L], True: padding."""
    if not isinstance(options, GenerationOptions):
        raise TypeError(f"options must be GenerationOptions, got {options!r}")
    check.check_tensor("prompt_ids", prompt_ids, "B L", (torch.int64, torch.int32))
    if not len(prompt_ids):
        raise ValueError(f"prompt_ids must have at least one row, got shape {list(prompt_ids.shape)}")
    return padding_mask(prompt_mask, prompt_ids, "prompt_mask")


def _check_vocabulary(options: GenerationOptions, vocab_size: int) -> None:
    for token_id in options.eos_token_ids:
        check.check_int("eos_token_id", token_id, 0, vocab_size - 1)
    check.check_int("pad_token_id", options.pad_token_id, 0, vocab_size - 1)


@torch.no_grad()
def _choose_tokens(
    decoder: Decoder,
    prompt_ids: Tensor,
    padding: Tensor | None,
    options: GenerationOptions,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """int64 [B * num_return_sequences] at a time."""
    rows = len(prompt_ids) * options.num_return_sequences
    logits = decoder.start(rows)
    _check_vocabulary(options, logits.shape[1])
    eos = torch.tensor(options.eos_token_ids, dtype=torch.int64, device=logits.device)
    seen = _tokens_of_prompt(prompt_ids, padding, rows, logits)
    ended = torch.zeros(rows, dtype=torch.bool, device=logits.device)
    for length in range(1, options.max_new_tokens + 1):
        scores = _constrain(logits.float(), seen, eos, length, options)
        if options.do_sample:
            probabilities = _narrow(scores, options).softmax(dim=-1)
            token_ids = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        else:
            token_ids = scores.argmax(dim=-1)
        token_ids = token_ids.masked_fill(ended, options.pad_token_id)
        yield token_ids
        ended = ended | torch.isin(token_ids, eos)
        if length == options.max_new_tokens or (options.eos_token_ids and ended.all()):
            return
        seen = _with_tokens(seen, token_ids)
        logits = decoder.step(token_ids)


def _search_beams(decoder: Decoder, prompt_ids: Tensor, padding: Tensor | None, options: GenerationOptions) -> Tensor:
    """int64 [B * num_return_sequences, N].

    Each step extends the open sequences of a row by every token. Of the best so many ``candidates``, enough that not
    all of them end, the best open ones go on, and an ended one is kept if it is one of the best K of this step and of
    all ended ones.
    """
    B, K, T = len(prompt_ids), options.num_beams, options.max_new_tokens
    logits = decoder.start(B * K)
    V, device = logits.shape[1], logits.device
    _check_vocabulary(options, V)
    eos = torch.tensor(options.eos_token_ids, dtype=torch.int64, device=device)
    candidates = min(max(2, 1 + len(eos)), V) * K
    seen = _tokens_of_prompt(prompt_ids, padding, B * K, logits)
    first_rows = torch.arange(0, B * K, K, device=device).unsqueeze(1)  # [B, 1]

    open_ids = torch.full((B, K, T), options.pad_token_id, device=device)
    open_scores = torch.full((B, K), NEVER, dtype=torch.float32, device=device)
    open_scores[:, 0] = 0.0  # the others are the same sequence as yet
    ended_ids = open_ids
    ended_scores = torch.full((B, K), NEVER, dtype=torch.float32, device=device)  # the best first
    ended_lengths = torch.zeros(B, K, dtype=torch.int64, device=device)
    searching = torch.ones(B, 1, dtype=torch.bool, device=device)
    for length in range(1, T + 1):
        log_probs = _constrain(F.log_softmax(logits.float(), dim=-1), seen, eos, length, options)
        sums = (log_probs.view(B, K, V) + open_scores.unsqueeze(-1)).flatten(1)
        scores, index = sums.topk(candidates)
        parents, token_ids = index // V, index % V  # [B, candidates]
        ids = _rows_of(open_ids, parents)
        ids[:, :, length - 1] = token_ids
        ends = torch.isin(token_ids, eos) | (length == T)

        counts = ends[:, :K] & searching
        new_scores = (scores[:, :K] / length**options.length_penalty).masked_fill(~counts, -math.inf)
        ended_scores, kept = torch.cat((ended_scores, new_scores), dim=1).topk(K)
        ended_ids = _rows_of(torch.cat((ended_ids, ids[:, :K]), dim=1), kept)
        new_lengths = torch.full_like(ended_lengths, length)
        ended_lengths = torch.cat((ended_lengths, new_lengths), dim=1).gather(1, kept)

        open_scores, going_on = scores.masked_fill(ends, -math.inf).topk(K)
        worst_score = ended_scores[:, -1:]
        searching = searching & (open_scores[:, :1] / length**options.length_penalty > worst_score)
        if options.early_stopping:
            searching = searching & (worst_score <= NEVER)
        if length == T or not searching.any():
            break
        open_ids = _rows_of(ids, going_on)
        rows = (first_rows + parents.gather(1, going_on)).flatten()
        next_ids = token_ids.gather(1, going_on).flatten()
        seen = _with_tokens(seen[rows], next_ids)
        decoder.reorder(rows)
        logits = decoder.step(next_ids)
    n = options.num_return_sequences
    return ended_ids[:, :n, : int(ended_lengths[:, :n].max())].flatten(0, 1)


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """[B, K, T], [B, n] -> [B, n, T]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _tokens_of_prompt(prompt_ids: Tensor, padding: Tensor | None, rows: int, logits: Tensor) -> Tensor:
    """bool [rows, V]: which tokens a row has; one of the padding counts as token V."""
    V = logits.shape[1]
    ids = prompt_ids.to(logits.device, torch.int64)
    if padding is not None:
        ids = ids.masked_fill(padding.to(logits.device), V)
    found = torch.zeros(len(ids), V + 1, dtype=torch.bool, device=logits.device).scatter(1, ids, True)[:, :V]
    return found.repeat_interleave(rows // len(ids), dim=0)


def _with_tokens(seen: Tensor, token_ids: Tensor) -> Tensor:
    return seen.scatter(1, token_ids.unsqueeze(1), True)


def _constrain(scores: Tensor, seen: Tensor, eos: Tensor, length: int, options: GenerationOptions) -> Tensor:
    """Logits or log probabilities [rows, V] of the length-th new token, with what every way of choosing respects."""
    if options.repetition_penalty != 1:
        scores = penalize_repetition(scores, seen, options.repetition_penalty)
    return scores.index_fill(1, eos, -math.inf) if length <= options.min_new_tokens else scores


def _narrow(logits: Tensor, options: GenerationOptions) -> Tensor:
    """Logits [rows, V] to sample from."""
    logits = logits / options.temperature
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    return keep_top_p(logits, options.top_p) if options.top_p < 1 else logits


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores [rows, V] of the tokens that are seen (bool [rows, V]) become worse if the penalty is above 1."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf where k others of the row are larger."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf but for the fewest tokens of the largest probability that sum up to p; at least one of them is left."""
    ordered, index = logits.sort(dim=-1)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, index, removed), -math.inf)
