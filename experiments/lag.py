"""Two lags, three and eight steps (Pitis 2016): stateless windows end at their exact floor, stateful ones go below it.

python -m experiments.lag
"""

from typing import Any

import flax.linen as nn
import jax
import optax
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import tbptt_jax as tb
from experiments import launch
from tbptt_jax.study.tasks.known import binary
from tbptt_jax.tasks import lag, lag_floor
from tbptt_jax.training import TrainStep

FLAGS = flags.FLAGS
flags.DEFINE_list("windows", ["1", "2", "3", "5", "8", "12", "20"], "Window lengths, in steps.")
flags.DEFINE_integer("hidden", 16, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("lanes", 64, "Streams side by side.", lower_bound=1)
flags.DEFINE_integer("steps", 24_000, "Steps of each stream to train on.", lower_bound=100)
flags.DEFINE_integer("test_steps", 10_000, "Steps of each stream to test on.", lower_bound=100)
flags.DEFINE_float("learning_rate", 0.01, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 3, "Trainings, side by side.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/lag", "Where results.json, figure.png and flags.txt go.")

LOWER = "--seeds, --lanes, --steps, --test_steps or --hidden"


def train_step(window: int) -> tuple[tb.Recurrence, TrainStep]:
    """The model, and how it is trained."""
    model = tb.from_linen(nn.OptimizedLSTMCell(FLAGS.hidden), readout=nn.Dense(1))
    schedule = optax.cosine_decay_schedule(FLAGS.learning_rate, -(-FLAGS.steps // window))
    return model, tb.train_step(tb.gradient(model, binary), optax.adam(schedule))


def check_sizes(longest: int) -> None:
    """Raises a ``ValueError`` if the data or the state of the trainings does not fit."""
    steps = FLAGS.seeds * FLAGS.lanes * max(FLAGS.steps, FLAGS.test_steps)
    launch.check_fits("The streams", 8 * steps, LOWER)
    windows = jax.eval_shape(lambda key: tb.split(lag(key, FLAGS.lanes, longest), longest), jax.random.key(0))
    launch.check_training(train_step(longest)[1], windows, FLAGS.seeds, LOWER)


def train(window: int, stateful: bool) -> dict[str, Any]:
    """One row: the loss on new streams, in nats a step, for each seed."""
    model, step = train_step(window)

    def cut(key: jax.Array, steps: int) -> tb.Window:
        windows = tb.split(lag(key, FLAGS.lanes, steps), window)
        return windows if stateful else tb.stateless(windows)

    def one_seed(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        windows = cut(keys[0], FLAGS.steps)
        state = step.init(keys[1], jax.tree.map(lambda x: x[0], windows))
        state, _ = tb.train_windows(step, state, windows)
        return tb.evaluate(model, binary, state.params, cut(keys[2], FLAGS.test_steps // window * window)).loss

    losses, seconds = launch.train_seeds(one_seed, FLAGS.seeds, LOWER)
    return {
        "carry": "stateful" if stateful else "stateless",
        "window": window,
        "loss": losses.tolist(),
        "exact_loss": lag_floor() if stateful else lag_floor(window),
        "seconds": seconds,
    }


def picture(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.4))
    for i, carry in enumerate(("stateless", "stateful")):
        mine = [row for row in rows if row["carry"] == carry]
        x = [row["window"] for row in mine]
        for seed in range(FLAGS.seeds):
            label = carry if seed == 0 else None
            axes.plot(x, [row["loss"][seed] for row in mine], "os"[i], color=f"C{1 - i}", alpha=0.7, label=label)
    x = list(range(1, max(row["window"] for row in rows) + 1))
    axes.plot(x, [lag_floor(window) for window in x], "k-", linewidth=1, label="exact floor of stateless windows")
    axes.axhline(lag_floor(), color="k", linestyle="--", linewidth=1, label="floor with both lags known")
    axes.set(xlabel="window, steps", ylabel="nats a step, on new streams", title="Lags of three and eight steps")
    axes.legend()
    return figure


def main() -> None:
    windows = launch.positive_integers("windows", FLAGS.windows, at_most=min(FLAGS.steps, FLAGS.test_steps))
    check_sizes(max(windows))
    directory = launch.workdir(FLAGS.workdir)
    points = [(window, stateful) for window in windows for stateful in (False, True)]
    rows = []
    with launch.progress(len(points), "trainings") as report:
        for done, (window, stateful) in enumerate(points, 1):
            rows.append(train(window, stateful))
            report(done, f"{rows[-1]['carry']}, window {window}: {rows[-1]['loss'][0]:.4f} nats")
    told = [
        (
            r["carry"],
            str(r["window"]),
            f"{r['exact_loss']:.4f}",
            " ".join(f"{x:.4f}" for x in r["loss"]),
            f"{r['seconds']:.0f}",
        )
        for r in rows
    ]
    heads = "carry", "window", "exact floor", "by seed", "s"
    launch.console.print(launch.table("Nats a step on new streams", heads, told))
    launch.write_results(directory, {"rows": rows}, picture(rows))


if __name__ == "__main__":
    launch.run(main)
