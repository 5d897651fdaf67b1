"""convert_attention, and LSHMultiheadAttention inside whole models, compilers and data-parallel training."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.utils import parametrize

import reformer_kernels as rk
from reformer_kernels.modules.convert import convert_attention
from reformer_kernels.modules.multihead import LSHMultiheadAttention

from .rounding import assert_equal_to_rounding
from .test_sharding import check_dropout, check_everything

E, H = 16, 4
PATHS: dict[str, dict[str, Any]] = {"exact": {}, "long": {"exact_below": 0}}  # budget 128: both see every key
paths = pytest.mark.parametrize("path", PATHS)
nested_warnings = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning", "ignore:enable_nested_tensor is True, but:UserWarning"
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(E, H, batch_first=True)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attention": nn.MultiheadAttention(E, 2, 0.1, kdim=3, vdim=5)})])
        self.again = self.first
        self.linear = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.again(self.first(x, x, x)[0], x, x)[0])
        return out


def close(a: Any, b: Any) -> None:
    # Forward and backward of up to four layers: two projections, a feed-forward part of 2 E, scores, and 200 keys each.
    assert_equal_to_rounding(a, b, 2 * 4 * (2 * E + 4 * E + E + 200))


# Conversion


def test_converts_in_place() -> None:
    model = Model().double()
    model.blocks.eval()
    model.first.in_proj_weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, state = dict(model.named_parameters()), model.state_dict()
    seen = []
    handle = model.first.register_forward_hook(lambda *a: seen.append(1))
    x = torch.randn(2, 9, E, dtype=torch.float64)
    expected, random = model(x), torch.get_rng_state()
    converted = convert_attention(model, exact_below=0, budget=64)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(converted) == ["first", "blocks.0.attention"]
    assert all(model.get_submodule(name) is m and type(m) is LSHMultiheadAttention for name, m in converted.items())
    assert model.again is model.first
    assert model.first.training and not model.get_submodule("blocks.0.attention").training
    assert all(model.get_parameter(name) is p for name, p in before.items())
    assert list(model.state_dict()) == list(state)
    ours = converted["first"]
    assert ours.options["budget"] == 64 and ours.options["exact_below"] == 0
    seen.clear()
    out = model(x)
    close(out, expected)
    assert len(seen) == 2
    handle.remove()
    out.sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected) and len(seen) == 2
    assert convert_attention(model, budget=3) == {} and ours.options["budget"] == 64
    close(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be at least 1, got 0"),
        ({"budget": 2.0}, TypeError, "budget must be an int, got 2.0"),
        ({"local_fraction": 1.5}, ValueError, "local_fraction must be between 0 and 1, got 1.5"),
        ({"local_fraction": "1"}, TypeError, "local_fraction must be a float, got '1'"),
        ({"grouping": "random"}, ValueError, "grouping must be one of"),
        ({"rest_term": 1}, TypeError, "rest_term must be a bool, got 1"),
        ({"chunk_length": 0}, ValueError, "chunk_length must be at least 1, got 0"),
        ({"causal": None}, TypeError, "causal must be a bool, got None"),
        ({"shared_qk": 1}, TypeError, "shared_qk must be a bool, got 1"),
        ({"exact_below": -1}, ValueError, "exact_below must be at least 0, got -1"),
        ({"hash_seed": 1.5}, TypeError, "hash_seed must be an int, got 1.5"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"n_hashes": 4}, ValueError, "n_hashes must be None without shared_qk=True, got 4"),
        ({"n_buckets": 4}, ValueError, "n_buckets must be None without shared_qk=True, got 4"),
        ({"shared_qk": True, "n_hashes": 0}, ValueError, "n_hashes must be at least 1, got 0"),
        ({"shared_qk": True, "n_buckets": 3}, ValueError, "n_buckets must be a positive even integer"),
        ({"shared_qk": True, "exact_below": 3}, ValueError, "exact_below must be None with shared_qk=True"),
        ({"shared_qk": True, "add_bias_kv": True}, ValueError, "add_bias_kv must be False with shared_qk=True"),
        ({"shared_qk": True, "add_zero_attn": True}, ValueError, "add_zero_attn must be False with shared_qk=True"),
        ({"shared_qk": True, "kdim": 3}, ValueError, "kdim and vdim must be embed_dim with shared_qk=True"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSHMultiheadAttention(E, H, **options)


def test_options_are_checked_without_attention() -> None:
    assert convert_attention(LSHMultiheadAttention(E, H)) == {}
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        convert_attention(nn.Linear(2, 2), budget=0)
    for name, meant in (
        ("bugdet", r" \(did you mean 'budget'\?\)"),
        ("group", r" \(did you mean 'grouping'\?\)"),
        ("dropout", ""),
        ("batch_first", ""),
    ):
        message = f"convert_attention has no option '{name}'{meant}; its options are budget, local_fraction, grouping"
        with pytest.raises(TypeError, match=message):
            convert_attention(nn.Linear(2, 2), **{name: True})
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        convert_attention({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must contain nn.MultiheadAttention, not be one: build"):
        convert_attention(nn.MultiheadAttention(E, H))


class Attn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_says_what_a_model_has_instead() -> None:
    model = nn.ModuleDict({"a": Attn(), "b": nn.Linear(2, 2), "c": nn.ModuleList([Mixer(), Mixer()])})
    with pytest.warns(UserWarning, match="nothing was converted") as caught:
        assert convert_attention(model) == {}
    (warning,) = caught
    text = str(warning.message)
    assert warning.filename == __file__
    assert f"it has {__name__}.Attn (a), {__name__}.Mixer (c.0). Where these call torch's scaled_dot" in text
    with pytest.warns(UserWarning, match="nothing in it looks like attention"):
        assert convert_attention(nn.Linear(2, 2)) == {}
    assert convert_attention(nn.Sequential(LSHMultiheadAttention(E, H), Attn())) == {}  # converted before


def test_says_what_models_of_transformers_take() -> None:
    model = type("BertModel", (nn.Sequential,), {"__module__": "transformers.models.bert.modeling_bert"})(Attn())
    with pytest.warns(UserWarning, match="Models of transformers take other attentions by"):
        assert convert_attention(model) == {}


class Own(nn.MultiheadAttention):
    pass


def test_refuses_all_or_nothing() -> None:
    model = nn.ModuleDict({name: nn.MultiheadAttention(E, H) for name in ("fine", "patched", "parametrized")})
    model["own"] = Own(E, H)
    model["quantizable"] = torch.ao.nn.quantizable.MultiheadAttention(E, H)
    model["patched"].forward = model["fine"].forward
    parametrize.register_parametrization(model["parametrized"], "in_proj_weight", nn.Identity())
    with pytest.raises(ValueError, match="model cannot be converted") as info:
        convert_attention(model)
    lines = str(info.value).splitlines()[1:]
    assert sorted(line.split(":")[0] for line in lines) == ["own", "parametrized", "patched", "quantizable"]
    assert type(model["fine"]) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (nn.TransformerDecoderLayer(E, H), {"causal": True}, "multihead_attn: causal must be False for attention to"),
        (Model(), {"causal": True}, "blocks.0.attention: causal must be False for attention to another"),
        (Model(), {"shared_qk": True}, "blocks.0.attention: kdim and vdim must be embed_dim with shared_qk=True"),
        (
            nn.Sequential(nn.MultiheadAttention(E, H, add_bias_kv=True)),
            {"shared_qk": True},
            "0: add_bias_kv must be False with shared_qk=True",
        ),
    ],
)
def test_refuses_what_the_options_cannot_do(model: nn.Module, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        convert_attention(model, **options)
    assert not any(isinstance(m, LSHMultiheadAttention) for m in model.modules())


# Whole models


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The query shapes that our forward saw. (A hook would switch torch's fused path off by itself.)"""
    shapes: list[tuple[int, ...]] = []
    forward = LSHMultiheadAttention.forward

    def counted(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(() if query.is_nested else tuple(query.shape))
        return forward(self, query, *args, **kwargs)

    monkeypatch.setattr(LSHMultiheadAttention, "forward", counted)
    return shapes


def converted_pair(model: nn.Module, path: str) -> tuple[nn.Module, nn.Module]:
    model = model.double()
    ours = copy.deepcopy(model)
    assert convert_attention(ours, **PATHS[path])
    return model, ours


@nested_warnings
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["none", "padding", "mask", "gaps"])
@pytest.mark.parametrize("norm_first", [True, False])
@paths
def test_encoder_inference(path: str, norm_first: bool, kind: str, guard: Any, calls: list[Any]) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, norm_first=norm_first)
    stock, ours = (m.eval() for m in converted_pair(nn.TransformerEncoder(layer, 2), path))
    x = torch.randn(3, 9, E, dtype=torch.float64)
    padding = torch.arange(9) >= torch.tensor([[9], [4], [7]])
    given: dict[str, Any] = {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "mask": {"mask": torch.ones(9, 9, dtype=torch.bool).triu(1)},
        "gaps": {"src_key_padding_mask": padding.flip(1)},
    }[kind]
    with guard():
        expected = stock(x, **given)
        out = ours(x, **given)
    assert calls.count((3, 9, E)) == 2
    as_nested = kind == "padding" and not norm_first and guard is not torch.enable_grad
    assert calls.count(()) == (2 if as_nested else 0)
    keep = ~given.get("src_key_padding_mask", torch.zeros(3, 9, dtype=torch.bool))
    close(out[keep], expected[keep])  # the stock fast and slow paths differ in padded rows themselves


@nested_warnings
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@paths
def test_transformer(path: str, training: bool, batch_first: bool, calls: list[Any]) -> None:
    whole = nn.Transformer(E, H, 1, 2, 32, dropout=0.0, batch_first=batch_first)
    stock, ours = (m.train(training) for m in converted_pair(whole, path))
    src, tgt = (torch.randn((2, n, E) if batch_first else (n, 2, E), dtype=torch.float64) for n in (9, 7))
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    minus = torch.zeros(2, 9, dtype=torch.float64).masked_fill(padding, -torch.inf)
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    for hint in (None, True):
        results = []
        for m in (stock, ours):
            with torch.set_grad_enabled(training):
                out = m(src, tgt, None, causal, None, minus, None, minus, tgt_is_causal=hint)
            results.append([out])
            if training:
                results[-1] += torch.autograd.grad(out.square().sum(), list(m.parameters()))
        close(results[1], results[0])
    assert len(calls) - calls.count(()) == 2 * 5


def test_vision_transformer(calls: list[Any]) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(32, 4, 2, 2, E, 32, num_classes=3).double().eval()
    nn.init.normal_(model.heads.head.weight)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        short = copy.deepcopy(model)
        convert_attention(short, exact_below=0)
        close(short(images), expected)
        convert_attention(model, budget=16, chunk_length=8)
        approximate = model(images)
    assert calls == [(2, 65, E)] * 4
    assert not torch.equal(approximate, expected)
    model.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# The Reformer's attention


def test_shared_qk_is_lsh_attention() -> None:
    options: dict[str, Any] = {"n_hashes": 2, "n_buckets": 8, "causal": True, "chunk_length": 16}
    m = LSHMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, shared_qk=True, **options)
    nn.init.normal_(m.in_proj_bias)
    x = torch.randn(2, 100, E, dtype=torch.float64)
    padding = torch.arange(100).expand(2, -1) >= 80
    hidden, bias = torch.rand(100, 100) < 0.1, torch.randn(2, 100, dtype=torch.float64)
    projected = nn.functional.linear(x, m.in_proj_weight, m.in_proj_bias)
    q, _, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in projected.chunk(3, -1))

    def expected(attn_mask: Tensor | None) -> Tensor:
        out = rk.lsh_attention(q, v, key_padding_mask=padding, attn_mask=attn_mask, **options)
        result: Tensor = m.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def ours(padding: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        out: Tensor
        out, weights = m(x, x, x, padding, False, attn_mask)
        assert weights is None
        return out

    minus = torch.zeros_like(bias).masked_fill(padding, -torch.inf)
    close(ours(padding), expected(None))
    close(ours(minus), expected(None))
    close(ours(padding, hidden), expected(hidden[None, None]))
    added = bias[:, None, None].expand(-1, -1, 100, -1)
    close(ours(bias + minus), expected(added))
    close(ours(bias + minus, hidden), expected(added.masked_fill(hidden, -torch.inf)))
    scores = torch.zeros(100, 100, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    close(ours(bias + minus, scores), expected(added + scores))
    ours(padding).square().sum().backward()
    grad = m.in_proj_weight.grad
    assert grad is not None and grad[E : 2 * E].eq(0).all() and grad[:E].abs().sum() > 0
    with pytest.raises(ValueError, match="key must be query with shared_qk=True"):
        m(x, x + 1, x, need_weights=False)
    with pytest.raises(ValueError, match="need_weights must be False with shared_qk=True"):
        m(x, x, x)


# Compilers


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"shared_qk": True}, {"grouping": "hash"}])
def test_compile_with_dynamic_length(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    m = LSHMultiheadAttention(E, H, 0.1, batch_first=True, budget=32, chunk_length=16, **options).eval()
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 200, 300):
        x = torch.randn(2, length, E, requires_grad=True)
        padding = torch.arange(length).expand(2, -1) >= length - 3
        for given in ({}, {"key_padding_mask": padding}, {"key_padding_mask": torch.where(padding, -torch.inf, 0.0)}):
            results = [f(x, x, x, need_weights=False, **given)[0] for f in (m, compiled)]
            torch.testing.assert_close(results[1], results[0])
            gradients = [torch.autograd.grad(y.square().sum(), [x, *m.parameters()]) for y in results]
            torch.testing.assert_close(gradients[1], gradients[0])


def test_export_with_dynamic_length() -> None:
    m = LSHMultiheadAttention(E, H, batch_first=True, budget=32).eval()  # chunk_length depends on the length

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = m

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    length = torch.export.Dim("length", min=64, max=4096)
    program = torch.export.export(Self(), (torch.randn(2, 100, E),), dynamic_shapes=({1: length},))
    for n in (64, 333):
        x = torch.randn(2, n, E)
        torch.testing.assert_close(program.module()(x), Self()(x))


def test_fx_keeps_the_module_whole() -> None:
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = LSHMultiheadAttention(E, H, batch_first=True, budget=16, chunk_length=8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0] + x
            return out

    x, mask = torch.randn(2, 50, E), torch.rand(2, 50) < 0.3
    for module in (Self(), copy.deepcopy(Self())):
        traced = torch.fx.symbolic_trace(module)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"]
        assert torch.equal(traced(x, mask), module(x, mask))


@nested_warnings
def test_gradients_per_sample_with_a_float_mask() -> None:
    m = LSHMultiheadAttention(E, H, batch_first=True, budget=16, chunk_length=8)
    parameters = {name: p.detach() for name, p in m.named_parameters()}
    x = torch.randn(3, 40, E)
    mask = torch.zeros(3, 40).masked_fill(torch.rand(3, 40) < 0.2, -torch.inf)

    def loss(parameters: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        given = (x[None], x[None], x[None], mask[None])
        out: Tensor = torch.func.functional_call(m, parameters, given, {"need_weights": False})[0].square().sum()
        return out

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, mask)
    for i in range(3):
        alone = torch.autograd.grad(loss(dict(m.named_parameters()), x[i], mask[i]), list(m.parameters()))
        for (name, _), g in zip(m.named_parameters(), alone, strict=True):
            torch.testing.assert_close(together[name][i], g)


def test_compiled_encoder_calls_our_forward() -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    stock, ours = (m.eval() for m in converted_pair(nn.TransformerEncoder(layer, 1), "exact"))
    convert = ours.get_submodule("layers.0.self_attn")
    assert isinstance(convert, LSHMultiheadAttention)
    convert.options |= {"budget": 4, "chunk_length": 4}
    x = torch.randn(2, 32, E, dtype=torch.float64)
    with torch.no_grad():
        out = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
        close(out, ours(x))
        assert not torch.allclose(out, stock(x))


# Data-parallel training


def _train(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    check_everything(mesh)
    check_dropout(mesh)
    for options in PATHS.values():
        torch.manual_seed(0)
        model = Model().double()
        del model.blocks  # unused, and DDP wants a gradient for every parameter
        convert_attention(model, **options)
        x = torch.randn(4, 9, E, dtype=torch.float64)
        model(x).square().mean().backward()
        grads: list[Any] = [p.grad for p in model.parameters()]
        expected = [grad.clone() for grad in grads]
        model.zero_grad()
        mine = x[2 * rank : 2 * rank + 2]
        replica = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        replica(mine).square().mean().backward()
        close([p.grad for p in replica.parameters()], expected)

        dist.fsdp.fully_shard(model.first, mesh=mesh)
        dist.fsdp.fully_shard(model, mesh=mesh)
        assert isinstance(model.first, LSHMultiheadAttention)
        model(mine).square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        close([grad.full_tensor() for grad in grads], expected)
        assert convert_attention(model) == {}
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past torch's teardown, which now and then aborts on a thread of gloo that still runs


def test_two_processes(tmp_path: Path) -> None:
    spawn(_train, (str(tmp_path / "store"),), nprocs=2)
