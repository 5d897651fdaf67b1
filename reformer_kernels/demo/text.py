"""The text that the demo learns: read, checked and split into training and held-out bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.1  # the last part of the text


class DemoError(Exception):
    """Something that the user can mend; its message is one line."""


def read_text(path: str | None) -> bytes:
    """The bytes of a file; None: the help topics that ship with CPython, about 465 KB of English."""
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise DemoError("this Python lacks the module pydoc_data; name another text with --text FILE") from None
        return "\n".join(topics[name] for name in sorted(topics)).encode()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read {path!r}: {error.strerror}") from None


def split_text(text: bytes, context: int) -> tuple[Tensor, Tensor]:
    """Training and held-out bytes, int64 [n]; each has at least one window of ``context`` bytes and its next byte."""
    cut = int(len(text) * (1 - HELD_OUT))
    if len(text) - cut <= context:
        needed = int(context / HELD_OUT) + 10
        raise DemoError(
            f"the text has {len(text):,} bytes, too few: --context {context} needs at least {needed:,}, "
            f"so that the held-out tenth fills a window"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return data[:cut], data[cut:]
