"""Reformer: the trunk of every model, an encoder or a decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int, check_tensor
from ..modules.attention import LocalSelfAttention, LSHSelfAttention
from ..modules.feed_forward import ChunkedFeedForward, TokenChunks
from ..modules.full_attention import FullAttention
from ..modules.position import (
    AxialPositionEmbedding,
    LearnedPositionEmbedding,
    SinusoidalPositionEmbedding,
    check_row_positions,
)
from ..modules.reversible import ReversibleBlock, ReversibleSequence
from .base import PretrainedModel, check_ids, initialize, padding_mask
from .cache import Cache, check_cache
from .config import ReformerConfig
from .outputs import ReformerOutput

ROTARY_BASE = 10000.0


class Reformer(PretrainedModel):
    """Token and position embeddings, and reversible layers of attention and feed-forward (arXiv 2001.04451).

    Both residual streams start from the embeddings. Every layer is normalised first; layers alternate between the
    streams, so with ``context_dim`` in the configuration self-attention, attention to the context and feed-forward
    do, too (as trax). Any length from 1 to ``config.longest`` works: nothing has to be padded to chunks.

    Args:
        config: the architecture.

    Raises:
        TypeError: config is no ``ReformerConfig``.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        if not isinstance(config, ReformerConfig):
            raise TypeError(f"config must be a ReformerConfig, got {type(config).__name__}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position = _position(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        halves = _halves(config)
        self._kinds = [kind for kind, _ in halves]
        modules = [module for _, module in halves]
        pairs = [(modules[i], modules[i + 1] if i + 1 < len(modules) else None) for i in range(0, len(modules), 2)]
        self.layers = ReversibleSequence(
            [ReversibleBlock(f, g) for f, g in pairs],
            reversible=config.reversible,
            min_length=config.reversible_min_length,
            stream_dtype=config.torch_stream_dtype,
        )
        self.merge = MergeStreams(config)
        initialize(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        n_hashes: int | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> ReformerOutput:
        """The final hidden state.

        Args:
            input_ids: int64 or int32 [B, L].
            attention_mask: [B, L], 1: a token, 0: padding, on either side, which nobody attends to. A row is computed
                as if it were alone, with ``alignment="bucket"``, or a fixed ``n_buckets`` and rules that cut padding.
            inputs_embeds: [B, L, E], in the place of the embeddings of ``input_ids``.
            context: [B, S, context_dim], if the configuration has a ``context_dim``.
            context_mask: [B, S], as ``attention_mask``.
            n_hashes: in the place of the configuration's, for example more of them in evaluation.
            position_ids: integers [L] or [B, L]; None: they count from the first token of a row.
            cache: of ``new_cache``. The tokens go on with what it has, and layers have no gradients. The context counts
                in its first step.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value, or a sequence is too long.
        """
        streams = self.streams(
            input_ids, attention_mask, inputs_embeds, context, context_mask, n_hashes, position_ids, cache
        )
        return ReformerOutput(self.merge(torch.cat(streams, dim=-1)))

    def streams(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        n_hashes: int | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two final streams [B, L, E], which ``merge`` makes the hidden state of."""
        tokens = self._tokens(input_ids, inputs_embeds)
        mask = padding_mask(attention_mask, tokens)
        order = None
        if mask is not None:  # padding goes to the end, where it has no effect
            order = mask.to(torch.int8).argsort(dim=1, stable=True)
            tokens, mask = _reordered(tokens, order), mask.gather(1, order)
        if position_ids is not None:
            check_row_positions("position_ids", position_ids, tokens[:, :, None] if tokens.dim() == 2 else tokens)
            position_ids = position_ids.expand(tokens.shape[:2])
            position_ids = position_ids if order is None else position_ids.gather(1, order)
        kwargs = {"context": self._context_kwargs(tokens, context, context_mask, cache)}
        if n_hashes is not None:
            check_int("n_hashes", n_hashes, 1)
        if cache is not None:
            if n_hashes not in (None, self.config.n_hashes):
                raise ValueError(
                    f"n_hashes must be None with a cache, which has {self.config.n_hashes}, got {n_hashes}"
                )
            check_cache(cache, len(self._kinds))
            with torch.no_grad():
                streams = self._step(tokens, mask, position_ids, kwargs["context"], cache)
        else:
            own: dict[str, Any] = {"key_padding_mask": mask, "positions": position_ids}
            kwargs |= {"local": own, "full": own, "lsh": {**own, "n_hashes": n_hashes}, "feed_forward": {}}
            x = self._embed(tokens, position_ids)
            streams = self._through(x, [kwargs[kind] for kind in self._kinds])
        if order is None:
            return streams
        back = order.argsort(1)
        return _reordered(streams[0], back), _reordered(streams[1], back)

    def new_cache(self, *, max_crop: int = 0) -> Cache:
        """An empty cache, for ``forward`` in evaluation mode, whose rotations it has. Weights must not change.

        Args:
            max_crop: so many of the last tokens ``cache.crop`` can forget; local and LSH layers keep so many more.

        Raises:
            ValueError: the model is not causal.
            NotImplementedError: its rules or windows are not those of a cache.
        """
        check_int("max_crop", max_crop, 0)
        with torch.no_grad():
            layers = [
                None if kind == "feed_forward" else module.layer.new_cache(max_crop)
                for kind, module in zip(self._kinds, self._modules_of_halves(), strict=True)
            ]
        return Cache(layers, max_crop, self.config.longest)

    def _step(
        self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor | None, context: dict[str, Any], cache: Cache
    ) -> tuple[Tensor, Tensor]:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else ~mask
        if position_ids is not None:
            raise ValueError("position_ids must be None with a cache, whose rows know their positions")
        step = cache.begin(valid)
        longest = self.config.longest
        x = self._embed(tokens, step.position if longest is None else step.position.clamp(max=longest - 1))
        kwargs: list[dict[str, Any]] = []
        for kind, layer in zip(self._kinds, cache.layers, strict=True):
            own = {} if layer is None else {"cache": layer, "step": step}
            kwargs.append({**own, **context} if kind == "context" else own)
        streams = self._through(x, kwargs)
        cache.end(step, mask is not None)
        return streams

    def _modules_of_halves(self) -> list[Any]:
        blocks: list[Any] = list(self.layers.blocks)
        return [half for block in blocks for half in (block.f, block.g) if half is not None]

    def _through(self, x: Tensor, kwargs: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        f_kwargs, g_kwargs = kwargs[0::2], kwargs[1::2]
        if len(kwargs) % 2:
            g_kwargs.append({})
        streams: tuple[Tensor, Tensor] = self.layers(x, f_kwargs, g_kwargs)
        return streams

    def _context_kwargs(
        self, tokens: Tensor, context: Tensor | None, context_mask: Tensor | None, cache: Cache | None
    ) -> dict[str, Any]:
        for name, given in (("context", context), ("context_mask", context_mask)):
            if given is not None and self.config.context_dim is None:
                raise ValueError(f"{name} must be None, as the configuration has no context_dim, got a tensor")
        if self.config.context_dim is None or (context is None and cache is not None and cache.lengths is not None):
            return {}
        check_context("context", context, tokens, self.config.context_dim)
        assert context is not None
        return {"context": context, "key_padding_mask": padding_mask(context_mask, context, "context_mask")}

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Ids [B, L] or embeddings [B, L, E]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
            assert input_ids is not None
            return input_ids
        width = self.config.embed_dim
        if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:
            got = list(inputs_embeds.shape) if isinstance(inputs_embeds, Tensor) else type(inputs_embeds).__name__
            raise ValueError(f"inputs_embeds must have shape [B, L, {width}], got {got}")
        check_tensor("inputs_embeds", inputs_embeds, "B L E")
        return inputs_embeds

    def _embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        x = self.embedding(tokens) if tokens.dim() == 2 else tokens
        length, longest = x.shape[1], self.config.longest
        if longest is not None and length > longest:
            raise ValueError(f"the sequence must be at most max_length {longest} tokens long, got {length}")
        if self.position is not None:
            if positions is None:
                positions = torch.arange(length, device=x.device)
            x = x + self.position(positions).to(x.dtype)
        embedded: Tensor = self.dropout(x)
        return embedded


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x [B, L, ...] in another order [B, L] of each row."""
    return x.gather(1, order if x.dim() == 2 else order[..., None].expand(x.shape))


class ReformerModel(PretrainedModel):
    """What stands on one trunk: ``reformer``, and its ``config``.

    Args:
        config: the architecture; where a subclass is causal or not by its nature, its own ``config`` says so.

    Raises:
        TypeError: config is no ``ReformerConfig``.
    """

    causal: bool | None = None  # None: as the configuration says

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.reformer = Reformer(for_model("config", config, self.causal))
        self.config = self.reformer.config


class MergeStreams(nn.Module):
    """Both streams side by side [..., 2 E] -> the final hidden state [..., hidden_dim]: concat or mean, and norm."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.mean = config.streams == "mean"
        self.norm = _norm(config, config.hidden_dim)

    def forward(self, streams: Tensor) -> Tensor:
        merged = streams.unflatten(-1, (2, -1)).mean(dim=-2) if self.mean else streams
        out: Tensor = self.norm(merged.to(self.norm.weight.dtype))
        return out


class Residual(nn.Module):
    """What a layer adds to a stream: ``dropout(layer(norm(x)))``."""

    def __init__(self, config: ReformerConfig, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer, self.dropout = _norm(config), layer, nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        layer: Any = self.layer
        out: Tensor = self.dropout((layer.step if "cache" in kwargs else layer)(self.norm(x), **kwargs))
        return out


def _norm(config: ReformerConfig, width: int | None = None) -> nn.LayerNorm | nn.RMSNorm:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(width or config.embed_dim, eps=config.norm_eps)


def _halves(config: ReformerConfig) -> list[tuple[str, nn.Module]]:
    """The kinds and modules of all halves of reversible blocks, in order; tied ones are the same module."""
    tied: dict[str, nn.Module] = {}
    halves = []
    for i, attention in enumerate(config.layers):
        for kind in (attention, *(["context"] if config.context_dim else []), "feed_forward"):
            module = tied[kind] if kind in tied else _half(config, kind, i)
            if config.tie_layers:
                tied[kind] = module
            halves.append((kind, module))
    return halves


def _half(config: ReformerConfig, kind: str, layer: int) -> nn.Module:
    if kind == "feed_forward":
        feed_forward = ChunkedFeedForward(
            config.embed_dim,
            config.feed_forward_dim,
            activation=config.activation,
            glu=config.glu,
            dropout=config.hidden_dropout,
            chunk_length=None,  # the chunks are those of the whole half
        )
        return TokenChunks(Residual(config, feed_forward), config.feed_forward_chunk_length)
    options: dict[str, Any] = {
        "head_dim": config.head_dim,
        "dropout": config.attention_dropout,
        "bias": config.attention_bias,
    }
    if kind == "context":
        return Residual(
            config, FullAttention(config.embed_dim, config.num_heads, context_dim=config.context_dim, **options)
        )
    options |= {"causal": config.causal, "rotary_base": ROTARY_BASE if config.position == "rotary" else None}
    attention: nn.Module
    if kind == "local":
        attention = LocalSelfAttention(
            config.embed_dim,
            config.num_heads,
            chunk_length=config.local_chunk_length,
            chunks_before=config.local_chunks_before,
            chunks_after=config.local_chunks_after,
            **options,
        )
    elif kind == "full":
        attention = FullAttention(config.embed_dim, config.num_heads, memory_keys=config.memory_keys, **options)
    else:
        attention = LSHSelfAttention(
            config.embed_dim,
            config.num_heads,
            n_hashes=config.n_hashes,
            n_buckets=config.lsh_buckets,
            chunk_length=config.lsh_chunk_length,
            chunks_before=config.lsh_chunks_before,
            chunks_after=config.lsh_chunks_after,
            rules=config.attention_rules,
            alignment=config.lsh_alignment,
            shift_keys=config.causal and config.shift_keys,
            hash_seed=None if config.hash_seed is None else _next_seed(config.hash_seed, layer),
            memory_keys=config.memory_keys,
            **options,
        )
    return Residual(config, attention)


def _next_seed(seed: int, layer: int) -> int:
    """Another one for every layer; after the largest int64 comes the smallest."""
    return (seed + layer + 2**63) % 2**64 - 2**63


def _position(config: ReformerConfig) -> nn.Module | None:
    width, std = config.embed_dim, config.initializer_range
    if config.position == "axial":
        return AxialPositionEmbedding(width, config.axes, config.axial_dims, init_std=std)
    if config.position == "learned":
        assert config.longest is not None
        return LearnedPositionEmbedding(width, config.longest, init_std=std)
    return SinusoidalPositionEmbedding(width) if config.position == "sinusoidal" else None


def check_context(name: str, context: Any, x: Tensor, width: int) -> None:
    """[B, S, width], for x [B, L, E]."""
    if not isinstance(context, Tensor):
        raise TypeError(f"{name} must be a tensor [B, S, {width}], got {type(context).__name__}")
    if context.dim() != 3 or context.shape[0] != x.shape[0] or context.shape[2] != width:
        raise ValueError(f"{name} must have shape [{x.shape[0]}, S, {width}], got {list(context.shape)}")


def for_model(name: str, config: Any, causal: bool | None = None, context_dim: int | None = None) -> ReformerConfig:
    """The configuration of a model that by its nature is causal or not, or may be both, and has a context or not."""
    if not isinstance(config, ReformerConfig):
        raise TypeError(f"{name} must be a ReformerConfig, got {type(config).__name__}")
    return replace(config, causal=config.causal if causal is None else causal, context_dim=context_dim)
