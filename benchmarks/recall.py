"""``python -m benchmarks.recall``: how well clustered attention approximates the attention of trained models.

For every way to choose the keys (a table, POLICIES): the share of the softmax mass that is seen, and the error of the
output, on the heads of MiniLM and of a causal byte LM. Then both models with every attention replaced.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import clustered
from reformer_kernels.demo.figure import GREY, sheet
from reformer_kernels.demo.text import DemoError, split_text

from . import recall_data as data
from .machine import environment
from .recall_data import Heads
from .report import file_to_write, table

Row = dict[str, Any]
BUDGETS = (64, 128, 256)
BUDGET = 128  # of what is measured at one budget only
MOST_WEIGHTS = 2**22  # dense weights in memory at once
IGNORED = -1e30
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(rk.clustered_attention).parameters.items()
    if parameter.default is not parameter.empty
}


class Seen(NamedTuple):
    """What one approximation gives for R query rows."""

    keys: Tensor  # bool [H, R, S], True: one of the keys that the query attends
    with_rest: Tensor  # [H, R, D], output with the rest key for all others
    without: Tensor  # [H, R, D], output without it


@dataclass(frozen=True)
class Policy:
    """One way to choose keys.

    Args:
        kind: of KINDS.
        options: of the function of that kind.
        budgets: at which it is measured.
    """

    kind: str
    options: Row = field(default_factory=dict)
    budgets: tuple[int, ...] = BUDGETS


def _variants() -> dict[str, Policy]:
    """The defaults with one option changed at a time, at one budget."""
    found = {}
    for grouping in ("position", "hash"):
        for option, values in (("chunk_length", (16, 32, 64)), ("local_fraction", (0.125, 0.5))):
            for value in values:
                options = {"grouping": grouping, option: value}
                found[f"{grouping} groups, {option} {value:g}"] = Policy("clustered", options, (BUDGET,))
    return found


POLICIES = {
    "oracle: the true top keys": Policy("oracle"),
    "position groups": Policy("clustered", {"grouping": "position"}),
    "hash groups": Policy("clustered", {"grouping": "hash"}),
    "local window": Policy("local"),
    "sorted LSH windows": Policy("sorted"),
    "random keys": Policy("random"),
    **_variants(),
}

WHOLE_MINILM: list[Row] = [
    *({"budget": budget, "grouping": grouping} for grouping in ("position", "hash") for budget in BUDGETS),
    *({"budget": BUDGET, "grouping": grouping, "chunk_length": 32} for grouping in ("position", "hash")),
    {"budget": BUDGET, "rest_term": False},
    {"budget": BUDGET, "local_fraction": 1.0},  # nothing is chosen
]
TUNED: Row = {"budget": BUDGET, "grouping": "hash", "local_fraction": 0.5}
WHOLE_LM: list[Row] = [
    *({"budget": budget, "grouping": grouping} for grouping in ("position", "hash") for budget in BUDGETS),
    {"budget": BUDGET, "grouping": "position", "local_fraction": 0.5},
    TUNED,
    {"budget": BUDGET, "rest_term": False},
    {"budget": BUDGET, "local_fraction": 1.0},
]

# The rules: (heads [H, L, D], rows, budget, causal, options) -> what is seen.


def by_clustered(heads: Heads, rows: Tensor, budget: int, causal: bool, **options: Any) -> Seen:
    """What the library does."""
    inputs = [x[None] for x in heads]
    options = {**DEFAULTS, "budget": budget, "causal": causal, **options}
    without, weights = clustered.attend(*inputs, need_weights=True, **{**options, "rest_term": False})
    with_rest = rk.clustered_attention(*inputs, **options)
    assert weights is not None
    return Seen(weights[0][:, rows] > 0, with_rest[0][:, rows], without[0][:, rows])


def by_oracle(heads: Heads, rows: Tensor, budget: int, causal: bool) -> Seen:
    """The keys with the highest scores of every single query: no choice of as many keys sees more."""
    scores = exact_scores(heads, rows, causal)
    return from_keys(heads, rows, causal, _top(scores, budget))


def by_local(heads: Heads, rows: Tensor, budget: int, causal: bool) -> Seen:
    """The keys around the query, or up to it."""
    offset = torch.arange(heads.key.shape[1]) - rows[:, None]
    begin = 1 - budget if causal else -(budget // 2)
    keys = (offset >= begin) & (offset < begin + budget)
    return from_keys(heads, rows, causal, keys.expand(len(heads.key), -1, -1))


def by_sorted(heads: Heads, rows: Tensor, budget: int, causal: bool) -> Seen:
    """As the Reformer does it: queries and keys are sorted by bucket, and chunks attend themselves and the one before.

    Its queries and keys are the same; these are not, so they are centred first, and keys are sorted by themselves.
    """
    length, chunk = heads.key.shape[1], budget // 2
    n_chunks = math.ceil(length / chunk)
    generator = torch.Generator().manual_seed(0)
    rotations = torch.randn(len(heads.key), heads.key.shape[2], max(1, n_chunks // 2), generator=generator)
    chunks = []
    for x in (heads.query, heads.key):
        rotated = (x - x.mean(1, keepdim=True)) @ rotations
        order = torch.cat((rotated, -rotated), -1).argmax(-1).argsort(stable=True)
        chunks.append(order.argsort() // chunk)
    before = (chunks[0][:, rows, None] - chunks[1][:, None]) % n_chunks
    return from_keys(heads, rows, causal, before <= 1)


def by_chance(heads: Heads, rows: Tensor, budget: int, causal: bool) -> Seen:
    generator = torch.Generator().manual_seed(0)
    lots = torch.rand(len(heads.key), len(rows), heads.key.shape[1], generator=generator)
    return from_keys(heads, rows, causal, _top(lots.masked_fill(~visible(heads, rows, causal), -1.0), budget))


KINDS: dict[str, Callable[..., Seen]] = {
    "clustered": by_clustered, "oracle": by_oracle, "local": by_local, "sorted": by_sorted, "random": by_chance,
}  # fmt: skip


def _top(scores: Tensor, count: int) -> Tensor:
    top = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top, True)


def visible(heads: Heads, rows: Tensor, causal: bool) -> Tensor:
    """bool [R, S], True: the mask lets the query see the key."""
    keys = torch.arange(heads.key.shape[1])
    return keys <= rows[:, None] if causal else keys.expand(len(rows), -1) >= 0


def exact_scores(heads: Heads, rows: Tensor, causal: bool) -> Tensor:
    """[H, R, S]; what the mask hides has IGNORED."""
    scores: Tensor = heads.query[:, rows] @ heads.key.mT * heads.query.shape[2] ** -0.5
    return scores.masked_fill(~visible(heads, rows, causal), IGNORED)


def from_keys(heads: Heads, rows: Tensor, causal: bool, keys: Tensor) -> Seen:
    """The outputs of queries that see only some keys, bool [H, R, S].

    The rest key is as in the library: the mean of all keys that the query may see, with the logarithm of the number of
    unseen ones added to its score, and the mean of their values.
    """
    allowed = visible(heads, rows, causal)
    keys = keys & allowed
    scores = exact_scores(heads, rows, causal).masked_fill(~keys, IGNORED)
    mean = allowed.to(scores.dtype) / allowed.sum(-1, keepdim=True)
    rest = heads.query.shape[2] ** -0.5 * (heads.query[:, rows] * (mean @ heads.key)).sum(-1, keepdim=True)
    rest = rest + (allowed & ~keys).sum(-1, keepdim=True).to(scores.dtype).log()
    weights = torch.cat((scores, rest.clamp(min=IGNORED)), -1).softmax(-1)
    with_rest = weights[..., :-1] @ heads.value + weights[..., -1:] * (mean @ heads.value)
    without = scores.softmax(-1) @ heads.value * keys.any(-1, keepdim=True)  # a query that sees no key gives 0
    return Seen(keys, with_rest, without)


def evaluate(heads: Heads, policy: Policy, budget: int, causal: bool, rows: Tensor) -> Row:
    """Recall and errors of a policy on heads [T, H, L, D], at some query rows.

    Returns:
        ``recall``: the share of the true softmax mass on seen keys, mean over rows, texts and heads; ``worst_head``:
        of the head where it is smallest; ``error`` with and ``error_without_rest``: norm of the difference to the exact
        output relative to its norm, over all rows of a head and text, then mean; ``heads``: recall and error of each.
    """
    results = []
    for part in _parts(heads):
        seen = KINDS[policy.kind](part, rows, budget, causal, **policy.options)
        weights = exact_scores(part, rows, causal).softmax(-1)
        exact = weights @ part.value
        errors = [(out - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2)) for out in (seen.with_rest, seen.without)]
        results.append(torch.stack([(weights * seen.keys).sum(-1).mean(-1), *errors]))  # [3, H of the part]
    recall, error, without = torch.cat(results, 1).unflatten(1, heads.key.shape[:2]).mean(1)
    return {
        "recall": float(recall.mean()), "worst_head": float(recall.min()),
        "error": float(error.mean()), "error_without_rest": float(without.mean()),
        "heads": {name: [round(v, 3) for v in x.tolist()] for name, x in (("recall", recall), ("error", error))},
    }  # fmt: skip


def _parts(heads: Heads) -> Iterator[Heads]:
    """Some heads of one text at a time, [H, L, D], so that dense weights fit."""
    texts, count, length, _ = heads.key.shape
    step = max(1, MOST_WEIGHTS // length**2)
    for text in range(texts):
        for head in range(0, count, step):
            yield Heads(*(x[text, head : head + step] for x in heads))


class Task(NamedTuple):
    name: str
    heads: Heads
    causal: bool
    rows: Tensor


def sample_rows(length: int, count: int) -> Tensor:
    """Query rows, all or a random choice in rising order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(length, generator=generator)[:count].sort().values


# Whole models.


def attend_clustered(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function for Hugging Face models; the mask is bool [B, L], True: a token, or None."""
    padding = None if attention_mask is None else ~attention_mask.bool()
    options = module.config.clustered_options
    out = rk.clustered_attention(query, key, value, key_padding_mask=padding, scale=scaling, **options)
    return out.transpose(1, 2), None


def replace_in_bert(model: Any, **options: Any) -> Any:
    """A copy of a Hugging Face encoder in which every attention is ``clustered_attention``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask  # gives the padding as it is, bool [B, L] or None

    AttentionInterface.register("clustered", attend_clustered)
    AttentionMaskInterface.register("clustered", flash_attention_mask)
    model = copy.deepcopy(model)
    model.config.clustered_options = options
    model.set_attn_implementation("clustered")
    return model


def minilm_effect(model: Any, ids: Tensor, **options: Any) -> Row:
    """Cosines between the embeddings of the original and of a copy with every attention replaced."""
    cosines = F.cosine_similarity(data.embeddings(model, ids), data.embeddings(replace_in_bert(model, **options), ids))
    return {"options": options, "mean": float(cosines.mean()), "lowest": float(cosines.min()), "texts": len(cosines)}


def mean_bits(model: Any, text: Tensor, length: int) -> float:
    """Mean bits per byte over the whole windows of a text."""
    windows = text[: (len(text) - 1) // length * length + 1].unfold(0, length + 1, length)
    with torch.no_grad():
        return sum(float(data.loss_bits(model, window[None])) for window in windows) / len(windows)


def convert(model: Any, **options: Any) -> Any:
    """A copy of a model whose ``nn.MultiheadAttention`` layers became ours, with the same parameters."""
    model = copy.deepcopy(model)
    rk.convert_attention(model, causal=True, **options)
    return model


def lm_effect(model: Any, train_data: Tensor, held_out: Tensor, options: argparse.Namespace) -> list[Row]:
    """Bits per byte of the LM as it is and with every layer converted, before and after some more training of both."""

    text = held_out[: options.windows * max(options.lm_lengths) + 1]  # the same bytes for every length

    def measured(name: str, some: Any, steps: int = 0) -> Row:
        bits = {str(length): mean_bits(some, text, length) for length in options.lm_lengths}
        row = {"model": name, "fine_tuned": steps, "bits": bits}
        print("  " + lm_line(row), flush=True)
        return row

    rows = [measured("original", model)]
    for changed in WHOLE_LM:
        rows.append(measured(options_text(changed), convert(model, **changed)))
    for name, some in {"original": copy.deepcopy(model), options_text(TUNED): convert(model, **TUNED)}.items():
        data.fine_tune(some, train_data, options.fine_tune_steps, min(options.lm_lengths))
        rows.append(measured(name, some, options.fine_tune_steps))
    return rows


def options_text(options: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def lm_line(row: Row) -> str:
    bits = ", ".join(f"{bits:.3f} at L {length}" for length, bits in row["bits"].items())
    tuned = f", after {row['fine_tuned']} more steps" if row["fine_tuned"] else ""
    return f"{row['model']}{tuned}: {bits}"


# The command.


def measure_task(task: Task) -> list[Row]:
    rows = []
    for name, policy in POLICIES.items():
        for budget in policy.budgets:
            if budget < task.heads.key.shape[2]:
                row = evaluate(task.heads, policy, budget, task.causal, task.rows)
                rows.append({"task": task.name, "policy": name, "budget": budget, **row})
                print(f"  {name}, B {budget}: recall {cell(row)}", flush=True)
    return rows


def cell(row: Row) -> str:
    """Recall, that of the worst head, error, and that without the rest term."""
    return f"{row['recall']:.3f} / {row['worst_head']:.2f}, {row['error']:.3f} ({row['error_without_rest']:.3f})"


def run(options: argparse.Namespace) -> Row:
    """All measurements, printed as they come.

    Raises:
        MissingError: something is not installed.
    """
    results: Row = {"environment": environment(), "settings": settings(options), "recall": [], "minilm": [], "lm": []}
    torch.backends.mha.set_fastpath_enabled(False)  # it would hold all weights of a long causal layer

    def note(task: Task) -> None:
        texts, heads, length, _ = task.heads.key.shape
        print(f"{task.name}: {heads} heads, {texts} texts, {len(task.rows)} of {length} query rows", flush=True)
        results["recall"] += measure_task(task)

    if "minilm" in options.models:
        model, tokenizer = data.minilm()
        heads = data.bert_heads(model, data.minilm_texts(tokenizer, options.texts))
        for name, causal in (("MiniLM, L 512", False), ("MiniLM under a causal mask, L 512", True)):
            note(Task(name, heads, causal, sample_rows(512, options.rows)))
        ids = data.minilm_texts(tokenizer, options.embedded_texts)
        for changed in WHOLE_MINILM:
            row = minilm_effect(model, ids, **changed)
            results["minilm"].append(row)
            print(f"  embedding cosine with {changed}: mean {row['mean']:.4f}", flush=True)
    if "lm" in options.models:
        longest = max(options.lm_lengths)
        train_data, held_out = split_text(data.source_text(), longest)
        lm = data.lm(options.cache, data.LMSize(longest=longest), train_data, options.train_seconds)
        for length in options.lm_lengths:
            windows = held_out.unfold(0, length, length)[: min(options.texts, 2)]
            name = f"byte LM, causal, L {length:,}"
            note(Task(name, data.lm_heads(lm, windows), True, sample_rows(length, options.rows)))
        results["lm"] = lm_effect(lm, train_data, held_out, options)
    return results


def settings(options: argparse.Namespace) -> Row:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def recall_table(rows: list[Row], budget: int) -> str:
    """Policies by tasks."""
    rows = [row for row in rows if row["budget"] == budget]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["policy"], row["task"]): cell(row) for row in rows}
    names = dict.fromkeys(row["policy"] for row in rows)
    return table(
        [f"B = {budget}", *tasks], ([name, *(cells.get((name, task), "") for task in tasks)] for name in names)
    )


def markdown(results: Row) -> str:
    """All tables of a run."""
    env = results["environment"]
    parts = [
        f"{env['cpu']}, torch {env['torch']}, revision {env['revision']}, {env['date'][:10]}. Cells: recall, "
        "mean and of the worst head; error (without the rest term).\n"
    ]
    parts += [recall_table(results["recall"], budget) for budget in BUDGETS]
    if results["minilm"]:
        body = (
            [options_text(row["options"]), f"{row['mean']:.4f}",
             f"{row['lowest']:.4f}"]
            for row in results["minilm"]
        )  # fmt: skip
        parts.append(table(["MiniLM, every attention replaced", "embedding cosine, mean", "lowest"], body))
    if results["lm"]:
        lengths = list(results["lm"][0]["bits"])
        body = (
            [row["model"], str(row["fine_tuned"] or ""), *(f"{row['bits'][length]:.3f}" for length in lengths)]
            for row in results["lm"]
        )
        header = ["byte LM, every layer converted", "more steps", *(f"bits per byte, L {length}" for length in lengths)]
        parts.append(table(header, body))
    return "\n".join(parts)


STYLES: dict[str, Row] = {  # of the policies in the plot
    "oracle: the true top keys": {"color": "#333333", "linestyle": "--"},
    "position groups": {"color": "#0b6e8f", "marker": "o", "linewidth": 2.4},
    "hash groups": {"color": "#d1662b", "marker": "s", "linewidth": 2.4},
    "local window": {"color": "#7a9a3a", "marker": "^"},
    "sorted LSH windows": {"color": "#9467a8", "marker": "v"},
    "random keys": {"color": "#aaaaaa", "marker": "x"},
}


def draw(path: Path, rows: list[Row]) -> None:
    """Recall and error against the budget: a column per task, a line per policy."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parts = {"recall": "share of the softmax mass seen", "error": "relative error of the output"}
    with sheet(path, 2, len(tasks), figsize=(3.6 * len(tasks) + 0.6, 6.6), sharey="row") as (fig, axes):
        for (part, label), line in zip(parts.items(), axes, strict=True):
            for task, ax in zip(tasks, line, strict=True):
                for name, look in STYLES.items():
                    found = [row for row in rows if (row["task"], row["policy"]) == (task, name)]
                    ax.plot([row["budget"] for row in found], [row[part] for row in found], label=name, **look)
                ax.set_xscale("log", base=2)
                ax.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS], minor=False)
                ax.set_ylim(0, 1)
            line[0].set_ylabel(label)
        for task, ax in zip(tasks, axes[0], strict=True):
            ax.set_title(task, loc="left")
        fig.supxlabel("budget: keys that a query attends", fontsize=10, color=GREY)
        handles, names = axes[0][0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside upper center", ncols=min(len(names), 2 * len(tasks)), frameon=False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=("minilm", "lm"), default=["minilm", "lm"], help="which to look at"
    )
    parser.add_argument("--texts", type=int, default=8, help="texts (default 8; of the LM at most 2)")
    parser.add_argument("--embedded-texts", type=int, default=12, help="texts that MiniLM embeds (default 12)")
    parser.add_argument("--lm-lengths", type=int, nargs="+", default=[2048, 8192], help="L of the LM (2048 8192)")
    parser.add_argument("--rows", type=int, default=256, help="query rows of a head to look at (default 256)")
    parser.add_argument("--windows", type=int, default=4, help="longest windows of held-out text to predict (4)")
    parser.add_argument("--train-seconds", type=float, default=440, help="training time of the LM (default 440)")
    parser.add_argument("--fine-tune-steps", type=int, default=60, help="steps after the conversion (default 60)")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/recall"), help="folder of the trained LM, made if missing"
    )
    parser.add_argument("--out", type=file_to_write, help="JSON file for the results; its folder must exist")
    parser.add_argument("--plot", type=file_to_write, help="PNG file for a plot, likewise")
    options = parser.parse_args(arguments)
    for name in ("texts", "embedded_texts", "rows", "windows", "fine_tune_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        results = run(options)
    except (data.MissingError, DemoError) as error:
        sys.exit(f"error: {error}")
    print("\n" + markdown(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        draw(options.plot, results["recall"])


if __name__ == "__main__":
    main()
