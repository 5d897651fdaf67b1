"""The example of the duplication task: its data, what it learns, and what it refuses."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.examples import load_example

SMALL = (
    "--length 32 --vocab-size 16 --width 32 --heads 2 --steps 200 --warm-up 20 --learning-rate 0.01 --eval-hashes 1 8"
).split()


@pytest.fixture(scope="module")
def duplication() -> ModuleType:
    return load_example("duplication")


def test_a_sequence_is_the_same_twice(duplication: ModuleType) -> None:
    ids = duplication.sequences(50, 10, 4, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 10)
    assert torch.equal(ids[:, :5], ids[:, 5:])
    assert (ids[:, 0] == 0).all()
    assert set(ids[:, 1:5].flatten().tolist()) == {1, 2, 3}
    labels = duplication.second_half(ids)
    assert (labels[:, :6] == duplication.IGNORED).all()
    assert torch.equal(labels[:, 6:], ids[:, 6:])


@pytest.mark.parametrize(("attention", "chunk_length"), [("lsh", 8), ("local", 4)])
def test_lsh_attention_looks_up_what_a_window_does_not_see(
    duplication: ModuleType, attention: str, chunk_length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--attention", attention, "--chunk-length", str(chunk_length), "--out", str(out)]
    duplication.main([*SMALL, *arguments])
    result: dict[str, Any] = json.loads(out.read_text())
    found = result["accuracy"]
    printed = capsys.readouterr().out
    assert f"length 32, {attention}, 200 steps in " in printed
    assert all(f"{name:>16}{share:>12.2%}" in printed for name, share in found.items())
    if attention == "local":  # a window of 8 ends 8 symbols behind what it would have to look up: one of 15 is right
        assert found.keys() == {"none"}
        assert found["none"] < 0.15
    else:
        assert found.keys() == {"1", "8"}
        assert found["8"] > 0.9
        assert found["8"] >= found["1"]


def test_accuracy_counts_the_second_half(duplication: ModuleType) -> None:
    """A model that repeats what stood half a sequence before, and one that does so but once."""
    options = duplication.parse([*SMALL])

    class Repeats:
        def __init__(self, wrong: int) -> None:
            self.wrong = wrong

        def eval(self) -> None:
            pass

        def __call__(self, ids: torch.Tensor, n_hashes: int) -> Any:
            assert n_hashes == 5
            said = ids.roll(16 - 1, 1)  # at i the symbol that stood at i + 1 - 16
            said[:, 16 : 16 + self.wrong] = 0
            said[:, :16] = 0  # nobody asks
            return type("Output", (), {"logits": torch.nn.functional.one_hot(said, 16).float()})

    assert duplication.accuracy(Repeats(0), options, 5) == 1
    assert duplication.accuracy(Repeats(3), options, 5) == pytest.approx(12 / 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "7"], "--length must be an even number of at least 4, got 7"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--vocab-size", "1"], "--vocab-size must be at least 2, got 1"),
        (["--eval-hashes", "4", "0"], "--eval-hashes must be at least 1, got 0"),
        (["--out", "missing/x.json"], "--out: the folder 'missing' does not exist"),
    ],
)
def test_wrong_options(
    duplication: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        duplication.parse(arguments)
    assert message in capsys.readouterr().err
