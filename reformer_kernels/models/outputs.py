"""What the models return: attributes, keys and places of the same values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput:
    """``out.loss``, ``out["loss"]``, ``out[0]``, ``loss, logits = out`` and ``{**out}``, as of Hugging Face's models.

    Keys and places are those of values that are not None, in the order of the class. Its subclasses are known to
    ``torch.utils._pytree``, and so to ``torch.export``, ``torch.func`` and data-parallel wrappers.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = f"{cls.__module__}.{cls.__qualname__}"
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out.keys())),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=name,
            flatten_with_keys_fn=lambda out: (
                [(pytree.GetAttrKey(key), value) for key, value in out.items()],
                list(out.keys()),
            ),
        )

    def keys(self) -> list[str]:
        """The names of the values there are."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Tensor]:
        """The values there are."""
        return [getattr(self, key) for key in self.keys()]

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and values."""
        return [(key, getattr(self, key)) for key in self.keys()]

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The values there are."""
        return tuple(self.values())

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has {self.keys()}, got {key!r}")
        return getattr(self, key)


@dataclass(eq=False)
class ReformerOutput(ModelOutput):
    """``last_hidden_state`` [B, L, hidden_dim of the configuration]."""

    last_hidden_state: Tensor


@dataclass(eq=False)
class LMOutput(ModelOutput):
    """``loss``, a scalar, with labels; ``logits`` [B, L, V] without labels, or if they were asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass(eq=False)
class ClassifierOutput(ModelOutput):
    """``logits`` [B, num_labels], and ``loss``, a scalar, with labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """``start_logits`` and ``end_logits`` [B, L], and ``loss``, a scalar, with positions."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None


@dataclass(eq=False)
class Seq2SeqOutput(LMOutput):
    """Of the decoder; and ``encoder_last_hidden_state`` [B, S, hidden_dim of the encoder]."""

    encoder_last_hidden_state: Tensor | None = None
