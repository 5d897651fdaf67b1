"""What runs on CUDA tensors; everything here needs a GPU, and ``make gpu-check`` runs it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reformer_kernels as rk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

V, E, L = 50, 64, 700
KINDS = {"lsh": ("lsh",), "local": ("local",), "full": ("full",), "all": ("lsh", "local", "full")}


@pytest.fixture(autouse=True)
def _any_algorithm() -> None:
    torch.use_deterministic_algorithms(False)  # cuBLAS has them only with a workspace that is set before it starts


def model(attention: tuple[str, ...], dtype: torch.dtype = torch.float64, **changes: Any) -> rk.ReformerLM:
    options: dict[str, Any] = {
        "vocab_size": V, "embed_dim": E, "num_layers": 3, "num_heads": 4, "attention": attention, "n_hashes": 2,
        "max_length": 1024, "attention_dropout": 0.1, "hidden_dropout": 0.1, "feed_forward_chunk_length": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    return rk.ReformerLM(rk.ReformerConfig(**{**options, **changes})).to("cuda", dtype).train()


def tokens(length: int = L) -> Tensor:
    return torch.randint(V, (2, length), generator=torch.Generator().manual_seed(1)).cuda()


def gradients(of: nn.Module, reversible: bool, length: int = L, **autocast: Any) -> list[Tensor]:
    of.reformer.layers.reversible = reversible
    ids = tokens(length)
    torch.manual_seed(2)
    with torch.autocast("cuda", **{"enabled": False, **autocast}):
        loss = of(ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(of.parameters()))]


def relative(actual: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([x.double().flatten() for x in grads]) for grads in (actual, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_reversible_layers_draw_the_same_dropout_again(kind: str, dtype: torch.dtype, allowed: float) -> None:
    lm = model(KINDS[kind], dtype)
    assert relative(gradients(lm, True), gradients(lm, False)) < allowed


def test_random_state_after_a_step_is_that_of_stored_activations() -> None:
    lm, drawn = model(KINDS["all"]), []
    for reversible in (True, False):
        gradients(lm, reversible)
        drawn.append(torch.rand(5, device="cuda"))
    assert torch.equal(*drawn)


def test_reversible_layers_under_autocast() -> None:
    lm = model(KINDS["all"], torch.float32, stream_dtype="float64")
    autocast = {"enabled": True, "dtype": torch.bfloat16}
    # Streams come back to float64's rounding. With stored activations the chunks' gradients of a weight are added in
    # bfloat16, the dtype of its one cast.
    allowed = torch.finfo(torch.bfloat16).eps
    assert relative(gradients(lm, True, **autocast), gradients(lm, False, **autocast)) < allowed


def test_memory_of_a_step_does_not_grow_with_depth() -> None:
    peaks = []
    for layers in (2, 8):
        lm = model(KINDS["all"], torch.float32, num_layers=layers, max_length=4096)
        gradients(lm, True, 4096)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        own = sum(p.numel() * p.element_size() for p in lm.parameters())  # the gradients that are returned
        gradients(lm, True, 4096)
        peaks.append(torch.cuda.max_memory_allocated() - before - own)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_drop_in(causal: bool, padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 2 * E, dropout=0.0, batch_first=True, dtype=torch.float64)
    rk.convert_attention(layer, hash_seed=0)
    x = torch.randn(2, L, E, dtype=torch.float64)
    mask = torch.zeros(2, L, dtype=torch.bool)
    mask[1, 400:] = padded
    causal_mask = torch.ones(L, L, dtype=torch.bool).triu(1) if causal else None

    def outcome(device: str) -> list[Tensor]:
        layer.to(device)
        masks = {"src_key_padding_mask": mask.to(device) if padded else None, "is_causal": causal}
        out = layer(x.to(device), None if causal_mask is None else causal_mask.to(device), **masks)
        out = out.masked_fill(mask[..., None].to(device), 0)
        return [y.cpu() for y in (out, *torch.autograd.grad(out.square().sum(), list(layer.parameters())))]

    torch.testing.assert_close(outcome("cuda"), outcome("cpu"), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_the_cpu_on_the_same_buckets(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, v = (torch.randn(2, 3, 500, 32).to(dtype) for _ in range(2))
    expected, buckets = rk.lsh_attention(q, v, causal=True, backend="reference", return_buckets=True)
    actual = rk.lsh_attention(q.cuda(), v.cuda(), causal=True, buckets=buckets.cuda())
    exact = rk.lsh_attention(q.double(), v.double(), causal=True, buckets=buckets, backend="reference")
    unit = torch.finfo(dtype).eps * float(exact.abs().max())
    allowed = 2 * float((expected.double() - exact).abs().max()) + unit
    assert float((actual.cpu().double() - exact).abs().max()) <= allowed


def test_module_after_a_move_to_the_gpu() -> None:
    attention = rk.LSHSelfAttention(E, 4, causal=True, hash_seed=0).double().eval()
    x = torch.randn(2, L, E, dtype=torch.float64)
    expected = attention(x)
    actual = attention.cuda()(x.cuda())
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-11)


def test_a_saved_model_is_loaded_onto_the_gpu(tmp_path: Any) -> None:
    lm = model(KINDS["all"], torch.float32).eval()
    lm.save_pretrained(tmp_path)
    again = rk.ReformerLM.from_pretrained(tmp_path, device="cuda").eval()
    for x, y in zip(again.state_dict().values(), lm.state_dict().values(), strict=True):
        assert x.device.type == "cuda" and torch.equal(x, y)
    drawn = []
    for loaded in (lm, again):
        torch.manual_seed(3)
        drawn.append(loaded(tokens()).logits)
    torch.testing.assert_close(*drawn)
