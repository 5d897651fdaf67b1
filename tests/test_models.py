"""The trunk of the models written out; padding, order, gradients, seeds and dtypes of all of them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, vmap

import reformer_kernels as rk
from reformer_kernels import (
    Reformer,
    ReformerConfig,
    ReformerLM,
    ReformerMaskedLM,
    ReformerQuestionAnswering,
    ReformerSeq2Seq,
    ReformerSequenceClassifier,
)

from .rounding import assert_equal_to_rounding

V, E, H, B, L, S, C = 40, 16, 2, 2, 37, 11, 5
BASE: dict[str, Any] = {
    "vocab_size": V, "embed_dim": E, "num_layers": 3, "num_heads": H, "attention": ("lsh", "local", "full"),
    "n_hashes": 2, "hash_seed": 3, "lsh_chunk_length": 8, "local_chunk_length": 8, "max_length": 64,
    "initializer_range": 0.2, "pad_token_id": 7, "decoder_start_token_id": 9,
}  # fmt: skip
TRUNKS: dict[str, dict[str, Any]] = {
    "all kinds": {"axial_shape": (4, 16), "axial_dims": (6, 10), "feed_forward_chunk_length": 10},
    "lsh": {
        "attention": ("lsh",), "n_buckets": (4, 2), "lsh_chunks_before": 2, "lsh_chunks_after": 1, "n_hashes": 3,
        "rules": "paper", "attention_bias": True, "position": "learned",
    },
    "lsh, causal": {
        "attention": ("lsh",), "causal": True, "alignment": "bucket", "n_buckets": 4, "memory_keys": 3,
        "position": "rotary", "lsh_chunk_length": 5,
    },
    "local": {
        "attention": ("local",), "local_chunk_length": 4, "local_chunks_before": 2, "local_chunks_after": 1,
        "norm": "rms", "norm_eps": 0.5, "head_dim": 6, "position": "rotary",
    },
    "local, causal": {"attention": ("local",), "causal": True, "position": "sinusoidal", "glu": True},
    "full": {"attention": ("full",), "memory_keys": 2, "position": "none", "glu": True, "activation": "silu"},
    "full, causal": {"attention": ("full",), "causal": True, "position": "rotary", "feed_forward_dim": 21},
    "tied": {"attention": ("local", "lsh"), "tie_layers": True, "num_layers": 5},
    "mean": {"streams": "mean", "norm": "rms", "num_layers": 2},
    "context": {"context_dim": C},  # 9 halves: an odd number
    "tied context": {"context_dim": C, "attention": ("full",), "tie_layers": True, "streams": "mean"},
}  # fmt: skip
# The longest way: every half has a norm and a projection (E each), scores, weights and a hidden layer.
ROUNDINGS = 10 * (2 * E + 2 * H * E + (L + 3) + 4 * E)
MODELS: dict[str, Callable[..., Any]] = {
    "lm": lambda **o: made(ReformerLM, **o),
    "masked": lambda **o: made(ReformerMaskedLM, **o),
    "classifier": lambda **o: made(ReformerSequenceClassifier, **o),
    "answers": lambda **o: made(ReformerQuestionAnswering, **o),
    "seq2seq": lambda **o: made(ReformerSeq2Seq, **o),
}


def config(**changes: Any) -> ReformerConfig:
    return ReformerConfig(**{**BASE, **changes})


def made(cls: Any, *configs: ReformerConfig, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """In evaluation mode, with weights of which none is 0 or 1."""
    model = cls(*(configs or [config(**changes)])).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(V, shape)


def lengths(*each: int, longest: int = L) -> Tensor:
    """An attention mask of sequences that are padded at their ends."""
    return (torch.arange(longest) < torch.tensor(each)[:, None]).long()


def run(model: nn.Module, ids: Any, **options: Any) -> Any:
    """Its only or its first output."""
    if isinstance(model, ReformerSeq2Seq):
        options["decoder_input_ids"] = ids[:, :S]
    out = model(ids, **options)
    return next(x for x in vars(out).values() if x is not None)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(1)  # of dropout and rotations
    value = loss()
    return [value, *torch.autograd.grad(value, list(model.parameters()))]


# ---- the trunk


def attention(c: ReformerConfig, kind: str, index: int) -> nn.Module:
    options: dict[str, Any] = {"head_dim": c.head_dim, "bias": c.attention_bias, "dropout": c.attention_dropout}
    if kind == "context":
        return rk.FullAttention(E, H, context_dim=c.context_dim, **options)
    options |= {"causal": c.causal, "rotary_base": 10000.0 if c.position == "rotary" else None}
    if kind == "full":
        return rk.FullAttention(E, H, memory_keys=c.memory_keys, **options)
    window = ("chunk_length", "chunks_before", "chunks_after")
    options |= {name: getattr(c, f"{kind}_{name}") for name in window}
    if kind == "local":
        return rk.LocalSelfAttention(E, H, **options)
    options |= {"n_hashes": c.n_hashes, "memory_keys": c.memory_keys}
    options |= {"n_buckets": c.lsh_buckets, "alignment": c.lsh_alignment, "shift_keys": c.causal}
    rules = rk.AttentionRules.paper() if c.rules == "paper" else None
    assert c.hash_seed is not None
    return rk.LSHSelfAttention(E, H, hash_seed=c.hash_seed + index, rules=rules, **options)


def plain(model: Reformer, ids: Tensor, mask: Any = None, context: Any = None, context_mask: Any = None) -> Tensor:
    """The trunk of weights by their names; dropout draws from the same random state in the same order."""
    c, w = model.config, dict(model.named_parameters(remove_duplicate=False))
    ignored, context_ignored = (None if m is None else m == 0 for m in (mask, context_mask))

    def dropped(x: Tensor) -> Tensor:
        return F.dropout(x, c.hidden_dropout, model.training)

    def normed(name: str, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if c.norm == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]
        return (y + w[f"{name}.bias"] if c.norm == "layer" else y).to(x.dtype)

    def attended(kind: str, index: int, name: str, x: Tensor) -> Tensor:
        with torch.random.fork_rng([]):
            layer = attention(c, kind, index).to(x.dtype).train(model.training)
        layer.load_state_dict({key: w[f"{name}.layer.{key}"] for key in layer.state_dict()})
        y = normed(f"{name}.norm", x)
        out: Tensor = layer(y, context_ignored, context=context) if kind == "context" else layer(y, ignored)
        return out

    def fed_forward(name: str, x: Tensor) -> Tensor:
        linear = {n: (w[f"{name}.layer.module.{n}.weight"], w[f"{name}.layer.module.{n}.bias"]) for n in ("up", "down")}
        y = normed(f"{name}.norm", x)
        hidden, activate = F.linear(y, *linear["up"]), F.silu if c.activation == "silu" else F.gelu
        if c.glu:
            gate = F.linear(y, w[f"{name}.layer.module.gate.weight"], w[f"{name}.layer.module.gate.bias"])
            hidden = activate(gate) * hidden
        return F.linear(dropped(hidden if c.glu else activate(hidden)), *linear["down"])

    x = w["embedding.weight"][ids]
    if c.position == "axial":
        rows, columns = c.axes
        axes = [w["position.weights.0"].repeat_interleave(columns, 0), w["position.weights.1"].repeat(rows, 1)]
        x = x + (axes[0] + axes[1] if c.axial_dims is None else torch.cat(axes, -1))[: ids.shape[1]]
    elif c.position == "learned":
        x = x + w["position.weight"][: ids.shape[1]]
    elif c.position == "sinusoidal":
        x = x + rk.SinusoidalPositionEmbedding(E)(torch.arange(ids.shape[1])).to(x.dtype)
    narrow, x = x.dtype, dropped(x)
    streams = [x if c.stream_dtype is None else x.to(torch.promote_types(narrow, getattr(torch, c.stream_dtype)))] * 2
    kinds = [
        (index, kind)
        for index in range(c.num_layers)
        for kind in (c.attention[index % len(c.attention)], *(["context"] if c.context_dim else []), "feed forward")
    ]
    for half, (index, kind) in enumerate(kinds):
        name = f"layers.blocks.{half // 2}.{'fg'[half % 2]}"
        first = index % len(c.attention) if c.tie_layers else index  # where a tied layer was made
        x = streams[1 - half % 2].to(narrow)
        out = fed_forward(f"{name}.module", x) if kind == "feed forward" else attended(kind, first, name, x)
        streams[half % 2] = streams[half % 2] + dropped(out).to(streams[0].dtype)
    merged = (streams[0] + streams[1]) / 2 if c.streams == "mean" else torch.cat(streams, -1)
    return normed("merge.norm", merged.to(narrow))


def arguments(c: ReformerConfig, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Padding, and a context if there is one."""
    given: dict[str, Any] = {"attention_mask": lengths(L, L - 9)}
    if c.context_dim:
        given |= {"context": torch.randn(B, S, C, dtype=dtype), "context_mask": lengths(4, S, longest=S)}
    return given


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", TRUNKS)
def test_trunk_written_out(name: str, dropout: float) -> None:
    """In training without chunks, which draw their dropout one after the other."""
    chunks = {"feed_forward_chunk_length": None} if dropout else {}
    model = made(Reformer, attention_dropout=dropout, hidden_dropout=dropout, **{**TRUNKS[name], **chunks})
    model.train(dropout > 0)
    ids, given = tokens(B, L), arguments(model.config)
    outs = []
    for forward in (lambda: model(ids, **given).last_hidden_state, lambda: plain(model, ids, *given.values())):
        torch.manual_seed(1)
        outs.append(forward())
    assert outs[0].shape == (B, L, model.config.hidden_dim)
    assert_equal_to_rounding(outs[0], outs[1], ROUNDINGS)
    if not dropout:
        given["attention_mask"] = None
        assert_equal_to_rounding(model(ids, **given).last_hidden_state, plain(model, ids, *given.values()), ROUNDINGS)


@pytest.mark.parametrize("name", TRUNKS)
def test_reversible_equals_stored_gradients(name: str) -> None:
    model = made(Reformer, attention_dropout=0.1, hidden_dropout=0.1, **{**TRUNKS[name], "hash_seed": None}).train()
    given, embeds = arguments(model.config), torch.randn(B, L, E, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (embeds, given.get("context")) if x is not None]
    leaves = [*inputs, *(p for name, p in model.named_parameters() if name != "embedding.weight")]
    weight = torch.randn(B, L, model.config.hidden_dim, dtype=torch.float64)
    grads = []
    for model.layers.reversible in (True, False):
        torch.manual_seed(1)
        out = model(inputs_embeds=embeds, **given).last_hidden_state
        grads.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    assert_equal_to_rounding(grads[0], grads[1], ROUNDINGS)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_options_reach_the_layers() -> None:
    options = {"reversible": False, "reversible_min_length": 5, "stream_dtype": "float64"}
    layers: Any = Reformer(config(**options, feed_forward_chunk_length=6)).layers
    assert all(block.g.chunk_length == 6 for block in layers.blocks)
    assert (layers.reversible, layers.min_length, layers.stream_dtype) == (False, 5, torch.float64)
    assert Reformer(config()).layers.reversible


@pytest.mark.parametrize("length", [1, 5, 8, 9, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_length_and_kinds_of_input(batch: int, length: int) -> None:
    model, ids = made(Reformer, dtype=torch.float32), tokens(batch, length)
    out = model(ids).last_hidden_state
    assert out.shape == (batch, length, 2 * E) and out.dtype == torch.float32
    for same in (model(ids.int()), model(inputs_embeds=model.embedding(ids))):
        assert torch.equal(same.last_hidden_state, out)
    # Masks and other shapes may change the order of sums.
    assert_equal_to_rounding(model(ids, torch.ones(batch, length)).last_hidden_state, out, ROUNDINGS)
    for row, one in zip(out, ids, strict=True):
        assert_equal_to_rounding(model(one[None]).last_hidden_state[0], row, ROUNDINGS)


# ---- padding and order


@pytest.mark.parametrize("options", [
    {"attention": ("local",), "causal": True, "position": "rotary"},
    {"attention": ("local",), "local_chunks_before": 0}, {"attention": ("full",), "causal": True},
    {"attention": ("full",), "memory_keys": 2, "position": "sinusoidal"},
    {"attention": ("local", "full"), "causal": True, "memory_keys": 2, "position": "learned"},
])  # fmt: skip
def test_padding_is_as_if_it_were_not_there(options: dict[str, Any]) -> None:
    """Not in local layers whose chunks form a ring: there the first chunk sees the last, which may be padding."""
    model = made(Reformer, **options)
    ids = tokens(B, L)
    out = model(ids, lengths(20, 9)).last_hidden_state
    for row, length in enumerate((20, 9)):
        expected = model(ids[row : row + 1, :length]).last_hidden_state[0]
        assert_equal_to_rounding(out[row, :length], expected, ROUNDINGS)


@pytest.mark.parametrize("options", [
    *({"rules": name} for name in ("default", "paper", "trax", "huggingface")), {"causal": True},
    {"alignment": "bucket", "n_buckets": 4}, {"memory_keys": 2}, {"attention": ("lsh",), "num_layers": 2},
])  # fmt: skip
def test_what_is_in_the_padding_does_not_matter(options: dict[str, Any]) -> None:
    model, ids = made(Reformer, **options), tokens(B, L)
    mask = lengths(L - 3, 12).bool()
    mask[0, :5] = False  # anywhere
    mask[1, 6] = False
    out = model(ids, mask).last_hidden_state
    other = model(torch.where(mask, ids, (ids + 1 + tokens(B, L) % (V - 1)) % V), mask).last_hidden_state
    assert torch.equal(out[mask], other[mask]) and not torch.equal(out, other)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(model(ids, mask.to(dtype)).last_hidden_state, out)
    assert not torch.equal(model(ids).last_hidden_state[mask], out[mask])


@pytest.mark.parametrize("options", [{}, {"position": "rotary"}, {"memory_keys": 2}])
@pytest.mark.parametrize("kind", ["lsh", "local", "full"])
def test_order(kind: str, options: dict[str, Any]) -> None:
    """Whatever the configuration says of itself."""
    options = {**options, "alignment": "bucket", "n_buckets": 4, "attention": (kind, "lsh")}
    causal = made(ReformerLM, causal=False, context_dim=3, **options)
    masked = made(ReformerMaskedLM, causal=True, **options)
    assert causal.config.causal and not masked.config.causal and causal.config.context_dim is None
    ids = tokens(B, L)
    for position in (0, 9, 20, L - 1):
        other = ids.clone()
        other[:, position] = (ids[:, position] + 1) % V
        before, after = causal(ids).logits, causal(other).logits
        assert torch.equal(before[:, :position], after[:, :position])
        assert (before[:, position] != after[:, position]).any(-1).all()
        by_all, by_all_others = (masked(x).logits[:, :position] for x in (ids, other))
        assert position in (0, 20) or not torch.equal(by_all, by_all_others)


# ---- all models


def loss_of(model: Any, ids: Tensor) -> Tensor:
    if isinstance(model, ReformerQuestionAnswering):
        out = model(ids, start_positions=ids[:, 0] % L, end_positions=ids[:, 1] % L)
    else:
        out = model(ids, labels=ids[:, 0] % 2 if isinstance(model, ReformerSequenceClassifier) else ids)
    loss: Tensor = out.loss
    return loss


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_weight(name: str) -> None:
    model, ids = MODELS[name](hidden_dropout=0.1, memory_keys=2).train(), tokens(B, L)
    loss = loss_of(model, ids)
    for (weight, _), got in zip(
        model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        assert got.isfinite().all() and got.any(), weight


@pytest.mark.parametrize("name", [name for name in MODELS if name != "seq2seq"])
def test_arguments_reach_the_trunk(name: str) -> None:
    model, ids, mask = MODELS[name](pooling="last"), tokens(B, L), lengths(20, 9)
    embeds = model.reformer.embedding(ids)
    assert torch.equal(run(model, None, inputs_embeds=embeds), run(model, ids))
    out = run(model, None, inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(run(model, ids, attention_mask=mask), out) and not torch.equal(run(model, ids), out)
    other = run(model, torch.where(mask == 1, ids, ids.flip(1)), attention_mask=mask)
    assert torch.equal(*((x[mask == 1] for x in (out, other)) if out.shape[:2] == (B, L) else (out, other)))


@pytest.mark.parametrize("name", MODELS)
def test_number_of_hashes_and_seeds(name: str) -> None:
    model, more, ids = MODELS[name](), MODELS[name](n_hashes=5), tokens(B, L)
    more.load_state_dict(model.state_dict())
    assert torch.equal(run(model, ids, n_hashes=5), run(more, ids)) and not torch.equal(run(model, ids), run(more, ids))
    model.train()
    assert torch.equal(run(model, ids), run(model, ids))  # the seed is fixed, and there is no dropout
    drawing = MODELS[name](hash_seed=None).train()
    assert not torch.equal(run(drawing, ids), run(drawing, ids))
    outs = []
    for _ in range(2):
        torch.manual_seed(4)
        outs.append(run(drawing, ids))
    assert torch.equal(*outs)
    drawing.eval()
    assert torch.equal(run(drawing, ids), run(drawing, ids))


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_in_training_only(name: str) -> None:
    model, ids = MODELS[name](hidden_dropout=1.0), tokens(B, L)
    assert not torch.equal(run(model, ids), run(model.train(), ids))
    if name == "classifier":
        assert torch.equal(run(model, ids), model.output.bias.expand(B, -1))


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights(name: str) -> None:
    options = {**BASE, "embed_dim": 64, "memory_keys": 64, "initializer_range": 0.05, "attention_bias": True}
    model = type(MODELS[name]())(ReformerConfig(**options))
    for weight, x in model.state_dict().items():
        if x.dim() == 1:
            assert (x == (1 if "norm.weight" in weight else 0)).all(), weight
        else:
            std = 0.125 if "memory" in weight else 0.05  # 64 ** -0.5
            # The estimate from n numbers has a standard error of std / sqrt(2 n).
            assert abs(float(x.std()) / std - 1) < 6 / math.sqrt(2 * x.numel()), weight


def test_a_context_that_cannot_be_given_is_not_asked_for() -> None:
    for name in ("lm", "masked", "classifier", "answers"):
        model = MODELS[name](context_dim=C)
        assert run(model, tokens(B, L)).isfinite().all() and model.config.context_dim is None


# ---- dtypes, compilation, transforms


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_with_exact_streams(autocast: bool) -> None:
    """bfloat16 numbers add up exactly in float64, so that reconstruction loses nothing."""
    model = made(ReformerLM, dtype=torch.float32 if autocast else torch.bfloat16, stream_dtype="float64").train()
    ids, grads = tokens(B, L), []
    assert all(x.dtype == torch.float64 for x in model.reformer.streams(ids, None))
    for model.reformer.layers.reversible in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        assert loss.dtype == torch.float32
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*grads, strict=True))
    assert all(got.dtype == p.dtype for got, p in zip(grads[0], model.parameters(), strict=True))


@pytest.mark.parametrize("streams", [None, "float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_of_the_streams(dtype: torch.dtype, streams: str | None) -> None:
    model = made(Reformer, dtype=dtype, stream_dtype=streams, attention=("full",), num_layers=2, position="sinusoidal")
    ids = tokens(B, L)
    wide = dtype if streams is None else getattr(torch, streams)
    assert {x.dtype for x in model.streams(ids, None)} == {wide}
    out = model(ids).last_hidden_state
    assert out.dtype == dtype
    # A half rounds its norm, hidden layer, weights and output, and adds to a stream.
    assert_equal_to_rounding(out, plain(model, ids), 4 * 5 if dtype == torch.bfloat16 else ROUNDINGS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_compiled_training_step() -> None:
    model, ids = made(ReformerLM, dtype=torch.float32, num_layers=2).train(), tokens(B, L)
    expected = gradients(model, lambda: model(ids, labels=ids).loss)
    compiled: Callable[..., Any] = torch.compile(model)
    assert_equal_to_rounding(gradients(model, lambda: compiled(ids, labels=ids).loss), expected, ROUNDINGS + B * L)


def test_gradients_of_each_sequence_by_transforms() -> None:
    model, ids = made(ReformerLM, attention=("lsh", "local")), tokens(B, L)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        out: Tensor = functional_call(model, weights, (ids[None],), {"labels": ids[None]}).loss
        return out

    each = vmap(torch.func.grad(loss), (None, 0))(weights, ids)
    for row, one in enumerate(ids.split(1)):
        expected = gradients(model, functools.partial(loss_of, model, one))[1:]
        assert_equal_to_rounding([x[row] for x in each.values()], expected, ROUNDINGS)


@pytest.mark.parametrize("kind", ["fake", "meta", "meta, training"])
def test_tensors_without_values(kind: str) -> None:
    model, ids = made(ReformerLM), tokens(B, L)
    if kind == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(ids)).logits.shape == (B, L, V)
        return
    with torch.set_grad_enabled("training" in kind):
        assert model.to("meta")(ids.to("meta")).logits.shape == (B, L, V)


def test_learns() -> None:
    model = ReformerLM(config(embed_dim=32, hash_seed=None, hidden_dropout=0.1, initializer_range=0.05)).train()
    optimizer, ids = torch.optim.Adam(model.parameters(), 1e-2), torch.randperm(8).repeat(B, 5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 * math.log(V) and losses[-1] < 0.1 * losses[0]
