"""What is measured: each provider makes a function of (x, w_query_key, w_value) for a case, or says why it cannot.

All compute one layer without its output projection: x [B, L, H * D] is projected to queries (shared with the keys) and
values, and attended. The peers' layers contain those projections, so ours are measured with the same ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels.hashing import bucket_factors

from .cases import Case

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # weights are [H * D, H * D], as in nn.Linear


def _heads(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight).unflatten(-1, (case.heads, case.head_dim)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def ours(backend: str | None) -> Callable[[Case], Layer]:
    """lsh_attention with rotations as Hugging Face's layer draws them, so that the outputs can be compared."""

    def provide(case: Case) -> Layer:
        factors = bucket_factors(None, case.length, case.chunk_length)
        rotations = _hf_rotations(case)

        def layer(x: Tensor, w_qk: Tensor, w_v: Tensor) -> Tensor:
            out = rk.lsh_attention(
                _heads(case, x, w_qk), _heads(case, x, w_v), causal=True, n_hashes=case.n_hashes, n_buckets=factors,
                chunk_length=case.chunk_length, rotations=rotations, backend=backend,
            )  # fmt: skip
            return _merge(out)

        return layer

    return provide


def sdpa(case: Case) -> Layer:
    """torch's dense causal attention with queries as keys: another function, the speed to beat."""

    def layer(x: Tensor, w_qk: Tensor, w_v: Tensor) -> Tensor:
        q, v = _heads(case, x, w_qk), _heads(case, x, w_v)
        return _merge(torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True))

    return layer


def projections(case: Case) -> Layer:
    """What every layer here contains besides attention."""
    return lambda x, w_qk, w_v: _merge(_heads(case, x, w_qk) + _heads(case, x, w_v))


def huggingface(case: Case) -> Layer:
    """LSHSelfAttention of transformers."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    factors = list(bucket_factors(None, case.length, case.chunk_length))
    width = case.heads * case.head_dim
    config = ReformerConfig(
        attention_head_size=case.head_dim, num_attention_heads=case.heads, hidden_size=width, hash_seed=_SEED,
        num_hashes=case.n_hashes, num_buckets=factors if len(factors) > 1 else factors[0], is_decoder=True,
        lsh_attn_chunk_length=case.chunk_length, lsh_attention_probs_dropout_prob=0.0, axial_pos_embds=False,
        max_position_embeddings=case.length,
    )  # fmt: skip
    module = LSHSelfAttention(config).eval()

    def layer(x: Tensor, w_qk: Tensor, w_v: Tensor) -> Tensor:
        weights = {"query_key.weight": w_qk, "value.weight": w_v}
        return torch.func.functional_call(module, weights, (x,)).hidden_states

    return layer


_SEED = 7


def _hf_rotations(case: Case) -> Tensor:
    columns = sum(bucket_factors(None, case.length, case.chunk_length)) // 2
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(case.heads, case.head_dim, case.n_hashes, columns, generator=generator)[None]


PROVIDERS: dict[str, Callable[[Case], Layer]] = {
    "ours": ours(None),
    "torch SDPA": sdpa,
    "Hugging Face": huggingface,
    "projections alone": projections,
}
SAME_FUNCTION = ("ours", "Hugging Face")  # they differ by rounding alone
