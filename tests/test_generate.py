"""generate and stream of the models: what a loop over whole forwards gives; the loop itself has its own tests."""

from typing import Any

import pytest
import torch
from torch import Tensor

from reformer_kernels import ReformerConfig, ReformerLM, ReformerSeq2Seq

V, L, N, PAD, START = 50, 20, 25, 7, 9
LENGTHS = (L, 13, 4)
BASE: dict[str, Any] = {
    "vocab_size": V, "embed_dim": 32, "num_layers": 3, "num_heads": 2, "attention": ("local", "lsh", "full"),
    "alignment": "bucket", "n_buckets": 4, "lsh_chunk_length": 8, "local_chunk_length": 8, "max_length": 64,
    "initializer_range": 0.5, "pad_token_id": PAD, "decoder_start_token_id": START,
}  # fmt: skip


def made(cls: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(ReformerConfig(**{**BASE, **options})).double()


def prompts(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """int64 [3, L], their mask, and each row without padding."""
    ids = torch.randint(0, V, (3, L), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    rows = []
    for i, length in enumerate(LENGTHS):
        at = slice(L - length, L) if side == "left" else slice(0, length)
        mask[i, at] = 1
        rows.append(ids[i : i + 1, at])
    return ids, mask, rows


def next_logits(model: Any, source: Tensor, new: Tensor) -> Tensor:
    """[1, V], of a whole forward."""
    if isinstance(model, ReformerSeq2Seq):
        logits = model(source, decoder_input_ids=torch.cat([torch.tensor([[START]]), new], 1)).logits
    else:
        logits = model(torch.cat([source, new], 1)).logits
    assert isinstance(logits, Tensor)
    return logits[:, -1]


def greedy(model: Any, source: Tensor, length: int = N) -> list[int]:
    new = source.new_zeros(1, 0)
    with torch.no_grad():
        for _ in range(length):
            new = torch.cat([new, next_logits(model, source, new).argmax(-1, keepdim=True)], 1)
    return list(new[0].tolist())


def until_end(row: list[int], eos: int) -> list[int]:
    """With padding behind the first token that ends it."""
    end = next((i for i, token in enumerate(row) if token == eos), len(row))
    return row[: end + 1] + [PAD] * (len(row) - end - 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cls", [ReformerLM, ReformerSeq2Seq])
def test_greedy_tokens_are_those_of_whole_forwards(cls: Any, side: str) -> None:
    model = made(cls)
    ids, mask, rows = prompts(side)
    out = model.generate(ids, mask, max_new_tokens=N)
    prompt = ids if cls is ReformerLM else torch.full((3, 1), START)
    assert model.training
    assert torch.equal(out[:, : prompt.shape[1]], prompt)
    model.eval()
    expected = [greedy(model, row) for row in rows]
    assert out[:, prompt.shape[1] :].tolist() == expected
    assert len({tuple(row) for row in expected}) == 3
    ends = {token: {row.index(token) if token in row else N for row in expected} for token in range(V)}
    eos = max(ends, key=lambda token: len(ends[token]))
    assert len(ends[eos]) > 1
    ended = model.generate(ids, mask, max_new_tokens=N, eos_token_id=eos)[:, prompt.shape[1] :].tolist()
    assert ended == [until_end(row, eos)[: len(ended[0])] for row in expected]


def test_the_published_ring_generates_too() -> None:
    model = made(ReformerLM, alignment="ring", n_buckets=None, attention=("lsh",), num_layers=1).eval()
    ids, mask, rows = prompts("left")
    out = model.generate(ids, mask, max_new_tokens=N)
    assert out[:, L:].tolist() == [greedy(model, row) for row in rows]


@pytest.mark.parametrize("cls", [ReformerLM, ReformerSeq2Seq])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 4, "length_penalty": 0.3}])
def test_rows_are_generated_as_alone(cls: Any, options: dict[str, Any]) -> None:
    """Beams are repeated and reordered rows of the cache."""
    model = made(cls)
    ids, mask, rows = prompts("left")
    if options.get("do_sample"):  # which a batch draws differently than one row
        options, ids, mask, rows = {**options, "num_return_sequences": 2}, ids[1:2], mask[1:2], rows[1:2]
    for eos in (None, [29, 33]):
        chosen = {"max_new_tokens": N, "eos_token_id": eos, **options}
        out = model.generate(ids, mask, generator=torch.Generator().manual_seed(2), **chosen)
        n = chosen.get("num_return_sequences", 1)
        assert len(out) == len(ids) * n
        for i, row in enumerate(rows):
            alone = model.generate(row, generator=torch.Generator().manual_seed(2), **chosen)
            skipped, first = alone.shape[1] - row.shape[1] * (cls is ReformerLM), out.shape[1]
            begin = L if cls is ReformerLM else 0
            got = out[i * n : (i + 1) * n, begin : begin + skipped]
            assert torch.equal(got, alone[:, alone.shape[1] - skipped :])
            assert (out[i * n : (i + 1) * n, begin + skipped : first] == PAD).all()


def test_beams_find_what_whole_forwards_score_best() -> None:
    """Scores of the beams, written out; a better beam comes first, and none is worse than the greedy sequence."""
    model = made(ReformerLM).eval()
    ids, mask, rows = prompts("right")
    beams = model.generate(ids, mask, max_new_tokens=6, num_beams=4, num_return_sequences=4)[:, L:].view(3, 4, 6)
    for row, found in zip(rows, beams, strict=True):
        candidates = [*found.tolist(), greedy(model, row, 6)]
        scores = []
        for new in candidates:
            with torch.no_grad():
                logits = model(torch.cat([row, torch.tensor([new])], 1)).logits[0, row.shape[1] - 1 : -1]
            scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum()))
        assert scores[:4] == sorted(scores[:4], reverse=True)
        assert len(set(map(tuple, candidates[:4]))) == 4
        assert scores[0] >= scores[4]


@pytest.mark.parametrize("cls", [ReformerLM, ReformerSeq2Seq])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7}])
def test_stream_is_generate(cls: Any, options: dict[str, Any]) -> None:
    model = made(cls)
    ids, mask, _ = prompts("left")
    chosen = {"max_new_tokens": N, "eos_token_id": [29, 33], **options}
    expected = model.generate(ids, mask, generator=torch.Generator().manual_seed(4), **chosen)
    tokens = model.stream(ids, mask, generator=torch.Generator().manual_seed(4), **chosen)
    new = []
    for token in tokens:
        assert model.training  # between tokens the model is its user's
        assert torch.is_grad_enabled()
        new.append(token)
    assert torch.equal(torch.stack(new, 1), expected[:, -len(new) :])


def test_a_mode_comes_back_after_an_error() -> None:
    model = made(ReformerLM)
    model.reformer.layers.eval()
    with pytest.raises(ValueError, match="max_length 64 tokens"):
        model.generate(prompts("left")[0], max_new_tokens=60)
    assert model.training
    assert not model.reformer.layers.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, TypeError, "max_new_tokens must be given"),
        ({"max_new_tokens": 3, "beams": 2}, TypeError, "beams is no option of generate, which has max_new_tokens, "),
        ({"max_new_tokens": 3, "eos_token_id": V}, ValueError, "eos_token_id must be between 0 and 49, got 50"),
        ({"max_new_tokens": 3, "top_p": 2.0}, ValueError, "top_p must be between 0 and 1, got 2.0"),
        ({"max_new_tokens": 3, "input_ids": torch.full((1, 3), V)}, ValueError, "input_ids must be between 0 and 49"),
        (
            {"max_new_tokens": 3, "attention_mask": torch.tensor([[1] * L, [0] * L, [1] * L])}, ValueError,
            "attention_mask must leave a token in each row to go on with, got none in row 1",
        ),
        ({"max_new_tokens": 3, "attention_mask": torch.ones(3, 2)}, ValueError, r"attention_mask must have shape"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = made(ReformerLM)
    arguments = {"input_ids": prompts("left")[0], **changes}
    for method in (model.generate, model.stream):
        with pytest.raises(error, match=message):
            next(iter(method(**arguments)))


def test_streams_have_one_beam() -> None:
    model = made(ReformerLM)
    with pytest.raises(ValueError, match="num_beams must be 1 to stream tokens, got 2"):
        model.stream(prompts("left")[0], max_new_tokens=3, num_beams=2)


def test_a_plain_model_generates_exactly() -> None:
    """Each token is the best one of a whole forward of what stands before it."""
    torch.manual_seed(0)
    model = ReformerLM(ReformerConfig(embed_dim=32, num_heads=2, num_layers=2, max_length=512)).eval()
    ids = torch.randint(256, (2, 300))
    written = model.generate(ids, max_new_tokens=5)
    assert written.shape == (2, 305)
    with torch.no_grad():
        logits = model(written).logits
        assert torch.equal(logits[:, 299:-1].argmax(-1), written[:, 300:])
        torch.testing.assert_close(model(written[:, :302]).logits, logits[:, :302])  # later tokens change nothing
