"""The presets against the published implementations themselves: same weights, same rotations, same numbers."""

from typing import Any

import pytest
import torch
import transformers

import reformer_kernels as rk

from .rounding import assert_equal_to_rounding

# The reference computes what they compute, in their order; the kernels sum 3 windows of 32 keys in another one.
ROUNDINGS = {"reference": 1, "cpu": 3 * 32}
GRADIENT_ROUNDINGS = {"reference": 8, "cpu": 2 * 3 * 32}


def hf_layer(causal: bool, n_hashes: int) -> Any:
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = transformers.ReformerConfig(
        attention_head_size=8, num_attention_heads=2, hidden_size=16, num_hashes=n_hashes, num_buckets=[4, 2],
        lsh_attn_chunk_length=16, is_decoder=causal, lsh_attention_probs_dropout_prob=0.0, axial_pos_embds=False,
        max_position_embeddings=256, hash_seed=11,
    )  # fmt: skip
    return LSHSelfAttention(config).eval()


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:2], 2, 8).transpose(1, 2)


def hf_rotations(n_hashes: int) -> torch.Tensor:
    torch.manual_seed(11)  # as the layer does in every call
    return torch.randn(2, 8, n_hashes, 3)[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_hashes", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_hugging_face_layer(causal: bool, n_hashes: int, padded: bool, backend: str) -> None:
    layer = hf_layer(causal, n_hashes)
    x = torch.randn(2, 64, 16, requires_grad=True)
    keep = torch.rand(2, 64) > 0.3 if padded else None
    state = torch.get_rng_state()
    theirs = layer(x, attention_mask=keep)
    torch.set_rng_state(state)
    options: dict[str, Any] = {
        "rules": rk.AttentionRules.huggingface(), "causal": causal, "n_hashes": n_hashes, "n_buckets": [4, 2],
        "chunk_length": 16, "rotations": hf_rotations(n_hashes), "return_buckets": True,
        "key_padding_mask": None if keep is None else ~keep, "backend": backend,
    }  # fmt: skip
    out, buckets = rk.lsh_attention(heads(layer.query_key(x)), heads(layer.value(x)), **options)
    ours = out.transpose(1, 2).flatten(2)
    offset = torch.arange(n_hashes)[:, None] * (9 if padded else 8)
    assert torch.equal(theirs.buckets.flatten(2), (buckets + offset).flatten(2))
    assert_equal_to_rounding(ours, theirs.hidden_states, ROUNDINGS[backend])
    grad = torch.randn_like(ours)
    (a,), (b,) = (torch.autograd.grad(y, x, grad) for y in (ours, theirs.hidden_states))
    assert_equal_to_rounding(a, b, GRADIENT_ROUNDINGS[backend])


def test_default_rules_are_hugging_faces_without_its_rounding() -> None:
    """Where no query is left with only itself, the native default computes the same."""
    layer = hf_layer(False, 2)
    x = torch.randn(1, 64, 16)
    theirs = layer(x).hidden_states
    out = rk.lsh_attention(
        heads(layer.query_key(x)), heads(layer.value(x)), n_hashes=2, n_buckets=[4, 2], chunk_length=16,
        rotations=hf_rotations(2), backend="cpu",
    )  # fmt: skip
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lucidrains_layer(causal: bool, masked: bool, backend: str) -> None:
    from reformer_pytorch import reformer_pytorch as lucidrains

    layer = lucidrains.LSHAttention(bucket_size=16, n_hashes=3, causal=causal).eval()
    qk, v = torch.randn(4, 64, 8), torch.randn(4, 64, 8)  # [B * H, L, D]
    mask = torch.rand(4, 64) > 0.3 if masked else None
    torch.manual_seed(5)
    theirs, _, their_buckets = layer(qk, v, input_mask=mask)
    torch.manual_seed(5)
    rotations = torch.randn(1, 8, 3, 2)[None]  # one for all heads, 64 // 16 buckets
    ours, buckets = rk.lsh_attention(
        qk[:, None], v[:, None], rules=rk.AttentionRules.lucidrains(), causal=causal, n_hashes=3, n_buckets=4,
        chunk_length=16, rotations=rotations, key_padding_mask=None if mask is None else ~mask, return_buckets=True,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(their_buckets, (buckets + 4 * torch.arange(3)[:, None]).flatten(1))
    assert_equal_to_rounding(ours[:, 0], theirs, ROUNDINGS[backend])
