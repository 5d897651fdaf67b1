"""ReformerConfig, and models that are written to a directory and read again."""

import io
import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import ReformerConfig

OTHER: dict[str, Any] = {  # than the default, in every field
    "vocab_size": 50, "embed_dim": 24, "num_layers": 3, "num_heads": 4, "head_dim": 8,
    "attention": ("full", "lsh", "local"), "causal": True, "context_dim": 7, "n_hashes": 2, "n_buckets": (4, 2),
    "alignment": "bucket", "shift_keys": False, "hash_seed": -5, "rules": "paper",
    "lsh_chunk_length": 8, "lsh_chunks_before": 2, "lsh_chunks_after": 1,
    "local_chunk_length": 9, "local_chunks_before": 3, "local_chunks_after": 2,
    "attention_bias": True, "memory_keys": 3, "feed_forward_dim": 31, "activation": "silu", "glu": True,
    "feed_forward_chunk_length": None, "head_chunk_length": 5, "attention_dropout": 0.25, "hidden_dropout": 0.5,
    "norm": "rms", "norm_eps": 1e-5, "position": "learned", "max_length": 30, "axial_shape": (4, 8),
    "axial_dims": (10, 14), "tie_layers": True, "tie_embeddings": True, "streams": "mean", "reversible": False,
    "reversible_min_length": 6, "stream_dtype": None, "pad_token_id": 1, "decoder_start_token_id": 2, "num_labels": 3,
    "pooling": "mean", "initializer_range": 0.125,
}  # fmt: skip
LEAST = {
    "vocab_size": 1, "embed_dim": 1, "num_layers": 1, "num_heads": 1, "head_dim": 1, "context_dim": 1, "n_hashes": 1,
    "lsh_chunk_length": 1, "lsh_chunks_before": 0, "lsh_chunks_after": 0, "local_chunk_length": 1,
    "local_chunks_before": 0, "local_chunks_after": 0, "memory_keys": 0, "feed_forward_dim": 1,
    "feed_forward_chunk_length": 1, "head_chunk_length": 1, "max_length": 1, "reversible_min_length": 0,
    "num_labels": 1,
}  # fmt: skip
NULLABLE = (
    "head_dim", "context_dim", "n_buckets", "hash_seed", "feed_forward_dim", "feed_forward_chunk_length",
    "head_chunk_length", "max_length", "axial_shape", "axial_dims", "stream_dtype", "alignment",
)  # fmt: skip
BOOLS = ("causal", "attention_bias", "glu", "tie_layers", "tie_embeddings", "reversible", "shift_keys")
CHOICES = {
    "alignment": ("ring", "bucket"),
    "rules": ("default", "trax", "paper", "lucidrains", "huggingface"),
    "activation": ("gelu", "gelu_tanh", "relu", "silu", "sigmoid", "tanh", "identity"),
    "norm": ("layer", "rms"),
    "position": ("axial", "learned", "sinusoidal", "rotary", "none"),
    "streams": ("concat", "mean"),
    "stream_dtype": ("float32", "float64"),
    "pooling": ("first", "last", "mean"),
}
FRACTIONS = ("attention_dropout", "hidden_dropout")
POSITIVE = ("norm_eps", "initializer_range")
IDS = ("pad_token_id", "decoder_start_token_id")
KINDS = "('lsh', 'local', 'full')"
BUCKETS = "n_buckets must be a positive even integer or a sequence of them, got"
Case = tuple[dict[str, Any], type[Exception], str]


def wrong_values() -> list[Case]:
    cases: list[Case] = []
    for name, least in LEAST.items():
        most = 1024 if name.endswith(("before", "after")) else 2**31 - 1  # windows: as wide as attention allows
        span = f"between {least} and {most}"
        below = span if most == 1024 else f"at least {least}"
        cases += [
            ({name: least - 1}, ValueError, f"{name} must be {below}, got {least - 1}"),
            ({name: most + 1}, ValueError, f"{name} must be {span}, got {most + 1}"),
        ]
        wrong = (8.0, True) if name in NULLABLE else (8.0, True, None)
        cases += [({name: x}, TypeError, f"{name} must be an int, got {x!r}") for x in wrong]
    for name in BOOLS:
        cases += [({name: x}, TypeError, f"{name} must be a bool, got {x!r}") for x in (1, None, "yes")]
    for name, allowed in CHOICES.items():
        values = ("x", 3) if name in NULLABLE else ("x", 3, None)
        cases += [({name: x}, ValueError, f"{name} must be one of {allowed}, got {x!r}") for x in values]
    for name in FRACTIONS:
        cases += [({name: x}, ValueError, f"{name} must be between 0 and 1, got {x}") for x in (-0.1, 1.5, math.nan)]
        cases += [({name: x}, TypeError, f"{name} must be a float, got {x!r}") for x in (None, "0.1", True)]
    for name in POSITIVE:
        numbers = (0, -1.0, math.inf, math.nan)
        cases += [({name: x}, ValueError, f"{name} must be positive and finite, got {x}") for x in numbers]
        cases += [({name: x}, TypeError, f"{name} must be a float, got {x!r}") for x in (None, "1", True)]
    for name in IDS:
        cases += [({name: x}, ValueError, f"{name} must be between 0 and 255, got {x}") for x in (-1, 256)]
        cases += [({name: x}, TypeError, f"{name} must be an int, got {x!r}") for x in (None, 0.0)]
    return cases


def wrong_structures() -> list[Case]:
    seeds = "hash_seed must be between -9223372036854775808 and 9223372036854775807, got"
    cases: list[Case] = [
        ({"hash_seed": 2**63}, ValueError, f"{seeds} {2**63}"),
        ({"hash_seed": -(2**63) - 1}, ValueError, f"{seeds} {-(2**63) - 1}"),
        ({"hash_seed": 1.5}, TypeError, "hash_seed must be an int, got 1.5"),
        ({"attention": ["lsh", "x"]}, ValueError, f"attention must be one of {KINDS}, got 'x'"),
        ({"embed_dim": 30}, ValueError,
         "embed_dim must be divisible by num_heads unless head_dim is given, got 30 and 8"),
        ({"n_buckets": [2**16, 2**16]}, ValueError,
         f"n_buckets must have a product below 2**31 - 1, got {(2**16, 2**16)}"),
        ({"attention": ["local"], "memory_keys": 3}, ValueError,
         "memory_keys must be 0 without LSH and full layers (local ones have none), got 3"),
        ({"position": "rotary", "head_dim": 5}, ValueError, 'head_dim must be even with position="rotary", got 5'),
        ({"position": "rotary", "embed_dim": 56}, ValueError, 'head_dim must be even with position="rotary", got 7'),
        ({"axial_shape": [5, 8], "max_length": 41}, ValueError,
         "axial_shape must have a product of at least max_length 41, got (5, 8)"),
        ({"axial_dims": [512]}, ValueError, "axial_dims must have one width for each axis of (256, 256), got (512,)"),
        ({"axial_dims": [256, 255]}, ValueError, "axial_dims must sum up to embed_dim 512, got (256, 255)"),
        ({"tie_embeddings": True}, ValueError,
         'streams must be "mean" with tie_embeddings (the head has to be as wide as the embedding), got \'concat\''),
    ]  # fmt: skip
    cases += [
        ({"attention": x}, TypeError, f"attention must be a tuple of kinds of layers, {KINDS}, got {x!r}")
        for x in ("lsh", (), None)
    ]
    cases += [({"n_buckets": x}, ValueError, f"{BUCKETS} {x!r}") for x in (7, 0, 4.0, True, "4", (4, 3), ())]
    for name in ("axial_shape", "axial_dims"):
        cases += [
            ({name: x}, TypeError, f"{name} must be None or a tuple of integers, got {x!r}") for x in (16, (), "88")
        ]
        cases += [
            ({name: (8, 8.0)}, TypeError, f"{name} must be an int, got 8.0"),
            ({name: (8, 0)}, ValueError, f"{name} must be at least 1, got 0"),
        ]
    return cases


# ---- the configuration


def test_every_field_is_checked_here() -> None:
    names = {field.name for field in fields(ReformerConfig)}
    assert names == {*LEAST, *BOOLS, *CHOICES, *FRACTIONS, *POSITIVE, *IDS} | {
        "attention", "n_buckets", "hash_seed", "axial_shape", "axial_dims",
    }  # fmt: skip
    assert names == set(OTHER) and {f.name for f in fields(ReformerConfig) if f.default is None} | {
        "feed_forward_chunk_length", "head_chunk_length", "stream_dtype",
    } == set(NULLABLE)  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), [*wrong_values(), *wrong_structures()])
def test_wrong_values(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ReformerConfig(**changes)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ReformerConfig.from_dict(changes)


def test_the_largest_hash_seed_makes_a_model() -> None:
    """Layers have seeds of their own, after this one."""
    rk.ReformerLM(tiny(hash_seed=2**63 - 1, num_layers=4))


def test_round_trips() -> None:
    config = ReformerConfig(**OTHER)
    assert all(OTHER[field.name] != field.default for field in fields(config))
    assert config.to_dict() == OTHER
    for again in (
        ReformerConfig.from_dict(config.to_dict()),
        ReformerConfig.from_json(config.to_json()),
        ReformerConfig.from_dict(json.loads(json.dumps(OTHER))),
    ):
        assert again == config and hash(again) == hash(config)
    assert list(json.loads(config.to_json())) == list(OTHER)
    assert ReformerConfig.from_dict({}) == ReformerConfig() != config
    for name in NULLABLE:
        assert getattr(ReformerConfig.from_json(f'{{"{name}": null}}'), name) is None


def test_is_frozen_and_keeps_tuples() -> None:
    lists: dict[str, Any] = {"attention": ["lsh"], "n_buckets": [4, 2], "axial_shape": [4, 8], "axial_dims": [500, 12]}
    config = ReformerConfig(**lists)
    for name, value in lists.items():
        assert getattr(config, name) == tuple(value)
    with pytest.raises(FrozenInstanceError):
        config.causal = True  # type: ignore[misc]


def test_what_is_no_configuration() -> None:
    message = r"^the configuration has unknown fields \['heads', 'width'\]; known are \['activation', .*'vocab_size'\]$"
    with pytest.raises(ValueError, match=message):
        ReformerConfig.from_dict({"width": 3, "vocab_size": 5, "heads": 2})
    for values, got in (([1], "list"), (None, "NoneType"), ("x", "str")):
        with pytest.raises(TypeError, match=f"^the configuration must be a mapping of fields to values, got {got}$"):
            ReformerConfig.from_json(json.dumps(values))
    with pytest.raises(ValueError, match="Expecting"):
        ReformerConfig.from_json("{")


def test_derived_properties() -> None:
    config = ReformerConfig(num_layers=5, attention=("local", "lsh", "full"))
    assert config.layers == ("local", "lsh", "full", "local", "lsh")
    assert (config.attention_dim, config.hidden_dim) == (64, 1024)
    assert ReformerConfig(head_dim=5).attention_dim == 5 and ReformerConfig(streams="mean").hidden_dim == 512
    for name in CHOICES["rules"]:
        expected = rk.AttentionRules() if name == "default" else getattr(rk.AttentionRules, name)()
        assert ReformerConfig(rules=name).attention_rules == expected
    dtypes = {"float32": torch.float32, "float64": torch.float64, None: None}
    assert all(ReformerConfig(stream_dtype=name).torch_stream_dtype == dtype for name, dtype in dtypes.items())


@pytest.mark.parametrize(
    ("changes", "longest", "axes"),
    [
        ({}, 65536, (256, 256)),
        ({"max_length": 64}, 64, (8, 8)),
        ({"max_length": 65}, 65, (5, 16)),
        ({"max_length": 1}, 1, (1, 1)),
        ({"axial_shape": (3, 5, 7)}, 105, (3, 5, 7)),
        ({"axial_shape": (3, 5), "max_length": 14}, 14, (3, 5)),
        ({"position": "learned"}, 65536, (256, 256)),
        ({"position": "learned", "axial_shape": (3, 5)}, 65536, (3, 5)),
        ({"position": "learned", "max_length": 17, "axial_dims": (1,)}, 17, (3, 8)),
        *(({"position": x, "max_length": 17}, None, (3, 8)) for x in ("sinusoidal", "rotary", "none")),
    ],
)
def test_longest_and_axes(changes: dict[str, Any], longest: int | None, axes: tuple[int, ...]) -> None:
    config = ReformerConfig(**changes)
    assert (config.longest, config.axes) == (longest, axes)


@pytest.mark.parametrize("length", [1, 2, 3, 127, 4096, 4097, 500_001, 2**31 - 1])
def test_default_axes_hold_every_position(length: int) -> None:
    rows, columns = ReformerConfig(max_length=length).axes
    assert (rows - 1) * columns < length <= rows * columns and columns <= 4 * rows + 4


# ---- files


def tiny(**changes: Any) -> ReformerConfig:
    options: dict[str, Any] = {
        "vocab_size": 30, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "lsh_chunk_length": 8,
        "local_chunk_length": 8, "max_length": 32, "initializer_range": 0.3,
    }  # fmt: skip
    return ReformerConfig(**{**options, **changes})


TOKENS = torch.arange(24).view(2, 12)
MODELS: dict[str, Callable[..., Any]] = {
    "Reformer": lambda **o: rk.Reformer(tiny(**{"context_dim": 5, **o})),
    "ReformerLM": lambda **o: rk.ReformerLM(tiny(**o)),
    "ReformerMaskedLM": lambda **o: rk.ReformerMaskedLM(tiny(**o)),
    "ReformerSequenceClassifier": lambda **o: rk.ReformerSequenceClassifier(tiny(**{"pooling": "mean", **o})),
    "ReformerQuestionAnswering": lambda **o: rk.ReformerQuestionAnswering(tiny(**o)),
    "ReformerSeq2Seq": lambda **o: rk.ReformerSeq2Seq(tiny(embed_dim=24, vocab_size=40, norm="rms"), tiny(**o)),
}


def outputs(model: Any) -> dict[str, Tensor]:
    arguments: dict[str, Any] = {}
    if isinstance(model, rk.Reformer):
        arguments["context"] = torch.linspace(-1, 1, 30, dtype=next(model.parameters()).dtype).view(2, 3, 5)
    if isinstance(model, rk.ReformerSeq2Seq):
        arguments["decoder_input_ids"] = TOKENS[:, :7]
    with torch.no_grad():
        return {name: x for name, x in vars(model(TOKENS, **arguments)).items() if x is not None}


def assert_same(model: Any, other: Any) -> None:
    state, again = model.state_dict(), other.state_dict()
    assert list(state) == list(again)
    for name, x in state.items():
        assert again[name].dtype == x.dtype and torch.equal(again[name], x), name
    expected, got = outputs(model.eval()), outputs(other)
    assert expected and list(got) == list(expected)
    assert all(torch.equal(got[name], x) for name, x in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for where in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(where, refuse)
    model = MODELS[name]().to(dtype).train()
    next(model.parameters()).requires_grad_(False)
    directory = tmp_path / "not" / "there"
    model.save_pretrained(str(directory))
    assert model.training and sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    loaded = type(model).from_pretrained(directory)
    assert type(loaded) is type(model) and not any(module.training for module in loaded.modules())
    assert all(getattr(loaded, config) == getattr(model, config) for config in model.config_names)
    parameters = list(loaded.parameters())
    assert all(p.requires_grad and p.is_leaf and p.dtype == dtype and p.data_ptr() % 64 == 0 for p in parameters)
    assert_same(model, loaded)
    again = type(model).from_pretrained(str(directory), device=torch.device("cpu"))
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in parameters}


def test_each_weight_keeps_its_own_dtype(tmp_path: Path) -> None:
    model = MODELS["ReformerLM"](position="sinusoidal").bfloat16()
    model.reformer.merge.norm.float()
    model.head.double()
    model.save_pretrained(tmp_path)
    loaded = rk.ReformerLM.from_pretrained(tmp_path)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["ReformerLM", "ReformerSeq2Seq"])
def test_what_is_tied_is_stored_once_and_stays_tied(name: str, tmp_path: Path) -> None:
    model = MODELS[name](tie_layers=True, tie_embeddings=True, streams="mean", attention=("lsh", "local"), num_layers=4)
    model.save_pretrained(tmp_path)
    assert (
        set(load_file(tmp_path / "model.safetensors"))
        == {n for n, _ in model.named_parameters()}
        < set(model.state_dict())
    )
    loaded = type(model).from_pretrained(tmp_path)
    trunk = loaded.decoder if name == "ReformerSeq2Seq" else loaded.reformer
    assert loaded.head.weight is trunk.embedding.weight
    halves = [half for block in trunk.layers.blocks for half in (block.f, block.g)]
    per_layer = len(halves) // 4  # layers 0 and 2 are of a kind, and so are 1 and 3
    assert halves[: 2 * per_layer] == halves[2 * per_layer :] and len(set(halves)) == per_layer + 1
    assert_same(model, loaded)


def test_saving_over_an_older_save(tmp_path: Path) -> None:
    MODELS["ReformerLM"](num_layers=3).save_pretrained(tmp_path)
    model = MODELS["ReformerMaskedLM"]()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(model, rk.ReformerMaskedLM.from_pretrained(tmp_path))
    rk.ReformerMaskedLM.from_pretrained(tmp_path).save_pretrained(tmp_path)  # over the file that it was read from
    assert_same(model, rk.ReformerMaskedLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("writer", ["safetensors.torch.save_file", "pathlib.Path.write_text"])
def test_an_interrupted_save_leaves_the_old_one(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files: new weights beside an old configuration are no model."""
    model = MODELS["ReformerLM"]()
    model.save_pretrained(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(first: Any, second: Any) -> None:  # the path is save_file's second argument and write_text's first
        (first if isinstance(first, Path) else second).write_bytes(b"{")
        raise OSError("no space left")

    monkeypatch.setattr(writer, half)
    for directory, expected in ((tmp_path, old), (tmp_path / "new", {})):
        with pytest.raises(OSError, match="no space left"):
            MODELS["ReformerLM"](num_layers=3).save_pretrained(directory)
        assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == expected
    monkeypatch.undo()
    assert_same(model, rk.ReformerLM.from_pretrained(tmp_path))


# ---- files that are no model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    MODELS["ReformerLM"]().save_pretrained(tmp_path)
    return tmp_path


def assert_refused(directory: Path, kind: type[Exception], message: str, cls: Any = rk.ReformerLM) -> None:
    """``message``: a pattern."""
    with pytest.raises(kind, match=f"^{message}$") as caught:
        cls.from_pretrained(directory)
    assert caught.type is kind


def test_missing_files_and_other_models(saved: Path) -> None:
    where = re.escape(str(saved))
    assert_refused(saved / "x", FileNotFoundError, f"there is no config.json in {where}/x")
    for cls in (rk.Reformer, rk.ReformerMaskedLM, rk.ReformerSeq2Seq):
        assert_refused(saved, ValueError, f"{where}/config.json must be of a {cls.__name__}, got 'ReformerLM'", cls)
    for name in ("model.safetensors", "config.json"):
        (saved / name).unlink()
        assert_refused(saved, FileNotFoundError, f"there is no {name} in {where}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", " is no valid JSON: Expecting value: .*"),
        ("{", " is no valid JSON: Expecting property name .*"),
        (b"\xff", " is no valid JSON: 'utf-8' codec can't decode byte .*"),
        ("[1]", " must be of a ReformerLM, got None"),
        ("{}", " must be of a ReformerLM, got None"),
        ({"model": ["ReformerLM"]}, r" must be of a ReformerLM, got \['ReformerLM'\]"),
        ({"more": 1}, r" must have the keys \['model', 'config'\], got \['model', 'config', 'more'\]"),
        ('{"model": "ReformerLM"}', r" must have the keys \['model', 'config'\], got \['model'\]"),
        ({"config": [1]}, ": the configuration must be a mapping of fields to values, got list"),
        ({"config": {"heads": 2}}, r": the configuration has unknown fields \['heads'\]; known are .*"),
        ({"config": {"embed_dim": "16"}}, ": embed_dim must be an int, got '16'"),
        ({"config": {"embed_dim": 0}}, ": embed_dim must be at least 1, got 0"),
        ({"config": {"norm_eps": math.nan}}, ": norm_eps must be positive and finite, got nan"),
    ],
)
def test_a_configuration_that_is_none(change: Any, message: str, saved: Path) -> None:
    path = saved / "config.json"
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change})
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    assert_refused(saved, ValueError, re.escape(str(path)) + message)


class Trap:
    """Unpickling this makes a directory."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.place,)


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "header", "pickle", "torch.save"])
def test_weights_that_are_no_safetensors(damage: str, saved: Path) -> None:
    path = saved / "model.safetensors"
    good, checkpoint = path.read_bytes(), io.BytesIO()
    torch.save({"head.bias": Trap(saved / "sprung")}, checkpoint)
    path.write_bytes({
        "empty": b"", "cut": good[:-1], "longer": good + b"x", "header": good[:8] + b"x" + good[9:],
        "pickle": pickle.dumps(Trap(saved / "sprung")), "torch.save": checkpoint.getvalue(),
    }[damage])  # fmt: skip
    assert_refused(saved, ValueError, f"{re.escape(str(path))} is no valid safetensors file: .*")
    assert not (saved / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r" does not fit its config.json: missing \['head.bias'\], unexpected \[\]"),
        ({"more": torch.ones(1)}, r" does not fit its config.json: missing \[\], unexpected \['more'\]"),
        ({"head.bias": torch.ones(31)}, r": head.bias must have shape \[30\], got \[31\]"),
        ({"head.bias": torch.ones(30, 1)}, r": head.bias must have shape \[30\], got \[30, 1\]"),
        *(
            ({"head.bias": torch.ones(30).to(dtype)}, f".*head.bias.*{dtype}.*")
            for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
        ),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Tensor | None], message: str, saved: Path) -> None:
    path = saved / "model.safetensors"
    weights = {name: x for name, x in {**load_file(path), **change}.items() if x is not None}
    save_file(weights, path)
    assert_refused(saved, ValueError, re.escape(str(path)) + message)


def test_an_unknown_device_is_not_the_fault_of_the_file(saved: Path) -> None:
    with pytest.raises(Exception, match=r"^(?!.*no valid safetensors).*no such device"):
        rk.ReformerLM.from_pretrained(saved, device="no such device")


@pytest.mark.parametrize(
    ("options", "alignment", "buckets"),
    [
        ({}, "ring", None),  # as published
        ({"n_buckets": 6}, "ring", 6),
        ({"causal": True}, "bucket", (128,)),  # twice as many as 4,096 tokens have chunks
        ({"causal": True, "max_length": 1000}, "bucket", (30,)),
        ({"causal": True, "max_length": 8, "position": "rotary"}, "bucket", (2,)),
        ({"causal": True, "max_length": 65536, "lsh_chunk_length": 32}, "bucket", (64, 64)),
        ({"causal": True, "axial_shape": (16, 128)}, "bucket", (64,)),
        ({"causal": True, "n_buckets": (4, 2)}, "bucket", (4, 2)),
        ({"causal": True, "alignment": "ring"}, "ring", None),
        ({"alignment": "bucket"}, "bucket", (128,)),
    ],
)
def test_windows_of_lsh_layers(options: dict[str, Any], alignment: str, buckets: Any) -> None:
    config = rk.ReformerConfig(**options)
    assert (config.lsh_alignment, config.lsh_buckets) == (alignment, buckets)
    layer = rk.Reformer(config).layers.get_submodule("blocks.1.f.layer")
    assert isinstance(layer, rk.LSHSelfAttention)
    assert (layer.options["alignment"], layer.options["n_buckets"]) == (alignment, buckets)
