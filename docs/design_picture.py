"""Draws design.svg, the picture of design.md: ``python docs/design_picture.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

BUCKETS = ("#9ecae9", "#ffbf79", "#a8d5a2", "#d4b5e0")
QUERIES, WINDOW = "#d62728", "#1f77b4"
LENGTH, CHUNK, ROUNDS = 12, 4, 2


def cell(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.0) -> None:
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=color, edgecolor="white", linewidth=1.5))
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=9)


def frame(axes: Axes, x: float, y: float, width: float, color: str) -> None:
    axes.add_patch(Rectangle((x, y - 0.12), width, 1.24, fill=False, edgecolor=color, linewidth=2.2))


def brace(axes: Axes, x: float, width: float, y: float, text: str, color: str = "black") -> None:
    axes.annotate("", (x, y), (x + width, y), arrowprops={"arrowstyle": "<->", "color": color, "lw": 1})
    axes.text(x + width / 2, y - 0.28, text, ha="center", va="top", fontsize=9, color=color)


def label(axes: Axes, y: float, text: str) -> None:
    axes.text(-0.5, y + 0.5, text, ha="right", va="center", fontsize=9)


def draw_ring(axes: Axes) -> None:
    random = np.random.default_rng(5)
    buckets = random.integers(0, len(BUCKETS), (ROUNDS, LENGTH))
    for position in range(LENGTH):
        cell(axes, position, 4.2, str(position), "#e6e6e6")
    label(axes, 4.2, "positions of a sequence")
    for r in range(ROUNDS):
        order = np.argsort(buckets[r], kind="stable")
        for i, position in enumerate(order):
            cell(axes, r * LENGTH + i, 1.5, str(position), BUCKETS[buckets[r, position]])
            axes.text(r * LENGTH + i + 0.5, 2.62, str(r * LENGTH + i), ha="center", fontsize=7, color="#777777")
        for chunk in range(LENGTH // CHUNK + 1):
            axes.plot([r * LENGTH + chunk * CHUNK] * 2, [1.3, 2.7], color="black", linewidth=2 if chunk % 3 else 3.5)
        brace(axes, r * LENGTH, LENGTH, 1.05, f"round {r}")
    label(axes, 1.5, "order: positions\nsorted by bucket")
    axes.text(-0.5, 2.72, "slots", ha="right", va="center", fontsize=8, color="#777777")
    frame(axes, 16, 1.5, 4, QUERIES)
    axes.text(20.3, 3.45, "a chunk of queries", ha="left", va="center", fontsize=9, color=QUERIES)
    axes.plot([18, 18, 20.1], [2.75, 3.45, 3.45], color=QUERIES, linewidth=1)
    brace(axes, 12, 8, 3.9, "", WINDOW)
    axes.text(16, 4.1, "its window: the keys that these queries see", ha="center", fontsize=9, color=WINDOW)
    axes.annotate(
        "", (0.2, 0.25), (23.8, 0.25),
        arrowprops={"arrowstyle": "->", "connectionstyle": "arc3,rad=-0.06", "color": "#777777"},
    )  # fmt: skip
    axes.text(12, -0.95, "ring: behind the last slot comes the first", ha="center", fontsize=9, color="#777777")
    axes.set(xlim=(-6, 24.5), ylim=(-1.5, 5.5))


def draw_list(axes: Axes) -> None:
    keys, context = 22, 2
    kinds = {**dict.fromkeys((8, 9, 10, 11), BUCKETS[0]), **dict.fromkeys((2, 5, 14, 17), BUCKETS[1])}
    for key in range(keys):
        cell(axes, key, 3, str(key), BUCKETS[2] if key >= keys - context else kinds.get(key, "#e6e6e6"))
    label(axes, 3, "keys")
    brace(axes, 8, 4, 2.85, "local window", "#3a78a8")
    brace(axes, keys - context, context, 2.85, "context keys", "#3d8a37")
    axes.text(7, 4.25, "chosen by the mean queries of the chunk: 2, 5, 14, 17", fontsize=9, color="#c06c00")
    entries = [20, 21, 2, 5, 8, 9, 10, 11, 14, 17]
    for i, key in enumerate(entries):
        cell(axes, i, 0.6, str(key), BUCKETS[2] if key >= keys - context else kinds[key])
    label(axes, 0.6, "list of a chunk:\nits key_indices")
    cell(axes, 12, 0.6, "rest key: the mean of all keys", "#e6e6e6", 10)
    brace(axes, 0, len(entries), 0.4, "entries")
    axes.text(17, 0.15, "stands for the keys that are not in the list", ha="center", va="top", fontsize=9)
    axes.set(xlim=(-6, 24.5), ylim=(-0.6, 5))


def main() -> None:
    # The same file every time, with text as text.
    plt.rcParams.update({"svg.hashsalt": "design", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, (ring, chosen) = plt.subplots(2, 1, figsize=(10, 5.2), height_ratios=(7, 5.6))
    for axes, title in ((ring, "LSH attention: 2 rounds, chunks of 4"), (chosen, "Clustered attention")):
        axes.set_title(title, fontsize=10, loc="left", weight="bold")
        axes.axis("off")
    draw_ring(ring)
    draw_list(chosen)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix("").parent / "design.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
