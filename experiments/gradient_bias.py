"""How wrong is a truncated gradient, and how long should the window be?

Trains an LSTM on a task, then measures at its parameters: how fast gradients fade with the lag, the bias and the spread of
each influence against full BPTT for each window length, and the window that the measured decay suggests.

    python -m experiments.gradient_bias --task=lag --windows=1,2,5,10,20
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

import tbptt_jax as tb
from experiments import launch
from tbptt_jax import horizon

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "task", "lag", ["lag", "copy_memory", "adding", "first_bit"], "What the LSTM is trained and probed on."
)
flags.DEFINE_list("windows", ["1", "2", "5", "10", "20", "50"], "Window lengths to measure, in steps.")
flags.DEFINE_list(
    "influences", ["truncate", "replay:1", "replay:3", "replay:all:0.5", "rtrl", "uoro"], launch.INFLUENCES
)
flags.DEFINE_integer("hidden", 16, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("lanes", 8, "Lanes of the training and of the probe.", lower_bound=1)
flags.DEFINE_integer("steps", 400, "Steps of the probe.", lower_bound=4)
flags.DEFINE_integer("lags", 60, "The longest lag to trace.", lower_bound=2)
flags.DEFINE_float("tolerance", 0.1, "The relative bias that the suggested window may have.", lower_bound=1e-6)
flags.DEFINE_integer("draws", 32, "Estimates of each random influence.", lower_bound=2)
flags.DEFINE_integer(
    "updates", 500, "Updates of training, with windows of 10, before measuring; 0: as initialised.", lower_bound=0
)
flags.DEFINE_float("learning_rate", 0.005, "Adam's rate.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of the data, the parameters and the random influences.")
flags.DEFINE_string("workdir", "runs/gradient_bias", "Where results.json, figure.png and flags.txt go.")


@dataclasses.dataclass(frozen=True)
class Task:
    """Data ``(key, steps) -> Window``, the loss of a step and the outputs it needs."""

    data: Callable[[jax.Array, int], tb.Window]
    loss: Callable[[Any, tb.Window], jax.Array]
    outputs: int


def task() -> Task:
    def binary(logits: jax.Array, window: tb.Window) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(logits, window.targets)[..., 0]

    def squared(outputs: jax.Array, window: tb.Window) -> jax.Array:
        return ((outputs - window.targets) ** 2)[..., 0]

    def symbols(logits: jax.Array, window: tb.Window) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, window.targets)

    def in_a_row(make: Callable[[jax.Array, int], tb.Window], length: int) -> Callable[[jax.Array, int], tb.Window]:
        """Lanes of sequences of ``length``, one after another, cut off after the steps asked for."""

        def data(key: jax.Array, steps: int) -> tb.Window:
            sequences = make(key, FLAGS.lanes * -(-steps // length))
            return jax.tree.map(lambda x: x.reshape(FLAGS.lanes, -1, *x.shape[2:])[:, :steps], sequences)

        return data

    return {
        "lag": Task(lambda key, steps: tb.tasks.lag(key, FLAGS.lanes, steps), binary, 1),
        "copy_memory": Task(in_a_row(lambda key, n: tb.tasks.copy_memory(key, n, 16, 4, 2), 20), symbols, 6),
        "adding": Task(in_a_row(lambda key, n: tb.tasks.adding(key, n, 20), 20), squared, 1),
        "first_bit": Task(in_a_row(lambda key, n: tb.tasks.first_bit(key, n, 20), 20), binary, 1),
    }[FLAGS.task]


def trained(model: tb.Recurrence, chosen: Task, key: jax.Array, report: Callable[[float, str], None]) -> Any:
    """The parameters after training with stateful windows of 10, on data that is not probed."""
    data = tb.split(chosen.data(key, 10 * max(FLAGS.updates, 1)), 10)
    step = tb.train_step(tb.gradient(model, chosen.loss), optax.adam(FLAGS.learning_rate))
    state = step.init(key, jax.tree.map(lambda x: x[0], data))
    if FLAGS.updates:
        state, metrics = tb.train_windows(step, state, data)
        report(1, f"trained, loss {np.mean(metrics.loss[-20:]):.4f}")
    return state.params


def check_sizes(model: tb.Recurrence, chosen: Task, windows: list[int]) -> None:
    """Raises a ``ValueError`` if the data, or what is kept of it, does not fit."""
    steps = max(FLAGS.steps, 10 * FLAGS.updates)
    launch.check_fits("The streams", 8 * FLAGS.lanes * steps, "--lanes, --steps or --updates")
    for window in {min(windows), max(windows)}:
        probe = jax.eval_shape(lambda key, k=window: tb.split(chosen.data(key, k), k), jax.random.key(0))
        for name in FLAGS.influences:
            estimate = tb.gradient(model, chosen.loss, influence=launch.influence(name, -(-FLAGS.steps // window)))
            step = tb.train_step(estimate, optax.adam(FLAGS.learning_rate))
            launch.check_training(step, probe, 1, f"--hidden, --lanes or the reach of {name}")
    params = jax.eval_shape(lambda key: model.init(key, chosen.data(key, 1).inputs), jax.random.key(0))
    launch.check_fits("The estimates", FLAGS.draws * launch.size(params), "--draws or --hidden")


def measure(
    model: tb.Recurrence, chosen: Task, params: Any, probe: tb.Window, name: str, window: int, key: jax.Array
) -> dict[str, Any]:
    began = time.perf_counter()
    windows = -(-FLAGS.steps // window)
    random = name == "uoro" or (name.startswith("replay") and name.count(":") == 2)
    draws = FLAGS.draws if random else 1
    influence = launch.influence(name, windows)
    found = horizon.bias(model, chosen.loss, params, probe, window, influence, key=key, draws=draws)
    return {
        "influence": name,
        "window": window,
        "relative_bias": found.relative_bias,
        "cosine": found.cosine,
        "relative_std": found.relative_std if random else 0.0,
        "draws": draws,
        "relative_bias_standard_error": found.relative_std / np.sqrt(draws) if random else 0.0,
        "groups": {group: part._replace(groups={})._asdict() for group, part in found.groups.items()},
        "seconds": time.perf_counter() - began,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("influence", box=box.SIMPLE_HEAD, pad_edge=False, title="Against full BPTT", title_justify="left")
    for name in ("window", "relative bias", "± of its mean", "cosine", "relative std"):
        out.add_column(name, justify="right")
    for row in rows:
        out.add_row(
            row["influence"],
            str(row["window"]),
            f"{row['relative_bias']:.2e}",
            f"{row['relative_bias_standard_error']:.1e}" if row["draws"] > 1 else "",
            f"{row['cosine']:.5f}",
            f"{row['relative_std']:.2e}" if row["draws"] > 1 else "",
        )
    return out


def picture(rows: list[dict[str, Any]], fading: horizon.Decay, choice: horizon.Choice) -> Figure:
    """Left: bias, and the spread of what is random, against the window. Right: the decay it comes from."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    floor = 1e-7
    for i, name in enumerate(dict.fromkeys(row["influence"] for row in rows)):
        mine = [row for row in rows if row["influence"] == name]
        x = [row["window"] for row in mine]
        left.plot(
            x, [max(floor, row["relative_bias"]) for row in mine], marker="os^vD<>p*"[i % 9], color=f"C{i}", label=name
        )
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
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def main() -> None:
    windows = launch.positive_integers("windows", FLAGS.windows, at_most=FLAGS.steps)
    launch.check_influences(FLAGS.influences)
    if FLAGS.lags > FLAGS.steps:
        raise ValueError(f"--lags={FLAGS.lags} is more than --steps={FLAGS.steps}: trace at most the probe's length.")
    chosen = task()
    model = tb.from_linen(nn.OptimizedLSTMCell(FLAGS.hidden), readout=nn.Dense(chosen.outputs))
    check_sizes(model, chosen, windows)
    directory = launch.workdir(FLAGS.workdir)
    train_key, probe_key, draw_key = jax.random.split(jax.random.key(FLAGS.seed), 3)
    probe = chosen.data(probe_key, FLAGS.steps)
    points = [(name, window) for name in FLAGS.influences for window in windows]
    rows = []
    with launch.progress(2 + len(points), "measurements") as report:
        params = trained(model, chosen, train_key, report)
        fading = horizon.decay(model, chosen.loss, params, probe, lags=FLAGS.lags)
        choice = horizon.suggest(fading, tolerance=FLAGS.tolerance)
        for done, (name, window) in enumerate(points):
            rows.append(measure(model, chosen, params, probe, name, window, draw_key))
            report(3 + done, f"{name}, window {window}: relative bias {rows[-1]['relative_bias']:.2e}")
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
    launch.say(f"Written to {directory}: results.json, figure.png, flags.txt")


if __name__ == "__main__":
    launch.run(main)
