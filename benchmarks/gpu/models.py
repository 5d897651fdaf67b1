"""Training steps of whole models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .. import models as whole
from .timing import Row, median_ms


def models() -> list[Row]:
    """Training steps of whole models: memory by depth, and time and memory beside Hugging Face."""
    deep = [dataclasses.replace(whole.DEPTH, layers=n) for n in whole.DEPTHS]
    wide = [dataclasses.replace(whole.PEER, length=n) for n in (whole.PEER.length, 2**15)]
    pairs = [(name, case) for case in deep for name in ("ours", "ours, activations stored")]
    pairs += [(name, case) for case in wide for name in ("ours", "ours, activations stored", "Hugging Face")]
    return [_model_row(name, case, whole.Step(whole.MODELS[name](case), case, "cuda")) for name, case in pairs]


def _model_row(name: str, case: Any, step: Callable[[], Any]) -> Row:
    row: Row = {"model": name, "case": str(case)}
    try:
        row["step ms"] = round(median_ms(step, 5), 2)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak MB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    except (RuntimeError, ImportError) as error:  # a peer that fails does not hide the others
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row
