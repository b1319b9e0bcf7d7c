"""What happened? A stateless LSTM on short windows is at chance for what it can see; a stateful one remembers.

The study of P. Remy, *Stateful LSTM in Keras* (2016). Sequences of 20 steps begin with a one or a zero, all else is zero,
and the label is that first value. One LSTM, one train step; the systems differ only in how the same data is cut.

    python -m experiments.first_bit
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import tbptt_jax as tb
from experiments import launch, pictures
from experiments.first_bit_systems import LENGTH, System, shape_of, starts_of, systems
from tbptt_jax.study.tasks.known import binary, correct
from tbptt_jax.tasks.first_bit import score_last
from tbptt_jax.training import TrainStep

FLAGS = flags.FLAGS
flags.DEFINE_integer("train", 1000, "Training sequences.", lower_bound=2)
flags.DEFINE_integer("test", 200, "Test sequences.", lower_bound=2)
flags.DEFINE_integer("hidden", 10, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("lanes", 100, "Sequences side by side in a training window.", lower_bound=1)
flags.DEFINE_integer("updates", 1000, "Updates of each training, rounded up to whole epochs.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.02, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 5, "Trainings of each system, side by side.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/first_bit", "Where results.json, figure.png and flags.txt go.")

LOWER = "--hidden, --lanes or --seeds"


def figures(logits: jax.Array, window: tb.Window) -> dict[str, jax.Array]:
    return {"loss": binary(logits, window), "accuracy": correct(logits, window)}


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
    return tb.train_step(tb.gradient(lstm(), binary), optax.adam(rate))


def study(system: System) -> dict[str, Any]:
    """Trains one system for all seeds at once and returns its row of the results."""
    model = lstm()
    train, test = jax.jit(functools.partial(data_of, system))(jax.random.key(0))
    epochs = -(-FLAGS.updates // len(train.inputs))
    step, starts = train_step(epochs * len(train.inputs)), starts_of(system, test)

    def one_seed(key: jax.Array) -> tuple[Any, jax.Array]:
        train, test = data_of(system, key)
        state = step.init(jax.random.fold_in(key, 1), jax.tree.map(lambda x: x[0], train))
        state = jax.lax.fori_loop(0, epochs, lambda _, state: tb.train_windows(step, state, train)[0], state)

        def scores(weights: Any) -> Any:
            return tb.evaluate(model, figures, state.params, test._replace(weights=weights)).loss

        by_start = [test.weights * (starts == start)[..., None] for start in np.unique(starts)]
        return scores(test.weights), jax.lax.map(scores, jnp.stack(by_start))["accuracy"]

    (scores, by_start), seconds = launch.train_seeds(one_seed, FLAGS.seeds, LOWER)
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
        "train_windows": shape_of(train),
        "test_windows": shape_of(test),
        "accuracy_by_start": dict(zip(np.unique(starts).tolist(), by_start.mean(0).tolist(), strict=True)),
        "epochs": epochs,
        "updates": epochs * len(train.inputs),
        "seconds": seconds,
    }


def main() -> None:
    for name, number in (("train", FLAGS.train), ("test", FLAGS.test)):
        if number % 2:
            raise ValueError(f"--{name}={number} is odd: half of the sequences begin with a one. Give an even number.")
    if FLAGS.lanes > FLAGS.train:
        raise ValueError(f"--lanes={FLAGS.lanes} is more than --train={FLAGS.train}: choose at most one a sequence.")
    sequences = FLAGS.seeds * max(5 * FLAGS.train, FLAGS.test)
    launch.check_fits("The sequences", 4 * LENGTH * sequences, "--seeds, --train or --test")
    chosen = systems()
    windows = jax.eval_shape(lambda key: data_of(chosen[0], key)[0], jax.random.key(0))
    launch.check_training(train_step(1), windows, FLAGS.seeds, LOWER)
    directory = launch.workdir(FLAGS.workdir)
    rows: list[dict[str, Any]] = []
    with launch.progress(len(chosen), "systems") as report:
        for done, system in enumerate(chosen, 1):
            rows.append(study(system))
            report(done, f"{system.name}, window {system.window}: {rows[-1]['test_accuracy']:.4f}")
    launch.console.print(pictures.first_bit_table(rows))
    launch.write_results(directory, {"rows": rows}, pictures.first_bit(rows))


if __name__ == "__main__":
    launch.run(main)
