"""The benchmark of generation, on tiny models: what it runs, not how long that takes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from benchmarks import generation
from benchmarks.generation import MODELS, TOKENS, Width

from .rounding import assert_equal_to_rounding

RESULTS = json.loads((Path(generation.__file__).parent / "results" / "generation.json").read_text())
TINY = Width(embed_dim=32, layers=2, heads=2, feed_forward_dim=32, n_buckets=4)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_reads_tokens_one_by_one_into_the_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    make = MODELS[name]

    def noting(width: Width, context: torch.Tensor) -> Any:
        step, size = make(width, context)

        def noted(token: torch.Tensor) -> torch.Tensor:
            logits = step(token)
            assert logits.isfinite().all()
            shapes.append((*token.shape, *logits.shape))
            return logits

        return noted, size

    monkeypatch.setitem(MODELS, name, noting)
    run, size = generation.measure(name, TINY, 256)
    before = size()
    assert run().keys() == {"token"}
    assert shapes == [(1, 1, 1, 1, generation.VOCAB_SIZE)] * TOKENS
    if name == "Llama, full attention":
        assert before == 2 * 2 * 256 * 32 * 4  # layers, keys and values, tokens, width, bytes
        assert size() == before + 2 * 2 * TOKENS * 32 * 4
    elif name == "Hugging Face's Reformer":
        hashes = 2 * 4 * 8  # heads, rounds, bytes: of the LSH layer
        assert before == 256 * (2 * 32 * 4 + hashes)
        assert size() == before + TOKENS * (2 * 32 * 4 + hashes)
    else:
        assert before > 2 * 129 * 32 * 4  # of the local layer keys and values: two chunks of 64 and the slot of none


@pytest.fixture
def float64() -> Iterator[None]:
    """What is made is float64, so that no bucket is a near tie."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
def test_ours_goes_on_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    original = rk.ReformerLM

    def noted(config: rk.ReformerConfig) -> rk.ReformerLM:
        models.append(original(config))
        return models[-1]

    monkeypatch.setattr(rk, "ReformerLM", noted)
    context, token = torch.randint(256, (1, 256)), torch.tensor([[65]])
    step, _ = generation.ours(TINY, context)
    with torch.no_grad():
        got = step(token)[:, -1]
        expected = models[0](torch.cat([context, token], 1)).logits[:, -1]
    # Two layers, of norms, projections of up to 4 * 32 terms, scores and weights.
    assert_equal_to_rounding(got, expected, 4 * (2 * 32 + 4 * 32 + 257))
    assert (models[0](token).logits[:, -1] - expected).abs().max() > 0.01


def test_committed_results_can_be_reported() -> None:
    text = generation.markdown(RESULTS)
    assert "| 1K | 16K | 64K |" in text
    for name in MODELS:
        assert f"| {name} |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "1000"], "--contexts must be positive multiples of 256, got 1000"),
        (["--contexts", "0"], "--contexts must be positive multiples of 256, got 0"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generation.parse(arguments)
    assert message in capsys.readouterr().err
