"""Choices of attention inside reversible blocks, buckets and lists of keys: made once, kept for backward."""

import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reformer_kernels import _choices, _dispatch
from reformer_kernels.modules.attention import LSHSelfAttention
from reformer_kernels.modules.multihead import LSHMultiheadAttention
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

from .rounding import assert_equal_to_rounding
from .test_reversible import Checkpointed, First, attention, block, outcome, rounded


class Attention(nn.Module):
    """Over normalised rows, by hashing or, with heads of its own, by lists of keys."""

    def __init__(self, hash_seed: int | None = None, clustered: bool = False) -> None:
        super().__init__()
        self.norm, self.clustered = nn.LayerNorm(8), clustered
        self.attention: nn.Module = attention(hash_seed=hash_seed)
        if clustered:
            options: dict[str, Any] = {"exact_below": 0, "chunk_length": 4, "hash_seed": hash_seed}
            self.attention = LSHMultiheadAttention(8, 2, 0.1, batch_first=True, budget=8, **options)

    def forward(self, u: Tensor) -> Tensor:
        u = self.norm(u)
        out: Tensor = self.attention(u, u, u, need_weights=False)[0] if self.clustered else self.attention(u)
        return out


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The choices that are made in backward; they come out differently than in forward."""
    made: list[str] = []
    select = _dispatch.select

    def selected(call: Any) -> Any:
        backend = select(call)
        if call.op not in ("hash_buckets", "select_keys") or torch._C._current_graph_task_id() == -1:
            return backend
        made.append(call.op)
        return types.SimpleNamespace(**{call.op: lambda call: getattr(backend, call.op)(call).roll(1, 2)})

    monkeypatch.setattr(_dispatch, "select", selected)
    yield made
    assert _choices._current() is None


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many attentions
    "lsh": (Attention, 1),
    "clustered": (lambda: Attention(clustered=True), 1),
    "two layers": (lambda: nn.Sequential(Attention(), Attention()), 2),
    "two layers of one seed": (lambda: nn.Sequential(Attention(3), Attention(3)), 2),
    "two clustered layers": (lambda: nn.Sequential(Attention(3, True), Attention(3, True)), 2),
    "compiled": (lambda: compiled(Attention()), 1),
    "compiled clustered": (lambda: compiled(Attention(clustered=True)), 1),
    "checkpointed": (lambda: Checkpointed(Attention()), 1),
    "two layers checkpointed": (lambda: nn.Sequential(Checkpointed(Attention()), Checkpointed(Attention())), 2),
    "two layers in a checkpoint": (lambda: Checkpointed(nn.Sequential(Attention(1), Attention(2))), 2),
    "a sequence inside": (lambda: First(ReversibleSequence([block(Attention(), Attention())])), 2),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at a stream's
@pytest.mark.parametrize("function", FUNCTIONS)
def test_choices_are_made_once(function: str, again: list[str]) -> None:
    """What is chosen again is another choice, as it may be after rounding, and would give other gradients."""
    build, layers = FUNCTIONS[function]
    seq = ReversibleSequence([block(build(), build()) for _ in range(2)]).double()
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    results, random = outcome(seq, x)
    assert again == []
    if "checkpoint" in function:  # otherwise the stored version itself chooses again, differently
        for module in seq.modules():
            if isinstance(module, Checkpointed):
                module.forward = module.blocks.forward  # type: ignore[method-assign]
    for module in seq.modules():
        if isinstance(module, ReversibleSequence):
            module.reversible = False
    expected, expected_random = outcome(seq, x)
    assert again == [] and torch.equal(random, expected_random)
    assert_equal_to_rounding(results, expected, rounded(4 * layers))
    if function == "lsh":  # the watch sees a choice in backward, and it matters
        seq.blocks[0].f = Checkpointed(seq.get_submodule("blocks.0.f"))
        others = outcome(seq, x)[0]
        assert again and not torch.allclose(others[2], expected[2])


def test_reconstructed_inputs_would_choose_otherwise() -> None:
    attention = LSHSelfAttention(8, 2, n_hashes=1, n_buckets=16, chunk_length=4, hash_seed=1)
    seq = ReversibleSequence([ReversibleBlock(attention, lambda u: 2.0**18 * u)])  # x2 + 2^18 * y1 loses bits of x2
    x1, x2, seen = torch.randn(2, 64, 8), torch.randn(2, 64, 8, requires_grad=True), []
    y1, _ = seq((x1, x2))
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone().requires_grad_()))
    y1.sum().backward()
    [u] = seen
    buckets = [attention(t, return_buckets=True)[1] for t in (x2, u)]
    assert not torch.equal(*buckets)
    kept, others = (torch.autograd.grad(attention(u, buckets=b).sum(), u)[0] for b in buckets)
    assert x2.grad is not None and torch.equal(x2.grad, kept) and not torch.allclose(kept, others)


def test_checkpoints_of_equal_seeds() -> None:
    f = nn.Sequential(Checkpointed(Attention(3)), Checkpointed(Attention(3)))
    y1, y2 = ReversibleSequence([ReversibleBlock(f)])(torch.randn(2, 16, 8))
    message = (
        "the recomputation of a reversible block calls hash_buckets more often than its forward did: 3 times, not 2; "
        "gradient checkpointing inside a block needs layers with different hash seeds (hash_seed=None draws them)"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        (y1 + y2).sum().backward()
    assert _choices._current() is None
