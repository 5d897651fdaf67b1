"""The demo, end to end at a tiny size, and how it refuses bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reformer_kernels.demo import __main__ as demo
from reformer_kernels.demo import cost, figure
from reformer_kernels.demo.model import ByteLM
from reformer_kernels.demo.text import DemoError, split_text

ENGLISH = b"The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
LENGTHS = [256, 512]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reformer_kernels.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "new" / "out"
    text.write_bytes(ENGLISH * 60)
    done = run(
        *f"--seconds 2 --context 256 --width 32 --layers 2 --heads 2 --lengths 512,256 --repeats 1 --generate 20 "
        f"--swap-length 300 --swap-repeats 1 --text {text} --out {out}".split()
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "wins by" in done.stdout
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) == 20

    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["cores"] >= 1
    assert "isa" in results["environment"]
    assert results["options"]["context"] == 256 and results["options"]["lengths"] == LENGTHS
    points = [(row["length"], row["name"]) for row in results["attention"]]
    assert points == [(length, name) for length in LENGTHS for name in cost.NAMES]
    assert all(row["seconds"] > 0 and row["extra_bytes"] > 0 and row["calls"] == 1 for row in results["attention"])
    swapped = results["swap"]
    assert swapped["length"] == 300 and swapped["seconds"].keys() == {"stock", "swapped"}
    assert 0 <= swapped["short_difference"] < 1e-5
    for name in figure.MODELS:
        training = results["training"][name]
        assert training["after"] < training["before"], name
        assert training["curve"][0] == [0.0, training["before"]] and training["curve"][-1][1] == training["after"]
        assert training["steps"] >= 1
    assert 190 <= len(results["sample"]["prompt"]) <= 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "cannot read 'missing.txt': No such file"),
        (["--text", "."], "cannot read '.': Is a directory"),
        (["--text", "empty.txt"], "has 0 bytes, too few"),
        (["--text", "short.txt"], "--context 4096 needs at least 40,970"),
        (["--text", "short.txt", "--out", "short.txt"], "too few"),
        (["--context", "256", "--text", "short.txt", "--out", "short.txt"], "cannot make the folder 'short.txt'"),
        (["--width", "130", "--heads", "4"], "--width must be divisible by --heads, got 130 and 4"),
        (["--seconds", "0"], "--seconds: must be a positive number, got '0'"),
        (["--seconds", "nan"], "--seconds: must be a positive number, got 'nan'"),
        (["--context", "1"], "--context: must be an integer of at least 2, got '1'"),
        (["--layers", "two"], "--layers: must be an integer of at least 1, got 'two'"),
        (["--lengths", "1024,,2048"], "--lengths: must be an integer of at least 1, got ''"),
        (["--lengths", "-5"], "--lengths"),
        (["--seed", "-1"], "--seed: must be an integer of at least 0, got '-1'"),
        (["--lr", "inf"], "--lr: must be a positive number, got 'inf'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(ENGLISH * 50)
    try:
        code = demo.main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


def test_error_line_of_the_real_process() -> None:
    done = run("--text", "/no/such/file")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "reformer_kernels.demo: cannot read '/no/such/file': No such file or directory\n"


@pytest.mark.parametrize("module", ["matplotlib", "tqdm"])
def test_missing_extra_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main([]) == 2
    assert capsys.readouterr().err == (
        f"reformer_kernels.demo: {module} is missing: pip install reformer_kernels[demo]\n"
    )


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = demo._parser()
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for action in parser._actions:
        assert action.help, action.dest
        for option in action.option_strings:
            assert re.search(rf"{option}\b", shown), option


def test_models_are_of_equal_size_and_causal() -> None:
    models = [ByteLM(name, 256, 32, 4, 2, 1, 1).eval() for name in figure.MODELS]
    sizes = [sum(x.numel() for x in model.parameters()) for model in models]
    assert sizes[0] == sizes[1]
    for model in models:
        for x in model.parameters():
            torch.nn.init.normal_(x, std=0.3)
        tokens = torch.randint(256, (1, 256))
        changed = tokens.clone()
        changed[0, 200] = (changed[0, 200] + 1) % 256
        with torch.no_grad():
            difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
        assert float(difference[200:].max()) > 0
        assert float(difference[:200].max()) == 0


def test_text_is_split_behind_nine_tenths() -> None:
    train, held_out = split_text(bytes(range(100)), 9)
    assert train.tolist() == list(range(90)) and held_out.tolist() == list(range(90, 100))
    with pytest.raises(DemoError, match="needs at least 110"):
        split_text(bytes(100), 10)


def test_cost_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(DemoError, match="LSH attention at L 64 could not be measured: its process ended with code 1"):
        cost.measure([64], 1, 1.0, iter)
