"""What models return: attributes, keys, places, and leaves of a tree."""

import copy
import pickle
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch.utils import _pytree as pytree

import reformer_kernels as rk
from reformer_kernels.models import outputs
from reformer_kernels.models.outputs import LMOutput, ModelOutput

OUTPUTS = [kind for kind in vars(outputs).values() if isinstance(kind, type) and is_dataclass(kind)]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_places_and_keys(kind: type[ModelOutput]) -> None:
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    assert names[0] in ("loss", "last_hidden_state")
    for given in (names, names[:1], names[-1:], []):
        out = kind(**{name: torch.tensor(i) if name in given else None for i, name in enumerate(names)})
        values = [getattr(out, name) for name in given]
        assert out.keys() == given and len(out) == len(given)
        for same in (list(out), list(out.to_tuple()), out.values(), [v for _, v in out.items()], list(out[:])):
            assert len(same) == len(values) and all(a is b for a, b in zip(same, values, strict=True))
        assert all(out[i] is value and out[name] is value for i, (name, value) in enumerate(out.items()))
        assert list(dict(out)) == list({**out}) == given == [name for name, _ in out.items()]
        assert [name in out for name in names] == [name in given for name in names] and 0 not in out


def test_unpacked() -> None:
    model, ids = (
        rk.ReformerLM(rk.ReformerConfig(vocab_size=8, embed_dim=8, num_layers=1, num_heads=1)),
        torch.ones(1, 5),
    )
    out = model(ids.long(), labels=ids.long(), return_logits=True)
    loss, logits = out
    assert loss is out.loss is out[0] is out["loss"] and logits is out.logits is out[-1] is out["logits"]
    [logits] = model(ids.long())
    assert logits.shape == (1, 5, 8)


def test_what_is_not_there() -> None:
    out = LMOutput(logits=torch.ones(1))
    for key, kind, message in (
        ("loss", KeyError, r"LMOutput has \['logits'\], got 'loss'"),
        ("keys", KeyError, "got 'keys'"),
        (1, IndexError, "index out of range"),
        (1.5, TypeError, "must be integers or slices"),
    ):
        with pytest.raises(kind, match=message):
            out[key]  # type: ignore[index]
    with pytest.raises(TypeError, match="item assignment"):
        out["loss"] = torch.ones(1)  # type: ignore[index]
    with pytest.raises(TypeError, match="item deletion"):
        del out["logits"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_is_a_tree(kind: type[ModelOutput]) -> None:
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    out = kind(**{name: torch.tensor(float(i)) for i, name in enumerate(names)})
    doubled = pytree.tree_map(lambda t: 2 * t, out)
    assert type(doubled) is kind and [float(t) for t in doubled] == [2 * float(t) for t in out]
    leaves, spec = pytree.tree_flatten(kind(**{names[0]: torch.ones(1)}))
    assert len(leaves) == 1 and pytree.tree_unflatten(leaves, spec).keys() == names[:1]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert pytree.keystr(pytree.tree_flatten_with_path(out)[0][0][0]) == f".{names[0]}"
    for same in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(same) is kind and same.keys() == names


def test_functional_transforms_return_outputs() -> None:
    model = rk.ReformerLM(rk.ReformerConfig(vocab_size=8, embed_dim=8, num_layers=1, num_heads=1)).eval()
    ids = torch.randint(8, (3, 2, 10))
    out = torch.func.vmap(model)(ids)
    assert isinstance(out, LMOutput) and out.logits is not None and out.logits.shape == (3, 2, 10, 8)
