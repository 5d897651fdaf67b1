"""What labels mean to each model, and what they return; the decoder and its source; errors."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from reformer_kernels import (
    Reformer,
    ReformerLM,
    ReformerMaskedLM,
    ReformerQuestionAnswering,
    ReformerSeq2Seq,
    ReformerSequenceClassifier,
)

from .rounding import assert_equal_to_rounding
from .test_models import MODELS, ROUNDINGS, B, C, E, L, S, V, config, gradients, lengths, made, plain, tokens

# ---- language models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cls", [ReformerLM, ReformerMaskedLM])
def test_labels(cls: Any, tied: bool) -> None:
    model = made(cls, streams="mean" if tied else "concat", tie_embeddings=tied, head_chunk_length=10)
    ids, labels = tokens(B, L), tokens(B, L)
    labels[0, 3:9] = -100
    logits = model(ids).logits
    trunk = model.reformer(ids).last_hidden_state
    assert_equal_to_rounding(logits, trunk @ model.head.weight.T + model.head.bias, 4 * E)
    assert (model.head.weight is model.reformer.embedding.weight) == tied
    first, target = (logits[:, :-1], labels[:, 1:]) if cls is ReformerLM else (logits, labels)
    expected = F.cross_entropy(first.flatten(0, 1), target.flatten())
    out = model(ids, labels=labels)
    assert out.logits is None and out.loss.shape == ()
    assert_equal_to_rounding(out.loss, expected, B * L + V + 4 * E)
    both = model(ids, labels=labels, return_logits=True)
    assert torch.equal(both.loss, out.loss) and torch.equal(both.logits, logits)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    assert (model(ids[:, :1], labels=ids[:, :1]).loss == 0) == (cls is ReformerLM)


@pytest.mark.parametrize("name", ["lm", "masked", "seq2seq"])
def test_chunks_of_the_head_change_nothing(name: str) -> None:
    model, ids = MODELS[name](streams="mean", tie_embeddings=True).train(), tokens(B, L)
    expected = gradients(model, lambda: model(ids, labels=ids).loss)
    for length in (None, 1, 7):
        other = MODELS[name](streams="mean", tie_embeddings=True, head_chunk_length=length).train()
        other.load_state_dict(model.state_dict())
        # The sums of a weight's gradient are over all tokens.
        assert_equal_to_rounding(gradients(other, lambda: other(ids, labels=ids).loss), expected, ROUNDINGS + B * L)  # noqa: B023


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("name", ["lm", "masked", "seq2seq"])
def test_all_logits_at_once_are_never_there(name: str) -> None:
    ids, found = tokens(B, S), {}
    for length in (4, None):
        model = MODELS[name](vocab_size=2000, head_chunk_length=length, hidden_dropout=0.1).train()
        with Largest() as largest:  # type: ignore[no-untyped-call]
            model(ids, labels=ids).loss.backward()
        found[length] = largest.numel
    assert found[None] == max(B * S * 2000, 2000 * 2 * E) and found[4] == max(4 * 2000, 2000 * 2 * E)


# ---- classifiers and answers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_pooling(pooling: str, masked: bool) -> None:
    model, ids = made(ReformerSequenceClassifier, pooling=pooling, num_labels=3), tokens(4, L)
    mask = None
    if masked:
        mask = lengths(L, 20, 9, 0)
        mask[1, :4] = 0  # padded on the left, too
    hidden = model.reformer(ids, mask).last_hidden_state
    pooled = []
    for row in range(4):
        there = list(range(L)) if mask is None else mask[row].nonzero().flatten().tolist()
        used = {"first": [min(there, default=0)], "last": [max(there, default=0)], "mean": there}[pooling]
        pooled.append(sum((hidden[row, position] for position in used), torch.zeros(2 * E)) / max(1, len(used)))
    dense = torch.tanh(torch.stack(pooled) @ model.dense.weight.T + model.dense.bias)
    out = model(ids, mask)
    assert out.loss is None and out.logits.shape == (4, 3)
    assert_equal_to_rounding(out.logits, dense @ model.output.weight.T + model.output.bias, L + 4 * E)


@pytest.mark.parametrize(("num_labels", "labels", "expected"), [
    (3, torch.tensor([2, 0]), F.cross_entropy),
    (3, torch.tensor([2, -100]), F.cross_entropy),
    (3, torch.tensor([[1.0, 0.0, 0.25], [0.0, 0.0, 1.0]]), F.binary_cross_entropy_with_logits),
    (1, torch.tensor([0.5, -2.0]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
    (1, torch.tensor([[0.5], [-2.0]]), F.mse_loss),
    (1, torch.tensor([[0.5], [-2.0]]).double(), F.mse_loss),
])  # fmt: skip
def test_losses_of_classes_and_numbers(num_labels: int, labels: Tensor, expected: Any) -> None:
    model, ids = made(ReformerSequenceClassifier, num_labels=num_labels), tokens(B, L)
    out = model(ids, labels=labels)
    targets = labels.double() if labels.is_floating_point() else labels
    assert torch.equal(out.logits, model(ids).logits)
    assert_equal_to_rounding(out.loss, expected(out.logits, targets), 20)
    if not labels.is_floating_point():
        assert model(ids, labels=torch.full((B,), -100)).loss == 0


def test_answers() -> None:
    model, ids, mask = made(ReformerQuestionAnswering), tokens(3, L), lengths(L, 20, 9)
    mask[0, :4] = 0
    start, end = torch.tensor([5, 19, -100]), torch.tensor([5, 3, 0])
    out = model(ids, mask, start, end)
    logits = model.output(model.reformer(ids, mask).last_hidden_state)
    for got, expected in ((out.start_logits, logits[..., 0]), (out.end_logits, logits[..., 1])):
        assert got.shape == (3, L) and torch.equal(got[mask == 1], expected[mask == 1])
        assert (got[mask == 0] == torch.finfo(torch.float64).min).all()
        assert mask.gather(1, got.argmax(1, keepdim=True)).all()
    # Of the attended positions only: the softmax of the rest is 0.
    ends = logits.masked_fill(mask[..., None] == 0, -math.inf).log_softmax(1)
    expected = -(ends[0, 5, 0] + ends[1, 19, 0]) / 4 - (ends[0, 5, 1] + ends[1, 3, 1] + ends[2, 0, 1]) / 6
    assert_equal_to_rounding(out.loss, expected, L)
    assert model(ids).loss is None
    nothing = torch.full((3,), -100)
    assert model(ids, mask, nothing, nothing).loss == 0


# ---- sequence to sequence


def encoder_decoder(**changes: Any) -> Any:
    """Of two widths and vocabularies; padding is not seen, nor are later tokens."""
    encoder = config(embed_dim=24, vocab_size=50, causal=True, attention=("full",), norm="rms", context_dim=3)
    return made(ReformerSeq2Seq, encoder, config(causal=False, attention=("local", "full"), **changes))


def test_decoder_sees_the_source_and_the_past() -> None:
    model, source, target = encoder_decoder(), torch.randint(50, (B, L)), tokens(B, S)
    assert not model.encoder_config.causal and model.encoder_config.context_dim is None
    assert model.decoder_config.causal and model.decoder_config.context_dim == 48
    sources, targets = lengths(20, L), lengths(S, 6, longest=S)
    out = model(source, sources, target, targets)
    assert out.logits.shape == (B, S, V) and out.encoder_last_hidden_state.shape == (B, L, 48)
    plainly = plain(model.decoder, target, targets, model.encoder(source, sources).last_hidden_state, sources)
    assert_equal_to_rounding(out.logits, model.head(plainly), ROUNDINGS)
    for row, (n, m) in enumerate(((20, S), (L, 6))):
        alone = model(source[row : row + 1, :n], decoder_input_ids=target[row : row + 1, :m])
        assert_equal_to_rounding(out.logits[row, :m], alone.logits[0], ROUNDINGS)
        other_source, other = source.clone(), target.clone()
        other_source[row, n:], other[row, m:] = 1, 2
        assert torch.equal(model(other_source, sources, other, targets).logits[row, :m], out.logits[row, :m])
    for position in (0, 4, S - 1):
        other = target.clone()
        other[:, position] = (target[:, position] + 1) % V
        later = model(source, decoder_input_ids=other).logits
        before = model(source, decoder_input_ids=target).logits
        assert torch.equal(later[:, :position], before[:, :position]) and not torch.equal(later, before)
    source[:, -1] = (source[:, -1] + 1) % 50
    assert (model(source, decoder_input_ids=target).logits != before).any(-1).all()


def test_labels_are_shifted_right() -> None:
    model, source, labels = encoder_decoder(), torch.randint(50, (B, L)), tokens(B, S)
    labels[0, 2:5], labels[1, 7:] = -100, -100
    shifted = [[9, *(7 if x == -100 else x for x in row[:-1])] for row in labels.tolist()]
    out = model(source, labels=labels, return_logits=True)
    given = model(source, decoder_input_ids=torch.tensor(shifted), labels=labels)
    assert torch.equal(out.loss, given.loss) and given.logits is None
    assert torch.equal(out.logits, model(source, decoder_input_ids=torch.tensor(shifted)).logits)
    assert_equal_to_rounding(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()), B * S + V)
    mask = lengths(20, 30)
    once = model(source, mask, labels=labels)
    again = model(None, mask, labels=labels, encoder_last_hidden_state=once.encoder_last_hidden_state)
    assert torch.equal(again.loss, once.loss) and once.loss != out.loss
    assert torch.equal(again.encoder_last_hidden_state, once.encoder_last_hidden_state)
    alike = made(ReformerSeq2Seq, streams="mean")
    assert (alike.encoder_config.context_dim, alike.decoder_config.context_dim) == (None, E)
    assert alike.encoder_config.streams == "mean"


# ---- errors

IDS, FLOATS, MASK = torch.zeros(B, L, dtype=torch.int64), torch.zeros(B, L, E, dtype=torch.float64), torch.ones(B, S)
CLASS, POSITIONS = torch.tensor([0, 1]), torch.tensor([3, 5])
GIVEN_TWICE = "input_ids or inputs_embeds must be given, and not both"
WRONG_INPUT: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("lm", {}, ValueError, GIVEN_TWICE),
    ("answers", {"input_ids": IDS, "inputs_embeds": FLOATS}, ValueError, GIVEN_TWICE),
    ("lm", {"input_ids": [[1]]}, TypeError, "input_ids must be a torch.Tensor, got list"),
    ("lm", {"input_ids": IDS.float()}, TypeError,
     "input_ids must have dtype torch.int64 or torch.int32, got torch.float32"),
    ("lm", {"input_ids": IDS[0]}, ValueError, f"input_ids must have shape [B, L] with L at least 1, got [{L}]"),
    ("lm", {"input_ids": IDS[:, :0]}, ValueError,
     f"input_ids must have shape [B, L] with L at least 1, got [{B}, 0]"),
    ("lm", {"input_ids": IDS + V}, ValueError, f"input_ids must be between 0 and {V - 1}, got {V}"),
    ("lm", {"input_ids": IDS - 3}, ValueError, f"input_ids must be between 0 and {V - 1}, got -3"),
    ("lm", {"input_ids": IDS.repeat(1, 2)}, ValueError,
     f"the sequence must be at most max_length 64 tokens long, got {2 * L}"),
    ("lm", {"inputs_embeds": torch.zeros(B, 65, E)}, ValueError,
     "the sequence must be at most max_length 64 tokens long, got 65"),
    ("lm", {"inputs_embeds": "x"}, ValueError, f"inputs_embeds must have shape [B, L, {E}], got str"),
    ("lm", {"inputs_embeds": FLOATS[..., 1:]}, ValueError,
     f"inputs_embeds must have shape [B, L, {E}], got [{B}, {L}, {E - 1}]"),
    ("lm", {"input_ids": IDS, "attention_mask": [1]}, TypeError, "attention_mask must be a torch.Tensor, got list"),
    ("lm", {"input_ids": IDS, "attention_mask": MASK}, ValueError,
     f"attention_mask must have shape [{B}, {L}], got [{B}, {S}]"),
    ("lm", {"input_ids": IDS, "attention_mask": IDS.to("meta")}, ValueError,
     "attention_mask must be on the device of the tokens, cpu, got meta"),
    ("lm", {"input_ids": IDS, "n_hashes": 0}, ValueError, "n_hashes must be at least 1, got 0"),
    ("lm", {"input_ids": IDS, "n_hashes": 2.0}, TypeError, "n_hashes must be an int, got 2.0"),
    ("lm", {"input_ids": IDS, "labels": [1]}, TypeError, "labels must be a torch.Tensor, got list"),
    ("lm", {"input_ids": IDS, "labels": IDS.int()}, TypeError,
     "labels must have dtype torch.int64, got torch.int32"),
    ("lm", {"input_ids": IDS, "labels": IDS[0]}, ValueError,
     f"labels must have 2 dimensions [B, L], got shape ({L},)"),
    ("masked", {"input_ids": IDS, "labels": IDS[:, 1:]}, ValueError,
     f"labels must have shape [{B}, {L}], got [{B}, {L - 1}]"),
    ("lm", {"input_ids": IDS[:, :1], "labels": IDS[:, :0]}, ValueError,
     f"labels must have shape [{B}, 1], got [{B}, 0]"),
    ("masked", {"input_ids": IDS, "labels": IDS + V}, IndexError, f"Target {V} is out of bounds."),
    ("trunk", {"input_ids": IDS, "context": FLOATS}, ValueError,
     "context must be None, as the configuration has no context_dim, got a tensor"),
    ("decoder", {"input_ids": IDS}, TypeError, f"context must be a tensor [B, S, {C}], got NoneType"),
    ("decoder", {"input_ids": IDS, "context": FLOATS}, ValueError,
     f"context must have shape [{B}, S, {C}], got [{B}, {L}, {E}]"),
    ("decoder", {"input_ids": IDS, "context": FLOATS[:1, :, :C]}, ValueError,
     f"context must have shape [{B}, S, {C}], got [1, {L}, {C}]"),
    ("decoder", {"input_ids": IDS, "context": FLOATS[..., :C], "context_mask": MASK}, ValueError,
     f"context_mask must have shape [{B}, {L}], got [{B}, {S}]"),
    ("classifier", {"input_ids": IDS, "labels": [0, 1]}, TypeError, "labels must be an int64 tensor, got list"),
    ("classifier", {"input_ids": IDS, "labels": CLASS.int()}, TypeError,
     "labels must be an int64 tensor, got torch.int32"),
    ("classifier", {"input_ids": IDS, "labels": IDS}, ValueError, f"labels must have shape [{B}], got [{B}, {L}]"),
    ("classifier", {"input_ids": IDS, "labels": CLASS.float()}, ValueError,
     f"floating labels must have shape [{B}, 2], got [{B}]"),
    ("numbers", {"input_ids": IDS, "labels": MASK}, ValueError,
     f"floating labels must have shape [{B}] or [{B}, 1], got [{B}, {S}]"),
    ("answers", {"input_ids": IDS, "end_positions": POSITIONS}, ValueError,
     "start_positions and end_positions must be given together, got end_positions alone"),
    ("answers", {"input_ids": IDS, "start_positions": POSITIONS, "end_positions": POSITIONS[:1]}, ValueError,
     f"end_positions must have shape [{B}], got [1]"),
    ("answers", {"input_ids": IDS, "start_positions": POSITIONS.int(), "end_positions": POSITIONS}, TypeError,
     "start_positions must be an int64 tensor, got torch.int32"),
    ("seq2seq", {"labels": IDS}, ValueError, "input_ids or encoder_last_hidden_state must be given, and not both"),
    ("seq2seq", {"input_ids": IDS, "labels": IDS, "encoder_last_hidden_state": FLOATS}, ValueError,
     "input_ids or encoder_last_hidden_state must be given, and not both"),
    ("seq2seq", {"input_ids": IDS}, ValueError, "decoder_input_ids or labels must be given, got neither"),
    ("seq2seq", {"input_ids": IDS, "labels": IDS.int()}, TypeError,
     "labels must have dtype torch.int64, got torch.int32"),
    ("seq2seq", {"input_ids": IDS, "decoder_input_ids": IDS, "labels": IDS[:, 1:]}, ValueError,
     f"labels must have shape [{B}, {L}], got [{B}, {L - 1}]"),
]  # fmt: skip
# Patterns: the arguments of the call are named, not what they are inside.
NAMED: list[tuple[str, dict[str, Any], str]] = [
    ("lm", {"inputs_embeds": torch.ones(B, L, E).long()}, "inputs_embeds must have dtype .*, got torch.int64"),
    ("seq2seq", {"input_ids": IDS, "decoder_input_ids": IDS + V}, f"decoder_input_ids must be .*, got {V}"),
    ("seq2seq", {"input_ids": IDS, "labels": IDS + V}, f"(labels|decoder_input_ids) must be between .*, got {V}"),
    ("seq2seq", {"input_ids": IDS, "labels": IDS, "decoder_attention_mask": MASK}, "decoder_attention_mask must have"),
    ("seq2seq", {"input_ids": IDS, "labels": IDS[:1]}, "(labels|decoder_input_ids|input_ids) must have"),
    ("seq2seq", {"encoder_last_hidden_state": FLOATS, "labels": IDS}, "encoder_last_hidden_state must have"),
    ("seq2seq", {"encoder_last_hidden_state": FLOATS.repeat(1, 1, 2), "labels": IDS, "attention_mask": MASK},
     "attention_mask must have"),
    ("trunk", {"input_ids": IDS, "context_mask": MASK}, "context_mask must be None"),
]  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "trunk": lambda: made(Reformer),
    "decoder": lambda: made(Reformer, context_dim=C),
    "numbers": lambda: made(ReformerSequenceClassifier, num_labels=1),
}


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_INPUT)
def test_wrong_input(name: str, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        {**MODELS, **OTHERS}[name]()(**arguments)


@pytest.mark.parametrize(("name", "arguments", "message"), NAMED)
def test_errors_name_arguments_of_the_call(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        {**MODELS, **OTHERS}[name]()(**arguments)


def test_wrong_configurations() -> None:
    for cls in (Reformer, ReformerLM, ReformerMaskedLM, ReformerSequenceClassifier, ReformerQuestionAnswering):
        with pytest.raises(TypeError, match=r"^config must be a ReformerConfig, got dict$"):
            cls({})  # type: ignore[arg-type]
    for name, configs in (("encoder", ({}, config())), ("decoder", (config(), {}))):
        with pytest.raises(TypeError, match=f"^{name}_config must be a ReformerConfig, got dict$"):
            ReformerSeq2Seq(*configs)
