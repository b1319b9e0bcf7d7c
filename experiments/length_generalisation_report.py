"""The table and the figure of `length_generalisation`, in the colours of light and of dark pages."""

import io
import itertools
import math
import re
from importlib import resources
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from experiments import launch

PALETTE = resources.files("tbptt_jax.study.report").joinpath("palette.css").read_text()
LIGHT = dict(re.findall(r"--(\w+): (#\w{6})", PALETTE.partition("@media")[0]))
COLOURS: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), LIGHT["ink"]),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), LIGHT["page"]),
    "axes.edgecolor": LIGHT["muted"],
    "grid.color": LIGHT["rule"],
    "grid.alpha": 1,
}


def edges(steps: int) -> list[int]:
    """Of the bins, 0, 1, 2, 4, 8 and so on to the last step: steps 1, 2, 3 to 4, 5 to 8."""
    return [0, *(2**i for i in range(32) if 2**i < steps), steps]


def binned(x: np.ndarray, edges: list[int]) -> np.ndarray:
    """Means over the bins of ``[..., steps]``."""
    return np.stack([x[..., first:end].mean(-1) for first, end in itertools.pairwise(edges)], -1)


def table(rows: list[dict[str, Any]], edges: list[int], window: int) -> Table:
    """At a few of the bins, the last within a window and the first beyond it among them."""
    last, inside = len(edges) - 2, math.ceil(math.log2(window))
    bins = sorted({bin for bin in (inside - 3, inside, inside + 1, inside + 2, last) if 0 <= bin <= last})
    told = []
    for row in rows:
        low, median, high = np.quantile(1000 * np.asarray(row["excess"])[:, bins], (0.25, 0.5, 0.75), axis=0)
        norm, growth = (np.median(np.asarray(row[name]), 0) for name in ("norm", "growth"))
        spread = (f"{m:.1f} ({a:.0f}–{b:.0f})" for m, a, b in zip(median, low, high, strict=True))
        told.append(
            (row["cell"], row["carry"], *spread, f"{norm[last] / norm[min(inside, last)]:.2f}", f"{growth[last]:.2f}")
        )
    heads = (f"{edges[bin] + 1}–{edges[bin + 1]}" for bin in bins)
    title = "Thousandths of a nat above Bayes' filter by test step, median (quartiles) over seeds"
    return launch.table(title, ("cell", "carry", *heads, "norm ×", "growth"), told, left=2)


def figure(rows: list[dict[str, Any]], edges: list[int], window: int, alone: float) -> Figure:
    """A row for each cell: left the loss by test step, right how far the carry leaves what training met, medians and quartiles over seeds."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    middle = [(first + 1 + end) / 2 for first, end in itertools.pairwise(edges)]
    with matplotlib.rc_context(COLOURS):
        out, axes = plt.subplots(len(cells), 2, figsize=(9, 2.6 * len(cells) + 0.6), squeeze=False, sharex=True)
        for (left, right), cell in zip(axes, cells, strict=True):
            for i, row in enumerate(row for row in rows if row["cell"] == cell):
                look: dict[str, Any] = {"color": LIGHT[f"s{i}"], "marker": "osv"[i], "markersize": 4}
                for panel, values in ((left, 1000 * np.asarray(row["excess"])), (right, np.asarray(row["growth"]))):
                    low, median, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
                    panel.plot(middle, median, label=row["carry"], **look)
                    panel.fill_between(middle, low, high, color=LIGHT[f"s{i}"], alpha=0.2, linewidth=0)
            label = f"knowing the last {window} steps alone"
            left.hlines(1000 * alone, window, edges[-1], LIGHT["muted"], "dashed", label=label)
            left.set(title=f"{cell}: loss", ylabel="nats above Bayes, × 1000", ylim=(-5, None))
            right.set(title=f"{cell}: carry", ylabel="largest growth of a number", xscale="log")
            for panel in (left, right):
                panel.axvline(window, color=LIGHT["muted"], linestyle=":")
        ticks = [edge for edge in edges if edge.bit_length() % 2]  # powers of 4
        axes[0, 0].set_xticks(ticks, map(str, ticks))
        for panel in axes[-1]:
            panel.set_xlabel(f"test step (dotted: {window}, where training windows end)")
        out.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return out


def themed(drawn: Figure) -> bytes:
    """A figure as SVG, in which the palette's light colours are the dark ones where a dark page is preferred."""
    to = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tbptt_jax"}):
        drawn.savefig(to, format="svg", bbox_inches="tight", facecolor=LIGHT["page"], metadata={"Date": None})
    head, tag, body = to.getvalue().partition("<defs>")
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    return f"{head}<style><![CDATA[{PALETTE}]]></style>{tag}{body}".encode()
