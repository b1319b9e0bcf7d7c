"""What each influence learns where the lag is longer than the window: say a symbol again, four windows later.

python -m experiments.copy_memory
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import flags
from rich.table import Table

import tbptt_jax as tb
from experiments import launch, pictures
from tbptt_jax.study.tasks.known import symbols as loss
from tbptt_jax.tasks import copy_memory, copy_memory_floor
from tbptt_jax.training import TrainStep

FLAGS = flags.FLAGS
INFLUENCES = ["truncate", "replay:1", "replay:all", "replay:all:0.9", "rtrl", "uoro"]
flags.DEFINE_list("influences", INFLUENCES, launch.INFLUENCES)
flags.DEFINE_integer("window", 4, "Steps of a window.", lower_bound=1)
flags.DEFINE_integer("lag", 28, "Steps of silence.", lower_bound=1)
flags.DEFINE_integer("symbols", 2, "How many symbols there are.", lower_bound=2)
flags.DEFINE_integer("length", 1, "How many symbols are to be remembered.", lower_bound=1)
flags.DEFINE_integer("hidden", 8, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("lanes", 16, "Sequences side by side.", lower_bound=1)
flags.DEFINE_integer("updates", 20_000, "Updates, one a window.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.003, "Adam's rate.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 5, "Trainings of each influence, side by side.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/copy_memory", "Where results.json, figure.png and flags.txt go.")

LOWER = "--seeds, --updates, --lanes, --lag, --length, --symbols, --hidden"


def data(key: jax.Array, n: int) -> tb.Window:
    """Windows of ``n`` sequences, ``lanes`` of them side by side."""
    return tb.split(copy_memory(key, n, FLAGS.lag, FLAGS.symbols, FLAGS.length), FLAGS.window, lanes=FLAGS.lanes)


def groups_and_windows() -> tuple[int, int]:
    """How many times ``lanes`` sequences are read, and the windows of each."""
    each = -(-(FLAGS.lag + 2 * FLAGS.length) // FLAGS.window)
    return -(-FLAGS.updates // each), each


def train_step(name: str) -> tuple[tb.Recurrence, TrainStep]:
    """The model, and how an influence trains it."""
    model = tb.from_linen(nn.OptimizedLSTMCell(FLAGS.hidden), readout=nn.Dense(FLAGS.symbols + 1))
    past = launch.influence(name, groups_and_windows()[1] - 1)
    estimate = tb.gradient(model, loss, influence=past, normaliser=FLAGS.lanes * FLAGS.length)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(FLAGS.learning_rate))
    return model, tb.train_step(estimate, optimiser)


def check_sizes() -> None:
    """Raises a ``ValueError`` if the data or the state of the trainings does not fit."""
    groups, _ = groups_and_windows()
    steps = FLAGS.seeds * max(groups, 16) * FLAGS.lanes * (FLAGS.lag + 2 * FLAGS.length)
    launch.check_fits("The sequences", 4 * steps * (FLAGS.symbols + 3), LOWER)
    windows = jax.eval_shape(lambda key: data(key, FLAGS.lanes), jax.random.key(0))
    for name in FLAGS.influences:
        launch.check_training(train_step(name)[1], windows, FLAGS.seeds, f"{LOWER} or the reach of {name}")


def train(name: str) -> dict[str, Any]:
    """One influence's row: the loss of a recalled symbol on new sequences, in nats, for each seed."""
    groups, each = groups_and_windows()
    model, step = train_step(name)

    def one_seed(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        windows = data(keys[0], groups * FLAGS.lanes)
        state = step.init(keys[1], jax.tree.map(lambda x: x[0], windows))
        state, metrics = tb.train_windows(step, state, windows)
        total, weight = (x.reshape(groups, each).sum(1) for x in (metrics.loss * metrics.weight, metrics.weight))
        return total / weight, tb.evaluate(model, loss, state.params, data(keys[2], 16 * FLAGS.lanes)).loss

    (curves, final), seconds = launch.train_seeds(one_seed, FLAGS.seeds, f"{LOWER} or the reach of {name}")
    return {
        "influence": name,
        "window": FLAGS.window,
        "seeds": FLAGS.seeds,
        "updates": groups * each,
        "loss": final.tolist(),
        "curve": curves.mean(0).tolist(),
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]], floor: float) -> Table:
    title = f"Nats a recalled symbol on new sequences; without memory {floor:.4f}; learned: below 0.9 of that"
    told = []
    for row in rows:
        losses = np.asarray(row["loss"])
        learned, by_seed = f"{(losses < 0.9 * floor).sum()} of {len(losses)}", " ".join(f"{x:.4f}" for x in losses)
        told.append((row["influence"], f"{losses.mean():.4f}", by_seed, learned, f"{row['seconds']:.0f}"))
    return launch.table(title, ("influence", "mean", "by seed", "seeds that learned", "s"), told)


def main() -> None:
    launch.check_influences(FLAGS.influences)
    if FLAGS.window > (steps := FLAGS.lag + 2 * FLAGS.length):
        raise ValueError(f"--window={FLAGS.window} is longer than a sequence of {steps} steps: choose less.")
    check_sizes()
    directory = launch.workdir(FLAGS.workdir)
    floor = copy_memory_floor(1, FLAGS.lag, FLAGS.symbols, FLAGS.length).recalled
    rows = []
    with launch.progress(len(FLAGS.influences), "influences") as report:
        for done, name in enumerate(FLAGS.influences, 1):
            rows.append(train(name))
            report(done, f"{name}: {np.mean(rows[-1]['loss']):.4f} nats")
    launch.console.print(table(rows, floor))
    title = f"Copy memory: lag {FLAGS.lag + FLAGS.length}, windows of {FLAGS.window}"
    launch.write_results(directory, {"rows": rows, "memoryless_floor": floor}, pictures.copy_memory(rows, floor, title))


if __name__ == "__main__":
    launch.run(main)
