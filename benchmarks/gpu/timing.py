"""Times of calls on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]


def median_ms(function: Callable[[], Any], repetitions: int = 20, budget_ms: float = 500.0) -> float:
    """Median time of a call on the GPU; fewer repetitions (at least 3) where they would exceed the budget."""
    function()
    first = _event_ms(function)
    repetitions = max(3, min(repetitions, int(budget_ms / max(first, 1e-3))))
    return statistics.median(_event_ms(function) for _ in range(repetitions))


def _event_ms(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    ms: float = start.elapsed_time(end)
    return ms


def median_ms_in_graph(function: Callable[[], Any], calls: int = 100) -> float:
    """Median time of a call that is too short to be timed by itself: many in one CUDA graph, launch gaps included."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return median_ms(graph.replay) / calls
