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


@pytest.fixture(scope="module")
def recall() -> ModuleType:
    return load_example("associative_recall")


def sequences(module: ModuleType, task: str, *arguments: str) -> tuple[torch.Tensor, torch.Tensor]:
    made: tuple[torch.Tensor, torch.Tensor] = getattr(module, task)(
        50, module.parse(arguments), torch.Generator().manual_seed(0)
    )
    return made


def test_a_sequence_is_the_same_twice(duplication: ModuleType) -> None:
    ids, labels = sequences(duplication, "duplication", "--length", "12", "--vocab-size", "4")
    assert ids.shape == (50, 12)
    assert torch.equal(ids[:, :6], ids[:, 6:])
    assert (ids[:, 0] == 0).all()
    assert set(ids[:, 1:6].flatten().tolist()) == {1, 2, 3}
    assert (labels[:, :7] == duplication.IGNORED).all()
    assert torch.equal(labels[:, 7:], ids[:, 7:])


def test_each_key_comes_twice_with_its_value(recall: ModuleType) -> None:
    ids, labels = sequences(recall, "recall", "--length", "40", "--vocab-size", "7")
    assert ids.shape == (50, 40)
    orders = set()
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        pairs = list(zip(row[0::2], row[1::2], strict=True))
        listed, again = pairs[:10], pairs[10:]
        assert sorted(listed) == sorted(again)
        assert {key for key, _ in listed} == set(range(7, 17))
        assert all(0 <= value < 7 for _, value in listed)
        assert asked == [recall.IGNORED] * 20 + [x for _, value in again for x in (recall.IGNORED, value)]
        orders.add(tuple(key for key, _ in again))
    assert len(orders) == 50


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

    assert duplication.accuracy(Repeats(0), duplication.duplication, options, 5) == 1
    assert duplication.accuracy(Repeats(3), duplication.duplication, options, 5) == pytest.approx(12 / 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "6"], "--length must be a multiple of 4, got 6"),
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
