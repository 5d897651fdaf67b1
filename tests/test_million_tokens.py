"""The example of one step on a very long text: what it measures, and what it refuses."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.examples import FOLDER, load_example

FILE = FOLDER / "million_tokens.py"
SMALL = "--length 3000 --layers 3 --width 32 --heads 2 --hashes 2 --chunk 1024".split()
PHASES = [
    "forward, embedding", "forward, layer 1 (local)", "forward, layer 2 (lsh)", "forward, layer 3 (local)", "loss",
    "backward, loss", "backward, layer 3 (local)", "backward, layer 2 (lsh)", "backward, layer 1 (local)",
    "backward, embedding", "optimizer",
]  # fmt: skip
MEMORY = ("resident_peak", "resident_after", "in_use_peak")


@pytest.fixture(scope="module")
def million() -> ModuleType:
    return load_example("million_tokens")


@pytest.mark.parametrize("changes", [[], ["--position", "rotary", "--dtype", "bfloat16"]])
def test_a_step_by_phases(
    million: ModuleType, changes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    million.main([*SMALL, *changes, "--json", str(out)])
    result: dict[str, Any] = json.loads(out.read_text())
    phases = result["phases"]
    assert [phase["name"] for phase in phases] == PHASES
    assert result["length"] == 3000 and result["dtype"] == ("bfloat16" if changes else "float32")
    for phase in phases:
        assert phase["seconds"] >= 0
        if sys.platform == "linux":
            assert phase["resident_peak"] >= phase["resident_after"] > 2**26  # torch alone is more
        if million.in_use() is not None:
            assert 2**20 < phase["in_use_peak"] < phase["resident_peak"]
    assert 5 < result["loss"] < 6.5  # of 256 bytes, before anything was learned: log 256 is 5.5
    assert result["prefix_after"] < result["prefix_before"]  # it did learn from what it is tested with
    printed = capsys.readouterr().out
    assert "3,000 bytes, 3 layers of width 32, 2 heads, 2 hashes, " in printed
    for phase in phases:
        cells = [million.megabytes(phase[name]) for name in MEMORY]
        line = next(line for line in printed.splitlines() if line.startswith(phase["name"] + " "))
        assert line.split(maxsplit=len(phase["name"].split()))[-1].split() == [
            f"{phase['seconds']:.2f}", *" ".join(cells).split(),
        ]  # fmt: skip
    last = next(line for line in printed.splitlines() if line.startswith("all "))
    peaks = [million.megabytes(million.largest(phases, name)) for name in (MEMORY[0], MEMORY[2])]
    assert last.split()[2:] == " ".join(peaks).split()


def test_text_is_that_of_the_files(million: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "b", tmp_path / "a"
    first.write_bytes(bytes(range(250, 256)))
    second.write_bytes(b"\0ab")
    assert million.read([first, second], 8).tolist() == [[250, 251, 252, 253, 254, 255, 0, 97]]
    options = million.parse([str(first), str(second), "--length", "9"])
    assert options.ids.dtype == torch.int64 and options.ids[0, -1] == ord("b")


def test_the_library_has_a_million_bytes(million: ModuleType) -> None:
    assert sum(file.stat().st_size for file in million.documents(million.LIBRARY, ".py")) >= 2**20
    ids = million.read(million.documents(million.LIBRARY, ".py"), 2**20)
    assert ids.shape == (1, 2**20) and 0 <= ids.min() and ids.max() < 256


def test_the_sampler_sees_memory_that_is_gone_again(million: ModuleType) -> None:
    if million.in_use() is None:
        pytest.skip("malloc does not say")
    with million.tqdm(total=2, disable=True) as bar, million.Meter(bar) as meter:
        block = torch.ones(2**26)  # 256 MB
        million.time.sleep(10 * million.SAMPLE_SECONDS)
        del block
        meter.end("large")
        million.time.sleep(10 * million.SAMPLE_SECONDS)
        meter.end("small")
    large, small = meter.phases
    assert large["in_use_peak"] - small["in_use_peak"] > 2**27
    assert large["resident_peak"] - large["resident_after"] > 2**27
    assert small["seconds"] >= 10 * million.SAMPLE_SECONDS


def test_the_last_gradient_ends_a_phase(million: ModuleType) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    ended: list[object] = []
    million.when_all_have_gradients([second], lambda: ended.append("second"))
    hooks = million.when_all_have_gradients([first], lambda: ended.append(first.bias.grad is not None))
    second(first(torch.ones(1, 2))).sum().backward()
    assert ended == ["second", True]
    assert len(hooks) == 2


def test_where_the_system_does_not_say(
    million: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(million, "PROC", Path("/nonexistent"))
    monkeypatch.setattr(million, "_mallinfo2", None)
    million.main([*SMALL, "--length", "200"])
    assert capsys.readouterr().out.count("unknown") == 3 * len(PHASES) + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "1"], "--length must be at least 2, or there is nothing to predict, got 1"),
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--width", "30", "--heads", "4"], "--width must be divisible by --heads 4, got 30"),
        (
            ["--width", "12", "--heads", "4", "--position", "rotary"],
            "--width must be an even multiple of --heads 4 for rotary, got 12",
        ),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8' (choose from"),
        (["missing.txt"], "FILE: there is no file or folder 'missing.txt'"),
        ([str(FILE), "--length", "1000000"], f"--length must be at most {FILE.stat().st_size}, the bytes of 1 files"),
        (["--json", "missing/x.json"], "--json: the folder 'missing' does not exist"),
    ],
)
def test_wrong_options(
    million: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        million.parse(arguments)
    assert message in " ".join(f"{error.value} {capsys.readouterr().err}".split())
