"""The benchmark of whole models, on tiny ones: what it computes, not how long that takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models
from benchmarks.models import ModelCase

TINY = ModelCase(length=256, embed_dim=16, layers=2, heads=2, feed_forward_dim=32, n_hashes=2, chunk_length=16)
RESULTS = json.loads((Path(models.__file__).parent / "results" / "models.json").read_text())


def collected(part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    models.PARTS[part](rows.append, 1)
    return rows


@pytest.mark.filterwarnings("ignore")
def test_gradients_beside_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs are right without dropout, so the comparison is; with dropout they are not, and ours are."""
    monkeypatch.setattr(models, "GRADIENT", TINY)
    error = {(row["model"], row["case"]["dropout"]): row["error"] for row in collected("gradients")}
    assert error["Hugging Face", 0.0] < 1e-5 < 1e-2 < error["Hugging Face", 0.1]
    assert error["ours", 0.0] < 1e-5 and error["ours", 0.1] < 1e-5


def test_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DRIFT", replace(TINY, dropout=0.0))
    monkeypatch.setattr(models, "DRIFT_DEPTHS", (3,))
    rows = {row["precision"]: row for row in collected("drift")}
    for name, row in rows.items():
        if "float64" in name:
            assert row["input"] == row["gradient"] == 0
    assert 0 == rows["float32"]["rounding"] < rows["float32"]["gradient"] < rows["bfloat16"]["gradient"]


def test_both_models_are_of_one_configuration() -> None:
    ours, theirs = (models.MODELS[name](TINY) for name in ("ours", "Hugging Face"))
    sizes = [sorted(p.numel() for p in model.parameters() if p.dim() > 1) for model in (ours, theirs)]
    assert sizes[0] == sizes[1]


def test_memory_in_a_fresh_process() -> None:
    row = models.memory_in_fresh_process("ours", TINY)
    assert row["extra_bytes"] > 0 and row["seconds"] > 0 and ModelCase(**row["case"]) == TINY


def test_a_step_leaves_gradients_where_they_were() -> None:
    step = models.Step(models.ours(TINY), TINY)
    before: list[Any] = [p.grad for p in step.model.parameters()]
    addresses = [grad.data_ptr() for grad in before]
    taken = step()
    assert 0 < taken["forward"] < taken["both"]
    after: list[Any] = [p.grad for p in step.model.parameters()]
    assert [grad.data_ptr() for grad in after] == addresses
    assert all(grad.abs().sum() > 0 for grad in after)


def test_committed_results_can_be_reported(tmp_path: Path) -> None:
    text = models.markdown(RESULTS)
    for name in (*models.MODELS, *models.PRECISIONS):
        assert f"| {name} |" in text
    for part in models.PARTS:
        assert all(models.line(part, row) for row in RESULTS[part])
    models.draw(tmp_path / "plot.png", RESULTS)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--plot", "x.png", "--parts", "drift"], "--plot needs the parts depth and drift"),
        (["--memory-of", "ours"], "--memory-of and --case go together"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        models.parse(arguments)
    assert message in capsys.readouterr().err


def test_axes_are_as_long_as_the_sequence() -> None:
    for length in (256, 1024, 8192, 16384):
        rows, columns = replace(TINY, length=length).axes
        assert rows * columns == length
