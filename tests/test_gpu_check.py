"""The check of a GPU machine, on a machine without a GPU."""

import inspect
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.cases import Case
from benchmarks.gpu import attention
from benchmarks.gpu.timing import Row

ROOT = Path(__file__).resolve().parent.parent


def test_a_stage_that_needs_no_gpu_runs_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of its process
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--stage", "versions"]) == 0
    results = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert results.keys() == {"versions"} and results["versions"]["device"] == "no GPU"
    assert {"what": "device", "value": "none that torch sees"} in results["versions"]["rows"]
    said = capsys.readouterr().out
    assert "## versions: ok" in said and "Left out" not in said


def test_a_stage_that_needs_a_gpu_is_refused_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--stage", "kernels"]) == 1
    said = f"Left out, since torch sees no GPU: kernels. Results in {tmp_path / 'out'} stay.\n"
    assert capsys.readouterr() == (said, "")
    assert not (tmp_path / "out").exists()


def test_make_runs_nothing_when_it_is_only_to_print(tmp_path: Path) -> None:
    command = ["make", "gpu-check", "PYTHON=false", f"OUT={tmp_path / 'out'}", "STAGE=versions"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test
    ran = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f'"false" -m benchmarks.gpu_check --out "{tmp_path / "out"}" --stage versions\n'
    assert subprocess.run(command, cwd=ROOT, capture_output=True, env=environment).returncode == 2


@pytest.mark.parametrize("name", gpu_check.STAGES)
def test_a_stage_is_a_function_without_arguments(name: str) -> None:
    inspect.signature(gpu_check.stage_function(name)).bind()


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--stage", "nonsense"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "nonsense" in said and "ceilings" in said


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("broken")

    table = {"works": lambda: [{"a": 1, "b": 0.25}, {"a": 2}], "fails": fails}
    monkeypatch.setattr(gpu_check, "STAGES", {name: gpu_check.Stage("", 9, name == "fails") for name in table})
    monkeypatch.setattr(gpu_check, "stage_function", table.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def test_without_a_gpu_one_line_names_what_is_left_out(
    stages: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> tuple[int, str]:
        return gpu_check.main(["--out", str(tmp_path)]), capsys.readouterr().out

    def run_stage_here(name: str, out: Path) -> Row:
        gpu_check.save(out, name, gpu_check.run_stage(name))
        return gpu_check.load(out)[name]

    monkeypatch.setattr(gpu_check, "run_stage_in_process", run_stage_here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = main()
    assert code == 0 and said.count("no GPU: fails. ") == said.count("Left out") == 1 and "## works: ok" in said
    assert gpu_check.load(tmp_path).keys() == {"works"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code, said = main()
    assert code == 1 and "Left out" not in said and "## fails: failed" in said
    with_gpu = gpu_check.load(tmp_path)
    assert [result["device"] for result in with_gpu.values()] == ["a GPU"] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = main()
    assert code == 0 and "no GPU: works, fails. Results" in said and gpu_check.load(tmp_path) == with_gpu


def test_results_of_single_stages_are_merged(stages: None, tmp_path: Path) -> None:
    for name in ("works", "fails", "works"):
        gpu_check.save(tmp_path, name, gpu_check.run_stage(name))
    results = gpu_check.load(tmp_path)
    assert results["works"]["rows"] == [{"a": 1, "b": 0.25}, {"a": 2}]
    assert results["fails"]["error"] == "RuntimeError: broken"
    report = (tmp_path / "gpu_check.md").read_text()
    assert "| a | b |\n|---|---|\n| 1 | 0.25 |\n| 2 |  |" in report
    assert "## fails: failed" in report and "a GPU" in report


def test_a_stage_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    died: subprocess.CompletedProcess[str] = subprocess.CompletedProcess([], returncode=-11)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: died)
    monkeypatch.setattr(gpu_check, "_origin", dict)
    result = gpu_check.run_stage_in_process("versions", tmp_path)
    assert result == {"status": "failed", "error": "it ended with exit code -11"}
    assert gpu_check.load(tmp_path) == {"versions": result}


CASE = Case(256, heads=2, head_dim=16)


def called(function: Callable[[], Any]) -> float:
    function()
    return 1.0


def test_attention_beside_its_peers() -> None:
    rows = attention.attention((CASE,), "cpu", called)
    names = {row["attention"]: row for row in rows}
    assert {"ours", "lucidrains", "ours, reference", "FlexAttention, sorted rows"} <= names.keys()
    for name in ("ours", "lucidrains", "ours, reference", "SDPA, FLASH_ATTENTION"):
        assert names[name].get("both ms") == 1, names[name]
    assert rows[-1]["attention"] == "ours is ahead of the best SDPA at no length"


def test_the_crossover() -> None:

    def row(name: str, length: int, ms: float) -> Row:
        return {"attention": name, "L": length, "D": 64, "both ms": ms}

    rows = [row("ours", 1024, 2.0), row("SDPA, A", 1024, 1.0), row("ours", 2048, 4.0), row("SDPA, A", 2048, 5.0)]
    rows += [row("SDPA, B", 2048, 4.5), row("ours, reference", 1024, 0.1)]
    assert attention._crossover(rows, 64)["attention"].endswith("from L 2048")
    assert attention._crossover(rows, 128)["attention"].endswith("at no length")


def test_repeats_and_compiled() -> None:
    assert all(row["repeats to the bit"] for row in attention.determinism(CASE, "cpu"))
    assert [row["mode"] for row in attention.compiled(CASE, "cpu", called)] == ["eager", "compiled"]
