"""Reversible residual blocks: backward reconstructs the activations from the outputs instead of storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._checks import FLOATING, check_bool, check_int
from ._reconstruct import Half, Run
from .feed_forward import can_recompute

Kwargs = Mapping[str, Any]
Function = Callable[..., Tensor]


class ReversibleBlock(nn.Module):
    """Two residual functions on two streams: ``y1 = x1 + f(x2); y2 = x2 + g(y1)`` (RevNet, arXiv 1707.04585).

    By itself a block stores its activations as any module does; a ``ReversibleSequence`` of blocks does not.

    Args:
        f, g: modules or functions of a tensor, and of keyword arguments. ``g=None`` leaves the second stream as it is.
            In a reversible sequence each must do the same when it is called again with the same input, random state,
            parameters and buffers. Buffers of a module that forward changes (running statistics) are changed once.

    Shape: x1, x2 -> y1, y2, of the same shapes: ``f(x2)`` has that of x1, ``g(y1)`` that of x2.

    Raises:
        TypeError: f or g cannot be called.
    """

    def __init__(self, f: Function, g: Function | None = None) -> None:
        super().__init__()
        for name, function in (("f", f), ("g", g)):
            if not callable(function) and not (name == "g" and function is None):
                raise TypeError(f"{name} must be a module or a function, got {type(function).__name__}")
        self.f, self.g = f, g

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        f_kwargs: Kwargs | None = None,
        g_kwargs: Kwargs | None = None,
        *,
        _dtype: torch.dtype | None = None,
        _run: Run | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both streams, and the keyword arguments of f and g. Returns (y1, y2).

        What begins with an underscore is for ``ReversibleSequence``.
        """
        streams = [x1, x2]
        for half in self._halves(f_kwargs, g_kwargs, _dtype):
            x, u = half.of(streams)
            streams[half.target] = half.add(x, u) if _run is None else _uncompiled(_run.add, half, x, u)
        return streams[0], streams[1]

    def inverse(
        self, y1: Tensor, y2: Tensor, f_kwargs: Kwargs | None = None, g_kwargs: Kwargs | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x1, x2) of which ``forward`` makes (y1, y2), to rounding. Random functions need the same random state."""
        streams = [y1, y2]
        for half in reversed(self._halves(f_kwargs, g_kwargs)):
            y, u = half.of(streams)
            streams[half.target] = y - half.call(u).to(y.dtype)
        return streams[0], streams[1]

    def _halves(self, f_kwargs: Kwargs | None, g_kwargs: Kwargs | None, dtype: Any = None) -> list[Half]:
        pairs = ((0, self.f, f_kwargs), (1, self.g, g_kwargs))
        return [
            Half(target, function, kwargs or {}, dtype) for target, function, kwargs in pairs if function is not None
        ]


class ReversibleSequence(nn.Module):
    """Reversible blocks one after the other; memory does not grow with their number (paper section 3).

    Forward keeps the two final streams, the choices of LSH and clustered attention inside (buckets, lists of keys) and
    the random states; backward goes through the blocks in reverse, reconstructs the input of each, and computes its
    functions again under the same random state, choices and autocast, for the tensors that their gradients need.
    Gradients are those of stored activations, to the rounding of the reconstruction; also those of tensors that a
    function has from elsewhere than its parameters.

    Blocks are called as modules: hooks of a block run in forward, those of f and g in forward and again in backward, so
    that FSDP may shard blocks, or f and g. A hook of f or g may change what it gets; one of a block may not change the
    streams. FSDP's mixed precision around a block needs ``cast_forward_inputs=False`` for the same reason.

    Activations are stored, as of any module, when no gradient is needed, under ``torch.func`` transforms, in
    ``torch.export``, and if ``reversible`` or ``min_length`` says so. With gradients, ``torch.compile`` leaves the
    sequence as it is: f and g may be compiled modules. ``fullgraph=True`` then needs ``reversible=False``, and
    raises torch's error with this advice.

    Args:
        blocks: ``ReversibleBlock`` modules; the same block may stand in several places.
        reversible: False stores all activations, which is faster. May be changed at any time.
        min_length: sequences (dimension 1 of the second stream) shorter than this store activations.
        stream_dtype: the streams have at least this dtype, for example float32 with blocks in bfloat16, so that little
            is lost in rounding; f and g get inputs of the dtype of x. None: the streams have that, too.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        blocks: Iterable[ReversibleBlock],
        *,
        reversible: bool = True,
        min_length: int = 0,
        stream_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for i, block in enumerate(self.blocks):
            if not isinstance(block, ReversibleBlock):
                raise TypeError(f"blocks must be ReversibleBlock modules, got {type(block).__name__} at {i}")
        check_bool("reversible", reversible)
        check_int("min_length", min_length, 0)
        if stream_dtype is not None and stream_dtype not in FLOATING:
            raise ValueError(f"stream_dtype must be None or one of {FLOATING}, got {stream_dtype!r}")
        self.reversible, self.min_length, self.stream_dtype = reversible, min_length, stream_dtype

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        f_kwargs: Kwargs | Sequence[Kwargs | None] | None = None,
        g_kwargs: Kwargs | Sequence[Kwargs | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs all blocks.

        Args:
            x: both streams (x1, x2), or a tensor that both start from.
            f_kwargs, g_kwargs: keyword arguments of the functions (masks, an encoder's output, ...): a dictionary for
                all blocks, or a sequence with one for each block, or None for none. Tensors in them get gradients.

        Returns:
            (y1, y2).

        Raises:
            TypeError, ValueError: an argument has a wrong type or length.
            RuntimeError: something changed the streams between two functions, or a function its input; and in backward,
                if a function saves other tensors than in forward.
        """
        x1, x2 = (x, x) if isinstance(x, Tensor) else self._pair(x)
        dtype, streams = None, [x1, x2]
        if self.stream_dtype is not None:
            dtype = x2.dtype
            streams = [x.to(torch.promote_types(x.dtype, self.stream_dtype)) for x in streams]
        blocks = list(zip(self.blocks, self._each("f_kwargs", f_kwargs), self._each("g_kwargs", g_kwargs), strict=True))
        if self._stores_activations(streams, blocks):
            return _through(blocks, streams, dtype, None)
        out: tuple[Tensor, Tensor] = _uncompiled(_reversibly, blocks, streams, dtype)
        return out

    def extra_repr(self) -> str:
        return f"reversible={self.reversible}, min_length={self.min_length}, stream_dtype={self.stream_dtype}"

    def _stores_activations(self, streams: list[Tensor], blocks: list[Any]) -> bool:
        if not self.reversible or not torch.is_grad_enabled():
            return True
        if self.min_length and streams[1].dim() > 1 and streams[1].shape[1] < self.min_length:
            return True
        if not can_recompute():
            return True
        given = pytree.tree_leaves([dict(kwargs) for _, *both in blocks for kwargs in both if kwargs is not None])
        return not any(isinstance(t, Tensor) and t.requires_grad for t in (*streams, *self.parameters(), *given))

    def _each(self, name: str, kwargs: Any) -> Sequence[Kwargs | None]:
        if kwargs is None or isinstance(kwargs, Mapping):
            return [kwargs] * len(self.blocks)
        if not isinstance(kwargs, Sequence) or not all(k is None or isinstance(k, Mapping) for k in kwargs):
            raise TypeError(f"{name} must be a mapping, or a sequence of one for each block, got {kwargs!r}")
        if len(kwargs) != len(self.blocks):
            raise ValueError(f"{name} must have an entry for each of the {len(self.blocks)} blocks, got {len(kwargs)}")
        return kwargs

    @staticmethod
    def _pair(x: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(x, (tuple, list)) or len(x) != 2 or not all(isinstance(t, Tensor) for t in x):
            raise TypeError(f"x must be a tensor or a pair of tensors (x1, x2), got {type(x).__name__}")
        return x[0], x[1]


def _through(
    blocks: list[Any], streams: list[Tensor], dtype: torch.dtype | None, run: Run | None
) -> tuple[Tensor, Tensor]:
    x1, x2 = streams
    for block, f_kwargs, g_kwargs in blocks:
        x1, x2 = block(x1, x2, f_kwargs, g_kwargs, _dtype=dtype, _run=run)
    return x1, x2


def _reversibly(blocks: list[Any], streams: list[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    run = Run(streams)
    return run.finish(_through(blocks, streams, dtype, run))


def _uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Also what it calls: backward is out of a compiler's reach, and its random numbers are its own."""
    if not torch.compiler.is_compiling():
        return function(*args)
    from ._uncompiled import call_uncompiled

    return call_uncompiled(function, *args)
