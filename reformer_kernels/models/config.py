"""ReformerConfig: everything that decides a model's architecture, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .. import _checks as check
from ..functional import MAX_NEIGHBOURS
from ..hashing import bucket_factors
from ..modules.feed_forward import ACTIVATIONS, DEFAULT_CHUNK_LENGTH
from ..rules import AttentionRules

ATTENTION_KINDS = ("lsh", "local", "full")
POSITIONS = ("axial", "learned", "sinusoidal", "rotary", "none")
RULES = ("default", "trax", "paper", "lucidrains", "huggingface")
STREAM_DTYPES = ("float32", "float64")
DEFAULT_MAX_LENGTH = 65536
TYPICAL_LENGTH = 4096


@dataclass(frozen=True)
class ReformerConfig:
    """The architecture of a Reformer. Lists are taken as tuples; every value is checked.

    Args:
        vocab_size: V, number of token ids.
        embed_dim: E, width of each of the two residual streams.
        num_layers: attention layers, each with a feed-forward layer.
        num_heads, head_dim: H and D; ``head_dim=None``: ``embed_dim // num_heads``.
        attention: the kinds of the layers, of "lsh", "local" and "full" (softmax attention to everything), repeated
            until there are ``num_layers``.
        causal: no token sees later ones. With ``alignment="ring"`` they have a say in what LSH layers offer to it.
        context_dim: width of another sequence that every layer also attends, as a decoder does; None: there is none.
        n_hashes: rounds of the LSH layers.
        alignment: of the LSH layers, "ring" (as published) or "bucket", as in ``lsh_attention``, which says what makes
            a row depend on its batch. None: "bucket" if causal, else "ring".
        shift_keys: of the LSH layers of a causal model, as in ``lsh_attention``; False as published.
        n_buckets: of the LSH layers. None: in a ring twice as many as a sequence has chunks; in buckets, whose number
            must not depend on the sequence, twice as many as one of ``max_length`` or all of ``axial_shape`` has, or
            of 4,096 without both.
        hash_seed: an int fixes the rotations; None draws new ones in every training forward.
        rules: the name of a preset of ``AttentionRules``, for the LSH layers: "default", "trax", "paper",
            "lucidrains" or "huggingface".
        lsh_chunk_length, lsh_chunks_before, lsh_chunks_after: windows of the LSH layers.
        local_chunk_length, local_chunks_before, local_chunks_after: windows of the local layers.
        attention_bias: give the attention projections a bias.
        memory_keys: learned keys that every query of an LSH or full layer sees.
        feed_forward_dim: F; None: as in ``ChunkedFeedForward``.
        activation, glu: of the feed-forward layers, as in ``ChunkedFeedForward``.
        feed_forward_chunk_length: tokens at a time in the feed-forward layers; None: all, as when compiled.
        head_chunk_length: tokens at a time in language model heads and their loss; None: all, as when compiled.
        attention_dropout: probability of dropping an attention weight.
        hidden_dropout: the same for embeddings, hidden activations and the output of every layer.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm), before every layer and at the end.
        norm_eps: added to the variance.
        position: "axial", "learned", "sinusoidal", "rotary" or "none".
        max_length: of a sequence, for axial and learned positions. None: all of ``axial_shape``, or 65,536.
        axial_shape: the axes' lengths; None: two axes of about the same length.
        axial_dims: their widths, which sum up to ``embed_dim``, to concatenate; None: all have ``embed_dim`` and are
            summed.
        tie_layers: layers of a kind share their weights, and so do all feed-forward layers.
        tie_embeddings: language model heads use the weights of the token embedding; needs ``streams="mean"``.
        streams: how the two residual streams become the final hidden state: "concat" (2 E wide, as trax and Hugging
            Face) or "mean" (E wide, as lucidrains).
        reversible: reconstruct activations in backward; False stores them, which is faster.
        reversible_min_length: shorter sequences store their activations.
        stream_dtype: the residual streams have at least this dtype, "float32" or "float64", whatever the weights have.
            float64 makes the reconstruction exact. None: that of the weights; half types then lose much.
        pad_token_id: what stands for ignored labels in the input of a decoder.
        decoder_start_token_id: the first token in the input of a decoder.
        num_labels: of a sequence classifier; 1 is regression.
        pooling: what a sequence classifier sees: the "first" or "last" token that is attended, or the "mean" of all.
        initializer_range: standard deviation of the initial weights.

    Raises:
        TypeError, ValueError: a field has a wrong type or value, or two do not fit.
    """

    vocab_size: int = 256
    embed_dim: int = 512
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int | None = None
    attention: tuple[str, ...] = ("local", "lsh")
    causal: bool = False
    context_dim: int | None = None
    n_hashes: int = 4
    n_buckets: int | tuple[int, ...] | None = None
    alignment: str | None = None
    shift_keys: bool = True
    hash_seed: int | None = None
    rules: str = "default"
    lsh_chunk_length: int = 64
    lsh_chunks_before: int = 1
    lsh_chunks_after: int = 0
    local_chunk_length: int = 64
    local_chunks_before: int = 1
    local_chunks_after: int = 0
    attention_bias: bool = False
    memory_keys: int = 0
    feed_forward_dim: int | None = None
    activation: str = "gelu"
    glu: bool = False
    feed_forward_chunk_length: int | None = DEFAULT_CHUNK_LENGTH
    head_chunk_length: int | None = DEFAULT_CHUNK_LENGTH
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    norm: str = "layer"
    norm_eps: float = 1e-6
    position: str = "axial"
    max_length: int | None = None
    axial_shape: tuple[int, ...] | None = None
    axial_dims: tuple[int, ...] | None = None
    tie_layers: bool = False
    tie_embeddings: bool = False
    streams: str = "concat"
    reversible: bool = True
    reversible_min_length: int = 0
    stream_dtype: str | None = "float32"
    pad_token_id: int = 0
    decoder_start_token_id: int = 0
    num_labels: int = 2
    pooling: str = "first"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in _POSITIVE:
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check.check_int(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            check.check_int(name, getattr(self, name), 0)
        for name in _NEIGHBOURS:
            check.check_int(name, getattr(self, name), 0, MAX_NEIGHBOURS)
        for name in _BOOLS:
            check.check_bool(name, getattr(self, name))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check.check_choice(name, getattr(self, name), allowed)
        for name in ("attention_dropout", "hidden_dropout"):
            check.check_fraction(name, getattr(self, name))
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a float, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.hash_seed is not None:
            check.check_int("hash_seed", self.hash_seed, -(2**63), 2**63 - 1)
        for name in ("pad_token_id", "decoder_start_token_id"):
            check.check_int(name, getattr(self, name), 0, self.vocab_size - 1)
        self._check_layers()
        self._check_positions()
        if self.tie_embeddings and self.streams != "mean":
            raise ValueError(
                f'streams must be "mean" with tie_embeddings (the head has to be as wide as the embedding), '
                f"got {self.streams!r}"
            )

    def _check_layers(self) -> None:
        if not isinstance(self.attention, tuple) or not self.attention:
            raise TypeError(f"attention must be a tuple of kinds of layers, {ATTENTION_KINDS}, got {self.attention!r}")
        for kind in self.attention:
            check.check_choice("attention", kind, ATTENTION_KINDS)
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads unless head_dim is given, got {self.embed_dim} and "
                f"{self.num_heads}"
            )
        bucket_factors(self.n_buckets, 1, 1)
        if self.memory_keys and set(self.layers) == {"local"}:
            raise ValueError(
                f"memory_keys must be 0 without LSH and full layers (local ones have none), got {self.memory_keys}"
            )

    def _check_positions(self) -> None:
        for name in ("axial_shape", "axial_dims"):
            axes = getattr(self, name)
            if axes is None:
                continue
            if not isinstance(axes, tuple) or not axes:
                raise TypeError(f"{name} must be None or a tuple of integers, got {axes!r}")
            for axis in axes:
                check.check_int(name, axis, 1)
        if self.position == "rotary" and self.attention_dim % 2:
            raise ValueError(f'head_dim must be even with position="rotary", got {self.attention_dim}')
        if self.position != "axial":
            return
        shape = self.axes
        if math.prod(shape) < (self.longest or 0):
            raise ValueError(f"axial_shape must have a product of at least max_length {self.max_length}, got {shape}")
        if self.axial_dims is not None:
            if len(self.axial_dims) != len(shape):
                raise ValueError(f"axial_dims must have one width for each axis of {shape}, got {self.axial_dims}")
            if sum(self.axial_dims) != self.embed_dim:
                raise ValueError(f"axial_dims must sum up to embed_dim {self.embed_dim}, got {self.axial_dims}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return tuple(self.attention[i % len(self.attention)] for i in range(self.num_layers))

    @property
    def lsh_alignment(self) -> str:
        """``alignment`` of the LSH layers."""
        return self.alignment or ("bucket" if self.causal else "ring")

    @property
    def lsh_buckets(self) -> int | tuple[int, ...] | None:
        """``n_buckets`` of the LSH layers; None: as many as fit each sequence."""
        if self.n_buckets is None and self.lsh_alignment == "bucket":
            length = self.max_length or math.prod(self.axial_shape or (TYPICAL_LENGTH,))
            return bucket_factors(None, length, self.lsh_chunk_length)
        return self.n_buckets

    @property
    def attention_dim(self) -> int:
        """D, the size of a head."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Width of the final hidden state."""
        return 2 * self.embed_dim if self.streams == "concat" else self.embed_dim

    @property
    def longest(self) -> int | None:
        """The longest sequence; None: any."""
        if self.position not in ("axial", "learned"):
            return None
        if self.max_length is not None:
            return self.max_length
        return math.prod(self.axial_shape) if self.position == "axial" and self.axial_shape else DEFAULT_MAX_LENGTH

    @property
    def axes(self) -> tuple[int, ...]:
        """The lengths of the axes of axial positions."""
        if self.axial_shape is not None:
            return self.axial_shape
        longest = DEFAULT_MAX_LENGTH if self.max_length is None else self.max_length
        columns = 2 ** math.ceil(math.log2(math.sqrt(longest)))
        return (math.ceil(longest / columns), columns)

    @property
    def attention_rules(self) -> AttentionRules:
        """``rules`` as an object."""
        return AttentionRules() if self.rules == "default" else getattr(AttentionRules, self.rules)()

    @property
    def torch_stream_dtype(self) -> torch.dtype | None:
        """``stream_dtype`` as a dtype."""
        return None if self.stream_dtype is None else getattr(torch, self.stream_dtype)

    def to_dict(self) -> dict[str, Any]:
        """All fields and their values, which ``from_dict`` makes an equal configuration of."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReformerConfig:
        """Fields that are not given have their defaults.

        Raises:
            TypeError, ValueError: as the constructor; also for a name that is no field.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"the configuration must be a mapping of fields to values, got {type(values).__name__}")
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"the configuration has unknown fields {unknown}; known are {sorted(names)}")
        return cls(**values)

    def to_json(self) -> str:
        """All fields as a JSON object, which ``from_json`` makes an equal configuration of."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ReformerConfig:
        """The configuration of which ``to_json`` made this text.

        Raises:
            TypeError, ValueError: it is no JSON object of known fields with allowed values.
        """
        return cls.from_dict(json.loads(text))


_POSITIVE = (
    "vocab_size", "embed_dim", "num_layers", "num_heads", "head_dim", "context_dim", "n_hashes", "lsh_chunk_length",
    "local_chunk_length", "feed_forward_dim", "feed_forward_chunk_length", "head_chunk_length", "max_length",
    "num_labels",
)  # fmt: skip
_NOT_NEGATIVE = ("memory_keys", "reversible_min_length")
_NEIGHBOURS = ("lsh_chunks_before", "lsh_chunks_after", "local_chunks_before", "local_chunks_after")
_BOOLS = ("causal", "attention_bias", "glu", "tie_layers", "tie_embeddings", "reversible", "shift_keys")
_CHOICES: dict[str, tuple[str, ...]] = {
    "alignment": ("ring", "bucket"),
    "rules": RULES,
    "activation": tuple(ACTIVATIONS),
    "norm": ("layer", "rms"),
    "position": POSITIONS,
    "streams": ("concat", "mean"),
    "stream_dtype": STREAM_DTYPES,
    "pooling": ("first", "last", "mean"),
}
_OPTIONAL = (
    "head_dim", "context_dim", "feed_forward_dim", "feed_forward_chunk_length", "head_chunk_length", "max_length",
    "stream_dtype", "alignment",
)  # fmt: skip
