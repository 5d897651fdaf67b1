"""The benchmark command: its results, its gate and its counting. Nothing here depends on how long something takes."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import base, gate, models, recall, report, roofline, run, timing
from benchmarks.cases import SUITES, Case
from benchmarks.kernel_cases import VARIANTS, Variant, backward_flop, forward_flop, make_call, seen_keys, window_keys
from benchmarks.providers import PROVIDERS, TARGETS, inputs
from reformer_kernels.backends import cpu, cuda

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--suite", "tiny", "--repeats", "1"]
needs_cpu_kernels = pytest.mark.skipif("error" in cpu.build_info(), reason="no CPU kernels")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_cpu_kernels
def test_the_command_writes_results_that_can_be_reported(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    ran = command("benchmarks.run", *TINY, "--providers", "ours; torch SDPA", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    results = json.loads(out.read_text())
    assert {"revision", "date", "torch", "cpu", "cores", "isa"} <= results["environment"].keys()
    suite = SUITES["tiny"]
    assert [(Case(**row["case"]), row["target"]) for row in results["cases"]] == [
        (case, target) for case in suite.cases for target in suite.targets
    ]
    for row in results["cases"]:
        assert "agrees with the float64 oracle" in row["gate"]["ours"]
        assert row["seconds"].keys() == {"ours", "torch SDPA"}
        assert {"forward", "both", "repeats", "runs"} <= row["seconds"]["ours"].keys()
    assert [row["provider"] for row in results["memory"]] == ["ours", "torch SDPA"]
    assert all(row["extra_bytes"] >= 0 for row in results["memory"])
    assert [row["variant"]["name"] for row in results["kernels"]] == [v.name for v in VARIANTS["small"]]
    assert all({"seconds", "ns", "gflops"} <= row["backward"].keys() for row in results["kernels"])
    assert results["hash_and_sort"] and results["calls"]

    reported = command("benchmarks.report", str(out))
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.strip() in ran.stdout
    assert "| torch SDPA takes |" in reported.stdout


@pytest.mark.parametrize(
    ("parse", "option"),
    [(run.parse, "--out"), *((m.parse, option) for m in (models, recall) for option in ("--out", "--plot"))],
)
def test_files_that_cannot_be_written_are_refused_before_the_run(
    parse: Callable[[list[str]], argparse.Namespace], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, reason in (
        (tmp_path / "missing" / "results", f"the folder '{tmp_path / 'missing'}' does not exist"),
        (tmp_path, f"'{tmp_path}' is a folder"),
    ):
        with pytest.raises(SystemExit):
            parse([option, str(path)])
        assert f"argument {option}: {reason}" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()
    file = tmp_path / "results"
    assert getattr(parse([option, str(file)]), option[2:]) == file
    assert getattr(parse([option, "results"]), option[2:]) == Path("results")
    assert list(tmp_path.iterdir()) == []


def test_the_roofline_is_that_of_the_gpu_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setattr(cuda, "library", dict)
    monkeypatch.setattr(roofline, "SHAPES", [])
    roofline.main()
    assert capsys.readouterr().out.startswith("Predicted for one H200, ")


@needs_cpu_kernels
@pytest.mark.parametrize("wrong", ["kernel", "backward kernel", "provider"])
def test_a_wrong_result_stops_the_run_before_any_time_is_taken(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setattr(run, "fma_peak", lambda *threads: {})
    monkeypatch.setattr(run, "interleaved", lambda *arguments: pytest.fail("timed on a red gate"))
    if wrong == "provider":
        ours = PROVIDERS["ours"].attention
        assert ours is not None
        scaled = replace(PROVIDERS["ours"], attention=lambda case: lambda *x: ours(case)(*x) * (1 + 1e-6))
        monkeypatch.setitem(PROVIDERS, "ours", scaled)
    else:
        name = "chunk_attention" if wrong == "kernel" else "chunk_attention_backward"
        right = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a: (right(*a)[0] * 1.001, *right(*a)[1:]))
    with pytest.raises(SystemExit, match="correctness gate"):
        run.main([*TINY, "--providers", "ours"])


@needs_cpu_kernels
@pytest.mark.parametrize("wrong", ["list_attention", "list_attention_backward", "select_keys", "exact", None])
def test_the_gate_of_the_drop_in(monkeypatch: pytest.MonkeyPatch, wrong: str | None) -> None:
    if wrong == "exact":
        ours = PROVIDERS["ours"].module
        assert ours is not None
        scaled = replace(PROVIDERS["ours"], module=lambda case: lambda *x: ours(case)(*x) * (1 + 1e-5))
        monkeypatch.setitem(PROVIDERS, "ours", scaled)
    elif wrong == "select_keys":
        right = cpu.select_keys
        monkeypatch.setattr(cpu, wrong, lambda call: right(call._replace(key=-call.key)))
    elif wrong:
        right = getattr(cpu, wrong)
        monkeypatch.setattr(cpu, wrong, lambda *a: (right(*a)[0] * 1.001, *right(*a)[1:]))
    case = Case(128 if wrong == "exact" else 300, heads=2, head_dim=16)
    if wrong is None:
        assert "agrees with the float64 oracle" in gate.check_module("ours", case)
        assert "as exact as" in gate.check_module("ours", case.shorter(128))
        return
    with pytest.raises(AssertionError):
        gate.check_module("ours", case)


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_gives_an_output_and_gradients_or_has_no_such_target(name: str) -> None:
    torch.use_deterministic_algorithms(False)  # the peers' gathers have no deterministic backward
    case = Case(128, heads=2, head_dim=16)
    for target in TARGETS:
        function = PROVIDERS[name].make(target, case)
        tensors, grad_out = inputs(target, case)
        if function is None:
            continue
        out, *grads = gate.step(function, tensors, grad_out)
        assert out.shape == grad_out.shape and out.isfinite().all()
        assert [g.shape for g in grads] == [t.shape for t in tensors]


def test_the_layer_of_hugging_face_is_ours() -> None:
    assert gate.distance(Case(128, heads=2, head_dim=16)) < 1e-4


def test_useful_work_by_hand() -> None:
    plain = Variant("plain", length=128, heads=3, head_dim=64, chunk_length=64, n_hashes=4)
    call = make_call(plain)
    # 128 keys, each a product of 64 terms with the query's row and one with the weight: 2 * 64 * 2 * 128.
    assert forward_flop(call) == 32768 == 8 * 64 * 64
    assert backward_flop(call) == 81920  # five products instead of two
    assert plain.token_head_rounds == 1536
    assert Variant("local", length=100, heads=3, key="local").token_head_rounds == 300
    assert window_keys(make_call(Variant("after", length=256, chunks_after=1))) == 192
    assert window_keys(make_call(replace(plain, length=100))) == 100  # chunks of 64 and 36, and each sees both


def test_keys_that_are_used_by_hand() -> None:
    # One window of 64: a query uses the keys up to itself; with shared rows those before it, the first one itself.
    assert seen_keys(make_call(Variant("local", length=64, heads=2, key="local"))) == 65 / 2
    assert seen_keys(make_call(Variant("shared", length=64, heads=2))) == (63 * 32 + 1) / 64
    # The second of two chunks sees the first wholly; the first sees nothing of the second, which is later.
    assert seen_keys(make_call(Variant("local", length=128, heads=1, key="local"))) == (65 / 2 + 65 / 2 + 64) / 2


def test_windows_that_end_at_a_bucket_are_counted_as_they_are() -> None:
    call = make_call(Variant("bucket", length=200, heads=1, chunk_length=16, n_hashes=2, alignment="bucket"))
    assert call.buckets is not None
    pairs = 0
    for buckets in call.buckets[0, 0].tolist():
        for bucket in set(buckets):
            slots = range(buckets.count(bucket))
            pairs += sum(q // 16 - k // 16 in (0, 1) for q in slots for k in slots)
    assert window_keys(call) == pairs / 400


def test_runs_are_interleaved_and_a_slow_one_is_not_repeated() -> None:
    order: list[str] = []

    def timer(name: str, seconds: float) -> timing.Timer:
        def run() -> dict[str, float]:
            order.append(name)
            return {"both": seconds + len(order)}

        return run

    times = timing.interleaved({"a": timer("a", 0.0), "slow": timer("slow", 100.0), "b": timer("b", 0.0)}, 3)
    assert order == ["a", "slow", "b", "a", "b", "a", "b", "a", "b"]
    assert times["a"]["both"] == 6.0 and times["a"]["repeats"] == 3
    assert times["slow"]["both"] == 102.0 and times["slow"]["repeats"] == 1


def test_what_would_take_too_long_is_skipped_with_a_reason() -> None:

    def reason(name: str, target: str, case: Case) -> str | None:
        return run.reason_to_skip(name, target, case, gflops=100.0, max_seconds=60.0)

    assert "too slow" in str(reason("torch SDPA", "attention", Case(2**20)))
    assert "too big" in str(reason("Hugging Face", "layer", Case(2**17, batch=100, head_dim=1, n_hashes=1)))
    assert reason("Hugging Face", "attention", Case(1024)) == "has no attention"
    assert reason("ours", "attention", Case(2**16)) is None


def test_base_is_a_commit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: list[tuple[str, ...]] = []

    def git(*arguments: str) -> str:
        asked.append(arguments)
        return commit

    monkeypatch.setattr(base, "git", git)
    assert run.parse([*TINY, "--base", "HEAD"]).base == commit
    assert asked == [("rev-parse", "--verify", "HEAD^{commit}")]
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run.parse([*TINY, "--base", "no-such-revision"])
    assert "--base: " in capsys.readouterr().err


def test_arguments_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--repeats", "0"], ["--providers", "nobody"], ["--suite", "nonsense"]):
        with pytest.raises(SystemExit):
            run.parse(arguments)
        assert arguments[1] in capsys.readouterr().err


def test_numbers_in_tables() -> None:
    assert [report.length_name(n) for n in (1024, 65536, 2**20, 100)] == ["1K", "64K", "1M", "100"]
    assert [report.number(x) for x in (0.0571, 1.234, 12.3, 123.4)] == ["0.057", "1.2", "12", "123"]
