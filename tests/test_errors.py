"""Bad input: the error names the argument, its value and what is allowed, and nothing else happens."""

import re
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels.backends import _common, cuda, reference
from reformer_kernels.testing import capture

Q = torch.randn(2, 3, 20, 8)
HALF = Q.half()
SEED = torch.tensor([1])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"query_key": Q[0]}, ValueError, "query_key must have 4 dimensions [B, H, L, D], got shape (3, 20, 8)"),
        ({"query_key": "q"}, TypeError, "query_key must be a torch.Tensor, got str"),
        ({"query_key": Q.int()}, TypeError, "query_key must have dtype"),
        ({"query_key": Q[..., :0]}, ValueError, "query_key must have a last dimension of at least 1"),
        ({"value": HALF}, TypeError, "value must have dtype torch.float32, got torch.float16"),
        ({"value": Q[:, :, 1:]}, ValueError, "value must have shape [2, 3, 20, 8], got [2, 3, 19, 8]"),
        ({"value": Q.to("meta")}, ValueError, "value must be on the device of query_key, cpu, got meta"),
        ({"n_hashes": 0}, ValueError, "n_hashes must be at least 1, got 0"),
        ({"n_hashes": 2.0}, TypeError, "n_hashes must be an int, got 2.0"),
        ({"n_buckets": 7}, ValueError, "n_buckets must be a positive even integer or a sequence of them, got 7"),
        ({"n_buckets": [4, 3]}, ValueError, "got [4, 3]"),
        ({"n_buckets": []}, ValueError, "got []"),
        ({"n_buckets": 0}, ValueError, "got 0"),
        ({"n_buckets": [2**16, 2**16]}, ValueError, "n_buckets must have a product below 2**31 - 1"),
        ({"chunk_length": 0}, ValueError, "chunk_length must be at least 1, got 0"),
        ({"chunk_length": True}, TypeError, "chunk_length must be an int, got True"),
        ({"chunks_before": -1}, ValueError, "chunks_before must be between 0 and 1024, got -1"),
        ({"chunks_after": -1}, ValueError, "chunks_after must be between 0 and 1024, got -1"),
        ({"chunks_before": 1025}, ValueError, "chunks_before must be between 0 and 1024, got 1025"),
        ({"chunk_length": 2**64}, ValueError, "chunk_length must be between 1 and 2147483647"),
        ({"n_buckets": 4.0}, ValueError, "n_buckets must be a positive even integer or a sequence of them, got 4.0"),
        ({"dropout_p": 0.1, "dropout_seed": SEED.to("meta")}, ValueError, "dropout_seed must be on the device of the query, cpu, got meta"),
        ({"causal": 1}, TypeError, "causal must be a bool, got 1"),
        ({"key_padding_mask": torch.zeros(2, 19, dtype=torch.bool)}, ValueError, "key_padding_mask must have shape [2, 20]"),
        ({"key_padding_mask": torch.zeros(2, 20)}, TypeError, "key_padding_mask must have dtype torch.bool"),
        ({"attn_mask": torch.zeros(20, 20)}, ValueError, "attn_mask must have 4 dimensions"),
        ({"attn_mask": torch.zeros(3, 1, 20, 20)}, ValueError, "attn_mask must have shape [2 or 1, 3 or 1, 20, 20]"),
        ({"attn_mask": torch.zeros(1, 1, 20, 20, requires_grad=True)}, ValueError, "attn_mask must not require a gradient"),
        ({"num_queries": 21}, ValueError, "num_queries must be between 0 and 20, got 21"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1, got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be between 0 and 1, got nan"),
        ({"dropout_p": "x"}, TypeError, "dropout_p must be a float, got 'x'"),
        ({"dropout_p": 0.1}, ValueError, "dropout_seed must be an int64 tensor of one element when dropout_p is 0.1"),
        ({"dropout_p": 0.1, "dropout_seed": 1}, TypeError, "dropout_seed must be an int64 tensor of one element, got 1"),
        ({"dropout_p": 0.1, "dropout_seed": SEED.int()}, ValueError, "got torch.int32 [1]"),
        ({"rules": "paper"}, TypeError, "rules must be an AttentionRules, got 'paper'"),
        ({"rotations": torch.zeros(1, 3, 8, 4, 2)}, ValueError, "rotations must have shape [2 or 1, 3 or 1, 8, 4, 1]"),
        ({"rotations": torch.zeros(1, 3, 8, 4, 1).double()}, TypeError, "rotations must have dtype torch.float32"),
        ({"hash_seed": 1.5}, TypeError, "hash_seed must be an int, got 1.5"),
        ({"hash_seed": 2**63}, ValueError, "hash_seed must be between"),
        ({"hash_seed": SEED.int()}, ValueError, "hash_seed must be an int or an int64 tensor of one element"),
        ({"buckets": torch.zeros(2, 3, 3, 20).int()}, ValueError, "buckets must have shape [2, 3, 4, 20], got [2, 3, 3, 20]"),
        ({"buckets": torch.zeros(2, 3, 4, 20)}, TypeError, "buckets must have dtype torch.int32"),
        ({"buckets": torch.full((2, 3, 4, 20), 99).int()}, ValueError, "buckets must be between 0 and 4, got 99 to 99"),
        ({"buckets": torch.full((2, 3, 4, 20), -1).int()}, ValueError, "buckets must be between 0 and 4, got -1 to -1"),
        ({"alignment": "left"}, ValueError, "alignment must be one of ('ring', 'bucket'), got 'left'"),
        ({"alignment": "bucket"}, ValueError, 'n_buckets must be given with alignment="bucket"'),
        ({"cu_seqlens": torch.tensor([0, 20]).int()}, ValueError, "n_buckets must be given with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 19]).int(), "n_buckets": 2}, ValueError, "rise from 0 to the length 20, got [0, 19]"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 20]).int(), "n_buckets": 2}, ValueError, "got [0, 9, 5, 20]"),
        ({"cu_seqlens": torch.tensor([0, 20]), "n_buckets": 2}, TypeError, "cu_seqlens must have dtype torch.int32"),
        ({"shift_keys": 1}, TypeError, "shift_keys must be a bool, got 1"),
        ({"shift_keys": True}, ValueError, "shift_keys must be False without causal"),
        ({"shift_keys": True, "causal": True, "num_queries": 7}, ValueError, "num_queries must be None with shift_keys"),
        ({"shift_keys": True, "causal": True, "attn_mask": torch.zeros(1, 1, 20, 20)}, ValueError,
         "attn_mask must be None with shift_keys"),
        ({"backend": "gpu"}, ValueError, "backend must be one of 'cpu', 'cuda', 'triton', 'reference' or None, got 'gpu'"),
        ({"return_buckets": None}, TypeError, "return_buckets must be a bool, got None"),
    ],
)  # fmt: skip
def test_lsh_attention(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"query_key": Q, "value": Q, "chunk_length": 16, **changes}
    if "buckets" in changes:
        arguments["n_buckets"] = 4
    for backend in ("cpu", "reference"):
        with pytest.raises(kind, match=re.escape(message)):
            rk.lsh_attention(**{"backend": backend, **arguments})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"key": Q[..., :4]}, ValueError, "key must have shape [2, 3, 20, 8], got [2, 3, 20, 4]"),
        ({"key": None}, TypeError, "key must be a torch.Tensor, got NoneType"),
        ({"value": Q[:, :, 1:]}, ValueError, "value must have shape [2, 3, 20, 8], got [2, 3, 19, 8]"),
        ({"scale": float("inf")}, ValueError, "scale must be finite in float32, got inf"),
        ({"scale": 1e300}, ValueError, "scale must be finite in float32, got 1e+300"),
        ({"scale": "1"}, TypeError, "scale must be a float or None, got '1'"),
        ({"chunk_length": -3}, ValueError, "chunk_length must be at least 1, got -3"),
    ],
)
def test_local_attention(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        rk.local_attention(**{"query": Q, "key": Q, "value": Q, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be at least 1, got 0"),
        ({"budget": 1.5}, TypeError, "budget must be an int, got 1.5"),
        ({"local_fraction": 1.5}, ValueError, "local_fraction must be between 0 and 1, got 1.5"),
        ({"local_fraction": None}, TypeError, "local_fraction must be a float, got None"),
        ({"chunk_length": 0}, ValueError, "chunk_length must be at least 1, got 0"),
        ({"grouping": "kmeans"}, ValueError, "grouping must be one of ('position', 'hash'), got 'kmeans'"),
        ({"rest_term": 1}, TypeError, "rest_term must be a bool, got 1"),
        ({"causal": None}, TypeError, "causal must be a bool, got None"),
        ({"key": torch.randn(2, 3, 9, 8)}, ValueError, "key must have a number of heads that divides the query's, 4, got 3"),
        ({"key": torch.randn(2, 2, 9, 7)}, ValueError, "key must have shape [2, 2, 9, 8], got [2, 2, 9, 7]"),
        ({"value": torch.randn(2, 2, 8, 8)}, ValueError, "value must have shape [2, 2, 9, 8], got [2, 2, 8, 8]"),
        ({"value": torch.randn(2, 2, 9, 8).half()}, TypeError, "value must have dtype torch.float32, got torch.float16"),
        ({"key_padding_mask": torch.zeros(2, 5).bool()}, ValueError, "key_padding_mask must have shape [2, 9], got [2, 5]"),
        ({"attn_mask": torch.zeros(1, 1, 5, 5)}, ValueError, "attn_mask must have shape [2 or 1, 4 or 1, 5, 9]"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p must be between 0 and 1, got 2.0"),
        ({"dropout_p": 0.5}, ValueError, "dropout_seed must be an int64 tensor of one element when dropout_p is 0.5"),
        ({"scale": float("inf")}, ValueError, "scale must be finite in float32, got inf"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_clustered_attention(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 9, 8), "value": torch.randn(2, 2, 9, 8)}
    for backend in ("cpu", "reference"):
        with pytest.raises(kind, match=re.escape(message)):
            rk.clustered_attention(**({"backend": backend} | arguments | changes))


def test_steps() -> None:
    rotations = rk.random_rotations(0, 3, 8, 2, 4)
    with pytest.raises(ValueError, match=re.escape("rotations must have shape [2 or 1, 3 or 1, 8, 2, 3]")):
        rk.hash_buckets(Q, rotations, 6)
    with pytest.raises(ValueError, match="got 5"):
        rk.hash_buckets(Q, rotations, 5)
    with pytest.raises(TypeError, match="n_buckets must be a positive even integer or a sequence of them, got None"):
        rk.hash_buckets(Q, rotations, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"buckets must have dtype torch\.int32"):
        rk.bucket_order(torch.zeros(1, 1, 1, 4).long(), 4)
    for bad in (-1, 4, 2**31 - 1):
        for backend in ("cpu", "reference"):
            with pytest.raises(ValueError, match=f"buckets must be between 0 and 3, got .*{bad}"):
                rk.bucket_order(torch.tensor([0, 1, bad, 0]).int().view(1, 1, 1, 4), 4, backend=backend)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        rk.random_rotations(0, 0, 8, 2, 4)
    with pytest.raises(TypeError, match="hash_seed must be an int, got None"):
        rk.random_rotations(None, 1, 8, 2, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("key_norm", "l1"), ("own_position", "never"), ("dedup", True), ("combine_rounds", "mean"), ("window_order", ""),
     ("scale", float("nan")), ("own_value", "x"), ("mask_value", float("-inf")),
     ("own_value", None), ("within_bucket", "off"), ("cut_padding", 1)],
)  # fmt: skip
def test_rules(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"AttentionRules.{field} must be .* got"):
        rk.AttentionRules(**{field: value})


def test_the_library_checks_what_memory_safety_needs() -> None:
    """Ops called directly, past the public functions."""
    from .test_ops import OPS, attention_arguments

    for changes, message in (
        ({"order": torch.full((1, 2, 2, 20), 20).int()}, "order must be between 0 and 19"),
        ({"order": torch.full((1, 2, 2, 20), -5).int()}, "order must be between 0 and 19"),
        ({"order": torch.zeros(1, 2, 2, 19).int()}, "order has a wrong shape"),
        ({"value": torch.randn(1, 2, 19, 3)}, "value must have shape"),
        ({"key_padding_mask": torch.zeros(1, 3).bool()}, "key_padding_mask has a wrong shape"),
        ({"attn_mask": torch.zeros(1, 1, 3, 3)}, "attn_mask must have shape"),
        ({"chunk_length": 0}, "chunk_length must be positive"),
        ({"num_queries": 50}, "num_queries must be between"),
        ({"cu_seqlens": torch.tensor([0, 30]).int()}, "cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([[0, 21, 20]]).int()}, "cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([[0, 20], [0, 20]]).int()}, "cu_seqlens has a wrong shape"),
        ({"alignment": "bucket"}, "bucket alignment needs"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.chunk_attention.default(*attention_arguments(**{"backend": "cpu", **changes}))


@pytest.mark.parametrize("bounds", [[64, 128, 192], [0, 96, 64, 128], [0, 64], [0]], ids=str)
def test_backends_check_bounds(bounds: list[int]) -> None:
    """In compiled code nothing else has, and kernels go where they say."""
    x = torch.randn(1, 2, 128, 8)
    good = torch.tensor([0, 64, 128], dtype=torch.int32)
    for op in ("bucket_order", "chunk_attention"):
        call: Any = capture(rk.lsh_attention, x, x, cu_seqlens=good, n_buckets=4, op=op)
        assert _common.device_bounds(call) is call.cu_seqlens
        call = call._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        for backend in (cuda, reference):
            with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to the length 128"):
                getattr(backend, op)(call)
