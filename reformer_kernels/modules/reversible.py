"""Reversible residual blocks: backward reconstructs the activations from the outputs instead of storing them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

from .._checks import FLOATING, check_bool, check_int
from .._choices import Choices
from .feed_forward import TokenChunks, can_recompute, join_tokens, split_tokens

Kwargs = Mapping[str, Any]
Function = Callable[..., Tensor]


class ReversibleBlock(nn.Module):
    """Two residual functions on two streams: ``y1 = x1 + f(x2); y2 = x2 + g(y1)`` (RevNet, arXiv 1707.04585).

    By itself a block stores its activations as any module does; a ``ReversibleSequence`` of blocks does not.

    Args:
        f, g: modules or functions of a tensor, and of keyword arguments. ``g=None`` leaves the second stream as it is.
            Each must give the same result when it is called again with the same input, random state and parameters
            (no running statistics that the result depends on). The parameters of a module are found; what a function
            needs beside them that requires a gradient must be a keyword argument.

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
        self, x1: Tensor, x2: Tensor, f_kwargs: Kwargs | None = None, g_kwargs: Kwargs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both streams, and the keyword arguments of f and g. Returns (y1, y2)."""
        streams = [x1, x2]
        for half in self._halves(f_kwargs, g_kwargs):
            streams[half.target] = half.add(*half.of(streams))
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

    def _halves(self, f_kwargs: Kwargs | None, g_kwargs: Kwargs | None, dtype: Any = None) -> list[_Half]:
        pairs = ((0, self.f, f_kwargs), (1, self.g, g_kwargs))
        return [
            _Half(target, function, kwargs or {}, dtype) for target, function, kwargs in pairs if function is not None
        ]


class ReversibleSequence(nn.Module):
    """Reversible blocks one after the other; memory does not grow with their number (paper section 3).

    Forward keeps the two final streams, the choices of LSH and clustered attention inside (buckets, lists of keys) and
    the random states; backward goes through the blocks in reverse, reconstructs the input of each, computes it again
    under the same random state, choices and autocast, and gives the gradients of its parameters at once. Gradients are
    those of stored activations, to the rounding of the reconstruction.

    Activations are stored, as of any module, when no gradient is needed, under ``torch.func`` transforms, in
    ``torch.export``, and if ``reversible`` or ``min_length`` says so. ``torch.compile`` leaves the sequence as it is: f
    and g may be compiled modules. ``fullgraph=True`` needs ``reversible=False``.

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
            RuntimeError: in backward, if a function used a tensor that it could not be given a gradient for.
        """
        x1, x2 = (x, x) if isinstance(x, Tensor) else self._pair(x)
        dtype, streams = None, [x1, x2]
        if self.stream_dtype is not None:
            dtype = x2.dtype
            streams = [x.to(torch.promote_types(x.dtype, self.stream_dtype)) for x in streams]
        per_block = zip(self.blocks, self._each("f_kwargs", f_kwargs), self._each("g_kwargs", g_kwargs), strict=True)
        halves = [half for block, f, g in per_block for half in block._halves(f, g, dtype)]  # type: ignore[operator]
        if self._stores_activations(streams, halves):
            for half in halves:
                streams[half.target] = half.add(*half.of(streams))
            return streams[0], streams[1]
        return _run_reversibly(halves, streams)

    def extra_repr(self) -> str:
        return f"reversible={self.reversible}, min_length={self.min_length}, stream_dtype={self.stream_dtype}"

    def _stores_activations(self, streams: list[Tensor], halves: list[_Half]) -> bool:
        if not self.reversible or not torch.is_grad_enabled():
            return True
        if self.min_length and streams[1].dim() > 1 and streams[1].shape[1] < self.min_length:
            return True
        if not can_recompute():
            return True
        return not any(t.requires_grad for t in [*streams, *(t for half in halves for t in half.tensors)])

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


class _Half:
    """``streams[target] += function(the other stream, **kwargs)``."""

    def __init__(self, target: int, function: Function, kwargs: Kwargs, dtype: torch.dtype | None) -> None:
        self.target, self.function, self.kwargs = target, function, kwargs
        self.dtype = dtype  # of the function's input; None: that of the stream
        parameters: list[nn.Parameter] = []
        self.places: dict[str, int] = {}  # of every parameter in the module, to its index in ``parameters``
        if isinstance(function, nn.Module):
            parameters = list(function.parameters())
            index = {id(p): i for i, p in enumerate(parameters)}
            # Each module once: functional_call, if it finds a shared one by two names, does not restore it.
            for prefix, module in function.named_modules():
                for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                    self.places[name] = index[id(p)]
        self.n_parameters = len(parameters)
        flat, self.spec = pytree.tree_flatten(dict(kwargs))
        self.options = [None if isinstance(a, Tensor) else a for a in flat]  # with places for the tensors
        # All that gets a gradient, beside the input of the function.
        self.tensors: list[Tensor] = [*parameters, *(a for a in flat if isinstance(a, Tensor))]
        self.is_tensor = [isinstance(a, Tensor) for a in flat]

    def of(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The stream that is added to, and the input of the function."""
        return streams[self.target], streams[1 - self.target]

    def add(self, x: Tensor, u: Tensor) -> Tensor:
        return x + self.call(u).to(x.dtype)

    def call(self, u: Tensor) -> Tensor:
        return self.function(u if self.dtype is None else u.to(self.dtype), **self.kwargs)

    def call_with(self, u: Tensor, tensors: list[Tensor]) -> Tensor:
        """``call`` with other tensors in the place of its own: backward must use the forward's, and leaves."""
        arguments = iter(tensors[self.n_parameters :])
        flat = [next(arguments) if is_t else o for is_t, o in zip(self.is_tensor, self.options, strict=True)]
        kwargs = pytree.tree_unflatten(flat, self.spec)
        u = u if self.dtype is None else u.to(self.dtype)
        if not isinstance(self.function, nn.Module):
            return self.function(u, **kwargs)
        parameters = {name: tensors[i] for name, i in self.places.items()}
        return functional_call(self.function, parameters, (u,), kwargs, tie_weights=False)


class _Conditions:
    """The random state and the autocast under which a function runs."""

    def __init__(self, u: Tensor) -> None:
        self.device_type = u.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.states = get_device_states(u)
        self.autocast: dict[str, dict[str, Any]] = {
            kind: {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
            for kind in {"cpu", self.device_type}
            if torch.amp.is_autocast_available(kind)
        }

    @contextlib.contextmanager
    def autocasting(self) -> Iterator[None]:
        # Without its cache of cast weights: what is cast without a graph must not be found by who needs one.
        with contextlib.ExitStack() as stack:
            for kind, options in self.autocast.items():
                stack.enter_context(torch.autocast(kind, cache_enabled=False, **options))
            yield

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            yield


class _Backward:
    """Where the backward of one call has got to."""

    def __init__(self) -> None:
        self.streams: list[Tensor] = []  # after the half whose turn is next
        self.owned = [False, False]  # made by backward: nobody else sees it, so it may be written over
        self.first: _Half | None = None  # the last one in backward


@torch.compiler.disable  # also of f and g: backward is out of a compiler's reach, and its random numbers are its own
def _run_reversibly(halves: list[_Half], streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    state = _Backward()
    for half in halves:
        streams[half.target] = _Add.apply(state, half, *half.of(streams), *half.tensors)
    return _Ends.apply(state, *streams)


class _Ends(torch.autograd.Function):
    """Keeps the final streams. Both pass here, so backward visits every half even if only one stream was used."""

    @staticmethod
    def forward(ctx: Any, state: _Backward, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.state = state
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.state.streams, ctx.state.owned = list(ctx.saved_tensors), [False, False]
        return (None, *grads)


class _Add(torch.autograd.Function):
    """``x + function(u)``: saves neither x nor u nor what is between."""

    @staticmethod
    def forward(ctx: Any, state: _Backward, half: _Half, x: Tensor, u: Tensor, *tensors: Tensor) -> Tensor:
        ctx.state, ctx.half, ctx.choices = state, half, Choices()
        ctx.conditions = _Conditions(u)
        if state.first is None and any(ctx.needs_input_grad):
            state.first = half
        with ctx.conditions.autocasting(), ctx.choices.recorded():
            y = half.add(x, u)
        ctx.save_for_backward(*tensors, *ctx.choices.tensors)
        ctx.choices.tensors = []
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        state, half = ctx.state, ctx.half
        y, u = half.of(state.streams)
        _, _, needs_x, needs_u, *needs = ctx.needs_input_grad
        saved = list(ctx.saved_tensors)
        tensors = [t.detach().requires_grad_(need) for t, need in zip(saved, needs, strict=False)]
        with ctx.conditions.restored(), ctx.choices.replayed(saved[len(needs) :]):
            out, grad_u = _recompute(half, ctx.conditions, u, tensors, grad, needs_u)
        if half is state.first:
            state.streams = []
        else:
            state.streams[half.target] = y.sub_(out) if state.owned[half.target] else y - out
            state.owned[half.target] = True
        return None, None, grad if needs_x else None, grad_u, *(t.grad for t in tensors)


def _recompute(
    half: _Half, conditions: _Conditions, u: Tensor, tensors: list[Tensor], grad: Tensor, needs_u: bool
) -> tuple[Tensor, Tensor | None]:
    """function(u) and the gradient of u; those of the tensors are left in their ``grad``."""
    chunk_length = half.function.chunk_length if isinstance(half.function, TokenChunks) and not half.kwargs else None
    outs, grads = [], []
    # Forward and backward of one part after the other, so that only the activations of one exist.
    for part, grad_part in zip(split_tokens(u, chunk_length), split_tokens(grad, chunk_length), strict=True):
        part = part.detach().requires_grad_(needs_u)
        with torch.enable_grad(), conditions.autocasting():
            out = half.call_with(part, tensors).to(grad.dtype)
        if out.requires_grad:
            inputs = [t for t in (part, *tensors) if t.requires_grad]
            _check_reached(out, inputs)
            torch.autograd.backward(out, grad_part, inputs=inputs)
        outs.append(out.detach())
        if needs_u:
            grads.append(torch.zeros_like(part) if part.grad is None else part.grad)
    return join_tokens(outs, grad.shape), join_tokens(grads, u.shape) if needs_u else None


def _check_reached(out: Tensor, inputs: list[Tensor]) -> None:
    """The graph of out ends in these inputs: the gradient of anything else would be lost without a word."""
    known = {id(t) for t in inputs}
    nodes: list[Any] = [torch.autograd.graph.get_gradient_edge(out).node]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise RuntimeError(
                "a function of a reversible block uses a tensor that requires a gradient, of shape "
                f"{list(variable.shape)}, which is neither a parameter of its module nor a keyword argument: register "
                "it, pass it in f_kwargs or g_kwargs, or set reversible=False"
            )
        nodes.extend(next_node for next_node, _ in node.next_functions)
