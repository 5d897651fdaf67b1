"""The one-line swap: a stock nn.TransformerEncoder, before and after convert_attention."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.convert import convert_attention

WIDTH, HEADS, LAYERS = 512, 8, 2
SETTINGS = f"nn.TransformerEncoder, {LAYERS} layers, width {WIDTH}, {HEADS} heads, batch 1, float32"
_SHORT = 100  # fits the budget, so the swap changes nothing


def _step(model: nn.Module, x: Tensor) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - start


def measure(length: int, repeats: int, seed: int, progress: Any) -> dict[str, Any]:
    """Median seconds of a training step of both models, and how far their outputs differ where the swap is exact."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
    stock = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    swapped = copy.deepcopy(stock)
    convert_attention(swapped)
    short, x = torch.randn(1, _SHORT, WIDTH), torch.randn(1, length, WIDTH)
    with torch.no_grad():
        expected = stock(short)
        difference = float((swapped(short) - expected).abs().max() / expected.abs().max())
    models: dict[str, nn.Module] = {"stock": stock, "swapped": swapped}
    for model in models.values():
        _step(model, short)  # starts the threads
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in progress(range(repeats)):
        for name, model in models.items():
            seconds[name].append(_step(model, x))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"length": length, "short_length": _SHORT, "short_difference": difference, "seconds": medians}
