"""The figures and tables of launches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from experiments import launch

SHOWN = 600  # steps of the test file's end in the figure
BINS = 300  # of the whole test file there


def forecast(
    names: Sequence[str],
    observed: np.ndarray,
    predicted: np.ndarray,
    curve: list[tuple[int, float, float | None]],
    test_mse: float,
    title: str,
) -> Figure:
    """Above, the test file and a stretch of it, its end, observed and predicted ``[rows, targets]``; below, the training."""
    names = names[:3]
    long, end = len(predicted) > SHOWN, slice(-SHOWN, None)
    rows: list[Any] = [[f"whole {name}", f"end {name}"] if long else [f"end {name}"] for name in names]
    figure, axes = plt.subplot_mosaic(
        [*rows, ["training"] * len(rows[0])],
        figsize=(11 if long else 9, 2.6 * (len(names) + 1)),
        width_ratios=[1, 2] if long else None,
    )
    steps = np.arange(len(predicted))
    starts = np.arange(0, len(predicted), -(-len(predicted) // BINS))
    for i, name in enumerate(names):
        label = name.replace("$", r"\$")  # else matplotlib reads what is between two of them as mathematics
        right = axes[f"end {name}"]
        right.plot(steps[end], observed[end, i], color="0.6", linewidth=2, label="observed")
        right.plot(steps[end], predicted[end, i], color="C0", linewidth=1, label="predicted")
        rows_of = "its last rows" if long else "row of the test file"
        right.set(xlabel=rows_of, ylabel="" if long else label, xmargin=0.01)
        if long:
            left = axes[f"whole {name}"]
            for values, colour in ((observed[:, i], "0.6"), (predicted[:, i], "C0")):
                low, high = (f.reduceat(values, starts) for f in (np.fmin, np.fmax))  # a line would be a block
                left.fill_between(steps[starts], low, high, color=colour, alpha=0.5, linewidth=0.5)
            left.axvline(steps[end][0], color="k", linestyle=":", linewidth=1)
            left.set(xlabel="row of the test file", ylabel=label, xmargin=0.01)
            left.locator_params(axis="x", nbins=4)
    legend = {"ncols": 2, "loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    axes[f"end {names[0]}"].legend(**legend)
    below = axes["training"]
    updates, losses, _ = zip(*curve, strict=True)
    below.plot(updates, losses, color="C0", label="training windows, as read")
    measured = [(n, error) for n, _, error in curve if error is not None]
    if measured:
        below.plot(*zip(*measured, strict=True), color="C1", marker="o", label="validation file, in one go")
    if np.isfinite(test_mse):
        below.axhline(test_mse, color="k", linestyle="--", linewidth=1, label=f"test file, in one go: {test_mse:.4g}")
    below.set(xlabel="updates", ylabel="squared error, standardised", yscale="log")
    below.legend()
    figure.suptitle(title)
    return figure


def first_bit(rows: list[dict[str, Any]]) -> Figure:
    """Left: who sees the bit. Right: what that makes of the accuracy at each window length, beside the exact figures."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    looks: dict[str, dict[str, Any]] = {
        "stateful contiguous": {"color": "C0", "marker": "o"},
        "stateless contiguous": {"color": "C1", "marker": "s", "markersize": 8, "markerfacecolor": "none"},
        "stateless sliding": {"color": "C2", "marker": "^"},
    }
    for name, window in (("stateful contiguous", 2), ("stateless contiguous", 2), ("stateless sliding", 10)):
        (row,) = (row for row in rows if (row["system"], row["window"]) == (name, window))
        starts = row["accuracy_by_start"]
        label = f"{name}, windows of {window}"
        left.plot(list(starts), list(starts.values()), linestyle="none", label=label, **looks[name])
    left.set_title("What happened? Only the window at 0 sees the bit")
    left.set(xlabel="where the window starts in its sequence", ylabel="test accuracy", xticks=range(0, 20, 2))
    for name, look in looks.items():
        mine = [row for row in rows if row["system"] == name]
        points = sorted((row["window"], row["test_accuracy"], row["exact_accuracy"]) for row in mine)
        windows, accuracy, exact = zip(*points, strict=True)
        right.plot(windows, accuracy, label=name, **look)
        right.plot(windows, exact, "k+", markersize=12, label="exact" if name == "stateless sliding" else None)
    right.set_title("Carrying the state does what no short window can")
    right.set(xlabel="window, steps", xticks=[1, 2, 4, 5, 10, 20], ylim=(0.45, 1.05))
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def first_bit_table(rows: list[dict[str, Any]]) -> Table:
    names = "published_accuracy", "exact_accuracy", "test_accuracy", "exact_loss", "test_loss"
    heads = "system", "window", "published", "exact", "accuracy", "exact", "loss", "updates", "s"
    told = []
    for row in rows:
        scores = ("–" if row[name] is None else f"{row[name]:.4f}" for name in names)
        told.append((row["system"], str(row["window"]), *scores, str(row["updates"]), f"{row['seconds']:.1f}"))
    return launch.table("Test scores, mean over seeds", heads, told)


def copy_memory(rows: list[dict[str, Any]], floor: float, title: str) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.4))
    for row in rows:
        curve = np.asarray(row["curve"])
        width = max(1, len(curve) // 50)
        smooth = curve[: len(curve) // width * width].reshape(-1, width).mean(1)
        updates = (np.arange(len(smooth)) + 1) * width * row["updates"] / len(curve)
        axes.plot(updates, smooth, label=row["influence"])
    axes.axhline(floor, color="k", linestyle="--", linewidth=1, label="without memory")
    axes.set(xlabel="updates", ylabel="nats a recalled symbol, mean over seeds", ylim=(0, None))
    axes.set_title(title)
    axes.legend()
    return figure
