"""Position embeddings against formulas written out in Python, and against the published ones."""

import cmath
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from axial_positional_embedding import AxialPositionalEmbedding
from torch import Tensor, nn
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import AxialPositionEmbeddings

from reformer_kernels.modules.position import (
    AxialPositionEmbedding,
    LearnedPositionEmbedding,
    RotaryPositionEmbedding,
    SinusoidalPositionEmbedding,
)

from .rounding import assert_equal_to_rounding

FAR = torch.tensor([0, 1, 17, 4095, 65_537, 1_000_000])
EMBEDDINGS: dict[str, Callable[..., Any]] = {
    "concatenated": lambda **o: AxialPositionEmbedding(10, (3, 5), (4, 6), **o),
    "summed": lambda **o: AxialPositionEmbedding(6, (5, 3), **o),
    "one axis": lambda **o: AxialPositionEmbedding(6, (15,), (6,), **o),
    "three axes": lambda **o: AxialPositionEmbedding(9, [2, 3, 4], [2, 3, 4], **o),
    "three summed": lambda **o: AxialPositionEmbedding(4, (2, 3, 4), **o),
    "learned": lambda **o: LearnedPositionEmbedding(6, 15, **o),
}
AXIAL = [name for name in EMBEDDINGS if name != "learned"]
# An angle below 2 pi rounds by up to pi units, and its sine by one; a rounding counts as two.
SINE_ROUNDINGS = 3
# Both numbers of a pair turn by such an angle, which is off by pi * sqrt(2) units, and three roundings follow.
TURN_ROUNDINGS = 4


def axial_rows(embedding: AxialPositionEmbedding) -> Tensor:
    """All rows [max_length, E], one after the other as a counter with the last axis fastest."""
    rows = []
    for indices in itertools.product(*map(range, embedding.axial_shape)):
        vectors = [table[i] for table, i in zip(embedding.weights, indices, strict=True)]
        rows.append(sum(vectors) if embedding.axial_dims is None else torch.cat(vectors))
    return torch.stack(rows)


def angle(position: int, pair: int, width: int, base: float = 10000.0) -> float:
    return position / math.pow(base, 2 * pair / width)


def turned(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of x [B, H, L, D] by complex numbers in float64; positions [B, L]."""
    half = x.shape[-1] // 2
    turns = [
        [[cmath.rect(1, angle(p, i, 2 * half, base)) for i in range(half)] for p in row] for row in positions.tolist()
    ]
    pairs = (
        torch.complex(x[..., :half].double(), x[..., half:].double())
        * torch.tensor(turns, dtype=torch.complex128)[:, None]
    )
    return torch.cat([pairs.real, pairs.imag], -1)


# ---- axial and learned tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", AXIAL)
def test_axial_counts_with_the_last_axis_fastest(name: str, dtype: torch.dtype) -> None:
    embedding = EMBEDDINGS[name](dtype=dtype)
    expected = axial_rows(embedding)
    assert embedding.max_length == len(expected) == math.prod(embedding.axial_shape)
    assert embedding(torch.arange(embedding.max_length)).dtype == dtype
    for length in (0, 1, 7, embedding.max_length):
        assert torch.equal(embedding(torch.arange(length)), expected[:length])
    anywhere = torch.randint(embedding.max_length, (2, 3, 5))
    assert torch.equal(embedding(anywhere), expected[anywhere])
    assert torch.equal(embedding(anywhere.int()), expected[anywhere])
    assert torch.equal(embedding(torch.tensor(4)), expected[4])


@pytest.mark.parametrize("training", [False, True])
def test_equals_hugging_face(training: bool) -> None:
    config = ReformerConfig(
        axial_pos_shape=(4, 32), axial_pos_embds_dim=(6, 10), hidden_size=16, hidden_dropout_prob=0.0,
        lsh_attn_chunk_length=8, local_attn_chunk_length=8,
    )  # fmt: skip
    published = AxialPositionEmbeddings(config).train(training)
    ours = AxialPositionEmbedding(16, (4, 32), (6, 10)).train(training)
    for theirs, table in zip(published.weights, ours.weights, strict=True):
        theirs.data = torch.randn(theirs.shape)
        table.data = theirs.detach().flatten(0, 1).clone()
    for length in (128,) if training else (128, 96, 8, 5):  # theirs takes the full length only, in training
        positions = torch.arange(length).expand(2, -1)
        assert torch.equal(ours(positions), published(positions))
    positions = torch.arange(128).flip(0)[None, :128]
    if not training:
        positions = positions[:, 40:]
        assert torch.equal(ours(positions), published(positions))


@pytest.mark.parametrize("widths", [None, (4, 3, 5)])
def test_equals_lucidrains(widths: tuple[int, ...] | None) -> None:
    published = AxialPositionalEmbedding(12, (3, 4, 5), widths)
    ours = AxialPositionEmbedding(12, (3, 4, 5), widths)
    for theirs, table in zip(published.weights, ours.weights, strict=True):
        table.data = theirs.detach().reshape(table.shape).clone()
    for length in (60, 37, 1):
        assert torch.equal(ours(torch.arange(length)), published(torch.empty(1, length, 12).fill_(0))[0])


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_gradients_of_the_tables(name: str) -> None:
    embedding = EMBEDDINGS[name](dtype=torch.float64)
    positions = torch.cat([torch.arange(embedding.max_length), torch.randint(embedding.max_length, (20,))]).view(1, -1)
    weight = torch.randn(*positions.shape, embedding.embed_dim, dtype=torch.float64)
    tables = list(embedding.parameters())
    rows = embedding.weight if name == "learned" else axial_rows(embedding)
    grads = torch.autograd.grad((embedding(positions) * weight).sum(), tables)
    expected = torch.autograd.grad((rows[positions] * weight).sum(), tables)
    assert all(grad.abs().sum(-1).min() > 0 for grad in grads)
    assert_equal_to_rounding(grads, expected, 2 * positions.numel())  # either side adds the positions in an order


def test_learned() -> None:
    embedding = LearnedPositionEmbedding(6, 15)
    positions = torch.randint(15, (2, 3, 5))
    for given in (positions, positions.int()):
        assert torch.equal(embedding(given), embedding.weight[positions])
    assert embedding.max_length == 15


def test_names_in_the_state_dict_and_in_repr() -> None:
    assert {name: list(table.shape) for name, table in EMBEDDINGS["concatenated"]().state_dict().items()} == {
        "weights.0": [3, 4], "weights.1": [5, 6],
    }  # fmt: skip
    assert list(EMBEDDINGS["summed"]().state_dict()["weights.1"].shape) == [3, 6]
    assert list(LearnedPositionEmbedding(6, 15).state_dict()) == ["weight"]
    for module in (SinusoidalPositionEmbedding(6), RotaryPositionEmbedding(6)):
        assert not list(module.parameters()) and not list(module.buffers()) and not module.state_dict()
    assert "10, axial_shape=(3, 5), axial_dims=(4, 6)" in repr(EMBEDDINGS["concatenated"]())
    assert "6, max_length=15" in repr(LearnedPositionEmbedding(6, 15))
    assert "8, base=500.0" in repr(RotaryPositionEmbedding(8, 500.0))
    assert SinusoidalPositionEmbedding(6).max_length is None


@pytest.mark.parametrize("make", [
    lambda **o: AxialPositionEmbedding(64, (64, 64), **o), lambda **o: LearnedPositionEmbedding(64, 64, **o),
])  # fmt: skip
def test_initialisation(make: Callable[..., Any]) -> None:
    built = [(make(), 0.02), (make(init_std=0.5), 0.5), (make(device="meta").to_empty(device="cpu"), 0.02)]
    built[2][0].reset_parameters()
    for embedding, std in built:
        for table in (parameter.detach() for parameter in embedding.parameters()):
            # The estimate from n numbers has a standard error of std / sqrt(2 n), the mean's is std / sqrt(n).
            assert abs(float(table.std()) / std - 1) < 6 / math.sqrt(2 * table.numel())
            assert abs(float(table.mean())) < 6 * std / math.sqrt(table.numel())


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("side", [-1, 1])
def test_positions_out_of_range(name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = EMBEDDINGS[name]()
    last = embedding.max_length - 1
    positions = torch.tensor([[0, 3, -1 if side < 0 else last + 1]])
    span = "-1 to 3" if side < 0 else f"0 to {last + 1}"
    with pytest.raises(IndexError, match=re.escape(f"positions must be between 0 and {last}, got {span}")):
        embedding(positions)
    assert embedding(torch.tensor([last])).shape == (1, embedding.embed_dim)
    # Where values are not read, the lookup itself refuses: no coordinate wraps.
    monkeypatch.setattr("reformer_kernels.modules.position._check_range", lambda *_: None)
    with pytest.raises(IndexError, match="index out of range"):
        embedding(positions)


@pytest.mark.parametrize("make", [EMBEDDINGS["summed"], EMBEDDINGS["learned"]])
def test_positions_are_not_read_off_the_cpu(make: Callable[..., nn.Module]) -> None:
    """A tensor without values stands for one whose values cost a synchronisation."""
    out = make(device="meta")(torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    assert out.shape == (2, 3, 6) and out.is_meta


# ---- sinusoidal


@pytest.mark.parametrize("width", [1, 2, 7, 12])
def test_sinusoidal_by_the_formula(width: int) -> None:
    expected = torch.tensor([
        [math.sin(angle(p, c // 2, width)) if c % 2 == 0 else math.cos(angle(p, c // 2, width)) for c in range(width)]
        for p in FAR.tolist()
    ])  # fmt: skip
    embedding = SinusoidalPositionEmbedding(width)
    for positions in (FAR, FAR.int()):
        out = embedding(positions.view(2, 3))
        assert out.shape == (2, 3, width) and out.dtype == torch.float32
        assert_equal_to_rounding(out.flatten(0, 1), expected, SINE_ROUNDINGS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(FAR), embedding(FAR)) and embedding(FAR).dtype == torch.float32
        assert_equal_to_rounding(embedding(FAR), expected, SINE_ROUNDINGS)


# ---- rotary


@pytest.mark.parametrize(
    ("dtype", "roundings"), [(torch.float32, TURN_ROUNDINGS), (torch.bfloat16, 1), (torch.float16, 1)]
)
@pytest.mark.parametrize("base", [10000.0, 7])
def test_rotary_by_complex_numbers(dtype: torch.dtype, roundings: int, base: float) -> None:
    """To one rounding of a half dtype: the turn itself is made in float32."""
    x = torch.randn(2, 3, 6, 8).to(dtype)
    rotary = RotaryPositionEmbedding(8, base)
    positions = torch.stack([FAR, FAR.flip(0)])
    for given, both in ((FAR, FAR.expand(2, -1)), (positions, positions), (positions.int(), positions)):
        out = rotary(x, given)
        assert_equal_to_rounding(out, turned(x, both, base).to(dtype), roundings)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(rotary(x, given), out)


def test_rotary_in_float64() -> None:
    x = torch.randn(2, 1, 6, 4, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 5, 8], [13, 21, 34, 55, 89, 100]])
    out = RotaryPositionEmbedding(4)(x, positions)
    # Both sides know an angle of up to 100 to a few units of 100: the frequency, its product and the formula's own.
    assert_equal_to_rounding(out, turned(x, positions), TURN_ROUNDINGS + 4 * 100)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: RotaryPositionEmbedding(4)(y, positions), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_position_0_is_the_identity(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(dtype)
    assert torch.equal(RotaryPositionEmbedding(8)(x, torch.zeros(5, dtype=torch.int64)), x)
    assert not torch.equal(RotaryPositionEmbedding(8)(x, torch.ones(5, dtype=torch.int64)), x)


def test_rotated_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 2, 9, 16).unbind()
    rotary, near = RotaryPositionEmbedding(16), torch.arange(9)
    scores = [rotary(q, near + shift) @ rotary(k, near + shift).mT for shift in (0, 3, 1_000_000, -70)]
    unit = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / float(scores[0].abs().max())
    for shifted in scores[1:]:
        # Each row is off by as many units of its length, and 16 products are added.
        assert_equal_to_rounding(shifted, scores[0], math.ceil((2 * TURN_ROUNDINGS + 16) * unit))
    assert not torch.allclose(rotary(q, near + 1) @ rotary(k, near).mT, scores[0])


# ---- errors


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: AxialPositionEmbedding(0, (2, 2)), ValueError, "embed_dim must be at least 1, got 0"),
        (lambda: AxialPositionEmbedding(8, ()), TypeError, "axial_shape must be a sequence of positive ints, got ()"),
        (
            lambda: AxialPositionEmbedding(8, 64),  # type: ignore[arg-type]
            TypeError,
            "axial_shape must be a sequence of positive ints, got 64",
        ),
        (lambda: AxialPositionEmbedding(8, (4, 0)), ValueError, "axial_shape must be at least 1, got 0"),
        (
            lambda: AxialPositionEmbedding(8, (4, 4.0)),  # type: ignore[arg-type]
            TypeError,
            "axial_shape must be an int, got 4.0",
        ),
        (
            lambda: AxialPositionEmbedding(8, (4, 4), (4, 3)),
            ValueError,
            "axial_dims must sum to embed_dim, 8, got (4, 3)",
        ),
        (
            lambda: AxialPositionEmbedding(8, (4, 4), (8,)),
            ValueError,
            "axial_dims must have one width for each of the 2 axes, got (8,)",
        ),
        (
            lambda: AxialPositionEmbedding(8, (4,), init_std=-1.0),
            ValueError,
            "init_std must be at least 0 and finite, got -1.0",
        ),
        (
            lambda: LearnedPositionEmbedding(8, 4, init_std="x"),  # type: ignore[arg-type]
            TypeError,
            "init_std must be a float, got 'x'",
        ),
        (lambda: LearnedPositionEmbedding(8, 0), ValueError, "max_length must be at least 1, got 0"),
        (
            lambda: SinusoidalPositionEmbedding(1.0),  # type: ignore[arg-type]
            TypeError,
            "embed_dim must be an int, got 1.0",
        ),
        (
            lambda: RotaryPositionEmbedding(7),
            ValueError,
            "head_dim must be even (channels are rotated in pairs), got 7",
        ),
        (lambda: RotaryPositionEmbedding(8, 0.0), ValueError, "base must be positive and finite, got 0.0"),
        (
            lambda: RotaryPositionEmbedding(8, "x"),  # type: ignore[arg-type]
            TypeError,
            "base must be a float, got 'x'",
        ),
    ],
)
def test_constructors_check(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        make()


@pytest.mark.parametrize("make", [*EMBEDDINGS.values(), lambda: SinusoidalPositionEmbedding(6)])
def test_positions_are_checked(make: Callable[[], nn.Module]) -> None:
    for bad, message in (
        ([0, 1], "positions must be a torch.Tensor, got list"),
        (torch.zeros(3), "positions must have dtype torch.int64 or torch.int32, got torch.float32"),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            make()(bad)


def test_rotary_arguments_are_checked() -> None:
    rotary, x, near = RotaryPositionEmbedding(8), torch.randn(2, 3, 5, 8), torch.arange(5)
    for bad, positions, kind, message in (
        (x[0], near, ValueError, "x must have 4 dimensions [B, H, L, D], got shape (3, 5, 8)"),
        (x[..., :6], near, ValueError, "x must have shape [2, 3, 5, 8], got [2, 3, 5, 6]"),
        (x, near[:4], ValueError, "positions must have shape [5] or [2, 5], got [4]"),
        (x, near.expand(3, -1), ValueError, "positions must have shape [5] or [2, 5], got [3, 5]"),
        (x, near.to("meta"), ValueError, "positions must be on the device of x, cpu, got meta"),
        (x, near.float(), TypeError, "positions must have dtype torch.int64 or torch.int32, got torch.float32"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            rotary(bad, positions)


# ---- torch.compile


def test_compiles_whole() -> None:
    modules = {name: EMBEDDINGS[name]() for name in ("concatenated", "summed", "learned")}
    modules["sinusoidal"] = SinusoidalPositionEmbedding(6)
    tables = nn.ModuleDict(modules)
    rotary, x = RotaryPositionEmbedding(8), torch.randn(2, 3, 14, 8)

    def all_of_them(positions: Tensor) -> tuple[Tensor, ...]:
        return (*(tables[name](positions) for name in modules), rotary(x, positions))

    compiled = torch.compile(all_of_them, fullgraph=True)
    positions = torch.arange(14)
    assert_equal_to_rounding(compiled(positions), all_of_them(positions), 2 * TURN_ROUNDINGS)


@pytest.mark.parametrize("name", ["concatenated", "learned"])
def test_compiled_lookups_do_not_wrap(name: str) -> None:
    embedding = EMBEDDINGS[name]()
    compiled: Callable[[Tensor], Tensor] = torch.compile(embedding, fullgraph=True)
    for bad in (-1, embedding.max_length):
        with pytest.raises(RuntimeError, match="index out of bounds"):
            compiled(torch.tensor([0, bad]))
