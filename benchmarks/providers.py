"""Who is measured: each provider makes functions for a case. A new competitor is one entry of PROVIDERS.

"attention" is the attention alone, of query_key and value [B, H, L, D]; "layer" is a layer without its output
projection: x [B, L, H * D] is projected to queries (shared with the keys) and values, and attended. Hugging Face's
layer contains those projections, so the others are measured with the same ones. "module" is self-attention by
nn.MultiheadAttention or its drop-in, with all projections and without weights; it is not causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reformer_kernels as rk
from reformer_kernels.hashing import bucket_factors

from .cases import Case

# (query_key, value), or (x, w_query_key, w_value) with weights [H * D, H * D], or (x, *parameters of the module)
Function = Callable[..., Tensor]
Maker = Callable[[Case], Function]
TARGETS = ("attention", "layer", "module")


@dataclass(frozen=True)
class Cost:
    """A rough estimate of one forward and backward, to skip what would take hours or would not fit."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Provider:
    """One implementation of causal attention. A target that it does not offer is None."""

    attention: Maker | None
    layer: Maker | None
    cost: Callable[[Case], Cost]  # flop: as if done at the machine's peak
    backend: str | None = None  # of ours
    module: Maker | None = None

    def make(self, target: str, case: Case) -> Function | None:
        maker: Maker | None = getattr(self, target)
        return None if maker is None else maker(case)


def inputs(target: str, case: Case) -> tuple[list[Tensor], Tensor]:
    """The tensors to differentiate by, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = case.heads * case.head_dim
    if target == "attention":
        rows = [normal(case.batch, case.heads, case.length, case.head_dim) for _ in range(3)]
        tensors, grad_out = rows[:2], rows[2]
    elif target == "module":
        x, grad_out = (normal(case.batch, case.length, width) for _ in range(2))
        shapes = [p.shape for p in nn.MultiheadAttention(width, case.heads, device="meta").parameters()]
        tensors = [x, *(normal(*shape) / width**0.5 for shape in shapes)]
    else:
        x, grad_out = (normal(case.batch, case.length, width) for _ in range(2))
        tensors = [x, *(normal(width, width) / width**0.5 for _ in range(2))]
    return [t.requires_grad_() for t in tensors], grad_out


def _heads(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    heads: Tensor = F.linear(x, weight).unflatten(-1, (case.heads, case.head_dim))
    return heads.transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _projected(attention: Maker) -> Maker:
    """The layer around an attention."""

    def make(case: Case) -> Function:
        attend = attention(case)
        return lambda x, w_qk, w_v: _merge(attend(_heads(case, x, w_qk), _heads(case, x, w_v)))

    return make


def _module(namespace: Any, kind: str) -> Maker:
    """The class is looked up when it is needed: a base revision may lack it."""

    def make(case: Case) -> Function:
        module = getattr(namespace, kind)(case.heads * case.head_dim, case.heads, batch_first=True)
        names = [name for name, _ in module.named_parameters()]

        def attend(x: Tensor, *parameters: Tensor) -> Tensor:
            weights = dict(zip(names, parameters, strict=True))
            out: Tensor = torch.func.functional_call(module, weights, (x, x, x), {"need_weights": False})[0]
            return out

        return attend

    return make


def _offer(attention: Maker, cost: Callable[[Case], Cost], backend: str | None = None) -> Provider:
    return Provider(attention, _projected(attention), cost, backend)


_SEED = 7


def _hf_rotations(case: Case) -> Tensor:
    columns = sum(bucket_factors(None, case.length, case.chunk_length)) // 2
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(case.heads, case.head_dim, case.n_hashes, columns, generator=generator)[None]


def _ours(backend: str | None) -> Maker:
    """lsh_attention with rotations as Hugging Face's layer draws them, so that the outputs can be compared."""

    def make(case: Case) -> Function:
        factors = bucket_factors(None, case.length, case.chunk_length)
        rotations = _hf_rotations(case)
        return lambda query_key, value: rk.lsh_attention(
            query_key, value, causal=True, n_hashes=case.n_hashes, n_buckets=factors,
            chunk_length=case.chunk_length, rotations=rotations, backend=backend,
        )  # fmt: skip

    return make


def _sdpa(case: Case) -> Function:
    """torch's dense causal attention with queries as keys: another function, the speed to beat."""
    return lambda query_key, value: F.scaled_dot_product_attention(query_key, query_key, value, is_causal=True)


def _huggingface(case: Case) -> Function:
    """LSHSelfAttention of transformers, a layer that cannot be had without its projections."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    factors = list(bucket_factors(None, case.length, case.chunk_length))
    config = ReformerConfig(
        attention_head_size=case.head_dim, num_attention_heads=case.heads, hidden_size=case.heads * case.head_dim,
        num_hashes=case.n_hashes, num_buckets=factors if len(factors) > 1 else factors[0], is_decoder=True,
        lsh_attn_chunk_length=case.chunk_length, lsh_attention_probs_dropout_prob=0.0, axial_pos_embds=False,
        max_position_embeddings=case.length, hash_seed=_SEED,
    )  # fmt: skip
    module = LSHSelfAttention(config).eval()

    def layer(x: Tensor, w_qk: Tensor, w_v: Tensor) -> Tensor:
        weights = {"query_key.weight": w_qk, "value.weight": w_v}
        hidden: Tensor = torch.func.functional_call(module, weights, (x,)).hidden_states
        return hidden

    return layer


def _lucidrains(case: Case) -> Function:
    """LSHAttention of reformer_pytorch, which wants the heads in the batch and its defaults otherwise."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    module = LSHAttention(bucket_size=case.chunk_length, n_hashes=case.n_hashes, causal=True).eval()

    def attention(query_key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = module(query_key.flatten(0, 1), value.flatten(0, 1))[0].unflatten(0, query_key.shape[:2])
        return out

    return attention


def _scores(case: Case) -> float:
    return case.batch * case.heads * case.length * case.n_hashes * 2 * case.chunk_length


def _rows(case: Case) -> float:
    return 4.0 * case.batch * case.heads * case.length * case.head_dim  # bytes of one [B, H, L, D]


def _fused_cost(case: Case) -> Cost:
    return Cost(flop=2 * 7 * case.head_dim * _scores(case), bytes=8 * _rows(case))


def _unfused_cost(case: Case) -> Cost:
    # Some 10 score matrices are alive at once, and memory traffic makes it a tenth of the speed (measured at 16K).
    scores = _scores(case)
    return Cost(flop=10 * 2 * 7 * case.head_dim * scores, bytes=10 * 4 * scores + 8 * case.n_hashes * _rows(case))


def _dense_cost(case: Case) -> Cost:
    scores = case.batch * case.heads * case.length**2 / 2
    return Cost(flop=2 * 7 * case.head_dim * scores, bytes=8 * _rows(case))


PROVIDERS: dict[str, Provider] = {
    "ours": replace(_offer(_ours(None), _fused_cost), module=_module(rk, "LSHMultiheadAttention")),
    "ours, cpu": _offer(_ours("cpu"), _fused_cost, "cpu"),
    "ours, reference": _offer(_ours("reference"), _unfused_cost, "reference"),
    "torch SDPA": _offer(_sdpa, _dense_cost),
    "Hugging Face": Provider(None, _huggingface, _unfused_cost),
    "lucidrains": Provider(_lucidrains, None, _unfused_cost),
    "nn.MultiheadAttention": Provider(None, None, _dense_cost, module=_module(nn, "MultiheadAttention")),
    # What every layer here contains besides attention.
    "projections alone": Provider(None, _projected(lambda case: torch.add), _fused_cost),
}
SAME_FUNCTION = ("ours", "Hugging Face")  # they differ by rounding alone
