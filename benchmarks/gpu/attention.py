"""lsh_attention end to end: time and memory beside the peers, and what must hold on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import reformer_kernels as rk

from ..cases import Case
from ..providers import PROVIDERS
from .timing import Row, median_ms, median_ms_in_graph

Attention = Callable[[Tensor, Tensor], Tensor]  # of query_key and value
Timer = Callable[[Callable[[], Any]], float]
TOKENS = 2**16  # in the batch of a shorter case
CASES = (
    *(Case(2**n, batch=TOKENS >> n) for n in range(10, 17)),
    *(Case(2**n, batch=TOKENS >> n, head_dim=128, chunk_length=256) for n in (12, 14, 16)),
    *(Case(2**n, heads=2) for n in (18, 20)),
)
SMALL = Case(4096, batch=2)
UNFUSED_LENGTH = 2**14  # those peers take long and much memory beyond


def _peers(case: Case, device: str) -> Iterator[tuple[str, Callable[[], Attention]]]:
    ours = functools.partial(rk.lsh_attention, causal=True, n_hashes=case.n_hashes, chunk_length=case.chunk_length)
    yield "ours", lambda: ours
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        yield f"SDPA, {backend.name}", functools.partial(_sdpa, backend)
    if case.length <= UNFUSED_LENGTH:
        yield "FlexAttention, sorted rows", lambda: _flex(case, device)
        for name in ("lucidrains", "ours, reference"):
            yield name, functools.partial(_provided, name, case, device)


def _sdpa(backend: SDPBackend) -> Attention:
    def attend(query_key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query_key, query_key, value, is_causal=True)

    return attend


def _flex(case: Case, device: str) -> Attention:
    """What FlexAttention takes for one round whose rows are sorted already; without hash, sort, gather and scatter."""
    chunk = case.chunk_length
    positions = torch.randperm(case.length, device=device)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        chunks_back = query // chunk - key // chunk
        return (chunks_back >= 0) & (chunks_back <= 1) & (positions[key] <= positions[query])

    mask = create_block_mask(visible, None, None, case.length, case.length, device=device)
    attend: Any = torch.compile(flex_attention) if device == "cuda" else flex_attention
    return lambda query_key, value: attend(query_key, query_key, value, block_mask=mask)


def _provided(name: str, case: Case, device: str) -> Attention:
    with torch.device(device):
        made = PROVIDERS[name].make("attention", case)
    assert made is not None
    return made


def _inputs(case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    rows = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    return [rows[0].requires_grad_(), rows[1].requires_grad_(), rows[2]]


def attention(cases: tuple[Case, ...] = CASES, device: str = "cuda", timer: Timer = median_ms) -> list[Row]:
    """Causal, bfloat16; times of one round of FlexAttention, of all rounds of the others; then where ours wins."""
    rows = [row for case in cases for row in _rows(case, device, timer)]
    return rows + [_crossover(rows, head_dim) for head_dim in dict.fromkeys(case.head_dim for case in cases)]


def _rows(case: Case, device: str, timer: Timer) -> Iterator[Row]:
    query_key, value, grad = _inputs(case, device)
    for name, make in _peers(case, device):
        row: Row = {"attention": name, "L": case.length, "B": case.batch, "H": case.heads, "D": case.head_dim}
        try:
            function = make()
            with torch.no_grad():
                row["forward ms"] = round(timer(functools.partial(function, query_key, value)), 4)
            step = functools.partial(_step, function, query_key, value, grad)
            row["both ms"] = round(timer(step), 4)
            row |= _memory(step, case) if device == "cuda" else {}
        except (RuntimeError, ImportError) as error:  # a peer that fails does not hide the others
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def _step(function: Attention, query_key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query_key and value."""
    return torch.autograd.grad(function(query_key, value), (query_key, value), grad)


def _memory(step: Callable[[], Any], case: Case) -> Row:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    return {"MB": round(extra / 2**20, 1), "bytes per token": round(extra / case.length / case.batch)}


def _crossover(rows: list[Row], head_dim: int) -> Row:
    best: dict[str, dict[int, float]] = {"ours": {}, "SDPA": {}}
    for row in rows:
        side = row["attention"].split(",")[0] if "reference" not in row["attention"] else ""
        if side in best and row["D"] == head_dim and "both ms" in row:
            best[side][row["L"]] = min(row["both ms"], best[side].get(row["L"], float("inf")))
    wins = [length for length, ms in sorted(best["ours"].items()) if ms < best["SDPA"].get(length, 0)]
    said = f"from L {wins[0]}" if wins else "at no length"
    return {"attention": f"ours is ahead of the best SDPA {said}", "D": head_dim}


def determinism(case: Case = SMALL, device: str = "cuda") -> list[Row]:
    """Output and gradients of repeated runs, to the bit."""
    query_key, value, grad = _inputs(case, device)

    def run() -> tuple[Tensor, ...]:
        out = rk.lsh_attention(query_key, value, causal=True)
        return out, *torch.autograd.grad(out, (query_key, value), grad)

    first = run()
    rows: list[Row] = [{"of": name, "repeats to the bit": True} for name in ("out", "query_key", "value")]
    for _ in range(10):
        for row, a, b in zip(rows, first, run(), strict=True):
            row["repeats to the bit"] &= torch.equal(a, b)
    if not all(row["repeats to the bit"] for row in rows):
        raise AssertionError(str(rows))
    return rows


def cuda_graph(case: Case = SMALL) -> list[Row]:
    """The forward in a CUDA graph, and what launching costs without one."""
    query_key, value, _ = _inputs(case, "cuda")
    with torch.no_grad():
        call = lambda: rk.lsh_attention(query_key, value, causal=True)  # noqa: E731
        eager, captured = median_ms(call), median_ms_in_graph(call, calls=10)
    return [{"case": str(case), "eager ms": round(eager, 4), "in a graph ms": round(captured, 4)}]


def compiled(case: Case = SMALL, device: str = "cuda", timer: Timer = median_ms) -> list[Row]:
    """torch.compile(fullgraph=True): the results of eager mode, and the time."""
    query_key, value, grad = _inputs(case, device)

    def forward(query_key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = rk.lsh_attention(query_key, value, causal=True)
        return out

    rows = []
    ways: dict[str, Attention] = {"eager": forward, "compiled": torch.compile(forward, fullgraph=True)}
    for name, function in ways.items():
        run = functools.partial(_step, function, query_key, value, grad)
        rows.append({"mode": name, "both ms": round(timer(run), 4), "gradients": [float(g.norm()) for g in run()]})
    if rows[0]["gradients"] != rows[1]["gradients"]:
        raise AssertionError(f"compiled and eager gradients differ: {rows}")
    return rows
