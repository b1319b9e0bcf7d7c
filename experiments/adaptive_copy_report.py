"""The table and the figure of `adaptive_copy`, in the colours of light and of dark pages."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from experiments import launch
from experiments.length_generalisation_report import COLOURS, LIGHT
from experiments.length_generalisation_report import themed as themed


def table(rows: list[dict[str, Any]], floor: float) -> Table:
    told = []
    for name in dict.fromkeys(row["K"] for row in rows):
        mine = [row for row in rows if row["K"] == name]
        test, valid = ([row["test"] for row in mine], [min(ppl for _, ppl in row["curve"]) for row in mine])
        scores = (f"{np.mean(x):.3f} ({np.std(x, ddof=len(x) > 1):.3f})" for x in (valid, test))
        seconds = f"{np.mean([row['seconds'] for row in mine]):.0f}"
        told.append((name, *scores, f"{np.mean([row['mean_window'] for row in mine]):.1f}", seconds))
    title = f"Perplexity, mean (deviation) over seeds; without memory {floor:.3f}"
    return launch.table(title, ("K", "best on validation", "test", "mean K", "s"), told)


def figure(rows: list[dict[str, Any]], floor: float, tolerance: float) -> Figure:
    """A line for each seed. Above, the validation perplexity; below, the K that was chosen, and the bound on its bias."""
    names = list(dict.fromkeys(row["K"] for row in rows))
    with matplotlib.rc_context(COLOURS):
        out, (above, middle, below) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, height_ratios=[2, 1, 1])
        for row in rows:
            look: dict[str, Any] = {"color": LIGHT[f"s{names.index(row['K'])}"], "linewidth": 1.2}
            label = f"K = {row['K']}" if row["K"].isdecimal() else f"K by {row['K']}, δ = {tolerance:g}"
            above.plot(*zip(*row["curve"], strict=True), label=label, **look)
            if row["choices"]:
                epochs, windows, bounds = zip(*row["choices"], strict=True)
                middle.step(epochs, windows, where="post", **look)
                below.plot(epochs, bounds, ".", markersize=3, color=look["color"])
            else:
                middle.axhline(row["mean_window"], color=look["color"], linestyle="dashed", linewidth=1.2)
        above.axhline(
            floor, color=LIGHT["muted"], linestyle="dashed", linewidth=1, label=f"without memory, {floor:.3f}"
        )
        below.axhline(tolerance, color=LIGHT["muted"], linestyle="dashed", linewidth=1)
        above.set(ylabel="perplexity, validation", ylim=(0.98, None))
        middle.set(ylabel="K, steps", ylim=(0, None))
        below.set(ylabel="bound δ(K) on the bias", yscale="log", xlabel="epochs, each of them the stream once")
        handles = dict(zip(*reversed(above.get_legend_handles_labels()), strict=True))
        out.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles))
    return out
