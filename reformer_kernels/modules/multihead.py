"""A drop-in for nn.MultiheadAttention whose time and memory grow linearly with the length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import clustered, functional
from .._checks import check_bool, check_choice, check_fraction, check_int
from .._dispatch import check_backend
from ..hashing import bucket_factors
from .attention import check_hash_seed, draw_seed, seed_of

_MASKED = -1e4  # added to a score, this leaves no weight in any dtype; float16's most negative number is -65504
_CLUSTERED = ("budget", "local_fraction", "grouping", "rest_term", "chunk_length", "backend")


def _no_fused_path(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing.

    In inference nn.TransformerEncoderLayer reads the weights of its ``self_attn`` and never calls its forward, unless a
    module inside it has a hook. At module level, so that modules can be copied and pickled.
    """


class LSHMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` for long sequences: same parameters, state_dict, forward and errors.

    With at most ``exact_below`` keys (what ``add_bias_kv`` and ``add_zero_attn`` append counts) it computes what the
    stock module does, to rounding. With more, every query attends ``budget`` keys, as in
    ``functional.clustered_attention``, and one pseudo-key for the rest. Two differences are meant: a query that sees no
    key gives ``out_proj.bias`` (and weights of 0) where the stock module may give NaN, and appended keys are seen by
    every query also with the ``is_causal`` hint, with which the stock module loses them.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            ``nn.MultiheadAttention``.
        budget, local_fraction, grouping, rest_term, chunk_length, hash_seed, backend: as in
            ``functional.clustered_attention``. A ``hash_seed`` of None draws a new one in every training forward, and
            is 0 in evaluation.
        causal: query i sees the keys 0 ... i, without any L x L mask.
        exact_below: the largest number of keys that is attended exactly; None: ``budget``.
        shared_qk: the Reformer's attention instead (``functional.lsh_attention``): **another function**, at every
            length, for training from scratch. The query projection makes queries and keys, keys have unit length, and
            a token attends itself only if it sees nothing else. The key projection is unused (its gradient is 0).
            Only for self-attention with ``need_weights=False``, without ``add_bias_kv``, ``add_zero_attn``, ``kdim``
            and ``vdim``; of the options only ``chunk_length``, ``causal``, ``hash_seed`` and ``backend`` apply.
        n_hashes, n_buckets: as in ``functional.lsh_attention``, only with ``shared_qk``. None: 4, and by the length.

    torch.fx keeps it as one node, as it does the stock module; torch.jit.script does not take it.

    Shape: as in ``nn.MultiheadAttention``.

    Raises:
        TypeError, ValueError, AssertionError: an argument has a wrong type or value.
    """

    options: dict[str, Any]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        budget: int = 128,
        local_fraction: float = 0.25,
        grouping: str = "position",
        rest_term: bool = True,
        chunk_length: int | None = None,
        causal: bool = False,
        shared_qk: bool = False,
        n_hashes: int | None = None,
        n_buckets: int | Sequence[int] | None = None,
        exact_below: int | None = None,
        hash_seed: int | None = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        check_clustered_options(
            budget, local_fraction, chunk_length, grouping, rest_term, hash_seed, backend, exact_below
        )
        check_bool("causal", causal)
        check_bool("shared_qk", shared_qk)
        _check_reformer_options(shared_qk, n_hashes, n_buckets, exact_below)
        self._set_options(
            budget=budget,
            local_fraction=local_fraction,
            grouping=grouping,
            rest_term=rest_term,
            chunk_length=chunk_length,
            causal=causal,
            shared_qk=shared_qk,
            n_hashes=n_hashes,
            n_buckets=n_buckets,
            exact_below=exact_below,
            hash_seed=hash_seed,
            backend=backend,
        )
        reasons = not_supported_reasons(self, self.options)
        if reasons:
            raise ValueError("; ".join(reasons))

    def _set_options(self, **options: Any) -> None:
        """All that a stock module lacks to be one of this class (``convert_attention`` uses it too)."""
        self.options = options
        self.register_forward_pre_hook(_no_fused_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``, for which see shapes and errors.

        Of long sequences:

        * A float ``key_padding_mask`` of 0 and -inf serves as a bool one. That is seen by reading it; where that is
          impossible (``torch.compile``, ``vmap`` over the mask, CUDA graphs) or it holds other values, these become one
          more column of queries and keys (with ``shared_qk`` a part of ``attn_mask``, [N, 1, L, S]). -1e4 and below
          ignores a key.
        * With ``is_causal`` and without weights, ``attn_mask`` is taken for the causal mask and not read (the stock
          module does so if there is no padding mask).
        * An ``attn_mask`` costs L x S memory and the pseudo-key, and may not require a gradient: prefer ``causal``.

        Returns:
            The output, and the weights [N, L, S], unaveraged [N, H, L, S], or None without ``need_weights``.
        """
        given = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        tracer: Any = getattr(query, "tracer", None)
        if tracer is not None:  # a torch.fx.Proxy: fx keeps modules of torch.nn whole, and so this one
            return tracer.create_proxy("call_module", tracer.path_of_module(self), given, {})
        own_nested = query.is_nested and query.layout == torch.strided and self.batch_first and query is key is value
        if own_nested and key_padding_mask is None and attn_mask is None:
            return self._forward_nested(query, need_weights, average_attn_weights)
        if not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(*given)  # raises the stock error
        options, batched = self.options, query.dim() == 3
        rows_first = self.batch_first or not batched
        context_keys = int(self.bias_k is not None) + int(self.add_zero_attn)
        n_keys = key.shape[1 if self.batch_first and batched else 0] + context_keys
        limit = options["budget"] if options["exact_below"] is None else options["exact_below"]
        exact = not options["shared_qk"] and n_keys <= limit
        causal = options["causal"]
        if exact and not causal and key_padding_mask is None and attn_mask is None:
            return super().forward(*given)

        if options["shared_qk"]:
            if key is not query:
                raise ValueError("key must be query with shared_qk=True (it is self-attention), got another tensor")
            if need_weights:
                raise ValueError("need_weights must be False with shared_qk=True (it has no weights), got True")
        if is_causal and not need_weights and (key_padding_mask is None or not exact):
            causal, attn_mask = True, None
        q, k, v = self._project(query, key, value, rows_first)
        if context_keys:
            k, v = self._append_context(k, v)
        masks = _four_dimensional(key_padding_mask, attn_mask, (q.shape[0], q.shape[1]), context_keys)
        if exact:
            dropout_p = self.dropout if self.training else 0.0
            out, weights = _attend_exactly(q, k, v, *masks, causal, context_keys, dropout_p, need_weights)
        else:
            out, weights = self._attend_long(q, k, v, *masks, causal, context_keys, need_weights, key is query)
        out = out.permute(0, 2, 1, 3) if rows_first else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _attend_long(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        causal: bool,
        context_keys: int,
        need_weights: bool,
        self_attention: bool,
    ) -> tuple[Tensor, Tensor | None]:
        options = self.options
        scale = self.head_dim**-0.5
        key_padding_mask, bias = _split_padding(key_padding_mask)
        if bias is not None and options["shared_qk"]:
            attn_mask = _add_bias(attn_mask, bias, q.shape[2])
        elif bias is not None:
            q, k = _with_bias(q, k, bias, scale)
        arguments: dict[str, Any] = {"causal": causal, "key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        dropping = self.training and self.dropout > 0
        arguments["dropout_p"] = self.dropout if dropping else 0.0
        arguments["dropout_seed"] = draw_seed(q.device) if dropping else None
        hashed = options["shared_qk"] or options["grouping"] == "hash"
        arguments["hash_seed"] = seed_of(options["hash_seed"], self.training) if hashed else 0
        if options["shared_qk"]:
            arguments |= {name: options[name] for name in ("n_buckets", "backend")}
            arguments["chunk_length"] = options["chunk_length"] or 64
            return functional.lsh_attention(q, v, n_hashes=options["n_hashes"] or 4, **arguments), None
        arguments |= {name: options[name] for name in _CLUSTERED} | {"hash_width": self.head_dim}
        if self_attention and key_padding_mask is not None:
            arguments["query_padding_mask"] = key_padding_mask[:, : q.shape[2]]
        return clustered.attend(q, k, v, **arguments, scale=scale, context_keys=context_keys, need_weights=need_weights)

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the stock module takes these shapes and types."""
        if query.is_nested or key.is_nested or value.is_nested or (is_causal and attn_mask is None):
            return False
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return False
        if key.shape[:-1] != value.shape[:-1]:
            return False
        batch, length, n_keys = None, query.shape[0], key.shape[0]
        if query.dim() == 3:
            rows = 1 if self.batch_first else 0
            batch, length, n_keys = query.shape[1 - rows], query.shape[rows], key.shape[rows]
            if key.shape[1 - rows] != batch:
                return False
        for mask, shapes in (
            (key_padding_mask, ((n_keys,),) if batch is None else ((batch, n_keys),)),
            (attn_mask, ((length, n_keys), ((1 if batch is None else batch) * self.num_heads, length, n_keys))),
        ):
            if mask is None:
                continue
            if not (mask.dtype == torch.bool or mask.is_floating_point()) or tuple(mask.shape) not in shapes:
                return False
        return True

    def _project(self, query: Tensor, key: Tensor, value: Tensor, rows_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, L, D] and twice [B, H, S, D], views of as few products as there are different inputs."""
        E, H, D = self.embed_dim, self.num_heads, self.head_dim
        stacked = (2, 0, 3, 1, 4) if rows_first else (2, 1, 3, 0, 4)  # [n, B, H, L, D]

        def project(x: Tensor, first: int, n: int = 1) -> tuple[Tensor, ...]:
            """Projections first ... first + n - 1 of query, key and value."""
            rows = slice(first * E, (first + n) * E)
            if self._qkv_same_embed_dim:
                weight = self.in_proj_weight[rows]
            else:
                weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[first]
            y = F.linear(x, weight, None if self.in_proj_bias is None else self.in_proj_bias[rows])
            y = y.unflatten(-1, (n, H, D))
            return (y if x.dim() == 3 else y[None]).permute(stacked).unbind()

        if self.options["shared_qk"]:
            (q,), (v,) = project(query, 0), project(value, 2)
            return q, q, v
        if not self._qkv_same_embed_dim or key is not value:
            (q,), (k,), (v,) = project(query, 0), project(key, 1), project(value, 2)
        elif query is not key:
            (q,), (k, v) = project(query, 0), project(key, 1, 2)
        else:
            q, k, v = project(query, 0, 3)
        return q, k, v

    def _append_context(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [B, H, S, D] with the rows of ``bias_k``, ``bias_v`` and ``add_zero_attn``."""
        B, H, _, D = k.shape
        ks, vs = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            ks.append(self.bias_k.to(k.dtype).view(1, H, 1, D).expand(B, -1, -1, -1))
            vs.append(self.bias_v.to(v.dtype).view(1, H, 1, D).expand(B, -1, -1, -1))
        if self.add_zero_attn:
            ks.append(k.new_zeros(B, H, 1, D))
            vs.append(v.new_zeros(B, H, 1, D))
        return torch.cat(ks, 2), torch.cat(vs, 2)

    def _forward_nested(
        self, x: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of a strided NestedTensor of [L_i, E], as nn.TransformerEncoder makes of padding."""
        lengths = [row.shape[0] for row in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        positions = torch.arange(padded.shape[1], device=x.device)
        mask = positions >= torch.tensor(lengths, device=x.device)[:, None]
        out, weights = self.forward(padded, padded, padded, mask, need_weights, None, average_attn_weights)
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.strided), weights

    def extra_repr(self) -> str:
        shown = {"num_heads": self.num_heads, "dropout": self.dropout, "batch_first": self.batch_first, **self.options}
        return ", ".join([str(self.embed_dim), *(f"{name}={value}" for name, value in shown.items())])


def _four_dimensional(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, sizes: tuple[int, int], context_keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """The masks as [B, S] and [B or 1, H or 1, L, S], where S counts context keys; views if there are none."""
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, sizes)
    if context_keys:
        key_padding_mask, attn_mask = (
            None if mask is None else F.pad(mask, (0, context_keys)) for mask in (key_padding_mask, attn_mask)
        )
    return key_padding_mask, attn_mask


def _split_padding(key_padding_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``key_padding_mask`` [B, S] as a bool mask, and what else a float one adds to the scores, [B, S]."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return key_padding_mask, None
    ignored = key_padding_mask <= _MASKED
    bias = key_padding_mask.masked_fill(ignored, 0.0)
    return ignored, None if _is_known_to_be_zero(bias) else bias


def _with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, L, D + 1] and k [B, H, S, D + 1], whose scores are those of D columns plus the bias [B, S] of the keys.

    So the keys are also selected by it, and nothing of size L x S is made.
    """
    constant = 2.0 ** round(-math.log2(scale))  # exact in every dtype, and keeps the keys' column in float16's range
    column = (bias / (scale * constant)).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
    return F.pad(q, (0, 1), value=constant), torch.cat([k, column], -1)


def _add_bias(attn_mask: Tensor | None, bias: Tensor, length: int) -> Tensor:
    """``attn_mask`` [B or 1, H or 1, L, S] plus the bias [B, S] of the keys."""
    bias = bias[:, None, None]
    if attn_mask is None:
        return bias.expand(-1, -1, length, -1)
    return torch.where(attn_mask, float("-inf"), bias) if attn_mask.dtype == torch.bool else attn_mask + bias


def _is_known_to_be_zero(x: Tensor) -> bool:
    """False where the values cannot be read."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    if torch._C._are_functorch_transforms_active() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return not bool(x.any())


def _attend_exactly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    causal: bool,
    context_keys: int,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The stock module's attention without its NaN: [B, H, L, D], and the weights [B, H, L, S].

    The stock module itself gives NaN for a query that sees no key, with weights and in its native inference path.
    """
    terms = [attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]]
    L, S = q.shape[2], k.shape[2]
    if causal:
        if not need_weights and attn_mask is None and key_padding_mask is None and not context_keys:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True), None
        hidden = torch.ones(L, S - context_keys, dtype=torch.bool, device=q.device).triu(1)
        terms.append(F.pad(hidden, (0, context_keys)))
    mask = None
    for term in terms:
        if term is None:
            continue
        if term.dtype == torch.bool:
            term = torch.zeros_like(term, dtype=q.dtype).masked_fill(term, float("-inf"))
        mask = term if mask is None else mask + term
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p), None
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        sees_none = (mask == float("-inf")).all(-1, keepdim=True)
        weights = (scores + mask).masked_fill(sees_none, 0.0).softmax(-1).masked_fill(sees_none, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


def check_clustered_options(
    budget: Any,
    local_fraction: Any,
    chunk_length: Any,
    grouping: Any,
    rest_term: Any,
    hash_seed: Any,
    backend: Any,
    exact_below: Any,
) -> None:
    """The options that modules and ``scaled_dot_product_attention`` share."""
    check_int("budget", budget, 1)
    check_fraction("local_fraction", local_fraction)
    if chunk_length is not None:
        check_int("chunk_length", chunk_length, 1)
    check_choice("grouping", grouping, clustered.GROUPINGS)
    check_bool("rest_term", rest_term)
    check_hash_seed(hash_seed)
    check_backend(backend)
    if exact_below is not None:
        check_int("exact_below", exact_below, 0)


def _check_reformer_options(shared_qk: bool, n_hashes: Any, n_buckets: Any, exact_below: Any) -> None:
    if not shared_qk:
        for name, value in (("n_hashes", n_hashes), ("n_buckets", n_buckets)):
            if value is not None:
                raise ValueError(f"{name} must be None without shared_qk=True, got {value!r}")
        return
    if exact_below is not None:
        raise ValueError(f"exact_below must be None with shared_qk=True (it is never exact), got {exact_below!r}")
    if n_hashes is not None:
        check_int("n_hashes", n_hashes, 1)
    if n_buckets is not None:
        bucket_factors(n_buckets, 1, 1)


def not_supported_reasons(module: nn.MultiheadAttention, options: dict[str, Any]) -> list[str]:
    """Why a module with these arguments of ``nn.MultiheadAttention`` cannot have the options; empty if it can."""
    if not options["shared_qk"]:
        return []
    reasons = []
    if module.bias_k is not None:
        reasons.append("add_bias_kv must be False with shared_qk=True, got True")
    if module.add_zero_attn:
        reasons.append("add_zero_attn must be False with shared_qk=True, got True")
    if not module._qkv_same_embed_dim:
        sizes = f"{module.embed_dim}, got {module.kdim} and {module.vdim}"
        reasons.append(f"kdim and vdim must be embed_dim with shared_qk=True, {sizes}")
    return reasons
