"""The figure of the demo: time and memory of a layer, and the training curves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import cost

COLOURS = {"lsh": "#0b6e8f", "sdpa": "#d1662b"}
MODELS = {"lsh": "Local + LSH attention", "sdpa": "torch SDPA"}
GREY = "#555555"
_LINE: Any = {"marker": "o", "markersize": 5, "linewidth": 2}


def _length(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _draw_cost(axes: Any, rows: list[dict[str, Any]], field: str, unit: float, title: str, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    ends = []
    for name, colour in COLOURS.items():
        # A tiny call may need no new page: the floor keeps it on the logarithmic axis.
        points = [(row["length"], max(row[field] / unit, 1e-3)) for row in rows if row["name"] == name]
        axes.plot(*zip(*points, strict=True), label=cost.NAMES[name], color=colour, **_LINE)
        ends.append(points[-1])
    axes.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": GREY, "shrinkA": 5, "shrinkB": 5})
    (length, lsh), (_, sdpa) = ends
    axes.annotate(
        f"{sdpa / lsh:.2g}x",
        (length, (lsh * sdpa) ** 0.5),
        (7, 0),
        textcoords="offset points",
        va="center",
        color=GREY,
    )
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [_length(x) for x in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_title(title, loc="left", pad=10)
    axes.set_xlabel("sequence length L (tokens)")
    axes.set_ylabel(label)
    axes.margins(x=0.12, y=0.12)
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper left")


def _draw_curves(axes: Any, runs: dict[str, dict[str, Any]], context: int) -> None:
    for name, run in runs.items():
        seconds, bits = zip(*run["curve"], strict=True)
        label = f"{MODELS[name]}: {bits[-1]:.2f} after {run['steps']} steps"
        axes.plot(seconds, bits, label=label, color=COLOURS[name], **_LINE)
    axes.set_title(f"A byte-level language model, context {context:,}", loc="left", pad=10)
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("bits per byte of held-out text")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper right")


@contextmanager
def sheet(path: Path, rows: int, columns: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A matplotlib figure and its axes [rows][columns], to be drawn inside; then written to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
        "axes.titlesize": 12, "axes.titleweight": "bold", "axes.grid": True, "grid.color": "#e6e6e6",
        "xtick.color": GREY, "ytick.color": GREY, "font.size": 10.5,
    }  # fmt: skip
    with pyplot.rc_context(style):
        layout = ConstrainedLayoutEngine(wspace=0.06)
        figure, axes = pyplot.subplots(rows, columns, squeeze=False, layout=layout, **options)
        yield figure, axes
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def draw(path: Path, attention: list[dict[str, Any]], runs: dict[str, dict[str, Any]], context: int, note: str) -> None:
    """Writes the figure; ``attention`` is of ``cost.measure``, ``runs`` the results of the models by name."""
    with sheet(path, 1, 3, figsize=(15, 4.8)) as (figure, [(time, memory, curves)]):
        _draw_cost(time, attention, "seconds", 1.0, "Time of one attention layer", "forward + backward (s)")
        _draw_cost(memory, attention, "extra_bytes", 2**20, "Memory of one attention layer", "extra peak memory (MiB)")
        _draw_curves(curves, runs, context)
        figure.supxlabel(note, fontsize=9, color=GREY)
