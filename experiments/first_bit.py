"""What happened? A stateless LSTM on short windows is at chance for what it can see; a stateful one remembers.

The study of P. Remy, *Stateful LSTM in Keras* (2016). Sequences of 20 steps begin with a one or a zero, all else is zero,
and the label is that first value. One LSTM, one train step; the systems differ only in how the same data is cut.

    python -m experiments.first_bit
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

import tbptt_jax as tb
from experiments import launch
from tbptt_jax import sharding
from tbptt_jax.tasks.first_bit import Floor, first_bit_floor, score_last
from tbptt_jax.training import TrainStep

LENGTH, SLIDING = 20, 10

FLAGS = flags.FLAGS
flags.DEFINE_integer("train", 1000, "Training sequences.", lower_bound=2)
flags.DEFINE_integer("test", 200, "Test sequences.", lower_bound=2)
flags.DEFINE_integer("hidden", 10, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("lanes", 100, "Sequences side by side in a training window.", lower_bound=1)
flags.DEFINE_integer("updates", 1000, "Updates of each training, rounded up to whole epochs.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.02, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 5, "Trainings of each system, side by side.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/first_bit", "Where results.json, figure.png and flags.txt go.")


class System(NamedTuple):
    """A way to cut sequences ``[n, 20, 1]``, what theory says of it, and what was published."""

    name: str
    window: int
    cut: Callable[[tb.Window, int], tb.Window]  # (sequences, lanes) -> windows
    exact: Floor | None
    published: float | None = None


def contiguous(length: int, sequences: tb.Window, lanes: int) -> tb.Window:
    return tb.split(sequences, length, lanes=lanes)


def sliding(sequences: tb.Window, lanes: int) -> tb.Window:
    return tb.split(tb.slide(sequences, SLIDING), SLIDING, lanes=lanes)


def misaligned(sequences: tb.Window, lanes: int) -> tb.Window:
    """The misuse: overlapping windows in batches of 11, as `split` would not let them run, carried on with no reset."""
    del lanes
    return sliding(sequences, LENGTH - SLIDING + 1)._replace(resets=None)


def systems() -> list[System]:
    published = {("stateful", 1): 1.0, ("stateless", 1): 0.525}
    rows = [
        System("stateless full", LENGTH, functools.partial(contiguous, LENGTH), first_bit_floor(1)),
        System("stateless sliding", SLIDING, sliding, first_bit_floor(LENGTH - SLIDING + 1), 0.5455),
        System("stateful misaligned", SLIDING, misaligned, None, 0.5),
    ]
    for k in (1, 2, 4, 5, 10, 20):
        cut = functools.partial(contiguous, k)

        def forget(sequences: tb.Window, lanes: int, cut: Callable = cut) -> tb.Window:
            return tb.stateless(cut(sequences, lanes))

        floor = first_bit_floor(LENGTH // k)
        rows.append(System("stateless contiguous", k, forget, floor, published.get(("stateless", k))))
        rows.append(System("stateful contiguous", k, cut, first_bit_floor(1), published.get(("stateful", k))))
    return rows


def cross_entropy(logits: jax.Array, window: tb.Window) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, window.targets)[..., 0]


def figures(logits: jax.Array, window: tb.Window) -> dict[str, jax.Array]:
    correct = (logits > 0) == (window.targets > 0.5)
    return {"loss": cross_entropy(logits, window), "accuracy": correct[..., 0].astype(jnp.float32)}


def data_of(system: System, key: jax.Array) -> tuple[tb.Window, tb.Window]:
    """The windows to train on and to test on."""
    keys = jax.random.split(key)
    train = system.cut(tb.tasks.first_bit(keys[0], FLAGS.train, LENGTH), FLAGS.lanes)
    test = system.cut(tb.tasks.first_bit(keys[1], FLAGS.test, LENGTH), FLAGS.test)
    return score_last(train), score_last(test)


def lstm() -> tb.Recurrence:
    return tb.from_linen(nn.OptimizedLSTMCell(FLAGS.hidden), readout=nn.Dense(1))


def train_step(updates: int) -> TrainStep:
    rate = optax.cosine_decay_schedule(FLAGS.learning_rate, updates)
    return tb.train_step(tb.gradient(lstm(), cross_entropy), optax.adam(rate))


def study(system: System, report: Callable[[float, str], None]) -> dict[str, Any]:
    """Trains one system for all seeds at once and returns its row of the results."""
    model = lstm()
    keys = jax.random.split(jax.random.key(0), FLAGS.seeds)
    train, test = jax.jit(jax.vmap(functools.partial(data_of, system)))(keys)
    count = train.inputs.shape[1]
    epochs = -(-FLAGS.updates // count)
    step = train_step(epochs * count)

    began = time.perf_counter()
    first = jax.tree.map(lambda x: x[:, 0], train)
    states = jax.jit(jax.vmap(step.init))(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), first)
    trainings = sharding.over_runs(functools.partial(tb.train_windows, step), launch.mesh(runs=FLAGS.seeds))
    epoch = jax.jit(trainings, donate_argnums=0)
    for done in range(1, epochs + 1):
        states, metrics = epoch(states, train)
        if done % max(1, epochs // 20) == 0:  # fetching a number waits for the device
            report(done / epochs, f"loss {metrics.loss.mean():.4f}")
    jax.block_until_ready(states)
    seconds = time.perf_counter() - began

    evaluate = jax.jit(jax.vmap(lambda params, windows: tb.evaluate(model, figures, params, windows).loss))
    scores = evaluate(states.params, test)
    return {
        "system": system.name,
        "window": system.window,
        "seeds": FLAGS.seeds,
        "test_accuracy": float(scores["accuracy"].mean()),
        "test_loss": float(scores["loss"].mean()),
        "exact_accuracy": system.exact and system.exact.accuracy,
        "exact_loss": system.exact and system.exact.loss,
        "published_accuracy": system.published,
        "test_accuracy_by_seed": scores["accuracy"].tolist(),
        "test_loss_by_seed": scores["loss"].tolist(),
        "train_windows": list(shape_of(train)),
        "test_windows": list(shape_of(test)),
        "accuracy_by_start": by_start(evaluate, states.params, test, system),
        "epochs": epochs,
        "updates": epochs * count,
        "seconds": seconds,
    }


def shape_of(windows: tb.Window) -> tuple[int, ...]:
    """``(windows over all lanes, time, features)`` of windows ``[seeds, windows, lanes, time, features]``."""
    _, count, lanes, time_, features = windows.inputs.shape
    filled = count * lanes if windows.valid is None else int(windows.valid[0, ..., 0].sum())
    return filled, time_, features


def by_start(evaluate: Callable, params: Any, test: tb.Window, system: System) -> dict[int, float]:
    """Test accuracy of the windows that start at each position of their sequence."""
    _, count, lanes, length, _ = test.inputs.shape
    if system.cut in (sliding, misaligned):
        starts = np.arange(count * lanes).reshape(count, lanes) % (LENGTH - length + 1)
    else:
        starts = np.arange(count)[:, None] % (LENGTH // length) * length + np.zeros(lanes, int)
    return {
        int(start): float(
            evaluate(params, test._replace(weights=test.weights * (starts == start)[..., None]))["accuracy"].mean()
        )
        for start in np.unique(starts)
    }


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(
        "system", box=box.SIMPLE_HEAD, pad_edge=False, title="Test scores, mean over seeds", title_justify="left"
    )
    for name in ("window", "published", "exact", "accuracy", "exact", "loss", "updates", "s"):
        out.add_column(name, justify="right")

    def number(x: float | None) -> str:
        return "–" if x is None else f"{x:.4f}"

    for row in rows:
        scores = ("published_accuracy", "exact_accuracy", "test_accuracy", "exact_loss", "test_loss")
        out.add_row(
            row["system"],
            str(row["window"]),
            *(number(row[score]) for score in scores),
            str(row["updates"]),
            f"{row['seconds']:.1f}",
        )
    return out


def what_happened(rows: list[dict[str, Any]]) -> Figure:
    """Left: who sees the bit. Right: what that makes of the accuracy at each window length, beside the exact figures."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    looks: dict[str, dict[str, Any]] = {
        "stateful contiguous": {"color": "C0", "marker": "o"},
        "stateless contiguous": {"color": "C1", "marker": "s", "markersize": 8, "markerfacecolor": "none"},
        "stateless sliding": {"color": "C2", "marker": "^"},
    }
    for name, window in (("stateful contiguous", 2), ("stateless contiguous", 2), ("stateless sliding", SLIDING)):
        (row,) = (row for row in rows if (row["system"], row["window"]) == (name, window))
        starts = row["accuracy_by_start"]
        left.plot(
            list(starts), list(starts.values()), linestyle="none", label=f"{name}, windows of {window}", **looks[name]
        )
    left.set_title("What happened? Only the window at 0 sees the bit")
    left.set(xlabel="where the window starts in its sequence", ylabel="test accuracy", xticks=range(0, LENGTH, 2))
    for name, look in looks.items():
        points = sorted(
            (row["window"], row["test_accuracy"], row["exact_accuracy"]) for row in rows if row["system"] == name
        )
        windows, accuracy, exact = zip(*points, strict=True)
        right.plot(windows, accuracy, label=name, **look)
        right.plot(windows, exact, "k+", markersize=12, label="exact" if name == "stateless sliding" else None)
    right.set_title("Carrying the state does what no short window can")
    right.set(xlabel="window, steps", xticks=[1, 2, 4, 5, 10, 20], ylim=(0.45, 1.05))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def main() -> None:
    for name, number in (("train", FLAGS.train), ("test", FLAGS.test)):
        if number % 2:
            raise ValueError(
                f"--{name}={number} is odd: half of the sequences begin with a one, so give an even number."
            )
    if FLAGS.lanes > FLAGS.train:
        raise ValueError(
            f"--lanes={FLAGS.lanes} is more than --train={FLAGS.train}: choose at most one lane a sequence."
        )
    launch.check_fits(
        "The sequences", 4 * LENGTH * FLAGS.seeds * max(5 * FLAGS.train, FLAGS.test), "--seeds, --train or --test"
    )
    chosen = systems()
    windows = jax.eval_shape(lambda key: data_of(chosen[0], key)[0], jax.random.key(0))
    launch.check_training(train_step(1), windows, FLAGS.seeds, "--hidden, --lanes or --seeds")
    directory = launch.workdir(FLAGS.workdir)
    rows: list[dict[str, Any]] = []
    with launch.progress(len(chosen), "systems") as report:
        for i, system in enumerate(chosen):

            def tell(part: float, text: str, i: int = i, system: System = system) -> None:
                report(i + part, f"{system.name}, window {system.window}: {text}")

            rows.append(study(system, tell))
    launch.console.print(table(rows))
    launch.write_results(directory, {"rows": rows}, what_happened(rows))
    launch.say(f"Written to {directory}: results.json, figure.png, flags.txt")


if __name__ == "__main__":
    launch.run(main)
