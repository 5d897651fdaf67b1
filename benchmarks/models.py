"""``python -m benchmarks.models``: training steps of whole models, beside Hugging Face's Reformer.

The memory of a step by depth; time, memory and gradients beside Hugging Face; what reversibility loses in rounding.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import reformer_kernels as rk
from reformer_kernels.demo.figure import sheet
from reformer_kernels.hashing import bucket_factors

from .machine import environment
from .memory import fresh_process, peak_of
from .report import file_to_write, length_name, megabytes, number, table
from .timing import interleaved

Row = dict[str, Any]


@dataclass(frozen=True)
class ModelCase:
    """A causal language model over bytes, whose layers are local and LSH attention in turn, and one sequence."""

    length: int
    embed_dim: int
    layers: int
    heads: int
    feed_forward_dim: int
    dropout: float = 0.1
    n_hashes: int = 4
    chunk_length: int = 64
    initializer_range: float = 0.02

    def __str__(self) -> str:
        return (
            f"L {self.length}, d {self.embed_dim}, feed-forward {self.feed_forward_dim}, {self.layers} layers, "
            f"{self.heads} heads, {self.n_hashes} hashes, chunks of {self.chunk_length}, dropout {self.dropout:g}"
        )

    @property
    def axes(self) -> tuple[int, int]:
        """Two axes of positions, exactly as long as the sequence: Hugging Face trains on no other."""
        rows = 2 ** ((self.length - 1).bit_length() // 2)
        return rows, self.length // rows


VOCAB_SIZE = 256
CHUNK = 1024  # of feed-forward and head, in tokens
DEPTH = ModelCase(length=16384, embed_dim=256, layers=12, heads=4, feed_forward_dim=1024)
DEPTHS = (2, 6, 12)
PEER = ModelCase(length=8192, embed_dim=512, layers=6, heads=8, feed_forward_dim=512)  # Hugging Face's default width
PEERS = (replace(PEER, dropout=0.0), PEER, replace(PEER, feed_forward_dim=2048))
GRADIENT = ModelCase(length=1024, embed_dim=256, layers=6, heads=4, feed_forward_dim=1024)
DRIFT = replace(GRADIENT, dropout=0.0)  # or each dtype draws other masks
DRIFT_DEPTHS = (2, 4, 8, 12, 24, 48)


def config(case: ModelCase, **changes: Any) -> rk.ReformerConfig:
    options: Row = {
        "vocab_size": VOCAB_SIZE, "embed_dim": case.embed_dim, "num_layers": case.layers, "num_heads": case.heads,
        "feed_forward_dim": case.feed_forward_dim, "n_hashes": case.n_hashes,
        "n_buckets": bucket_factors(None, case.length, case.chunk_length),
        "alignment": "ring", "shift_keys": False,  # as the peer
        "lsh_chunk_length": case.chunk_length, "local_chunk_length": case.chunk_length, "axial_shape": case.axes,
        "axial_dims": (case.embed_dim // 4, case.embed_dim - case.embed_dim // 4),
        "attention_dropout": case.dropout, "hidden_dropout": case.dropout, "activation": "gelu",
        "feed_forward_chunk_length": CHUNK, "head_chunk_length": CHUNK, "initializer_range": case.initializer_range,
    }  # fmt: skip
    return rk.ReformerConfig(**{**options, **changes})


def ours(case: ModelCase, **changes: Any) -> nn.Module:
    return rk.ReformerLM(config(case, **changes))


def huggingface(case: ModelCase) -> nn.Module:
    from transformers import ReformerConfig, ReformerModelWithLMHead

    mine = config(case)
    assert isinstance(mine.n_buckets, tuple) and mine.axial_dims is not None
    chunk = min(CHUNK, case.length)  # it takes no longer ones than the sequence
    return ReformerModelWithLMHead(
        ReformerConfig(
            vocab_size=VOCAB_SIZE, hidden_size=case.embed_dim, attn_layers=list(mine.layers),
            num_attention_heads=case.heads, attention_head_size=mine.attention_dim, num_hashes=case.n_hashes,
            num_buckets=mine.n_buckets[0] if len(mine.n_buckets) == 1 else list(mine.n_buckets),
            lsh_attn_chunk_length=case.chunk_length, local_attn_chunk_length=case.chunk_length,
            axial_pos_shape=list(case.axes), axial_pos_embds_dim=list(mine.axial_dims),
            max_position_embeddings=case.length, feed_forward_size=case.feed_forward_dim, is_decoder=True,
            hidden_dropout_prob=case.dropout, lsh_attention_probs_dropout_prob=case.dropout,
            local_attention_probs_dropout_prob=case.dropout, chunk_size_feed_forward=chunk, chunk_size_lm_head=chunk,
            hidden_act="gelu", use_cache=False, initializer_range=case.initializer_range,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[ModelCase], nn.Module]] = {
    "ours": ours,
    "ours, activations stored": functools.partial(ours, reversible=False),
    "ours, float64 streams": functools.partial(ours, stream_dtype="float64"),
    "Hugging Face": huggingface,
}

OURS = tuple(name for name in MODELS if name.startswith("ours"))


class Step:
    """Forward and backward of a model on random bytes; parameters and their gradients exist before."""

    def __init__(self, model: nn.Module, case: ModelCase, device: str = "cpu") -> None:
        self.model = model.train().to(device)
        ids = torch.randint(VOCAB_SIZE, (1, case.length), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(device)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.0)

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        loss = self.model(self.ids, labels=self.ids).loss
        middle = time.perf_counter()
        loss.backward()
        return {"forward": middle - start, "both": time.perf_counter() - start}


def memory(name: str, case: ModelCase) -> Row:
    """Peak memory of a step beside parameters, their gradients and the input; once in a process."""
    small = replace(case, length=4 * case.chunk_length, layers=2)
    Step(MODELS[name](small), small)()  # libraries and thread pools are not counted
    return peak_of(Step(MODELS[name](case), case))


def memory_in_fresh_process(name: str, case: ModelCase) -> Row:
    """What is in use at the peak.

    By default glibc keeps freed memory below a threshold that grows to 32 MB, and in what it keeps by chance tensors do
    or do not fit: that is hundreds of megabytes, for all models. A fixed threshold gives back what is free.
    """
    options = ["--memory-of", name, "--case", json.dumps(asdict(case))]
    measured = fresh_process("benchmarks.models", options, MALLOC_MMAP_THRESHOLD_="65536")
    return {"model": name, "case": asdict(case), **measured}


def by_depth(note: Callable[[Row], None], repeats: int) -> None:
    for layers in DEPTHS:
        for name in OURS:
            note(memory_in_fresh_process(name, replace(DEPTH, layers=layers)))


def beside_peers(note: Callable[[Row], None], repeats: int) -> None:
    for case in PEERS:
        times = interleaved({name: Step(make(case), case) for name, make in MODELS.items()}, repeats, float("inf"))
        for name in MODELS:
            note(memory_in_fresh_process(name, case) | {"seconds": times[name]})


# ---- gradients


def gradients(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss, and the gradients of all parameters as one vector."""
    model.zero_grad()
    loss = model(ids, labels=ids if labels is None else labels).loss
    loss.backward()
    grads = [p.grad.flatten().to(torch.float64) for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def our_gradients(case: ModelCase) -> tuple[Tensor, Tensor]:
    """Reversible, and with stored activations."""
    found = []
    ids = torch.randint(VOCAB_SIZE, (1, case.length), generator=torch.Generator().manual_seed(0))
    for name in ("ours", "ours, activations stored"):
        torch.manual_seed(0)
        found.append(gradients(MODELS[name](case).train(), ids)[1])
    return found[0], found[1]


def huggingface_gradients(case: ModelCase) -> tuple[Tensor, Tensor]:
    """Its own, and those of the same forward with stored activations: the same layers, seeds and dropout masks.

    Raises:
        AssertionError: the second forward is not the same.
    """
    from transformers.models.reformer import modeling_reformer

    torch.manual_seed(0)
    model = huggingface(case).train()
    ids = torch.randint(VOCAB_SIZE, (1, case.length), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    loss, own = gradients(model, ids)

    def stored(hidden_states: Tensor, layers: Any, *_: Any) -> Tensor:
        x1, x2 = hidden_states.chunk(2, dim=-1)
        for layer in layers:
            torch.manual_seed(layer.attention_seed)
            x1 = x1 + layer.attention(hidden_states=x2).hidden_states
            torch.manual_seed(layer.feed_forward_seed)
            x2 = x2 + layer.feed_forward(x1)
        return torch.cat([x1, x2], dim=-1)

    with mock.patch.object(modeling_reformer._ReversibleFunction, "apply", stored):
        torch.manual_seed(1)
        same_loss, expected = gradients(model, ids)
    assert torch.allclose(loss, same_loss, rtol=1e-5), f"the forwards differ: {loss} and {same_loss}"
    return own, expected


def gradient_errors(note: Callable[[Row], None], repeats: int) -> None:
    for dropout in (0.0, GRADIENT.dropout):
        case = replace(GRADIENT, dropout=dropout)
        for name, compute in (("ours", our_gradients), ("Hugging Face", huggingface_gradients)):
            note({"model": name, "case": asdict(case), "error": relative(*compute(case))})


# ---- drift


class Precision(NamedTuple):
    dtype: torch.dtype
    stream_dtype: str | None


PRECISIONS = {
    "float32": Precision(torch.float32, None),
    "float32 blocks, float64 streams": Precision(torch.float32, "float64"),
    "bfloat16": Precision(torch.bfloat16, None),
    "bfloat16 blocks, float32 streams": Precision(torch.bfloat16, "float32"),
    "bfloat16 blocks, float64 streams": Precision(torch.bfloat16, "float64"),
}


@contextmanager
def inputs_seen(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is called with, inside."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    yield seen
    handle.remove()


def drift(case: ModelCase, precision: Precision) -> Row:
    """What is lost on the way back through all layers.

    Returns:
        ``input``: the relative error of the input of the first layer, as backward reconstructs it; ``gradient``: that
        of all gradients, beside stored activations in the same precision; ``rounding``: what that precision itself
        costs: the error of the gradients with stored activations, beside float32.
    """
    ids = torch.randint(VOCAB_SIZE, (1, case.length), generator=torch.Generator().manual_seed(0))
    found = {}
    row = {}
    ways = {"reversible": (precision, True), "stored": (precision, False), "exact": (PRECISIONS["float32"], False)}
    for name, (way, reversible) in ways.items():
        torch.manual_seed(0)
        model = ours(case, reversible=reversible, stream_dtype=way.stream_dtype, hash_seed=0).to(way.dtype).train()
        torch.manual_seed(1)
        with inputs_seen(model.get_submodule("reformer.layers.blocks.0.f")) as seen:
            found[name] = gradients(model, ids)[1]
        if reversible:
            forward, backward = seen
            row["input"] = relative(backward, forward)
    row["gradient"] = relative(found["reversible"], found["stored"])
    row["rounding"] = relative(found["stored"], found["exact"])
    return row


def drifts(note: Callable[[Row], None], repeats: int) -> None:
    for name, precision in PRECISIONS.items():
        for layers in DRIFT_DEPTHS:
            case = replace(DRIFT, layers=layers)
            note({"precision": name, "case": asdict(case), **drift(case, precision)})


PARTS: dict[str, Callable[[Callable[[Row], None], int], None]] = {
    "depth": by_depth, "peers": beside_peers, "gradients": gradient_errors, "drift": drifts,
}  # fmt: skip


def line(part: str, row: Row) -> str:
    """One result, as the run prints it."""
    case = ModelCase(**row["case"])
    if part == "drift":
        return f"{row['precision']:<34} {case.layers:>3} layers: " + ", ".join(
            f"{name} {row[name]:.1e}" for name in ("input", "gradient", "rounding")
        )
    if part == "gradients":
        return f"{row['model']:<26} dropout {case.dropout:g}: relative error of the gradients {row['error']:.1e}"
    if "error" in row:
        return f"{row['model']:<26} {case}: failed: {row['error']}"
    times = row.get("seconds")
    seconds = f"median of {times['repeats']} {times['both']:.2f}" if isinstance(times, dict) else f"{times:.2f}"
    return f"{row['model']:<26} {case}: peak extra memory {megabytes(row['extra_bytes'])}, seconds: {seconds}"


def markdown(results: Row) -> str:
    """The tables of a run."""
    parts = []
    if rows := results.get("depth"):
        parts.append(_depth_table(rows))
    if rows := results.get("peers"):
        parts.append(_peer_table(rows))
    if rows := results.get("gradients"):
        body = [[row["model"], f"{row['case']['dropout']:g}", f"{row['error']:.1e}"] for row in rows]
        parts.append(table(["gradients, beside stored activations", "dropout", "relative error"], body))
    if rows := results.get("drift"):
        body = [
            [
                row["precision"],
                str(row["case"]["layers"]),
                *(f"{row[k]:.1e}" for k in ("input", "gradient", "rounding")),
            ]
            for row in rows
        ]
        header = ["precision", "layers", "reconstructed input", "gradients", "gradients, by rounding alone"]
        parts.append(table(header, body))
    return "\n".join(parts)


def _depth_table(rows: list[Row]) -> str:
    depths = list(dict.fromkeys(row["case"]["layers"] for row in rows))
    body = []
    for name in dict.fromkeys(row["model"] for row in rows):
        bytes_of = {row["case"]["layers"]: row["extra_bytes"] for row in rows if row["model"] == name}
        cells = [f"{megabytes(bytes_of[n])} ({bytes_of[n] / bytes_of[depths[0]]:.2f}x)" for n in depths]
        body.append([name, *cells])
    title = f"peak memory of a step, L {length_name(rows[0]['case']['length'])}, d {rows[0]['case']['embed_dim']}"
    return table([title, *(f"{n} layers" for n in depths)], body)


def _peer_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        mine = next(r for r in rows if r["model"] == "ours" and r["case"] == row["case"])
        body.append([
            row["model"], str(row["case"]["feed_forward_dim"]), f"{row['case']['dropout']:g}",
            f"{row['seconds']['both']:.2f} s ({number(row['seconds']['both'] / mine['seconds']['both'])}x)",
            f"{megabytes(row['extra_bytes'])} ({number(row['extra_bytes'] / mine['extra_bytes'])}x)",
        ])  # fmt: skip
    return table(["training step", "feed-forward", "dropout", "time", "peak memory"], body)


LOOKS: dict[str, Row] = {
    "ours": {"color": "#0b6e8f", "marker": "o", "linewidth": 2.4},
    "ours, float64 streams": {"color": "#7a9a3a", "marker": "^"},
    "ours, activations stored": {"color": "#d1662b", "marker": "s"},
    "float32": {"color": "#0b6e8f", "marker": "o", "linewidth": 2.4},
    "bfloat16": {"color": "#d1662b", "marker": "s"},
    "bfloat16 blocks, float32 streams": {"color": "#9467a8", "marker": "v"},
}


def draw(path: Path, results: Row) -> None:
    """Memory and what is lost in reconstruction, against the number of layers."""
    with sheet(path, 1, 2, figsize=(9.6, 3.8)) as (_, [[memory_axes, drift_axes]]):
        _lines(memory_axes, results["depth"], "model", lambda row: row["extra_bytes"] / 2**20)
        memory_axes.set_title("peak memory of a training step, MB", loc="left")
        memory_axes.set_ylim(bottom=0)
        _lines(drift_axes, results["drift"], "precision", lambda row: row["gradient"])
        rounding = [(r["case"]["layers"], r["rounding"]) for r in results["drift"] if r["precision"] == "bfloat16"]
        drift_axes.plot(*zip(*rounding, strict=True), color="#aaaaaa", linestyle="--", label="bfloat16's own rounding")
        drift_axes.set_title("relative error of the gradients", loc="left")
        drift_axes.set_yscale("log")
        for ax in (memory_axes, drift_axes):
            ax.set_xlabel("layers")
            ax.legend(frameon=False, fontsize=8)


def _lines(ax: Any, rows: list[Row], key: str, value: Callable[[Row], float]) -> None:
    for name in dict.fromkeys(row[key] for row in rows):
        points = [(row["case"]["layers"], value(row)) for row in rows if row[key] == name and value(row) > 0]
        if points:  # what is exact has no place on a logarithmic axis
            ax.plot(*zip(*points, strict=True), label=name, **LOOKS[name])


def run(options: argparse.Namespace) -> Row:
    env = environment()
    print(", ".join(f"{key} {value}" for key, value in env.items()), flush=True)
    results: Row = {"environment": env}
    for part in options.parts:
        rows: list[Row] = []
        results[part] = rows

        def note(row: Row, part: str = part, rows: list[Row] = rows) -> None:
            rows.append(row)
            print(f"{part}: {line(part, row)}", flush=True)

        PARTS[part](note, options.repeats)
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default all)")
    parser.add_argument("--repeats", type=int, default=3, help="steps of which a median is taken (default 3)")
    parser.add_argument("--out", type=file_to_write, help="JSON file for the results; its folder must exist")
    parser.add_argument("--plot", type=file_to_write, help="PNG file for a plot of depth and drift, likewise")
    parser.add_argument("--memory-of", choices=MODELS, help="only this model's memory, in this process, as JSON")
    parser.add_argument("--case", type=lambda text: ModelCase(**json.loads(text)), help="of --memory-of, as JSON")
    options = parser.parse_args(arguments)
    if options.plot and not {"depth", "drift"} <= set(options.parts):
        parser.error("--plot needs the parts depth and drift")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if (options.memory_of is None) != (options.case is None):
        parser.error("--memory-of and --case go together")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, options.case)))
        return
    results = run(options)
    print("\n" + markdown(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        draw(options.plot, results)


if __name__ == "__main__":
    main()
