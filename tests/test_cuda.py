"""What runs on CUDA tensors; everything here needs a GPU, and ``make gpu-check`` runs it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.backends import cuda

from .emulation import attention, lists, select
from .kernel_oracles import assert_best, assert_hashes, stable_order
from .rounding import assert_equal_to_rounding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU_BACKENDS = ("cuda", "triton")
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


def gradients(of: rk.ReformerLM, reversible: bool, length: int = L, **autocast: Any) -> list[Tensor]:
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
    autocast: dict[str, Any] = {"enabled": True, "dtype": torch.bfloat16}
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

    # Gradients of weights are sums over all tokens, of rows that went through the layer's sums and back.
    assert_equal_to_rounding(outcome("cuda"), outcome("cpu"), roundings=2 * L + 2 * (L + 8 * E))


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
    assert_equal_to_rounding(actual.cpu(), expected, roundings=3 * E + L)  # two projections, scores and their sums


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


# ---- hash and order kernels


def check_hash(x: Tensor, factors: tuple[int, ...], padding: Tensor | None = None, shared: bool = False) -> None:
    rotations = rk.random_rotations(1, 1 if shared else x.shape[1], x.shape[3], 3, factors).cuda()
    buckets = torch.ops.reformer_kernels.hash_buckets(x, rotations, padding, None, list(factors), 3, 64, "cuda")
    assert_hashes(buckets, x, rotations, factors, padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 65, 96, 128])
@pytest.mark.parametrize("factors", [(2,), (64,), (32, 16), (6, 10, 4), (512,)])
def test_hash_kernel(dtype: torch.dtype, head_dim: int, factors: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 1500, head_dim, device="cuda").to(dtype)
    check_hash(x, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_kernel_with_padding_and_strides(dtype: torch.dtype) -> None:
    x = torch.randn(2, 700, 3, 70, device="cuda").to(dtype).transpose(1, 2)
    padding = torch.rand(2, 700, device="cuda") < 0.3
    for view in (x[..., :64], x[..., 3:67], x[:, :, 1:], x[..., ::2]):
        check_hash(view, (32, 16), padding[:, : view.shape[2]].contiguous())
    check_hash(x, (16,), shared=True)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("n_buckets", [1, 2, 65, 1025, 8193, 20000, 2**27])
@pytest.mark.parametrize("length", [1, 63, 5000, 65536, 65537, 200000])
def test_order_kernel(length: int, n_buckets: int, rounds: int) -> None:
    buckets = torch.randint(0, n_buckets, (2, 1, rounds, length), dtype=torch.int32, device="cuda")
    buckets[:, :, 0, length // 3 :] = n_buckets - 1  # one bucket has most
    order = torch.ops.reformer_kernels.bucket_order(buckets, None, n_buckets, "cuda")
    assert torch.equal(order.cpu(), stable_order(buckets))


@pytest.mark.parametrize("bounds", [(0, 1, 1, 900, 70000), (0, 70000), (0, 66000, 70000)])
def test_order_kernel_on_packed_sequences(bounds: tuple[int, ...]) -> None:
    buckets = torch.randint(0, 300, (1, 2, 3, bounds[-1]), dtype=torch.int32, device="cuda")
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    order = torch.ops.reformer_kernels.bucket_order(buckets, cu_seqlens, 300, "cuda")
    assert torch.equal(order.cpu(), stable_order(buckets, bounds))


def test_order_kernel_of_buckets_out_of_range() -> None:
    buckets = torch.tensor([[[[3, -1, 2, 7, 2**31 - 1, 0]]]], dtype=torch.int32, device="cuda")
    order = torch.ops.reformer_kernels.bucket_order(buckets, None, 4, "cuda")
    assert order.flatten().tolist() == [5, 2, 0, 1, 3, 4]


# ---- attention kernels


def on_gpu(call: Any) -> Any:
    """The call with its tensors on the GPU, less those that the host reads."""
    return call._replace(
        **{
            name: x.cuda()
            for name, x in call._asdict().items()
            if isinstance(x, Tensor) and name not in ("cu_seqlens", "dropout_seed")
        }
    )


@pytest.mark.parametrize("case", [*attention.CASES, *lists.CASES], ids=str)
def test_attention_kernels(case: attention.Attention | lists.Lists) -> None:
    testing.assert_matches_oracle(on_gpu(case.call()), case.dtype, "cuda")


@pytest.mark.parametrize("case", select.CASES, ids=str)
def test_select_kernels(case: select.Select) -> None:
    call = case.call()
    key_indices = cuda.select_keys(on_gpu(call))
    assert_best(call, key_indices.cpu())
    assert torch.equal(key_indices, cuda.select_keys(on_gpu(call)))


def test_select_kernels_a_slice_at_a_time() -> None:
    """The weights of all chunks are more than scratch memory has room for."""
    case = select.Select(16384, 32, heads=8, chunk_length=16, causal=True)
    call = on_gpu(case.call())
    one = call._replace(query=call.query[:, -1:], key=call.key)
    assert torch.equal(cuda.select_keys(call)[:, -1:], cuda.select_keys(one))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize(("head_dim", "chunk_length"), [(64, 64), (64, 16), (128, 256), (32, 100)])
def test_attention_kernels_on_many_blocks(head_dim: int, chunk_length: int, dtype: torch.dtype, backend: str) -> None:
    case = attention.Attention(4096, head_dim, dtype, heads=4, causal=True, chunk_length=chunk_length, n_buckets=64)
    call = on_gpu(case.call())
    first = testing.assert_matches_oracle(call, dtype, backend)
    again = testing.assert_matches_oracle(call, dtype, backend)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


# ---- launching


def sorted_by_bucket(x: Tensor, backend: str) -> Tensor:
    rotations = rk.random_rotations(1, 2, 64, 2, (32, 16)).cuda()
    return rk.bucket_order(rk.hash_buckets(x, rotations, (32, 16), backend=backend), 512, backend=backend)


def attended(x: Tensor, backend: str) -> Tensor:
    out: Tensor = rk.lsh_attention(x, x, causal=True, backend=backend)
    return out


def clustered(x: Tensor, backend: str) -> Tensor:
    return rk.clustered_attention(x, x, x, causal=True, backend=backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("run", [sorted_by_bucket, attended, clustered])
def test_kernels_in_a_cuda_graph(run: Callable[[Tensor, str], Tensor], backend: str) -> None:
    x = torch.randn(1, 2, 3000, 64, device="cuda").bfloat16()
    run(x, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, backend)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, run(x, backend))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("run", [attended, clustered])
def test_kernels_in_a_compiled_function(run: Callable[[Tensor, str], Tensor], backend: str) -> None:
    x = torch.randn(1, 2, 1000, 64, device="cuda", requires_grad=True)
    outcomes: list[Any] = []
    for function in (run, torch.compile(run, fullgraph=True)):
        out = function(x, backend)
        outcomes.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_kernels_repeat_to_the_bit_and_run_on_other_streams() -> None:
    x = torch.randn(1, 2, 3000, 64, device="cuda")
    first = rk.hash_buckets(x, rk.random_rotations(1, 2, 64, 2, (32, 16)).cuda(), (32, 16))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        second = rk.hash_buckets(x, rk.random_rotations(1, 2, 64, 2, (32, 16)).cuda(), (32, 16))
        torch.cuda.current_stream().synchronize()
    assert torch.equal(first, second)


def test_a_launch_that_fails_says_why() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    buckets = torch.zeros(2**16, 1, 2**15 + 1, 1, dtype=torch.int32, device="cuda")  # a block each is too many
    with pytest.raises(RuntimeError, match="bucket_order: the launch failed: invalid"):
        torch.ops.reformer_kernels.bucket_order(buckets, None, 2, "cuda")
    assert torch.ones(3, device="cuda").sum() == 3  # the context lives on
