"""Turns the attention of an existing model into LSHMultiheadAttention."""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import Any

import torch
from torch import nn

from ._options import not_supported_reasons
from .multihead import LSHMultiheadAttention

_SDPA = "scaled_dot_product_attention"


def convert_attention(model: nn.Module, **options: Any) -> dict[str, LSHMultiheadAttention]:
    """Makes every ``nn.MultiheadAttention`` inside a model an ``LSHMultiheadAttention``, in place.

    The module objects stay the same and change their class, so parameters, optimizers, hooks, devices, modes and
    sharing stay as they are. All or none: nothing is changed if one of them cannot be converted. What is converted
    already stays as it is, options too.

    Args:
        model: any module, not itself an ``nn.MultiheadAttention``.
        options: the keyword-only arguments of ``LSHMultiheadAttention``, for all of them. ``causal`` and ``shared_qk``
            are for models with self-attention only. With ``causal`` the keys that a chunk of a long sequence attends
            are still chosen by all of its queries, see ``LSHMultiheadAttention``.

    Returns:
        The converted modules by their names in the model (the first one of a shared module). Empty, with a warning that
        says what the model has instead, if there were none.

    Raises:
        TypeError: ``model`` is no module, or an option has a wrong name or type.
        ValueError: an option has a wrong value, or a module cannot be converted; the message lists all of these.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_names(options)
    # Built once to check the options; the stock arguments stand first.
    options = LSHMultiheadAttention(1, 1, 0.0, True, False, False, None, None, False, "meta", None, **options).options
    if isinstance(model, nn.MultiheadAttention) and not isinstance(model, LSHMultiheadAttention):
        raise ValueError(
            "model must contain nn.MultiheadAttention, not be one: build an LSHMultiheadAttention with its arguments "
            f"and load its state_dict, got {type(model).__name__}"
        )
    found: dict[str, nn.MultiheadAttention] = {}
    refused: list[str] = []
    cross = {id(m.multihead_attn) for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    for name, module in model.named_modules():
        if isinstance(module, LSHMultiheadAttention):
            continue
        if isinstance(module, torch.jit.ScriptModule) and module.original_name == "MultiheadAttention":
            refused.append(f"{name}: it is scripted; convert before torch.jit.script")
        elif isinstance(module, nn.MultiheadAttention):
            reasons = _reasons_against(module, id(module) in cross, options)
            refused += [f"{name}: {reason}" for reason in reasons]
            found[name] = module
    if refused:
        raise ValueError("model cannot be converted:\n" + "\n".join(refused))
    if not found and not any(isinstance(module, LSHMultiheadAttention) for module in model.modules()):
        warnings.warn(_what_there_is(model), stacklevel=2)
    converted = {}
    for name, module in found.items():
        module.__class__ = LSHMultiheadAttention
        assert isinstance(module, LSHMultiheadAttention)
        module._set_options(**options)
        converted[name] = module
    return converted


def _check_names(options: dict[str, Any]) -> None:
    parameters = inspect.signature(LSHMultiheadAttention.__init__).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(f"convert_attention has no option {name!r}{meant}; its options are {', '.join(allowed)}")


def _what_there_is(model: nn.Module) -> str:
    """Of a model without nn.MultiheadAttention: what looks like attention, and what to do with it."""
    kinds: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        called = getattr(getattr(kind.forward, "__code__", None), "co_names", ())
        if any(part in kind.__name__.lower() for part in ("attention", "attn")) or _SDPA in called:
            kinds.setdefault(kind, []).append(name or "the model itself")
    text = f"model has no nn.MultiheadAttention ({type(model).__qualname__}), nothing was converted"
    if not kinds:
        return f"{text}; nothing in it looks like attention"
    found = [f"{kind.__module__}.{kind.__qualname__} ({names[0]})" for kind, names in kinds.items()]
    text += f"; it has {', '.join(found[:5])}{' and others' if len(found) > 5 else ''}. "
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return text + (
            "Models of transformers take other attentions by transformers.AttentionInterface: register a function that "
            f"calls reformer_kernels.{_SDPA}, the masks of sdpa for it in AttentionMaskInterface, and choose it by "
            "model.set_attn_implementation"
        )
    return text + (
        f"Where these call torch's {_SDPA}, call reformer_kernels.{_SDPA}, which has the same arguments; attention "
        "that is written out has to be replaced by it, or by LSHMultiheadAttention"
    )


def _reasons_against(module: nn.MultiheadAttention, is_cross: bool, options: dict[str, Any]) -> list[str]:
    if type(module) is not nn.MultiheadAttention:
        kind = type(module)
        return [
            f"{kind.__module__}.{kind.__qualname__} is a subclass of nn.MultiheadAttention with a behaviour of its own "
            "(parametrized, quantized and sharded modules are such: convert before)"
        ]
    reasons = not_supported_reasons(module, options)
    if "forward" in vars(module):
        reasons.append("its forward is replaced on the instance, which would go before ours")
    if is_cross or not module._qkv_same_embed_dim:
        for name in ("causal", "shared_qk"):
            if options[name]:
                reasons.append(f"{name} must be False for attention to another sequence, got True")
    return reasons
