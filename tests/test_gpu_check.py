"""The check of a GPU machine, on a machine without a GPU."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.cases import Case
from benchmarks.gpu import attention

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)


def test_every_stage_says_that_there_is_no_gpu(tmp_path):
    ran = run("--out", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results == {name: {"status": "no GPU"} for name in gpu_check.STAGES}
    for name in gpu_check.STAGES:
        assert f"## {name}: no GPU" in ran.stdout
        assert f"## {name}: no GPU" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.parametrize("name", gpu_check.STAGES)
def test_a_stage_is_a_function_without_arguments(name):
    inspect.signature(gpu_check.stage_function(name)).bind()


def test_an_unknown_stage_is_refused(tmp_path):
    ran = run("--out", str(tmp_path), "--stage", "nonsense")
    assert ran.returncode == 2
    assert "nonsense" in ran.stderr and "ceilings" in ran.stderr


@pytest.fixture
def stages(monkeypatch):
    def fails():
        raise RuntimeError("broken")

    table = {"works": lambda: [{"a": 1, "b": 0.25}, {"a": 2}], "fails": fails}
    monkeypatch.setattr(gpu_check, "STAGES", dict.fromkeys(table, ("", 9)))
    monkeypatch.setattr(gpu_check, "stage_function", table.get)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "a GPU")


def test_results_of_single_stages_are_merged(stages, tmp_path):
    for name in ("works", "fails", "works"):
        gpu_check.save(tmp_path, name, gpu_check.run_stage(name))
    results = gpu_check.load(tmp_path)
    assert results["works"]["rows"] == [{"a": 1, "b": 0.25}, {"a": 2}]
    assert results["fails"]["error"] == "RuntimeError: broken"
    report = (tmp_path / "gpu_check.md").read_text()
    assert "| a | b |\n|---|---|\n| 1 | 0.25 |\n| 2 |  |" in report
    assert "## fails: failed" in report and "a GPU" in report


def test_a_stage_that_dies_is_a_failure(monkeypatch, tmp_path):
    died = subprocess.CompletedProcess([], returncode=-11)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *args, **kwargs: died)
    monkeypatch.setattr(gpu_check, "_origin", dict)
    result = gpu_check.run_stage_in_process("versions", tmp_path)
    assert result == {"status": "failed", "error": "it ended with exit code -11"}
    assert gpu_check.load(tmp_path) == {"versions": result}


CASE = Case(256, heads=2, head_dim=16)


def called(function):
    function()
    return 1.0


def test_attention_beside_its_peers():
    rows = attention.attention((CASE,), "cpu", called)
    names = {row["attention"]: row for row in rows}
    assert {"ours", "lucidrains", "ours, reference", "FlexAttention, sorted rows"} <= names.keys()
    for name in ("ours", "lucidrains", "ours, reference", "SDPA, FLASH_ATTENTION"):
        assert names[name].get("both ms") == 1, names[name]
    assert rows[-1]["attention"] == "ours is ahead of the best SDPA at no length"


def test_the_crossover():
    row = lambda name, length, ms: {"attention": name, "L": length, "D": 64, "both ms": ms}  # noqa: E731
    rows = [row("ours", 1024, 2.0), row("SDPA, A", 1024, 1.0), row("ours", 2048, 4.0), row("SDPA, A", 2048, 5.0)]
    rows += [row("SDPA, B", 2048, 4.5), row("ours, reference", 1024, 0.1)]
    assert attention._crossover(rows, 64)["attention"].endswith("from L 2048")
    assert attention._crossover(rows, 128)["attention"].endswith("at no length")


def test_repeats_and_compiled():
    assert all(row["repeats to the bit"] for row in attention.determinism(CASE, "cpu"))
    assert [row["mode"] for row in attention.compiled(CASE, "cpu", called)] == ["eager", "compiled"]
