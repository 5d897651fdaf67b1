"""Models under FSDP of both kinds, in a group of one process: sharding, initial weights, files."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import reformer_kernels as rk
from reformer_kernels.models.reformer import Residual

from .rounding import assert_equal_to_rounding

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:FSDP is switching to use `NO_SHARD`"
    ),  # of one process there is nothing to shard
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),  # which we do not write to
    pytest.mark.filterwarnings("ignore:FSDP will not all-gather parameters for containers"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu"),
]
L = 150


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def config(**options: Any) -> rk.ReformerConfig:
    sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "feed_forward_chunk_length": 64}
    return rk.ReformerConfig(**{**sizes, "max_length": 256, **options})


def step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()

    def whole(x: Any) -> Any:
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    return loss.detach(), {name: whole(p.grad).clone() for name, p in model.named_parameters()}


PARTS = {
    "blocks": lambda b: [b],
    "f and g": lambda b: [b.f, b.g],
    "f alone": lambda b: [b.f],
    "layers inside": lambda b: [b.f.layer, b.g.module],
    "blocks, f and g": lambda b: [b.f, b.g, b],
}


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("reversible", [False, True])
def test_parts_of_blocks(reversible: bool, part: str, reshard: bool, root: bool) -> None:
    model, ids = rk.ReformerLM(config(reversible=reversible, hidden_dropout=0.1)), torch.randint(32, (2, L))
    expected, calls = step(model, ids), []
    model.reformer.layers.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for block in model.reformer.layers.blocks:
        for module in PARTS[part](block):
            fully_shard(module, reshard_after_forward=reshard)
    if root:
        fully_shard(model)
    for _ in range(2):
        loss, gradients = step(model, ids)
        assert torch.equal(loss, expected[0])
        # A block that is sharded adds up the gradients of its two streams first: of every token, to one rounding.
        assert_equal_to_rounding(gradients, expected[1], 2 * L if part == "blocks" else 0)
    assert len(calls) == 2


def test_mixed_precision() -> None:
    """Weights in bfloat16 for f and g, and streams in float32, which a cast of a block's inputs would take away."""
    model, ids = rk.ReformerLM(config()), torch.randint(32, (2, L))
    stored = copy.deepcopy(model)
    stored.reformer.layers.reversible = False
    results = []
    for m in (model, stored):
        for block in m.reformer.layers.blocks:
            fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))
        fully_shard(m, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
        results.append(step(m, ids))
    (loss, gradients), (expected, expected_gradients) = results
    assert torch.equal(loss, expected)
    for name, g in expected_gradients.items():  # inputs that cross a tie of bfloat16 differ by one of its units
        assert (gradients[name] - g).norm() <= 8 * torch.finfo(torch.bfloat16).eps * g.norm()
    wrong = rk.ReformerLM(config())
    for block in wrong.reformer.layers.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with pytest.raises(RuntimeError, match="cast_forward_inputs=True"):
        fully_shard(wrong)
        step(wrong, ids)


def test_saves_what_is_sharded(tmp_path: Path) -> None:
    model, ids = rk.ReformerLM(config()).eval(), torch.randint(32, (2, L))
    expected = model(ids).logits
    for block in model.reformer.layers.blocks:
        fully_shard(block)
    fully_shard(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(rk.ReformerLM.from_pretrained(tmp_path)(ids).logits, expected)
    block = model.get_submodule("reformer.layers.blocks.0")
    assert isinstance(block, FSDPModule)
    block.unshard()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(rk.ReformerLM.from_pretrained(tmp_path / "again")(ids).logits, expected)


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rk.ReformerLM(config())
    fully_shard(model)
    monkeypatch.setattr(DeviceMesh, "get_coordinate", lambda _: [1])
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


MODELS: dict[str, Callable[..., Any]] = {
    "lm": lambda **o: rk.ReformerLM(config(**o)),
    "tied": lambda **o: rk.ReformerMaskedLM(config(tie_embeddings=True, streams="mean", norm="rms", **o)),
    "classifier": lambda **o: rk.ReformerSequenceClassifier(config(attention_bias=True, memory_keys=3, **o)),
    "answers": lambda **o: rk.ReformerQuestionAnswering(config(glu=True, **o)),
    "seq2seq": lambda **o: rk.ReformerSeq2Seq(config(**o), config(initializer_range=0.3, **o)),
}


def moments(model: nn.Module) -> dict[str, tuple[float, float]]:
    return {name: (float(p.detach().mean()), float(p.detach().std(correction=0))) for name, p in
            model.named_parameters()}  # fmt: skip


def assert_alike(model: nn.Module, like: nn.Module) -> None:
    """The same means and deviations: constants to the bit, and of n normal values to 6 standard errors of each side."""
    expected = moments(like)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for name, (mean, std) in moments(model).items():
        error = 6 * 2**0.5 * expected[name][1] / sizes[name] ** 0.5
        assert abs(mean - expected[name][0]) <= error and abs(std - expected[name][1]) <= error, name


@pytest.mark.parametrize("position", ["axial", "learned"])
@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_from_the_meta_device(name: str, position: str) -> None:
    with torch.device("meta"):
        model = MODELS[name](position=position)
    made = MODELS[name](position=position)
    assert_alike(made, MODELS[name](position=position))
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, float("nan"))
    model.reset_parameters()
    assert_alike(model, made)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    made.reset_parameters()
    assert_alike(made, model)
    # Drawn anew; zeros and ones are what they were.
    assert all(p.std(correction=0) == 0 or not torch.equal(p, before[n]) for n, p in made.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_fsdp2_from_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
    fully_shard(model)
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    assert_alike(nn.ParameterDict({n.replace(".", "_"): p.full_tensor() for n, p in model.named_parameters()}),
                 nn.ParameterDict({n.replace(".", "_"): p for n, p in MODELS[name]().named_parameters()}))  # fmt: skip


@pytest.mark.parametrize("position", ["axial", "learned", "rotary"])
def test_fsdp1(position: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = rk.ReformerLM(config(position=position, memory_keys=2))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    made = rk.ReformerLM(config(position=position, memory_keys=2))
    with FullyShardedDataParallel.summon_full_params(wrapped):
        model.reset_parameters()
        assert_alike(model, made)
        model.save_pretrained(tmp_path)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    loaded, ids = rk.ReformerLM.from_pretrained(tmp_path), torch.randint(32, (2, L))
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())
    (loss, gradients), (expected, expected_gradients) = step(wrapped, ids), step(loaded.train(), ids)
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[f"_fsdp_wrapped_module.{name}"].view_as(g), g)
               for name, g in expected_gradients.items())  # fmt: skip


def test_weights_that_cannot_be_loaded_are_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"got shape .* on the meta device"):
        rk.ReformerLM(config()).save_pretrained(tmp_path)
    model = rk.ReformerLM(config())
    model.head = nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"head.weight must have shape \[32, 32\] and values, got shape \[7, 32\]"):
        model.save_pretrained(tmp_path)
    model = rk.ReformerLM(config())
    model.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"more.weight must have no place, got shape \[2, 2\]"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kinds", [{rk.ReversibleBlock}, {Residual, rk.TokenChunks}])
def test_fsdp1_of_parts(kinds: set[type[nn.Module]]) -> None:
    model, ids = rk.ReformerLM(config(hidden_dropout=0.1)), torch.randint(32, (2, L))
    expected, expected_gradients = step(model, ids)
    policy = ModuleWrapPolicy(kinds)
    wrapped = FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy
    )
    loss, gradients = step(wrapped, ids)
    assert torch.equal(loss, expected)
    gradients = {name.replace("_fsdp_wrapped_module.", ""): g for name, g in gradients.items()}
    gradients = {name: g.view_as(expected_gradients[name]) for name, g in gradients.items()}
    assert_equal_to_rounding(gradients, expected_gradients, 2 * L)
