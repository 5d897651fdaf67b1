"""What a sequence of reversible blocks does in the place of autograd's saved tensors: it computes them again."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

from .._choices import Choices
from ._buffers import Buffers, buffer_places, replaced
from .feed_forward import TokenChunks, join_tokens, split_tokens


class Half:
    """``streams[target] += function(the other stream, **kwargs)``."""

    def __init__(
        self, target: int, function: Callable[..., Tensor], kwargs: Mapping[str, Any], dtype: torch.dtype | None
    ) -> None:
        self.target, self.function, self.kwargs = target, function, kwargs
        self.dtype = dtype  # of the function's input; None: that of the stream

    def of(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The stream that is added to, and the input of the function."""
        return streams[self.target], streams[1 - self.target]

    def add(self, x: Tensor, u: Tensor) -> Tensor:
        return x + self.call(u).to(x.dtype)

    def call(self, u: Tensor) -> Tensor:
        return self.function(u if self.dtype is None else u.to(self.dtype), **self.kwargs)


class Run:
    """One forward through reversible halves, and where its backward has got to.

    Forward records autograd's graph as always, but of a tensor that the graph wants to save it keeps nothing. When
    backward asks for the first of a half, the halves after it are taken off the streams, it is computed again on what
    is left, and the tensors are those of that second time.
    """

    def __init__(self, streams: list[Tensor]) -> None:
        self.steps: list[_Step] = []
        self.first: int | None = None  # of the steps that backward can ask for
        self.streams: list[Tensor] = []  # in backward: after ``steps[:position]``
        self.owned = [False, False]  # made by backward: nobody else sees it, so it may be written over
        self.position = 0
        self.is_finished = False
        self._made = [_identity(x) for x in streams]

    def add(self, half: Half, x: Tensor, u: Tensor) -> Tensor:
        """``half.add(x, u)``"""
        if self.is_finished:
            raise RuntimeError(
                "a block of a reversible sequence was called again in backward, by a checkpoint around it: the "
                "sequence computes its functions again by itself; checkpoint all of it, or set reversible=False"
            )
        for seen, made in ((x, self._made[half.target]), (u, self._made[1 - half.target])):
            if _identity(seen) != made:
                raise RuntimeError(
                    "the streams of a reversible sequence were changed between two functions (by a hook of a block, a "
                    "cast of its inputs as FSDP's MixedPrecisionPolicy does with cast_forward_inputs=True, or a "
                    "function that changes its input in place), so backward could not reconstruct them: change them "
                    "within f or g, or set reversible=False"
                )
        step = _Step(self, half, len(self.steps))
        self.steps.append(step)
        y = x + step.forward(u).to(x.dtype)
        if _identity(u) != self._made[1 - half.target]:
            raise RuntimeError(
                "a function of a reversible block changed its input in place: backward could not reconstruct it; "
                "copy it first, or set reversible=False"
            )
        if self.first is None and step.is_asked_for:
            self.first = step.index
        self._made[half.target] = _identity(y)
        return y

    def finish(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keeps the final streams."""
        self.is_finished = True
        ends: tuple[Tensor, Tensor] = _Ends.apply(self, *streams)
        return ends

    def start_backward(self, streams: list[Tensor]) -> None:
        if self.first is not None:
            self.streams, self.owned, self.position = streams, [False, False], len(self.steps)
        for step in self.steps:
            step.values = None
            for part in step.parts:
                part.is_undone = False

    def reach(self, step: _Step, part: _Part) -> None:
        """Makes the saved tensors of a part."""
        if part.is_undone or step.index >= self.position or not self.streams:
            raise RuntimeError(_OUT_OF_ORDER)
        while self.position > step.index + 1:
            last = self.steps[self.position - 1]
            for other in last.parts:
                if not other.is_undone:
                    self._undo(last, other, record=False)
                other.forget()
            last.values = None
            self.position -= 1
        self._undo(step, part, record=True)

    @torch.no_grad()
    def _undo(self, step: _Step, part: _Part, record: bool) -> None:
        """Takes what the part added off the stream."""
        target = step.half.target
        y, u = step.half.of(self.streams)
        out = part.repeat(step, step.pieces(u)[part.index], record).to(y.dtype)
        part.is_undone = True
        if step.index == self.first:  # nobody asks for what was before
            if all(p.is_undone for p in step.parts):
                self.streams, step.values = [], None
            return
        if step.chunk_length is None:
            self.streams[target] = y.sub_(out) if self.owned[target] else y - out
        else:
            if not (self.owned[target] and y.is_contiguous()):
                self.streams[target] = y = y.clone(memory_format=torch.contiguous_format)
            step.pieces(y)[part.index].sub_(out)
        self.owned[target] = True


class _Ends(torch.autograd.Function):
    """Keeps the final streams. Both pass here, so they are there whatever backward starts from."""

    @staticmethod
    def forward(ctx: Any, run: Run, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.run = run
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.run.start_backward([y.detach() for y in ctx.saved_tensors])
        return (None, *grads)


class _Keep(torch.autograd.Function):
    """Keeps tensors as autograd keeps them: it sees changes in place, and hooks of whoever is outside apply."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return leaf.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("no gradient comes here")


def _keep(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    if not tensors:
        return list
    node = _Keep.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn
    return lambda: list(node.saved_tensors)


class _Step:
    """A half in a run: what its function was called with, beside its input; and its parts, one or one a chunk."""

    def __init__(self, run: Run, half: Half, index: int) -> None:
        # The graph has the run, and the run all that belongs to it: without a cycle it goes as soon as the graph does.
        self.run, self.half, self.index = weakref.ref(run), half, index
        self.parts: list[_Part] = []
        function = half.function
        modules = list(function.modules()) if isinstance(function, nn.Module) else []
        self.chunk_length = None
        if isinstance(function, TokenChunks) and not half.kwargs and not _has_hooks(function):
            # Backward then has the activations of one chunk, and computes each once. Hooks are of the whole.
            self.chunk_length = function.chunk_length
        tables = [] if any(map(_is_sharded, modules)) else [module._parameters for module in modules]
        self.parameters = [(table, name) for table in tables for name, p in table.items() if p is not None]
        self.buffers = buffer_places(function)
        flat, self.spec = pytree.tree_flatten(dict(half.kwargs))
        self.options = [None if isinstance(a, Tensor) else a for a in flat]  # with places for the tensors
        self.is_tensor = [isinstance(a, Tensor) for a in flat]
        parameters = [p for p in (table[name] for table, name in self.parameters) if p is not None]
        self.kept = _keep([*parameters, *(a for a in flat if isinstance(a, Tensor))])
        self.values: list[Tensor] | None = None  # what was kept, while it is this step's turn

    @property
    def is_asked_for(self) -> bool:
        return any(part.saved for part in self.parts)

    def forward(self, u: Tensor) -> Tensor:
        outs = []
        for index, piece in enumerate(self.pieces(u)):
            self.parts.append(_Part(self, index))
            outs.append(self.parts[-1].forward(self, piece))
        return outs[0] if self.chunk_length is None else join_tokens(outs, (*u.shape[:-1], outs[0].shape[-1]))

    def pieces(self, x: Tensor) -> Any:
        return split_tokens(x, self.chunk_length)

    def repeat(self, u: Tensor) -> Tensor:
        """The function of u, of forward's parameters and arguments (also where a functional_call gave them)."""
        if self.values is None:
            self.values = self.kept()
        n = len(self.parameters)
        tensors = (t.detach().requires_grad_(t.requires_grad) for t in self.values[n:])
        flat = [next(tensors) if is_t else o for is_t, o in zip(self.is_tensor, self.options, strict=True)]
        kwargs = pytree.tree_unflatten(flat, self.spec)
        with replaced(self.parameters, self.values[:n]):
            return Half(0, self.half.function, kwargs, self.half.dtype).call(u)


class _Part:
    """One call of a function in forward: under what it ran, and the tensors that the graph was to save."""

    def __init__(self, step: _Step, index: int) -> None:
        self.step, self.index = weakref.ref(step), index
        self.saved: list[weakref.ref[_Saved]] = []
        self.is_undone = False

    def forward(self, step: _Step, u: Tensor) -> Tensor:
        self.conditions, self.choices, self.buffers = _Conditions(u), Choices(), Buffers(step.buffers)
        self.needs_u = u.requires_grad
        if self.needs_u:
            u = u.view_as(u)  # of its own, for the hook

        def pack(t: Tensor) -> _Saved:
            holder = _Saved(self, t)
            self.saved.append(weakref.ref(holder))
            return holder

        with self._conditions(self.buffers.noted(), self.choices.recorded(), _hooks(pack, _unpack)):
            out = step.half.call(u)
        self.kept = _keep(self.choices.tensors)
        if self.needs_u and self.choices.tensors:
            choices = self.choices
            u.register_hook(lambda _: choices.forget_later())
        self.choices.tensors = []
        return out

    def repeat(self, step: _Step, u: Tensor, record: bool) -> Tensor:
        """The function of u, once more; ``record``: for the saved tensors."""
        u, again = u.detach().requires_grad_(self.needs_u), iter([*self.saved, None])

        def pack(t: Tensor) -> None:
            saved = next(again, None)
            if saved is None:
                raise RuntimeError(_OTHERS)
            if (holder := saved()) is not None:
                holder.fill(t)

        self.forget()
        same = self.conditions.restored(), self.buffers.restored(), self.choices.replayed(self.kept(), record)
        with self._conditions(*same):
            if not record:
                return step.repeat(u)
            with torch.enable_grad(), _hooks(pack, _never):
                out = step.repeat(u)
        if next(again, None) is not None:
            raise RuntimeError(_OTHERS)
        return out.detach()

    @contextlib.contextmanager
    def _conditions(self, *more: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for context in (self.conditions.autocasting(), _without_cached_parametrizations(), *more):
                stack.enter_context(context)
            yield

    def forget(self) -> None:
        """Drops tensors that nobody asked for."""
        for saved in self.saved:
            if (holder := saved()) is not None:
                holder.tensor = None


_OUT_OF_ORDER = (
    "backward asks a reversible sequence for tensors that it has had already, or not through the outputs of the "
    "sequence"
)
_OTHERS = (
    "a function of a reversible block saved other tensors for backward when it was computed again: with the same "
    "input, random state, parameters and buffers it must do the same"
)


class _Saved:
    """What the graph has in the place of a tensor."""

    def __init__(self, part: _Part, t: Tensor) -> None:
        self.part, self.tensor = part, None
        self.kind = t.shape, t.dtype, t.device

    tensor: Tensor | None

    def fill(self, t: Tensor) -> None:
        if (t.shape, t.dtype, t.device) != self.kind:
            raise RuntimeError(_OTHERS)
        self.tensor = t.detach()


def _unpack(holder: _Saved) -> Tensor:
    if holder.tensor is None:
        step = holder.part.step()
        run = None if step is None else step.run()
        if step is None or run is None:
            raise RuntimeError(_OUT_OF_ORDER)
        run.reach(step, holder.part)
    assert holder.tensor is not None
    return holder.tensor


def _hooks(pack: Any, unpack: Any) -> saved_tensors_hooks:
    # Marked as torch.utils.checkpoint marks its own, so that selective checkpoints do not take them for the user's.
    pack._checkpoint_internal = True
    pack._user_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return saved_tensors_hooks(pack, unpack)


def _never(_: Any) -> Tensor:
    raise AssertionError("the graph of a recomputation has no backward")


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
        # Without its cache of cast weights: both times a function has to find the same.
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


@contextlib.contextmanager
def _without_cached_parametrizations() -> Iterator[None]:
    """Both times a function computes its parametrized weights, also within ``parametrize.cached()``."""
    before, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


def _identity(x: Tensor) -> Any:
    """Equal for tensors of the same data, which nobody has written to in between."""
    if type(x) is not Tensor:  # the memory of a subclass is its own affair
        return None
    return x.data_ptr(), None if x.is_inference() else x._version, x.shape, x.stride(), x.dtype, x.device


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _is_sharded(module: nn.Module) -> bool:
    """FSDP exchanges the parameters of its modules itself."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))
