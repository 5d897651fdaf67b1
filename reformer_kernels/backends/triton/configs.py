"""The configuration of each kernel: what was measured on a device, or what a table says.

With REFORMER_KERNELS_AUTOTUNE=1 each kind of problem is measured once, at its first call, and what was fastest is kept
in REFORMER_KERNELS_CACHE (~/.cache/reformer_kernels). Results of different configurations differ in the last bits.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ._launch import Config

SHIPPED = Path(__file__).parent / "devices"
LONG_CHUNK = 128  # so that tiles of so many queries see no more keys than their chunks do


class Kind(NamedTuple):
    """What a configuration is for."""

    kernel: str
    element_size: int  # bytes
    width: int  # of rows: of keys or of values, the larger one, padded to a power of two
    pairs: bool = False  # rules of pairs, buckets or dropout, which take registers
    long: bool = False  # chunks of LONG_CHUNK or more

    def __str__(self) -> str:
        words = [self.kernel, f"{8 * self.element_size} bits", f"D {self.width}"]
        return ", ".join(words + ["rules"] * self.pairs + ["long chunks"] * self.long)


# (kernel, bytes of an element, rules): (largest width, configuration, the same for long chunks). For each the emulator
# counted instructions and traffic, and none spills on sm_80 and sm_90; see benchmarks/budgets.json.
_FLOAT_WIDE = (128, Config(32, 16, 8, 1, 255), None), (256, Config(16, 16, 8, 1, 255), None)
_FLOAT = (64, Config(32, 32, 4, 1, 255), None), *_FLOAT_WIDE
_HALF_64 = 64, Config(64, 32, 4, 2), Config(128, 32, 8, 2)
_HALF_256 = 256, Config(32, 32, 8, 1), None
_HALF_RULES = (64, Config(32, 32, 4, 1), None), (128, Config(32, 16, 4, 1), None), (256, Config(16, 32, 4, 1), None)
TABLE: dict[tuple[str, int, bool], tuple[tuple[int, Config, Config | None], ...]] = {
    ("forward", 2, False): (_HALF_64, (128, Config(64, 16, 4, 2), Config(128, 16, 8, 2)), _HALF_256),
    ("grad_query", 2, False): (_HALF_64, (128, Config(64, 32, 4, 2), Config(128, 32, 8, 2)), _HALF_256),
    ("grad_keys", 2, False): (_HALF_64, (128, Config(32, 32, 4, 1), None), _HALF_256),
    **{(kernel, 2, True): _HALF_RULES for kernel in ("forward", "grad_query", "grad_keys")},
    ("forward", 4, False): _FLOAT,
    ("grad_query", 4, False): _FLOAT,
    ("grad_keys", 4, False): _FLOAT_WIDE,
    **{(kernel, 4, True): _FLOAT_WIDE for kernel in ("forward", "grad_query", "grad_keys")},
    ("hash", 2, False): (
        (64, Config(128, 32, 4, 1), None),
        (128, Config(64, 16, 4, 1), None),
        (256, Config(16, 16, 8, 1), None),
    ),
    ("hash", 4, False): ((128, Config(32, 32, 4, 1, 255), None), (256, Config(32, 16, 8, 1, 255), None)),
    ("weigh", 2, False): ((128, Config(64, 64, 4, 1), None), (256, Config(64, 32, 4, 1), None)),
    ("weigh", 4, False): ((256, Config(32, 32, 4, 1, 255), None),),
}


def heuristic(kind: Kind) -> Config:
    """The same for every device."""
    rows = TABLE[kind.kernel, kind.element_size, kind.pairs]
    _, config, of_long = next(row for row in rows if kind.width <= row[0])
    return of_long if kind.long and of_long else config


def choose(kind: Kind, device: torch.device, measure: Callable[[Config], float] | None = None) -> Config:
    """
    Args:
        measure: seconds of a launch, for kinds that can be tuned.
    """
    name = _device_name(device)
    if measure and os.environ.get("REFORMER_KERNELS_AUTOTUNE") == "1" and not _capturing(device):
        tuned = _tuned(name)
        if str(kind) not in tuned:
            tuned[str(kind)] = min(candidates(kind), key=measure)
            _keep(name, tuned)
        return tuned[str(kind)]
    return _planned(kind, name)


@functools.cache
def _planned(kind: Kind, device: str) -> Config:
    return _shipped(device).get(str(kind), heuristic(kind))


def seconds(launch: Callable[[], None]) -> float:
    """The median time of a launch on a GPU."""
    return float(triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")) / 1e3


def candidates(kind: Kind) -> list[Config]:
    """What is measured: all that the table has for the kernel, the type, and rows of this width and wider ones."""
    found = [heuristic(kind)]
    for (kernel, element_size, _), rows in TABLE.items():
        if (kernel, element_size) == (kind.kernel, kind.element_size):
            found += [config for width, *both in rows if width >= kind.width for config in both if config]
    return list(dict.fromkeys(found))


def shipped_files() -> list[Path]:
    return sorted(SHIPPED.glob("*.json"))


def _shipped(device: str) -> dict[str, Config]:
    for file in shipped_files():
        told = json.loads(file.read_text())
        if device.startswith(tuple(told["devices"])):
            return _read(told["configs"])
    return {}


def _read(configs: dict[str, list[int]]) -> dict[str, Config]:
    return {kind: Config(*config) for kind, config in configs.items()}


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _cache_file(device: str) -> Path:
    folder = os.environ.get("REFORMER_KERNELS_CACHE") or Path.home() / ".cache" / "reformer_kernels"
    return Path(folder) / f"triton {device.replace('/', ' ')}.json"


@functools.cache
def _tuned(device: str) -> dict[str, Config]:
    file = _cache_file(device)
    try:
        return _read(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what tuning wrote: {error}; delete it, and it is written anew") from error


def _keep(device: str, tuned: dict[str, Config]) -> None:
    file = _cache_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(tuned, indent=1) + "\n")
    partial.replace(file)
