"""LSHSelfAttention and LocalSelfAttention as layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reformer_kernels as rk

LAYERS: dict[str, Callable[..., Any]] = {
    "lsh": lambda **o: rk.LSHSelfAttention(16, 2, chunk_length=8, causal=True, **o),
    "local": lambda **o: rk.LocalSelfAttention(16, 2, chunk_length=8, causal=True, **o),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_function_on_its_projections(name: str) -> None:
    layer, x = LAYERS[name](bias=True).eval(), torch.randn(2, 40, 16)
    heads: Callable[[Tensor], Tensor] = lambda y: y.view(2, 40, 2, 8).transpose(1, 2)  # noqa: E731
    if name == "lsh":
        out = rk.lsh_attention(heads(layer.query_key(x)), heads(layer.value(x)), chunk_length=8, causal=True)
    else:
        q, k, v = (heads(p(x)) for p in (layer.query, layer.key, layer.value))
        out = rk.local_attention(q, k, v, chunk_length=8, causal=True)
    assert torch.equal(layer(x), layer.output(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    layer = LAYERS[name](dropout=0.2)
    layer(torch.randn(2, 40, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_randomness_comes_from_torch(name: str) -> None:
    layer, x = LAYERS[name](dropout=0.3), torch.randn(2, 40, 16)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_options_of_the_drop_in_are_shown() -> None:
    text = repr(rk.LSHMultiheadAttention(16, 4, causal=True, budget=96))
    assert "16, num_heads=4" in text and "budget=96" in text and "causal=True" in text and "out_proj" in text


def test_hash_seed_of_the_drop_in() -> None:
    x = torch.randn(2, 200, 16)
    drawn = rk.LSHMultiheadAttention(16, 4, batch_first=True, budget=16, grouping="hash", hash_seed=None)
    fixed = rk.LSHMultiheadAttention(16, 4, batch_first=True, budget=16, grouping="hash")
    fixed.load_state_dict(drawn.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(fixed(x, x, x)[0], fixed(x, x, x)[0])
    assert torch.equal(drawn.eval()(x, x, x)[0], fixed(x, x, x)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn.train()(x, x, x)[0], drawn(x, x, x)[0])


def test_hash_seed() -> None:
    x = torch.randn(1, 100, 16)
    fixed, drawn = LAYERS["lsh"](hash_seed=4), LAYERS["lsh"]()
    assert torch.equal(fixed(x, return_buckets=True)[1], fixed(x, return_buckets=True)[1])
    assert not torch.equal(drawn(x, return_buckets=True)[1], drawn(x, return_buckets=True)[1])
    out, buckets = drawn(x, return_buckets=True)
    assert torch.equal(drawn(x, buckets=buckets), out)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_saves_and_checkpoints(name: str) -> None:
    layer, x = LAYERS[name](dropout=0.2), torch.randn(1, 40, 16, requires_grad=True)
    clone = copy.deepcopy(layer)
    other = LAYERS[name]()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), clone.eval()(x))
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        runs.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_options_are_checked_and_shown() -> None:
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads, got 10 and 3"):
        rk.LSHSelfAttention(10, 3)
    with pytest.raises(ValueError, match="dropout must be between 0 and 1, got 2"):
        rk.LocalSelfAttention(8, 2, dropout=2)
    with pytest.raises(ValueError, match=r"x must have shape \[B, L, 16\], got \[2, 40, 8\]"):
        LAYERS["lsh"]()(torch.randn(2, 40, 8))
    assert "n_hashes=4" in repr(LAYERS["lsh"]()) and "chunk_length=8" in repr(LAYERS["local"]())
    assert rk.LSHSelfAttention(16, 4, head_dim=3)(torch.randn(1, 5, 16)).shape == (1, 5, 16)


def test_masks_and_context_reach_the_kernel() -> None:
    layer, x = LAYERS["lsh"]().eval(), torch.randn(2, 40, 16)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[:, 20:] = True
    assert not torch.equal(layer(x, mask), layer(x))
    assert layer(x, num_queries=7).shape == (2, 7, 16)
    local = LAYERS["local"]().eval()
    torch.testing.assert_close(local(x, mask)[:, :20], local(x[:, :20]))
    dense = torch.zeros(1, 1, 40, 40).masked_fill(torch.arange(40) % 2 == 0, float("-inf"))
    torch.testing.assert_close(local(x, attn_mask=dense), local(x, (torch.arange(40) % 2 == 0).expand(2, -1)))
