"""The examples run, learn, and say what they lack."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch

import reformer_kernels as rk
from benchmarks.examples import FOLDER, load_example


@pytest.fixture
def swap() -> ModuleType:
    module = load_example("swap_attention")
    torch.use_deterministic_algorithms(False)
    return module


def test_swap_attention_prints_both_models() -> None:
    pytest.importorskip("sklearn")
    options = "--side 12 --steps 3 --batch 2 --width 16 --test-images 4 --threads 1"
    ran = subprocess.run(
        [sys.executable, str(FOLDER / "swap_attention.py"), *options.split()],
        cwd=FOLDER,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "sequences of 144 steps" in ran.stdout
    table = [line.split() for line in ran.stdout.splitlines()[-2:]]
    assert [row[0] for row in table] == ["stock", "converted"]
    assert all(row[1].endswith("%") and row[3] == "s" and row[5] == "MB" for row in table)


@pytest.mark.parametrize("name", ["stock", "converted"])
def test_swap_attention_learns(swap: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    converted = []
    convert = rk.convert_attention
    monkeypatch.setattr(rk, "convert_attention", lambda model, **options: converted.append(convert(model, **options)))
    options = swap.parse("--side 16 --steps 60 --batch 32 --width 32 --budget 64 --threads 1".split())
    assert swap.train(name, options)["accuracy"] > 0.4
    assert [len(modules) for modules in converted] == ([1] if name == "converted" else [])


def test_the_sequence_has_every_pixel(swap: ModuleType) -> None:
    seen = []
    model = swap.PixelClassifier(16, 8, 2, 1)
    model.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    assert model(torch.randn(3, 1, 16, 16)).shape == (3, 10)
    assert seen == [(3, 256, 8)]
    assert swap.parse([]).side ** 2 == 4096


def test_swap_attention_says_what_is_missing(
    swap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        swap.digits(16)
    for arguments in (["--steps", "0"], ["--width", "15"]):
        with pytest.raises(SystemExit):
            swap.parse(arguments)
        assert arguments[1] in capsys.readouterr().err
