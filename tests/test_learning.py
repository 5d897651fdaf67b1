"""benchmarks.learning: which trainings there are, what is measured of their models, and that nothing is done twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from benchmarks import learning
from benchmarks.learning import KINDS, Language, Synthetic


def test_later_trainings_have_the_best_learning_rate() -> None:
    done: dict[str, Any] = {"seconds a step": {"local and LSH": 0.1, "full": 0.4}}
    groups = learning.language(done)
    sweep = next(groups)
    assert len(sweep) == len(set(sweep)) == len(KINDS) * len(learning.RATES)
    for run in sweep:
        best = {"local": 4e-3, "LSH": 1e-3}.get(run.kind, 2e-3)
        done[run.name] = {"loss": 1.0 + abs(run.rate - best)}
    long, again, short, ring = groups
    for group, seed in ((long, 1), (again, 2)):
        assert [(run.kind, run.rate, run.seed, run.steps) for run in group] == [
            ("local", 4e-3, seed, learning.STEPS), ("local and LSH", 2e-3, seed, learning.STEPS),
            ("LSH", 1e-3, seed, learning.STEPS), ("full", 2e-3, seed, learning.STEPS),
            ("local and LSH, own keys", 2e-3, seed, learning.STEPS), ("LSH, own keys", 2e-3, seed, learning.STEPS),
        ]  # fmt: skip
    assert [run.alignment for run in ring] == ["ring", "ring"]
    assert [run.steps for run in short] == 2 * [learning.STEPS // 4]
    names = [run.name for group in (sweep, long, again, short, ring) for run in group]
    assert len(names) == len(set(names))


def made(**options: Any) -> rk.ReformerLM:
    torch.manual_seed(0)
    config = rk.ReformerConfig(
        embed_dim=16, num_heads=2, num_layers=2, max_length=64, initializer_range=0.3, hash_seed=1, **options
    )
    return rk.ReformerLM(config)


def test_losses_by_position() -> None:
    model, windows = made(), torch.randint(256, (3, 64))
    found = learning.losses(model, windows)
    assert found.shape == (3, 63)
    with torch.no_grad():
        assert float(found.mean()) == pytest.approx(float(model(windows, labels=windows).loss), rel=1e-6)
        first = torch.nn.functional.cross_entropy(model(windows).logits[:, 4], windows[:, 5])
    assert float(found[:, 4].mean()) == pytest.approx(float(first), rel=1e-6)


def test_far_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "REPEATED", 3)
    monkeypatch.setattr(learning, "FAR", 6)
    windows = torch.tensor([list(b"abcxyz_abcDabcxyz")])
    # After the second "abc" (7 bytes ago), not after the third (4 bytes ago); "bcx", "cxy" and "xyz" stood 10 before.
    assert [bytes(windows[0, i - 2 : i + 1].tolist()) for i in learning.far_repeats(windows)[0].nonzero()[:, 0]] == [
        b"abc", b"bcx", b"cxy",
    ]  # fmt: skip


def test_without_lsh_is_the_model_with_layers_of_zeros() -> None:
    model, windows = made(attention=("local", "lsh")), torch.randint(256, (2, 64))
    whole = learning.losses(model, windows)
    hooks = learning.without_lsh(model)
    assert len(hooks) == 1
    switched_off = learning.losses(model, windows)
    for hook in hooks:
        hook.remove()
    assert torch.equal(learning.losses(model, windows), whole)
    assert not torch.equal(switched_off, whole)
    torch.nn.init.zeros_(model.get_parameter("reformer.layers.blocks.1.f.layer.output.weight"))
    assert torch.equal(learning.losses(model, windows), switched_off)


def test_trains_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both kinds of trainings, in small, from the command."""
    small = "--batch 1 --context 64 --layers 2 --width 16 --heads 1 --hashes 1 --validate-every 2 --warm-up 1"
    monkeypatch.setattr(learning, "MODEL", small)
    monkeypatch.setattr(learning, "WINDOWS", 2)
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("sys.argv", ["learning", "language"])
    with pytest.raises(SystemExit):
        learning.main()
    assert "language needs what time measures, once" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps({"seconds a step": dict.fromkeys(KINDS, 1.0)}))
    tiny = "--steps 2 --warm-up 1 --width 16 --heads 1 --hashes 1 --chunk-length 8 --batch 2 --eval-hashes 1"
    tasks = [Synthetic("associative_recall", 16, "LSH", tiny)]
    models = [Language("local and LSH", 1e-3, 1, 2)]
    monkeypatch.setitem(learning.PARTS, "recall", lambda done: [tasks])
    monkeypatch.setitem(learning.PARTS, "language", lambda done: [models])
    names = [run.name for run in tasks] + [run.name for run in models]
    for expected in (names, []):
        monkeypatch.setattr("sys.argv", ["learning", "recall", "language", "--folder", str(tmp_path / "runs")])
        learning.main()
        assert sorted(capsys.readouterr().out.split("\n")[:-1]) == sorted(expected)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[tasks[0].name]["accuracy"].keys() == {"1"}
    found = results[models[0].name]
    assert len(found["by position"]) == learning.POSITIONS
    assert found["by hashes"]["1"]["loss"] == pytest.approx(found["loss"])
    assert found["loss"] == pytest.approx(sum(found["by position"]) / learning.POSITIONS, rel=1e-2)
    assert [step for step, _ in found["curve"]] == [2]
    assert found["without LSH"]["loss"] != found["loss"]


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    run = Synthetic("duplication", 6, "LSH")
    with pytest.raises(RuntimeError, match=r"duplication, 6, LSH: [\s\S]*--length must be a multiple of 4, got 6"):
        learning.train(run, tmp_path / "x")
