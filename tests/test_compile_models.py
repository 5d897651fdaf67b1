"""Whole models under torch.compile and torch.export: few graphs for all lengths, and the values of eager mode."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import reformer_kernels as rk

from .rounding import assert_equal_to_rounding

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
LENGTHS = (200, 300, 1500, 20, 64, 700, 2500, 100)  # of one window, more, and one to many chunks of 256
GRAPHS = 3  # of the first length, of all above a window, and of all below
ROUNDINGS = 300  # of sums of up to 64 products in two layers of four steps each, and what layer norms make of them


def config(**options: Any) -> rk.ReformerConfig:
    sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "max_length": 4096}
    chunks = {"feed_forward_chunk_length": 256, "head_chunk_length": 256}
    return rk.ReformerConfig(**{**sizes, **chunks, **options})


class Whole(nn.Module):
    """A model and what of its output is compared."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, ids: Tensor) -> Any:
        return self.call(self.model, ids)


MODELS: dict[str, Callable[..., Whole]] = {
    "lm": lambda **o: Whole(rk.ReformerLM(config(**o)), lambda m, ids: m(ids, labels=ids, return_logits=True)),
    "masked": lambda **o: Whole(rk.ReformerMaskedLM(config(position="rotary", **o)), lambda m, ids: m(ids)),
    "classifier": lambda **o: Whole(
        rk.ReformerSequenceClassifier(config(position="sinusoidal", pooling="mean", **o)), lambda m, ids: m(ids, ids)
    ),
    "answers": lambda **o: Whole(rk.ReformerQuestionAnswering(config(position="learned", **o)), lambda m, ids: m(ids)),
    "seq2seq": lambda **o: Whole(rk.ReformerSeq2Seq(config(**o)), lambda m, ids: m(ids, labels=ids)),
}


def compiled(model: nn.Module, **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(options.pop("backend", "eager"))
    return torch.compile(model, backend=counter, **options), counter


def tokens(length: int) -> Tensor:
    return torch.randint(1, 32, (2, length))


@pytest.mark.parametrize("name", ["lm", "classifier", "seq2seq"])
def test_inference(name: str) -> None:
    """The default model, reversible, in one graph."""
    model = MODELS[name]().eval()
    first = name == "lm"  # the others by two lengths that need not have graphs of their own
    whole, counter = compiled(model, fullgraph=True, dynamic=None if first else True)
    model.requires_grad_(name != "classifier")  # nothing needs gradients either way
    with torch.set_grad_enabled(name == "classifier"):
        for length in LENGTHS if first else (300, 1500):
            ids = tokens(length)
            assert_equal_to_rounding(dict(whole(ids)), dict(model(ids)), ROUNDINGS)
    assert counter.frame_count <= (GRAPHS if first else 1)


@pytest.mark.parametrize("reversible", [False, True])
def test_training(reversible: bool) -> None:
    """Gradients, in one graph of stored activations, or around the reversible sequence."""
    model = MODELS["lm"](reversible=reversible)
    whole, counter = compiled(model, fullgraph=not reversible, backend="eager" if reversible else "aot_eager")
    for length in LENGTHS[2:4]:
        results = []
        for m in (whole, model):
            torch.manual_seed(1)
            loss = m(tokens(length)).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        # A weight's gradient is a sum over all tokens.
        assert_equal_to_rounding(results[0], results[1], ROUNDINGS + 2 * length)
    assert counter.frame_count <= GRAPHS * (3 if reversible else 1)  # before and after the sequence, and in between


def test_training_with_dropout() -> None:
    """With any length dynamic, torch cannot compile a checkpoint of a Dropout: there is none."""
    model = MODELS["lm"](reversible=False, hidden_dropout=0.1, attention_dropout=0.1)
    whole, counter = compiled(model, fullgraph=True, dynamic=True)
    for length in LENGTHS[:3]:
        whole(tokens(length)).loss.backward()
    assert counter.frame_count <= GRAPHS and all(p.grad is not None for p in model.parameters())


def test_one_graph_of_a_reversible_training_step() -> None:
    model = MODELS["lm"]()
    whole, _ = compiled(model, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="for fullgraph=True set reversible=False"):
        whole(tokens(100))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_language_model(strict: bool) -> None:
    """Saved and loaded, over many chunks or within one window, as ReformerLM's output."""
    model = rk.ReformerLM(config()).eval()
    length = Dim("length", min=65, max=4096)
    with torch.no_grad():
        program = export(model, (tokens(200),), dynamic_shapes=({1: length},) if not strict else None, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for n in (200,) if strict else (65, 200, 3000):
            ids = tokens(n)
            out = loaded(ids)
            assert isinstance(out, type(model(ids))) and out.loss is None
            assert_equal_to_rounding(out.logits, model(ids).logits, ROUNDINGS)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"lm"}))
def test_exports(name: str) -> None:
    model = MODELS[name]().eval()
    with torch.no_grad():
        length = Dim("length", min=65, max=4096)
        program = export(model, (tokens(300),), dynamic_shapes=({1: length},), strict=False).module()
        for n in (65, 1500):
            ids = tokens(n)
            assert_equal_to_rounding(dict(program(ids)), dict(model(ids)), ROUNDINGS)
