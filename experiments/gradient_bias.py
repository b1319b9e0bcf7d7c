"""How wrong is a truncated gradient, and how long should the window be?

Trains a task, then measures at its parameters: how fast gradients fade with the lag, the bias and the spread of each
influence against full BPTT for each window length, and the window that the measured decay suggests.

    python -m experiments.gradient_bias --task=lag --windows=1,2,5,10,20
    python -m experiments.gradient_bias --task=mine.py:task
"""

from typing import Any

import numpy as np
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from experiments import launch, tasks
from tbptt_jax import horizon, study
from tbptt_jax.study.bias import check_bias

FLAGS = flags.FLAGS
tasks.define("lag")
flags.DEFINE_list("windows", ["1", "2", "5", "10", "20", "50"], "Window lengths to measure, in steps.")
INFLUENCES = ["truncate", "replay:1", "replay:3", "replay:all:0.5", "rtrl", "uoro"]
flags.DEFINE_list("influences", INFLUENCES, launch.INFLUENCES)
flags.DEFINE_integer("steps", 400, "Steps of the probe.", lower_bound=4)
flags.DEFINE_integer("lags", 60, "The longest lag to trace.", lower_bound=2)
flags.DEFINE_float("tolerance", 0.1, "The relative bias that the suggested window may have.", lower_bound=1e-6)
flags.DEFINE_integer("draws", 32, "Estimates of each random influence.", lower_bound=2)
flags.DEFINE_integer("train_window", 10, "Steps of a window in training.", lower_bound=1)
flags.DEFINE_integer("updates", 500, "Updates of training before measuring.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.01, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of the data, the parameters and the random influences.")
flags.DEFINE_string("workdir", "runs/gradient_bias", "Where results.json, figure.png and flags.txt go.")


def table(rows: list[dict[str, Any]]) -> Table:
    told = []
    for row in rows:
        error, spread = f"{row['relative_bias_standard_error']:.1e}", f"{row['relative_std']:.2e}"
        error, spread = (error, spread) if row["draws"] > 1 else ("", "")
        bias, cosine = f"{row['relative_bias']:.2e}", f"{row['cosine']:.5f}"
        told.append((row["influence"], str(row["window"]), bias, error, cosine, spread))
    heads = "influence", "window", "relative bias", "± of its mean", "cosine", "relative std"
    return launch.table("Against full BPTT", heads, told)


def picture(rows: list[dict[str, Any]], fading: horizon.Decay, choice: horizon.Suggestion) -> Figure:
    """Left: bias, and the spread of what is random, against the window. Right: the decay it comes from."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    floor = 1e-7
    for i, name in enumerate(dict.fromkeys(row["influence"] for row in rows)):
        mine = [row for row in rows if row["influence"] == name]
        x = [row["window"] for row in mine]
        look = {"marker": "os^vD<>p*"[i % 9], "color": f"C{i}", "label": name}
        left.plot(x, [max(floor, row["relative_bias"]) for row in mine], **look)
        if mine[0]["draws"] > 1:
            left.plot(x, [max(floor, row["relative_std"]) for row in mine], ":", color=f"C{i}")
    left.set(xscale="log", yscale="log", xlabel="window, steps", ylabel="relative to full BPTT")
    left.set_title("Bias by influence (dotted: the spread of one draw)")
    lags = np.arange(1, len(fading.norms) + 1)
    tail = lags[len(lags) // 2 - 1 :]
    seen = fading.norms > 0
    right.plot(lags[seen], fading.norms[seen], "o", markersize=4, label="φ, measured")
    if fading.rate > 0:
        fitted = np.exp(
            np.mean(np.log(fading.norms[tail - 1][seen[tail - 1]]))
            + (tail - tail[seen[tail - 1]].mean()) * np.log(fading.rate)
        )
        right.plot(tail, fitted, "k-", label=f"fitted decay, β̂ = {fading.rate:.3f}")
    right.axvline(choice.horizon, color="C3", linestyle="--", label=f"to be seen by every loss: {choice.horizon}")
    left.axvline(choice.window, color="0.5", linestyle="--", label=f"suggested window, {choice.window}")
    right.set(yscale="log", xlabel="lag k, steps", ylabel="E‖∂l(s) / ∂h(s−k)‖", title="How fast the gradient fades")
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def main() -> None:
    windows = launch.positive_integers("windows", FLAGS.windows, at_most=FLAGS.steps)
    launch.check_influences(FLAGS.influences)
    if FLAGS.lags > FLAGS.steps:
        raise ValueError(f"--lags={FLAGS.lags} is more than --steps={FLAGS.steps}: trace at most the probe's length.")
    task = tasks.chosen(lanes=8, hidden=16)()
    check_bias(task, windows, FLAGS.influences, lanes=task.lanes, steps=FLAGS.steps, draws=FLAGS.draws)
    directory = launch.workdir(FLAGS.workdir)
    run = study.fit(
        task,
        window=FLAGS.train_window,
        updates=FLAGS.updates,
        seed=FLAGS.seed,
        learning_rate=FLAGS.learning_rate,
        devices=launch.DEVICES.value,
    )
    probe: Any = {"lanes": task.lanes, "steps": FLAGS.steps, "seed": FLAGS.seed + 1}
    streams = study.probe_of(task, **probe)
    fading = horizon.decay(task.model, task.loss, run.params, streams, lags=FLAGS.lags)
    choice = horizon.suggest(fading, tolerance=FLAGS.tolerance)
    done: list[Any] = []
    with launch.progress(len(FLAGS.influences) * len(windows), "measurements") as report:

        def measured(row: dict[str, Any]) -> None:
            done.append(row)
            report(len(done), f"{row['influence']}, window {row['window']}: relative bias {row['relative_bias']:.2e}")

        rows = study.bias(task, run.params, windows, FLAGS.influences, draws=FLAGS.draws, report=measured, **probe)
    launch.console.print(table(rows))
    launch.console.print(choice.reason)
    results = {
        "rows": rows,
        "suggested_window": choice.window,
        "suggested_horizon": choice.horizon,
        "safe": choice.safe,
        "reason": choice.reason,
        "decay": fading.rate,
        "norms": fading.norms.tolist(),
        "probes": fading.probes,
    }
    launch.write_results(directory, results, picture(rows, fading, choice))


if __name__ == "__main__":
    launch.run(main)
