"""Feed-forward layers and losses computed in chunks of tokens, so that wide activations never exist for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import FLOATING, check_bool, check_choice, check_fraction, check_int, check_like
from ._buffers import Buffers, buffer_places

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
DEFAULT_CHUNK_LENGTH = 1024


def split_tokens(x: Tensor, chunk_length: int | None) -> Sequence[Tensor]:
    """[..., L, E] in pieces [n, E] of at most ``chunk_length`` tokens; None: x as it is."""
    return [x] if chunk_length is None else _chunks(x.flatten(0, -2), chunk_length)


def _chunks(tokens: Tensor, chunk_length: int | None) -> Sequence[Tensor]:
    # A compiler unrolls loops, into another graph for each number of chunks.
    whole = chunk_length is None or torch.compiler.is_compiling()
    return [tokens] if whole else tokens.split(chunk_length)


def join_tokens(pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return (pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))).reshape(shape)


def can_recompute() -> bool:
    """Whether backward may call a function again: not under ``torch.func`` transforms and in ``torch.export``."""
    return not (torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting())


def _recomputed(module: Any, function: Callable[..., Any], *args: Any) -> Any:
    """The function, which calls the module, of arguments."""
    if not can_recompute():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, context_fn=Buffers(buffer_places(module)).contexts)


class TokenChunks(nn.Module):
    """Applies a module that treats every token by itself to ``chunk_length`` tokens after the other.

    In backward a chunk is computed again, so at no time do activations inside of the module exist for more than one
    chunk. In a ``ReversibleSequence`` that is free: it computes everything again, chunk by chunk. Stored are
    the activations of a lone chunk, and all under ``torch.func`` transforms. What ``torch.compile`` and
    ``torch.export`` make takes all tokens at once.

    Args:
        module: of tokens [n, E], any n, to [n, F].
        chunk_length: tokens at a time, of all sequences of a batch together; None: all.

    Shape: x [..., E] -> [..., F], at least two dimensions.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def __init__(self, module: nn.Module, chunk_length: int | None = DEFAULT_CHUNK_LENGTH) -> None:
        super().__init__()
        if chunk_length is not None:
            check_int("chunk_length", chunk_length, 1)
        self.module, self.chunk_length = module, chunk_length

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] -> [..., F]."""
        if x.dim() < 2:
            raise ValueError(f"x must have at least two dimensions [..., L, E], got shape {list(x.shape)}")
        pieces = split_tokens(x, self.chunk_length)
        if len(pieces) == 1:
            outs = [self.module(pieces[0])]
        else:
            outs = [_recomputed(self.module, self.module, piece) for piece in pieces]
        return join_tokens(outs, (*x.shape[:-1], outs[0].shape[-1]))

    def extra_repr(self) -> str:
        return f"chunk_length={self.chunk_length}"


class ChunkedFeedForward(TokenChunks):
    """The feed-forward layer of a Transformer, in chunks of tokens (arXiv 2001.04451, section 3).

    ``down(dropout(activation(up(x))))``, and with ``glu`` ``down(dropout(activation(gate(x)) * up(x)))``, a gated
    linear unit (arXiv 2002.05202): "sigmoid" gives GLU, "gelu" GEGLU, "silu" SwiGLU.

    Args:
        embed_dim: E, size of the input and the output.
        hidden_dim: F; None: ``4 * embed_dim``, with ``glu`` two thirds of that, so that there are as many weights.
        activation: "gelu", "gelu_tanh", "relu", "silu", "sigmoid", "tanh", "identity", or a function of a tensor that
            treats every token by itself.
        glu: gate the hidden layer.
        dropout: probability of dropping a hidden activation, in training.
        bias: give the layers a bias.
        chunk_length: tokens at a time; None: all. See ``TokenChunks``.
        device, dtype: of the parameters.

    Shape: x [..., L, E] -> [..., L, E].

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        glu: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        chunk_length: int | None = DEFAULT_CHUNK_LENGTH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("embed_dim", embed_dim, 1)
        check_bool("glu", glu)
        if hidden_dim is None:
            hidden_dim = max(1, 8 * embed_dim // 3) if glu else 4 * embed_dim
        check_int("hidden_dim", hidden_dim, 1)
        check_fraction("dropout", dropout)
        if not callable(activation):
            check_choice("activation", activation, tuple(ACTIVATIONS))
        layer = _FeedForward(
            embed_dim, hidden_dim, activation, glu, dropout, {"bias": bias, "device": device, "dtype": dtype}
        )
        super().__init__(layer, chunk_length)


class _FeedForward(nn.Module):
    def __init__(
        self, embed_dim: int, hidden_dim: int, activation: Any, glu: bool, dropout: float, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        self.up = nn.Linear(embed_dim, hidden_dim, **factory)
        self.gate = nn.Linear(embed_dim, hidden_dim, **factory) if glu else None
        self.down = nn.Linear(hidden_dim, embed_dim, **factory)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        activate = self.activation if callable(self.activation) else ACTIVATIONS[self.activation]
        hidden = activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x)
        out: Tensor = self.down(self.dropout(hidden))
        return out

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def chunked_cross_entropy(
    hidden: Tensor | tuple[Tensor, ...],
    head: nn.Module,
    labels: Tensor,
    *,
    chunk_length: int | None = DEFAULT_CHUNK_LENGTH,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(head(hidden), labels)`` without the logits of all tokens: they exist for one chunk at a time.

    What ``torch.compile`` and ``torch.export`` make takes all tokens at once.

    Args:
        hidden: [..., E], floating; or several, which are concatenated, one chunk at a time.
        head: of tokens [n, E] to logits [n, V]: the last linear layer, with a norm before it or not.
        labels: int64 [...], between 0 and V - 1, or ``ignore_index``.
        chunk_length: tokens at a time; None: all.
        ignore_index: label of tokens that do not count.
        label_smoothing: as in ``F.cross_entropy``.
        reduction: "mean" over the tokens that count (0 if there are none), or "sum".

    Returns:
        A scalar, float32 or wider.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """
    parts: tuple[Any, ...] = hidden if isinstance(hidden, tuple) and hidden else (hidden,)
    for part in parts:
        if not isinstance(part, Tensor) or part.dtype not in FLOATING:
            got = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"hidden must be a floating tensor, got {got}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor, got {got}")
    for part in parts:
        if labels.shape != part.shape[:-1]:
            raise ValueError(f"labels must have shape {list(part.shape[:-1])}, got {list(labels.shape)}")
        check_like("labels", labels, "hidden", part)
    check_choice("reduction", reduction, ("mean", "sum"))
    check_fraction("label_smoothing", label_smoothing)
    if chunk_length is not None:
        check_int("chunk_length", chunk_length, 1)

    def loss(targets: Tensor, *tokens: Tensor) -> Tensor:
        logits = head(tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(
            logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
        )

    targets = labels.flatten()
    rows = (targets, *(part.reshape(-1, part.shape[-1]) for part in parts))
    pieces = list(zip(*(_chunks(x, chunk_length) for x in rows), strict=True))
    sums = [loss(*pieces[0])] if len(pieces) == 1 else [_recomputed(head, loss, *piece) for piece in pieces]
    total = torch.stack(sums).sum()
    if reduction == "sum":
        return total
    return total / (targets != ignore_index).sum().clamp(min=1)
