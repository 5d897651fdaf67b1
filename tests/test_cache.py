"""Going on with a cache is the same as reading everything at once; and what a cache holds, forgets and refuses."""

import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from reformer_kernels import (
    AttentionRules,
    FullAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    Reformer,
    ReformerConfig,
    ReformerLM,
    ReformerSeq2Seq,
    _ops,
)
from reformer_kernels._calls import HashCall
from reformer_kernels.backends import reference
from reformer_kernels.modules.cache import Step

from .rounding import assert_equal_to_rounding

V, B, L = 50, 3, 70
BASE: dict[str, Any] = {
    "vocab_size": V, "embed_dim": 32, "num_layers": 3, "num_heads": 2, "attention": ("lsh", "local", "full"),
    "alignment": "bucket", "n_buckets": 4, "n_hashes": 2, "hash_seed": 3, "lsh_chunk_length": 4,
    "local_chunk_length": 8, "max_length": 1024, "initializer_range": 0.2, "causal": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "all kinds": {},
    "stored": {"reversible": False},
    "lsh": {
        "attention": ("lsh",),
        "n_buckets": (4, 2),
        "n_hashes": 3,
        "lsh_chunks_before": 2,
        "lsh_chunks_after": 1,
        "attention_bias": True,
    },
    "lsh, keys of their own": {"attention": ("lsh",), "shift_keys": False},
    "lsh, two buckets": {"attention": ("lsh",), "n_buckets": 2},
    "lsh, paper": {"attention": ("lsh",), "rules": "paper"},
    "lsh, trax": {"attention": ("lsh",), "rules": "trax"},
    "local": {"attention": ("local",), "local_chunk_length": 3},
    "local, own chunk": {"attention": ("local",), "local_chunks_before": 0},
    "full": {"attention": ("full",), "position": "learned"},
    "rotary": {"position": "rotary"},
    "sinusoidal": {"position": "sinusoidal", "norm": "rms"},
    "axial": {"axial_shape": (4, 256), "axial_dims": (12, 20)},
    "memory": {"memory_keys": 3, "position": "rotary"},
    "tied": {"tie_layers": True, "num_layers": 5, "streams": "mean", "tie_embeddings": True},
}
SPLITS = {"whole": [L], "tokens": [1] * L, "parts": [20, 1, 1, 33, 15]}


def roundings(length: int) -> int:
    """The longest way through five layers: each half has a norm, projections of up to 128 terms, scores and weights."""
    return 10 * (2 * 32 + 4 * 32 + length)


def assert_same(actual: Tensor, expected: Tensor, length: int = L) -> None:
    assert expected.dtype == torch.float64
    assert_equal_to_rounding(actual, expected, roundings(length))


def made(**options: Any) -> ReformerLM:
    torch.manual_seed(0)
    return ReformerLM(ReformerConfig(**{**BASE, **options})).double().eval()


def tokens(length: int = L, batch: int = B, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, ids: Tensor | None, *args: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, *args, **options).logits
    return logits


def fed(model: Any, ids: Tensor, split: list[int], cache: Any) -> Tensor:
    return torch.cat([logits_of(model, part, cache=cache) for part in ids.split(split, dim=1)], dim=1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_forward(name: str, split: str) -> None:
    model, ids = made(**MODELS[name]), tokens()
    expected = logits_of(model, ids)
    cache = model.new_cache()
    assert_same(fed(model, ids, SPLITS[split], cache), expected)
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [L] * B


@pytest.mark.parametrize("kind", ["lsh", "local", "full"])
def test_a_long_prompt_is_read_at_once(kind: str) -> None:
    model, ids = made(attention=(kind,), memory_keys=2 * (kind == "lsh")), tokens(600)
    mask = torch.ones_like(ids)
    mask[1, 350:] = 0
    expected, new = logits_of(model, ids, mask), tokens(300, seed=2)
    cache = model.new_cache()
    assert_same(logits_of(model, ids, mask, cache=cache)[mask == 1], expected[mask == 1], 600)
    then = fed(model, new, [290, 1, 9], cache)
    for row, length in enumerate((600, 350, 600)):
        whole = logits_of(model, torch.cat([ids[row, :length], new[row]])[None])[0]
        assert_same(then[row], whole[length:], 900)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", ["all kinds", "rotary", "memory", "lsh, paper"])
def test_a_padded_row_is_the_row_alone(name: str, side: str) -> None:
    model, ids = made(**MODELS[name]), tokens()
    mask, padded = torch.zeros_like(ids), tokens(seed=5)
    ranges = []
    for row, length in enumerate((L, 37, 5)):
        begin = {"left": L - length, "right": 0, "both": (L - length) // 2}[side]
        ranges.append(slice(begin, begin + length))
        mask[row, ranges[row]], padded[row, ranges[row]] = 1, ids[row, :length]
    cache, new = model.new_cache(), tokens(6, seed=2)
    whole, cached = logits_of(model, padded, mask), logits_of(model, padded, mask, cache=cache)
    then = fed(model, new, [1, 5], cache)
    for row, at in enumerate(ranges):
        alone = logits_of(model, torch.cat([ids[row, : at.stop - at.start], new[row]])[None])[0]
        for got in (whole, cached):
            assert_same(got[row, at], alone[:-6])
        assert_same(then[row], alone[-6:])


@pytest.mark.parametrize("name", ["all kinds", "memory", "lsh"])
def test_a_row_may_get_no_tokens_in_a_step(name: str) -> None:
    model, ids = made(**MODELS[name]), tokens(20)
    whole = logits_of(model, ids)
    cache, begin = model.new_cache(max_crop=2), [0] * B
    steps: list[tuple[int, ...]] = [(3, 0, 5), (0, 4, 1), (2, 0, 0), (6, 2, 7), (0, 1, 0), (1, 1, 1)]
    for counts in steps:
        new, mask = tokens(max(counts), seed=7), torch.zeros(B, max(counts))
        for row, count in enumerate(counts):
            new[row, :count], mask[row, :count] = ids[row, begin[row] : begin[row] + count], 1
        got = logits_of(model, new, mask, cache=cache)
        for row, count in enumerate(counts):
            assert_same(got[row, :count], whole[row, begin[row] : begin[row] + count])
            begin[row] += count
        if counts[0] == 6:
            cache.crop(1)
            begin = [i - 1 for i in begin]


@pytest.mark.parametrize("name", ["all kinds", "memory", "tied", "local", "lsh", "lsh, keys of their own"])
def test_crop_forgets_and_reorder_moves_rows(name: str) -> None:
    model, ids, wrong, new = made(**MODELS[name]), tokens(), tokens(9, seed=2), tokens(8, seed=3)
    cache = model.new_cache(max_crop=9)
    fed(model, ids, [50, 20], cache)
    for dropped in (9, 4):
        fed(model, wrong[:, :dropped], [1] * dropped, cache)
        cache.crop(dropped)
    rows = torch.tensor([2, 0, 0, 1])
    first = fed(model, new[:, :5], [3, 2], cache)
    cache.reorder(rows)
    second = fed(model, new[rows][:, 5:], [3], cache)
    expected = logits_of(model, torch.cat([ids, new], 1))[:, L:]
    assert_same(first, expected[:, :5])
    assert_same(second, expected[rows, 5:])


@pytest.mark.parametrize("kind", ["lsh", "local", "full"])
def test_no_more_is_forgotten_than_is_kept(kind: str) -> None:
    """Of all tokens that were ever there, the last max_crop; what was overwritten does not come back."""
    model, ids, new = made(attention=(kind,)), tokens(), tokens(9, seed=2)
    cache = model.new_cache(max_crop=9)
    fed(model, ids, [L], cache)
    cache.crop(4)
    cache.crop(5)
    with pytest.raises(ValueError, match="tokens must be between 0 and 0, got 1"):
        cache.crop(1)
    logits_of(model, new[:, :2], cache=cache)
    with pytest.raises(ValueError, match="tokens must be between 0 and 2, got 9"):
        cache.crop(9)
    cache.crop(2)
    got = fed(model, new, [9], cache)
    expected = logits_of(model, torch.cat([ids[:, :-9], new], 1))
    assert_same(got, expected[:, -9:])


def test_forgotten_tokens_and_padding_do_not_count() -> None:
    model, ids, mask = made(max_length=32, position="learned"), tokens(30), torch.zeros(B, 30)
    cache = model.new_cache(max_crop=10)
    logits_of(model, ids, cache=cache)
    cache.crop(10)
    got = logits_of(model, tokens(12, seed=2), cache=cache)
    expected = logits_of(model, torch.cat([ids[:, :20], tokens(12, seed=2)], 1))
    assert_same(got, expected[:, 20:])

    mask[:, -10:] = 1
    cache = model.new_cache()
    logits_of(model, ids, mask, cache=cache)
    got = logits_of(model, tokens(22, seed=2), cache=cache)
    expected = logits_of(model, torch.cat([ids[:, -10:], tokens(22, seed=2)], 1))
    assert_same(got, expected[:, 10:])

    cache = made(attention=("full",), num_layers=1, position="rotary").new_cache(max_crop=4)
    model = made(attention=("full",), num_layers=1, position="rotary")
    for _ in range(100):
        logits_of(model, tokens(5), cache=cache)
        cache.crop(4)
    assert cache.nbytes < 2 * (4 * 104) * B * 2 * 16 * 8


@pytest.mark.parametrize("alignment", ["ring", "bucket"])
def test_a_row_may_have_no_tokens_yet(alignment: str) -> None:
    model, ids, mask = made(attention=("lsh",), num_layers=1, alignment=alignment), tokens(), torch.ones(B, L)
    mask[1] = 0
    cache, new = model.new_cache(), tokens(5, seed=2)
    logits_of(model, ids, mask, cache=cache)
    got = logits_of(model, new, cache=cache)[1, -1]
    assert_same(got, logits_of(model, new[1:2])[0, -1])


def test_a_prompt_of_another_dtype() -> None:
    """Keys that autocast made stay bfloat16."""
    model, ids = made().float(), tokens()
    cache = model.new_cache()
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, ids, cache=cache)
    assert logits_of(model, tokens(1, seed=2), cache=cache).isfinite().all()


def test_layers_keep_their_scale_and_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LocalSelfAttention(16, 2, chunk_length=8, causal=True, scale=2.0, backend="reference").double()
    x, cache = torch.randn(1, 300, 16).double(), layer.new_cache()
    step = Step(torch.arange(300)[None], torch.ones(1, 300, dtype=torch.bool), 300)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(reference, "chunk_attention", lambda call: pytest.fail("that is the backend"))
        with pytest.raises(pytest.fail.Exception, match="that is the backend"):
            layer.step(x, layer.new_cache(), step)
        monkeypatch.undo()
        assert_same(layer.step(x, cache, step), expected)
        cache = layer.new_cache()
        parts = [layer.step(x[:, i : i + 100], cache, step.slice(i, i + 100)) for i in (0, 100, 200)]
    assert_same(torch.cat(parts, 1), expected)


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[HashCall, Tensor]]:
    """All calls of hash_buckets, and their results."""
    calls: list[tuple[HashCall, Tensor]] = []
    hash_buckets = _ops.hash_buckets

    def recorded(call: HashCall) -> Tensor:
        calls.append((call, hash_buckets(call)))
        return calls[-1][1]

    monkeypatch.setattr(_ops, "hash_buckets", recorded)
    return calls


def test_steps_in_float32_round_alike(hashes: list[tuple[HashCall, Tensor]]) -> None:
    """Rows of projections differ in their last bits, so a bucket may be another one by a near tie, which is named."""
    model, ids = made(num_layers=2, attention=("local", "lsh")).float(), tokens()
    expected = logits_of(model, ids)
    (whole,) = hashes
    hashes.clear()
    got = fed(model, ids, SPLITS["tokens"], model.new_cache())
    buckets = torch.cat([result for _, result in hashes], dim=3)
    assert buckets.shape == whole[1].shape
    flips = (buckets != whole[1]).nonzero().tolist()
    fine = torch.ones(B, L, dtype=torch.bool)
    for b, h, r, i in flips:
        rows = [whole[0].x[b, h, i].double(), hashes[i][0].x[b, h, 0].double()]
        near = [_margin(whole[0], h, r, row) for row in rows]
        bound = roundings(L) * torch.finfo(torch.float32).eps
        assert min(near) < bound, f"row {i} of head {h} of sequence {b} changes its bucket in round {r} at {near}"
        warnings.warn(f"a near tie: row {i}, head {h}, sequence {b}, round {r}, margins {near}", stacklevel=1)
        fine[b, i:] = False
    assert fine.sum() > L  # else nothing is compared
    reference = logits_of(made(num_layers=2, attention=("local", "lsh")), ids).float()
    for x in (got, expected):
        assert_equal_to_rounding(x[fine], reference[fine], roundings=roundings(L))


def _margin(call: HashCall, h: int, r: int, row: Tensor) -> float:
    """By how much, in units of the row's length, the best bucket is ahead of the next."""
    rotations, _ = call.resolve()
    rotated = row @ rotations[0, h, :, r].double()
    best = torch.cat([rotated, -rotated]).topk(2).values
    return float((best[0] - best[1]) / row.norm())


def test_memory_of_an_endless_stream_is_bounded() -> None:
    sizes: dict[str, list[int]] = {}
    for kind in ("local", "lsh", "full"):
        model = made(attention=(kind,), num_layers=1, position="rotary")
        cache = model.new_cache()
        sizes[kind] = []
        for i in range(8):
            logits_of(model, tokens(500, 1, i), cache=cache)
            sizes[kind].append(cache.nbytes)
    # 2 heads, 16 numbers, 8 bytes: 16 keys and values and the slot of no key; 2 rounds x 4 buckets x 8 entries, and
    # a step's 500 rows.
    assert set(sizes["local"]) == {2 * 17 * 2 * 16 * 8}
    assert max(sizes["lsh"]) < 2 * 2 * (64 + 500) * 16 * 8 + 2_000
    assert sizes["full"][-1] >= 4000 * 2 * 2 * 16 * 8
    model = made(attention=("lsh",), num_layers=1, position="rotary")
    whole = model.new_cache()
    logits_of(model, tokens(4000, 1), cache=whole)
    assert whole.nbytes < 2 * 2 * (64 + 64) * 16 * 8 + 2_000


def test_the_ring_moves_but_its_newest_token_is_the_forward() -> None:
    model, ids = made(attention=("lsh",), num_layers=1, alignment="ring", n_buckets=None), tokens()
    cache = model.new_cache()
    for length in range(1, L + 1):
        new = logits_of(model, ids[:, length - 1 : length], cache=cache)
        assert_same(new[:, 0], logits_of(model, ids[:, :length])[:, -1])


def test_a_target_goes_on_with_a_source() -> None:
    torch.manual_seed(0)
    config = ReformerConfig(**BASE)
    model = ReformerSeq2Seq(config, config).double().eval()
    source, target, mask = tokens(30), tokens(seed=2), torch.ones(B, 30)
    mask[0, 12:], mask[1, :7], mask[2] = 0, 0, 0  # the last one has no source at all
    expected = logits_of(model, source, mask, target)
    cache = model.new_cache()
    parts = [logits_of(model, source, mask, target[:, :20], cache=cache)]
    parts += [logits_of(model, None, None, part, cache=cache) for part in target[:, 20:].split([1, 40, 9], 1)]
    assert_same(torch.cat(parts, 1), expected)


def test_layers_with_a_cache_have_no_gradients() -> None:
    model = made()
    model(tokens(), cache=model.new_cache()).logits.sum().backward()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"norm", "head"}
    assert model.reformer.merge.norm.weight.grad is not None
    assert model.reformer.embedding.weight.grad is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"causal": False}, ValueError, "causal must be True for a cache .*, got False"),
        ({"rules": "huggingface"}, NotImplementedError, "a cache does not go with rules"),
        ({"local_chunks_after": 1}, NotImplementedError, "chunks_after must be 0 for a cache .*, got 1"),
        ({"local_chunks_before": 2}, NotImplementedError, "chunks_before must be at most 1 for a cache .*, got 2"),
    ],
)
def test_models_without_a_cache(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Reformer(ReformerConfig(**{**BASE, **options}))
    with pytest.raises(error, match=message):
        model.new_cache()


def test_layers_without_a_cache() -> None:
    for layer in (
        LSHSelfAttention(16, 2), LocalSelfAttention(16, 2), FullAttention(16, 2),
        LSHSelfAttention(16, 2, rules=AttentionRules()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="causal must be True for a cache"):
            layer.new_cache()


def test_what_is_refused() -> None:
    model, ids = made(max_length=32, position="learned"), tokens(20)
    cache = model.new_cache(max_crop=3)
    with pytest.raises(ValueError, match="tokens must be between 0 and 0, got 1"):
        cache.crop(1)
    with pytest.raises(ValueError, match="at most max_length 32 tokens long, got 33 new ones behind 0 "):
        logits_of(model, tokens(33, 2), cache=cache)
    logits_of(model, ids, cache=cache)
    expected, wrong = cache.nbytes, cast("int", 1.0)
    for call, error, message in (
        (lambda: model(ids[:2], cache=cache), ValueError, "the cache is of 3 sequences, got input of 2"),
        (lambda: model(ids, cache=cache), ValueError, "at most max_length 32 tokens long, got 20 new ones behind 20"),
        (lambda: model(ids[:, :1] + V, cache=cache), ValueError, "input_ids must be between 0 and 49"),
        (lambda: model(ids[:, :1], cache={}), TypeError, r"cache must be a Cache of new_cache\(\), got dict"),
        (lambda: model(ids[:, :1], cache=cache, n_hashes=5), ValueError, "n_hashes must be None with a cache"),
        (lambda: model(ids, position_ids=torch.arange(20) + 20), IndexError, "must be between 0 and 31"),
        (lambda: model(ids, position_ids=torch.arange(3)), ValueError, r"position_ids must have shape \[20\]"),
        (
            lambda: model(ids[:, :1], cache=cache, position_ids=torch.arange(1)), ValueError,
            "position_ids must be None with a cache",
        ),
        (lambda: made(num_layers=1)(ids, cache=cache), ValueError, "cache must be of a model with 2 halves .* 6"),
        (lambda: cache.crop(4), ValueError, "tokens must be between 0 and 3, got 4"),
        (lambda: cache.crop(wrong), TypeError, "tokens must be an int, got 1.0"),
        (lambda: cache.reorder(torch.ones(2)), TypeError, "rows must have dtype torch.int64"),
        (lambda: model.new_cache(max_crop=-1), ValueError, "max_crop must be at least 0, got -1"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert cache.nbytes == expected
    logits = fed(model, tokens(12, seed=2), [12], cache)
    whole = logits_of(model, torch.cat([ids, tokens(12, seed=2)], 1))
    assert_same(logits, whole[:, 20:])
