"""A drop-in for nn.MultiheadAttention whose time and memory grow linearly with the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import clustered, functional
from .._checks import check_bool, check_kind, check_shape, check_tensor, is_readable
from .._exact import attend_exactly
from .._nested import nested_like, padded
from ._masks import add_bias, four_dimensional, split_padding, with_bias
from ._options import check_clustered_options, check_reformer_options, not_supported_reasons
from .attention import draw_seed, seed_of

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
    ``functional.clustered_attention``, and one rest key for the rest. Two differences are meant: a query that sees no
    key gives ``out_proj.bias`` (and weights of 0) where the stock module may give NaN, and appended keys are seen by
    every query also with the ``is_causal`` hint, with which the stock module loses them.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            ``nn.MultiheadAttention``.
        budget, local_fraction, grouping, rest_term, chunk_length, hash_seed, backend: as in
            ``functional.clustered_attention``. A ``hash_seed`` of None draws a new one in every training forward, and
            is 0 in evaluation.
        causal: query i sees the keys 0 ... i, without any L x L mask. No value or key of a later position has a part in
            an output. But which keys a long sequence's chunk attends is decided by all queries of the chunk: an output
            can change with a later token of the same ``chunk_length``, in what it approximates.
        exact_below: the largest number of keys that is attended exactly; None: ``budget``.
        shared_qk: the Reformer's attention instead (``functional.lsh_attention``): **another function**, at every
            length, for training from scratch. The query projection makes queries and keys, keys have unit length, and
            a token attends itself only if it sees nothing else. The key projection is unused (its gradient is 0).
            Only for self-attention (``key`` equals ``query``, by its values where they can be read) with
            ``need_weights=False``, without ``add_bias_kv``, ``add_zero_attn``, ``kdim`` and ``vdim``; of the options
            only ``chunk_length``, ``causal``, ``hash_seed`` and ``backend`` apply.
        n_hashes, n_buckets: as in ``functional.lsh_attention``, only with ``shared_qk``. None: 4, and by the length.

    torch.fx keeps it as one node, as it does the stock module; torch.jit.script does not take it. torch.onnx exports
    it only as exact attention (``exact_below`` at least the number of keys), and static quantization (torch.ao) has to
    leave it out (``qconfig = None``).

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
        check_reformer_options(shared_qk, n_hashes, n_buckets, exact_below)
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

    def reset_parameters(self) -> None:
        """Draws all values anew, as the constructor does. (The stock module has it as ``_reset_parameters``.)"""
        self._reset_parameters()

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
        *,
        query_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``, for which see shapes and errors.

        Args:
            query_padding_mask: bool [N, L], unbatched [L], True: padding, which has no say in the choice of keys, so
                that what it holds has no effect on other rows. None: with as many queries as keys it is the
                ``key_padding_mask``, which is right for self-attention; otherwise all queries choose. Not with
                ``shared_qk``, where queries are keys.

        Nested tensors, strided or jagged, are taken with ``batch_first`` and without masks; the weights are padded.

        Of long sequences:

        * A float ``key_padding_mask`` of 0 and -inf serves as a bool one. That is seen by reading it; where that is
          impossible (``torch.compile``, ``vmap`` over the mask, CUDA graphs) or it holds other values, these become one
          more column of queries and keys (with ``shared_qk`` a part of ``attn_mask``, [N, 1, L, S]). -1e4 and below
          ignores a key.
        * With ``is_causal`` and without weights, ``attn_mask`` is taken for the causal mask and not read (the stock
          module does so if there is no padding mask).
        * An ``attn_mask`` costs L x S memory and the rest key, and may not require a gradient: prefer ``causal``.

        Returns:
            The output, and the weights [N, L, S], unaveraged [N, H, L, S], or None without ``need_weights``.
        """
        given = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        masks = {
            "key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "query_padding_mask": query_padding_mask
        }  # fmt: skip
        tracer: Any = getattr(query, "tracer", None)
        if tracer is not None:  # a torch.fx.Proxy: fx keeps modules of torch.nn whole, and so this one
            extra = {} if query_padding_mask is None else {"query_padding_mask": query_padding_mask}
            proxy: tuple[Tensor, Tensor | None] = tracer.create_proxy(
                "call_module", tracer.path_of_module(self), given, extra
            )
            return proxy
        if query.is_nested or key.is_nested or value.is_nested:
            if query_padding_mask is not None:
                raise ValueError("query_padding_mask must be None with nested tensors, got a tensor")
            all_nested = query.is_nested and key.is_nested and value.is_nested
            if all_nested and self.batch_first and key_padding_mask is None and attn_mask is None:
                return self._forward_nested(query, key, value, need_weights, average_attn_weights)
            return super().forward(*given)  # raises the stock error
        for name, x in {"query": query, "key": key, "value": value, **masks}.items():
            if x is not None:
                check_kind(name, x)
        if not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(*given)  # raises the stock error
        self._check_query_padding(query_padding_mask, query)
        if not isinstance(self.out_proj.weight, Tensor):  # torch.ao makes it a method
            raise TypeError(
                f"out_proj must be a linear layer of floating weights, got {type(self.out_proj).__qualname__}: leave "
                "the attention out of static quantization by setting its qconfig = None before prepare"
            )
        options, batched = self.options, query.dim() == 3
        rows_first = self.batch_first or not batched
        context_keys = int(self.bias_k is not None) + int(self.add_zero_attn)
        n_keys = key.shape[1 if self.batch_first and batched else 0] + context_keys
        limit = options["budget"] if options["exact_below"] is None else options["exact_below"]
        exact = not options["shared_qk"] and n_keys <= limit
        causal = options["causal"]
        if options["shared_qk"]:
            if not _is_same(key, query):
                raise ValueError("key must be query with shared_qk=True (it is self-attention), got another tensor")
            if need_weights:
                raise ValueError("need_weights must be False with shared_qk=True (it has no weights), got True")
            if query_padding_mask is not None:
                raise ValueError("query_padding_mask must be None with shared_qk=True (key_padding_mask is of both)")
        if is_causal and not need_weights and (key_padding_mask is None or not (exact or _is_learned(attn_mask))):
            causal, attn_mask = True, None
        q, k, v = self._project(query, key, value, rows_first)
        if context_keys:
            k, v = self._append_context(k, v)
        padding, mask = four_dimensional(key_padding_mask, attn_mask, (q.shape[0], q.shape[1]), context_keys)
        if exact:
            dropout_p = self.dropout if self.training else 0.0
            out, weights = attend_exactly(q, k, v, padding, mask, causal, context_keys, dropout_p, need_weights)
        else:
            if query_padding_mask is not None and not batched:
                query_padding_mask = query_padding_mask[None]
            out, weights = self._attend_long(
                q, k, v, query_padding_mask, padding, mask, causal, context_keys, need_weights
            )
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
        query_padding_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        causal: bool,
        context_keys: int,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        options = self.options
        scale = self.head_dim**-0.5
        key_padding_mask, bias = split_padding(key_padding_mask)
        if bias is not None and options["shared_qk"]:
            attn_mask = add_bias(attn_mask, bias, q.shape[2])
        elif bias is not None:
            q, k = with_bias(q, k, bias, scale)
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
        arguments |= {name: options[name] for name in _CLUSTERED}
        arguments |= {"query_padding_mask": query_padding_mask, "hash_width": self.head_dim}
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
        if is_causal and attn_mask is None:
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

    def _check_query_padding(self, mask: Tensor | None, query: Tensor) -> None:
        """bool [N, L] of queries in the layout of the module, [L] of unbatched ones."""
        if mask is None:
            return
        rows = query.shape[:-1] if self.batch_first or query.dim() == 2 else (query.shape[1], query.shape[0])
        check_tensor("query_padding_mask", mask, "N L" if query.dim() == 3 else "L", (torch.bool,))
        check_shape("query_padding_mask", mask, tuple(rows))

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
            parts: tuple[Tensor, ...] = (y if x.dim() == 3 else y[None]).permute(stacked).unbind()
            return parts

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
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of NestedTensors of [L_i, E]: strided ones are what nn.TransformerEncoder makes of padding."""
        dense_query, query_padding, lengths = padded("query", query)
        dense_key, key_padding, key_lengths = padded("key", key)
        dense_value, _, value_lengths = padded("value", value)
        if value_lengths != key_lengths:
            raise ValueError(f"value must have the lengths of key, {key_lengths[:8]}, got {value_lengths[:8]}")
        out, weights = self.forward(
            dense_query, dense_key, dense_value, key_padding, need_weights, None, average_attn_weights,
            query_padding_mask=None if self.options["shared_qk"] else query_padding,
        )  # fmt: skip
        return nested_like(query, out, lengths), weights

    def extra_repr(self) -> str:
        shown = {"num_heads": self.num_heads, "dropout": self.dropout, "batch_first": self.batch_first, **self.options}
        return ", ".join([str(self.embed_dim), *(f"{name}={value}" for name, value in shown.items())])


def _is_same(key: Tensor, query: Tensor) -> bool:
    """Whether the key is the query by its values, as far as they can be read."""
    if key is query:
        return True
    if key.shape != query.shape:
        return False
    return not (is_readable(key) and is_readable(query)) or torch.allclose(key, query, 0.0, 0.0, equal_nan=True)


def _is_learned(mask: Tensor | None) -> bool:
    return mask is not None and mask.requires_grad
