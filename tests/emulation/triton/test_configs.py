"""Every configuration that Triton kernels can get, emulated; and how it is chosen."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from reformer_kernels.backends.triton import missing

from ..attention import PAPER, Attention
from ..cases import Hash
from ..emulator import ARCHITECTURES
from ..select import Select
from .budgets import Measured
from .kernels import EmulatedTriton, needs_triton

pytestmark = needs_triton()

if missing() is None:
    from reformer_kernels.backends.triton import attention, attention_backward, configs
    from reformer_kernels.backends.triton._launch import Config
    from reformer_kernels.backends.triton.configs import Kind

CPU = torch.device("cpu")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
KERNELS = "forward", "grad_query", "grad_keys"
# Element size, width, whether there is a score_mod, long chunks, where they matter.
PROBLEMS = [*product((2, 4), (64, 128, 256), (False, True), (False,)), (2, 64, False, True), (2, 128, False, True)]
# Of a device: its name and its architecture.
DEVICES = {"h100.json": ("NVIDIA H100 80GB HBM3", "sm_90"), "a100.json": ("NVIDIA A100-SXM4-40GB", "sm_80")}


def attention_case(element_size: int, width: int, has_score_mod: bool, long: bool) -> Attention:
    options: dict[str, Any] = {"rules": PAPER, "n_buckets": 2, "dropout": 0.1} if has_score_mod else {}
    return Attention(
        200 if long else 100, width, DTYPES[element_size], causal=True, chunk_length=128 if long else 32, **options
    )


def assert_launched(emulator: Measured, kernel: str, expected: Config) -> None:
    found = {config for name, config in emulator.configs if name == f"{kernel}_kernel"}
    assert found == {tuple(expected)}
    assert emulator.compiled[f"{kernel}_kernel"][0].spilled_bytes == 0


def check(emulator: Measured, *problem: Any) -> None:
    attention_case(*problem).check(emulator)
    for kernel in KERNELS:
        kind = Kind(kernel, *problem)
        expected = configs._shipped(emulator.device_name).get(str(kind), configs.heuristic(kind))
        assert_launched(emulator, kernel, expected)


@pytest.mark.full
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_the_table(architecture: str, problem: tuple[int, int, bool, bool]) -> None:
    check(Measured(architecture), *problem)


@pytest.mark.full
@pytest.mark.parametrize("problem", list(product((2, 4), (64, 128, 256))), ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_hashes_and_choices(architecture: str, problem: tuple[int, int]) -> None:
    element_size, width = problem
    emulator = Measured(architecture)
    Hash(70, width, (200,), DTYPES[element_size]).check(emulator)
    assert_launched(emulator, "hash", configs.heuristic(Kind("hash", element_size, width)))
    Select(100, width, DTYPES[element_size], causal=True).check(emulator)
    assert_launched(emulator, "weigh", configs.heuristic(Kind("weigh", element_size, width)))


def test_no_other_is_in_the_table() -> None:
    kinds = [Kind(kernel, *problem) for kernel in KERNELS for problem in PROBLEMS]
    kinds += [Kind(kernel, size, width) for kernel in ("hash", "weigh") for size in (2, 4) for width in (64, 128, 256)]
    found = {(kind.kernel, kind.element_size, configs.heuristic(kind)) for kind in kinds}
    table = {(key[0], key[1], c) for key, rows in configs.TABLE.items() for _, *row in rows for c in row if c}
    assert found == table
    assert all(configs.heuristic(Kind(k, *p[:3], long=True)) == configs.heuristic(Kind(k, *p[:3]))
               for k in KERNELS for p in PROBLEMS if (*p[:3], True) not in PROBLEMS)  # fmt: skip


def shipped() -> list[tuple[str, str]]:
    if missing():
        return []
    return [(file.name, kind) for file in configs.shipped_files() for kind in json.loads(file.read_text())["configs"]]


@pytest.mark.full
@pytest.mark.parametrize(("file", "name"), shipped())
def test_of_a_device(file: str, name: str) -> None:
    problem = next(p for p in PROBLEMS for kernel in KERNELS if str(Kind(kernel, *p)) == name)
    device, architecture = DEVICES[file]
    assert name in configs._shipped(device)
    check(Measured(architecture, device), *problem)


def test_other_devices_have_the_table() -> None:
    kind = Kind("forward", 2, 128)
    assert configs._planned(kind, "NVIDIA L4") == configs.heuristic(kind) != configs._planned(kind, "NVIDIA A100-PCIE")


# ---- tuning


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFORMER_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("REFORMER_KERNELS_CACHE", str(tmp_path))
    configs._tuned.cache_clear()
    return tmp_path


def test_what_is_fastest_is_kept(tuning: Path) -> None:
    kind, measured = Kind("forward", 2, 64), []

    def measure(config: Config) -> float:
        measured.append(config)
        return -config.block_n - config.block_m / 1000

    best = configs.choose(kind, CPU, measure)
    assert measured == configs.candidates(kind) and measured[0] == configs.heuristic(kind) != best
    configs._tuned.cache_clear()  # as in another process
    assert configs.choose(kind, CPU, lambda config: pytest.fail("it is measured again")) == best
    assert configs.choose(kind._replace(width=128), CPU, lambda config: config.block_m).block_m == 16
    assert all(config.block_m <= 32 for config in configs.candidates(kind._replace(width=256)))  # they fit
    assert len(json.loads(next(tuning.iterdir()).read_text())) == 2


def test_nothing_is_measured_unless_asked_to(tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFORMER_KERNELS_AUTOTUNE")
    kind = Kind("forward", 2, 64)
    assert configs.choose(kind, CPU, lambda config: pytest.fail("it is measured")) == configs.heuristic(kind)


def test_a_file_that_tuning_did_not_write(tuning: Path) -> None:
    configs._cache_file("").write_text("[]")
    with pytest.raises(ValueError, match=r"triton .*json is not what tuning wrote: .*; delete it"):
        configs.choose(Kind("forward", 2, 64), CPU, lambda config: 1.0)


@pytest.mark.full
def test_measuring_changes_no_result(tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of keys are added to those of queries, which launches that are only measured must not do."""
    emulator = EmulatedTriton("sm_80")

    def seconds(launch: Any) -> float:
        before = len(emulator.launched)
        launch()
        return float(sum(x.counters.warp_instructions for x in emulator.launched[before:] if x.counters))

    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "seconds", seconds)
    others = Config(16, 32, 4, 1), Config(32, 32, 4, 1)
    monkeypatch.setattr(configs, "candidates", lambda kind: list(others))
    Attention(100, 32, causal=True, chunk_length=32).check(emulator)
    assert {config for name, config in emulator.configs if name in ("forward_kernel", "grad_keys_kernel")} == {
        tuple(config) for config in others
    }
    assert len(json.loads(next(tuning.iterdir()).read_text())) == 3
