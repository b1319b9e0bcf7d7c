"""The figure of a forecast."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

SHOWN = 600  # steps of the test file's end in the figure
BINS = 300  # of the whole test file there


def picture(
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
        layout="constrained",
    )
    steps = np.arange(len(predicted))
    starts = np.arange(0, len(predicted), -(-len(predicted) // BINS))
    for i, name in enumerate(names):
        label = name.replace("$", r"\$")  # else matplotlib reads what is between two of them as mathematics
        right = axes[f"end {name}"]
        right.plot(steps[end], observed[end, i], color="0.6", linewidth=2, label="observed")
        right.plot(steps[end], predicted[end, i], color="C0", linewidth=1, label="predicted")
        right.set(
            xlabel="its last rows" if long else "row of the test file", ylabel="" if long else label, xmargin=0.01
        )
        if long:
            left = axes[f"whole {name}"]
            for values, colour in ((observed[:, i], "0.6"), (predicted[:, i], "C0")):
                low, high = (f.reduceat(values, starts) for f in (np.fmin, np.fmax))  # a line would be a block
                left.fill_between(steps[starts], low, high, color=colour, alpha=0.5, linewidth=0.5)
            left.axvline(steps[end][0], color="k", linestyle=":", linewidth=1)
            left.set(xlabel="row of the test file", ylabel=label, xmargin=0.01)
            left.locator_params(axis="x", nbins=4)
    legend = {"frameon": False, "ncols": 2, "loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
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
    below.legend(frameon=False)
    for each in axes.values():
        each.grid(alpha=0.3)
    figure.suptitle(title)
    return figure
