"""What stands in two places, so that neither can change alone: the order of arguments, flags, limits."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels import _ops, functional, testing
from reformer_kernels._calls import AttentionCall, Call, HashCall, ListCall, OrderCall, SelectCall
from reformer_kernels.backends import _common, _native, cpu, cuda, reference_lists, triton

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA, BINDING = (ROOT / "csrc" / folder for folder in ("kernels/cpu", "kernels/cuda", "binding"))
ONLY_CPU = {"attn_mask"}
ONLY_CUDA = {"longest", "key_sums", "value_sums", "counts", "key_grads", "value_grads"}


def number(folder: Path, name: str) -> float:
    """The constant of this name in the sources of a folder."""
    text = "".join(file.read_text() for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")
    found = re.findall(rf"\b{name} = (?:tl\.constexpr\(|T\()?(\d[\d.e+-]*)f?\b", text)
    assert len(found) == 1, f"{name} in {folder}: {found}"
    return float(found[0])


def schema_of(library: str, name: str) -> dict[str, str]:
    op = getattr(getattr(torch.ops, library), name).default
    return {argument.name: str(argument.type) for argument in op._schema.arguments}


RECORDS: dict[str, type[Call]] = {
    "hash_buckets": HashCall, "bucket_order": OrderCall, "select_keys": SelectCall, "chunk_attention": AttentionCall,
    "list_attention": ListCall,
}  # fmt: skip


@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_arguments_of_ops_are_the_fields_of_their_records(name: str) -> None:
    forward = name.removesuffix("_backward")
    before: list[str] = []
    if name != forward:
        before = ["grad_out", *(x.name for x in getattr(torch.ops.reformer_kernels, forward).default._schema.returns)]
    assert list(schema_of("reformer_kernels", name)) == [*before, *RECORDS[forward]._fields]


@pytest.mark.parametrize(
    ("record", "first"),
    [(AttentionCall, ("query", "key", "value")), (ListCall, ("query", "key", "value")), (SelectCall, ("query", "key"))],
)
def test_what_has_gradients_or_is_cast_comes_first(record: Any, first: tuple[str, ...]) -> None:
    """Autograd and autocast take them by their number."""
    assert record._fields[: len(first)] == first


def test_options_of_lsh_attention_are_its_parameters() -> None:
    """For type checkers they are listed a second time, beside what decides the type of the result."""
    parsed = ast.parse(Path(functional.__file__).read_text())
    (listed,) = (x for x in ast.walk(parsed) if isinstance(x, ast.ClassDef) and x.name == "_LSHOptions")
    fields = {ast.unparse(x.target): ast.unparse(x.annotation) for x in listed.body if isinstance(x, ast.AnnAssign)}
    parameters = inspect.signature(rk.lsh_attention).parameters.values()
    options = {x.name: x.annotation for x in parameters if x.kind is x.KEYWORD_ONLY}
    assert options.pop("return_buckets") == "bool"
    assert list(fields.items()) == list(options.items())


def test_flags_are_those_of_the_kernels() -> None:
    (body,) = re.findall(
        r"enum Flag : int64_t \{.*?\n(.*?)\};", (ROOT / "csrc" / "kernels" / "params.h").read_text(), re.DOTALL
    )
    flags = {name: int(value) for name, value in re.findall(r"\bk(\w+) = (\d+),", body)}
    in_python = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): value for name, value in flags.items()}
    assert in_python == _native.FLAGS


def test_limits_are_those_of_the_cuda_kernels() -> None:
    (steps,) = re.findall(r"\bkHeadSteps\[\] = \{(.*?)\}", (CUDA / "plan.h").read_text())
    assert cuda.MAX_HEAD_DIM == 16 * max(map(int, steps.split(",")))
    assert cuda.MAX_FACTORS == number(CUDA, "kHashMaxFactors")
    assert cuda.MAX_CHUNKS == number(CUDA, "kAttentionMaxChunks")
    assert cuda.LIST_TILE == number(CUDA, "kAttentionRows")
    assert 2 * _common.MAX_SLOTS <= 2**31
    assert functional.MAX_NEIGHBOURS == number(BINDING, "kMaxNeighbours")


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (CPU, ("kSubgroups", "kExactKeys", "kQueries", "kChosenBlocks", "kLeast")),
        (CUDA, ("kSelectSubgroups", "kSelectExactKeys", "kAttentionRows", "kSelectBlocks", "kSelectLeast")),
    ],
    ids=["cpu", "cuda"],
)
def test_keys_are_chosen_by_the_sizes_of_the_reference(folder: Path, names: tuple[str, ...]) -> None:
    sizes = ("SUBGROUPS", "EXACT_KEYS", "KEY_BLOCK", "CHOSEN_BLOCKS", "LEAST")
    assert [getattr(reference_lists, name) for name in sizes] == [number(folder, name) for name in names]


def test_limits_are_those_of_the_triton_kernels() -> None:
    folder = Path(triton.__file__).parent
    assert triton.MAX_CHUNKS == 2 ** number(folder, "KEPT_BITS") - 1
    assert number(folder, "LEAST") == reference_lists.LEAST


@pytest.fixture
def cuda_schemas() -> None:
    if error := cuda.library().get("error"):
        pytest.skip(f"the CUDA library: {error}")


OPS = (
    "hash_buckets", "bucket_order", "chunk_attention_forward", "chunk_attention_backward", "select_keys",
    "list_attention_forward", "list_attention_backward",
)  # fmt: skip


@pytest.mark.usefixtures("cuda_schemas")
@pytest.mark.parametrize("name", OPS)
def test_both_libraries_take_the_same(name: str) -> None:
    on_cpu, on_gpu = schema_of("reformer_kernels_cpu", name), schema_of("reformer_kernels_cuda", name)
    assert on_cpu.keys() - on_gpu.keys() <= ONLY_CPU
    assert on_gpu.keys() - on_cpu.keys() <= ONLY_CUDA
    common = [argument for argument in on_cpu if argument in on_gpu]
    assert common == [argument for argument in on_gpu if argument in on_cpu]
    assert all(on_cpu[argument] == on_gpu[argument] for argument in common)


class Noted:
    """Notes the names with which ops are called, and computes nothing."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Callable[[dict[str, Any]], None]:
        return lambda given: self.names.update({name: list(given)})


@pytest.fixture(params=["cpu", "cuda"])
def noted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Noted, str]]:
    if request.param == "cuda":
        request.getfixturevalue("cuda_schemas")
    backend, ops = {"cpu": cpu, "cuda": cuda}[request.param], Noted()
    monkeypatch.setattr(backend, "_ops", ops)
    yield backend, ops, f"reformer_kernels_{request.param}"


def test_ops_are_called_with_the_names_of_their_schemas(noted: tuple[Any, Noted, str]) -> None:
    backend, ops, library = noted
    x = torch.randn(1, 2, 32, 8)
    for name in ("hash_buckets", "bucket_order", "chunk_attention"):
        call = testing.capture(rk.lsh_attention, x, x, chunk_length=8, op=name)
        results = getattr(backend, name)(call)
    backend.chunk_attention_backward(call, x, *results)
    for name in ("select_keys", "list_attention"):
        call = testing.capture(rk.clustered_attention, x, x, x, budget=8, op=name)
        results = getattr(backend, name)(call)
    backend.list_attention_backward(call, x, *results)
    assert ops.names.keys() >= set(OPS)
    for name, names in ops.names.items():
        assert sorted(names) == sorted(schema_of(library, name)), name


def test_an_op_refuses_other_names() -> None:
    assert not cpu.build_info().get("error")
    with pytest.raises(KeyError, match="name"):
        _native.CPU_OPS.select_isa({"isa": "avx2"})
    with pytest.raises(TypeError, match="select_isa takes name, got name, other"):
        _native.CPU_OPS.select_isa({"name": "avx2", "other": 1})
