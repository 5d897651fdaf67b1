"""One training step on a sequence of a million bytes, on a processor: how long each part takes, and how much memory.

    python examples/million_tokens.py                     # 1,048,576 bytes of Python's own sources
    python examples/million_tokens.py --length 65536      # less: seconds
    python examples/million_tokens.py FILE ...            # of these files, one after the other

A byte-level ``ReformerLM``, with local and LSH layers in turn, keeps no activations: backward reconstructs them. The
step is a whole one: forward, loss, backward and AdamW. Memory is what the system counts (resident), and beside it what
the program has asked for (in use, seen 50 times a second).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from train_lm import documents

import reformer_kernels as rk

LOCAL_AND_LSH = ("local", "lsh")
CHUNK_LENGTH = 64  # of both kinds of attention
PREFIX = 16384  # bytes whose loss is computed before and after the step
SAMPLE_SECONDS = 0.02
PROC = Path("/proc/self")
LIBRARY = [Path(sysconfig.get_paths()["stdlib"])]


# ---- text


def read(files: Sequence[Path], length: int) -> Tensor:
    """The first bytes of files, one after the other: int64 [1, length].

    Raises:
        ValueError: there are not as many.
    """
    text = bytearray()
    for file in files:
        text += file.read_bytes()
        if len(text) >= length:
            return torch.frombuffer(text, dtype=torch.uint8)[None, :length].long()
    raise ValueError(f"--length must be at most {len(text)}, the bytes of {len(files)} files, got {length}")


# ---- memory


def resident(field: str) -> int | None:
    """Bytes by ``VmRSS`` (now) or ``VmHWM`` (at most) of this process; None where the system does not say."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def _mallinfo() -> Callable[[], Any] | None:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # not glibc 2.33 or newer
        return None
    function.restype = _MallInfo
    return function


_mallinfo2 = _mallinfo()


def in_use() -> int | None:
    """Bytes that malloc has given out and not got back; None where it does not say."""
    if _mallinfo2 is None:
        return None
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


class Meter:
    """Time and memory of one phase after the other."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.phases: list[dict[str, Any]] = []
        self._bar, self._most, self._stop, self._lock = bar, 0, threading.Event(), threading.Lock()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._sampler.start()
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._sampler.join()

    def end(self, name: str) -> None:
        """What was done since the last phase has this name."""
        with self._lock:
            now, most = in_use(), self._most
        self.phases.append({
            "name": name, "seconds": time.perf_counter() - self._begin, "resident_after": resident("VmRSS"),
            "resident_peak": resident("VmHWM"), "in_use_peak": None if now is None else max(now, most),
        })  # fmt: skip
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update()
        self._start()

    def _start(self) -> None:
        try:
            (PROC / "clear_refs").write_text("5")  # the peak, VmHWM, starts again from here
        except OSError:
            pass  # then it is that of all phases so far
        with self._lock:
            self._most, self._begin = 0, time.perf_counter()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            with self._lock:  # or what was seen before a phase could be written down in it
                self._most = max(self._most, in_use() or 0)


# ---- the step


def make_model(options: argparse.Namespace) -> rk.ReformerLM:
    torch.manual_seed(options.seed)
    config = rk.ReformerConfig(
        embed_dim=options.width, num_layers=options.layers, num_heads=options.heads, attention=LOCAL_AND_LSH,
        n_hashes=options.hashes, lsh_chunk_length=CHUNK_LENGTH, local_chunk_length=CHUNK_LENGTH,
        position=options.position, max_length=options.length, feed_forward_chunk_length=options.chunk,
        head_chunk_length=options.chunk,
    )  # fmt: skip
    return rk.ReformerLM(config).to(getattr(torch, options.dtype))


def when_all_have_gradients(modules: Sequence[nn.Module], then: Callable[[], None]) -> list[RemovableHandle]:
    """Calls ``then`` in backward, once: with the last gradient of their parameters."""
    parameters = {parameter for module in modules for parameter in module.parameters()}
    missing = set(parameters)

    def has_one(parameter: Tensor) -> None:
        missing.discard(cast(nn.Parameter, parameter))
        if not missing:
            then()

    return [parameter.register_post_accumulate_grad_hook(has_one) for parameter in parameters]


def train(model: rk.ReformerLM, ids: Tensor, meter: Meter) -> float:
    """One step; its loss."""
    blocks = list(model.reformer.layers.blocks)
    hooks = [blocks[0].register_forward_pre_hook(lambda *_: meter.end("forward, embedding"))]
    hooks += when_all_have_gradients([model.head, model.reformer.merge], lambda: meter.end("backward, loss"))
    for number, (kind, block) in enumerate(zip(model.config.layers, blocks, strict=True), 1):
        layer = f"layer {number} ({kind})"
        hooks.append(block.register_forward_hook(lambda *_, layer=layer: meter.end(f"forward, {layer}")))
        hooks += when_all_have_gradients([block], partial(meter.end, f"backward, {layer}"))

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(ids, labels=ids).loss
    meter.end("loss")
    loss.backward()
    meter.end("backward, embedding")
    optimiser.step()
    meter.end("optimizer")
    for hook in hooks:
        hook.remove()
    return float(loss.detach())


@torch.no_grad()
def loss_of_prefix(model: rk.ReformerLM, ids: Tensor) -> float:
    """Strictly causal, the model says of the first bytes what it would say with all others behind them."""
    model.eval()
    prefix = ids[:, :PREFIX]
    loss = float(model(prefix, labels=prefix).loss)
    model.train()
    return loss


# ---- what the user sees


def megabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**20:,.0f} MB"


def largest(phases: Sequence[dict[str, Any]], field: str) -> int | None:
    return max((phase[field] for phase in phases if phase[field] is not None), default=None)


def table(phases: Sequence[dict[str, Any]]) -> str:
    """A line for each phase, and for all."""
    columns = ("resident_peak", "resident_after", "in_use_peak")
    lines = [f"{'':<28}{'seconds':>10}{'resident, peak':>17}{'afterwards':>13}{'in use, peak':>15}"]
    for phase in phases:
        cells = [megabytes(phase[column]) for column in columns]
        lines.append(f"{phase['name']:<28}{phase['seconds']:>10.2f}{cells[0]:>17}{cells[1]:>13}{cells[2]:>15}")
    seconds = sum(phase["seconds"] for phase in phases)
    peaks = [megabytes(largest(phases, column)) for column in ("resident_peak", "in_use_peak")]
    lines.append(f"{'all':<28}{seconds:>10.2f}{peaks[0]:>17}{'':>13}{peaks[1]:>15}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = "the text, or folders of .py files (default: Python's library)"
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=files)
    integers = {
        "length": (2**20, "bytes of text"), "layers": (6, "local and LSH attention in turn"),
        "width": (256, "of the model"), "heads": (4, "of attention"), "hashes": (4, "hash rounds"),
        "chunk": (32768, "tokens at a time in feed-forward layers and head"),
    }  # fmt: skip
    for name, (default, text) in integers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default:,})")
    parser.add_argument("--position", choices=("axial", "rotary"), default="axial", help="(default axial)")
    dtypes = ("float32", "bfloat16")
    of = "of parameters and layers; streams are float32 (default float32)"
    parser.add_argument("--dtype", choices=dtypes, default="float32", help=of)
    parser.add_argument("--threads", type=int, help="(default: as many as torch takes)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and hashes (default 0)")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    for name in (*integers, "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.length < 2:
        parser.error(f"--length must be at least 2, or there is nothing to predict, got {options.length}")
    if options.width % options.heads:
        parser.error(f"--width must be divisible by --heads {options.heads}, got {options.width}")
    if options.position == "rotary" and options.width // options.heads % 2:
        parser.error(f"--width must be an even multiple of --heads {options.heads} for rotary, got {options.width}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: the folder {str(options.json.parent)!r} does not exist")
    try:
        options.ids = read(documents(options.files or LIBRARY, ".py"), options.length)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    ids = options.ids
    model = make_model(options)
    before = loss_of_prefix(model, ids)
    started = resident("VmRSS")
    phases = 2 * (options.layers + 2) + 1
    with tqdm(total=phases, desc=f"{options.length:,} bytes", unit="phase") as bar, Meter(bar) as meter:
        loss = train(model, ids, meter)
    after = loss_of_prefix(model, ids)

    count = sum(p.numel() for p in model.parameters())
    print(
        f"\n{options.length:,} bytes, {options.layers} layers of width {options.width}, {options.heads} heads,", end=" "
    )
    print(f"{options.hashes} hashes, {count:,} parameters, {options.dtype}, {torch.get_num_threads()} threads")
    print(f"resident before the step: {megabytes(started)}, at most in it:", end=" ")
    print(megabytes(largest(meter.phases, "resident_peak")), "\n\n" + table(meter.phases))
    print(f"\nloss {loss:.4f}; of the first {min(PREFIX, options.length):,} bytes", end=" ")
    print(f"{before:.4f} before the step and {after:.4f} after it")
    if options.json:
        given = {k: v for k, v in vars(options).items() if k not in ("ids", "json", "files")}
        result = {
            **given, "files": [str(file) for file in options.files], "torch": torch.__version__, "parameters": count,
            "threads": torch.get_num_threads(), "resident_before": started, "loss": loss, "prefix_before": before,
            "prefix_after": after, "phases": meter.phases,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
