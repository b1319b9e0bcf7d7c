"""Where a short window points the wrong way: the system of Tallec & Ollivier (2017), trained online by each influence.

A parameter moves the output one way soon and, more strongly, the other way late. Truncation sees the first and drives the
parameter off; what knows the past, exactly or on average, reaches the optimum -1/6.

    python -m experiments.influence_balancing
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import tbptt_jax as tb
from experiments import launch
from tbptt_jax.tasks import influence_balancing, influence_balancing_model, influence_balancing_optimum
from tbptt_jax.training import TrainStep

FLAGS = flags.FLAGS
RUNS = ["truncate@1", "truncate@10", "truncate@40", "uoro@1", "rtrl@1"]
flags.DEFINE_list("runs", RUNS, "INFLUENCE@WINDOW, in steps.")
flags.DEFINE_integer("steps", 100_000, "Steps of the stream.", lower_bound=100)
flags.DEFINE_float("learning_rate", 3e-5, "SGD's at first; it falls as 1/sqrt(1 + steps read / 1000).", lower_bound=0.0)
flags.DEFINE_integer("seeds", 5, "Runs of each random influence.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/influence_balancing", "Where results.json, figure.png and flags.txt go.")


def loss(s: jax.Array, window: tb.Window) -> jax.Array:
    return (s - window.targets) ** 2 / 2


def train_step(influence: str, window: int) -> TrainStep:
    past = launch.influence(influence, FLAGS.steps // window)
    estimate = tb.gradient(influence_balancing_model(), loss, influence=past)
    rate = lambda updates: FLAGS.learning_rate / jnp.sqrt(1 + updates * window / 1000)  # noqa: E731
    return tb.train_step(estimate, optax.sgd(rate))


def check_sizes(influence: str, window: int) -> None:
    """Raises a ``ValueError`` if what is read, told or kept of a run does not fit."""
    told = 4 * FLAGS.seeds * (FLAGS.steps // window)
    stream = 2 * 8 * FLAGS.steps  # as it is made and as it is cut
    launch.check_fits("The stream, and what is told of it,", stream + told, "--steps or --seeds")
    windows = jax.eval_shape(lambda: tb.split(influence_balancing(window), window))
    launch.check_training(
        train_step(influence, window), windows, FLAGS.seeds, f"--seeds or the reach of {launch.plain(influence, 80)}"
    )


def train(influence: str, window: int) -> tuple[np.ndarray, float]:
    """θ after each window, ``[seeds, windows]``, and the seconds."""
    windows = tb.split(influence_balancing(FLAGS.steps // window * window), window)
    step = train_step(influence, window)

    def one_seed(key: jax.Array) -> jax.Array:
        def update(state: Any, window: tb.Window) -> tuple[Any, jax.Array]:
            state, _ = step.update(state, window)
            return state, state.params["theta"]

        return jax.lax.scan(update, step.init(key, jax.tree.map(lambda x: x[0], windows)), windows)[1]

    return launch.train_seeds(one_seed, FLAGS.seeds, "--steps or --seeds")


def picture(paths: dict[str, np.ndarray]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.4))
    for i, (run, theta) in enumerate(paths.items()):
        steps = np.arange(1, theta.shape[1] + 1) * int(run.split("@")[1])
        for seed, path in enumerate(np.unique(theta, axis=0)):  # the seeds of what is not random are one line
            label = "{}, windows of {}".format(*run.split("@")) if seed == 0 else None
            axes.plot(steps, path, color=f"C{i}", linewidth=1, alpha=0.9, label=label)
    axes.axhline(influence_balancing_optimum(), color="k", linestyle="--", linewidth=1, label="optimum, −1/6")
    axes.set(xscale="log", xlim=(10, FLAGS.steps), ylim=(-1.2, 2.2), xlabel="steps of the stream", ylabel="θ")
    axes.set_title("Influence balancing: a short window drives θ the wrong way")
    axes.legend(loc="upper left")
    return figure


def main() -> None:
    runs = []
    for run in FLAGS.runs:
        influence, at, window = run.rpartition("@")
        if not at:
            raise ValueError(f"--runs has {launch.short(run)!r}: write INFLUENCE@WINDOW, such as truncate@10.")
        launch.influence(influence, 1, "runs")
        (steps,) = launch.positive_integers("runs", [window], at_most=FLAGS.steps)
        check_sizes(influence, steps)
        runs.append((run, influence, steps))
    directory = launch.workdir(FLAGS.workdir)
    rows, paths = [], {}
    with launch.progress(len(runs), "runs") as report:
        for done, (run, influence, window) in enumerate(runs, 1):
            paths[run], seconds = train(influence, window)
            final = paths[run][:, -1]
            rows.append({"influence": influence, "window": window, "theta": final.tolist()})
            told = f"{influence}, windows of {window}: θ = {np.array2string(final, precision=4)}"
            report(done, f"{told} in {seconds:.1f} s")
            launch.console.print(told, markup=False)
    launch.console.print(f"The optimum is {influence_balancing_optimum():.4f}; θ began at 0.5.")
    launch.write_results(directory, {"rows": rows, "optimum": influence_balancing_optimum()}, picture(paths))


if __name__ == "__main__":
    launch.run(main)
