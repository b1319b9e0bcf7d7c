"""Length generalisation by carried state (Ruiz & Gu 2025): trained in windows of 64 steps, how does a model read 4,096?

Each cell is trained with a carry that begins anew in each window, that is handed on, and that comes from another lane.

python -m experiments.length_generalisation
python -m experiments.length_generalisation --cells=min_gru,gru --workdir=runs/others
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import lax

import tbptt_jax as tb
from experiments import launch
from experiments import length_generalisation_report as report
from tbptt_jax.study.process.writing import short, write_files
from tbptt_jax.study.tasks.known import symbols as loss
from tbptt_jax.tasks import hidden_regime, hidden_regime_floor
from tbptt_jax.training import TrainStep

CELLS: dict[str, Any] = {
    "lru": functools.partial(tb.lru, r_min=0.9, r_max=0.999, max_phase=np.pi / 10),
    "rg_lru": tb.rg_lru,
    "gated_delta": functools.partial(tb.gated_delta, heads=2),
    "min_gru": tb.min_gru,
    "mamba2": functools.partial(tb.mamba2, heads=2, state=16),
    "mlstm": functools.partial(tb.mlstm, heads=2),
    "lstm": tb.lstm,
    "gru": tb.gru,
}
CARRIES = "reset", "carried", "swapped"
SYMBOLS = 4

FLAGS = flags.FLAGS
flags.DEFINE_list("cells", ["lru", "rg_lru", "lstm"], f"Any of {', '.join(CELLS)}.")
flags.DEFINE_integer("window", 64, "Steps of a window in training.", lower_bound=1)
flags.DEFINE_integer("test_steps", 4096, "Steps of each test stream.", lower_bound=1)
flags.DEFINE_integer("lasts", 2000, "Steps that a regime lasts, in the mean.", lower_bound=1)
flags.DEFINE_integer("hidden", 16, "Features of the cell, even.", lower_bound=2)
flags.DEFINE_integer("lanes", 16, "Streams to train on, side by side.", lower_bound=2)
flags.DEFINE_integer("test_lanes", 128, "Streams to test on.", lower_bound=1)
flags.DEFINE_integer("updates", 3000, "Updates, one a window.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.01, "Adam's rate at the start; it falls to zero.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 5, "Trainings of each kind, side by side.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/length_generalisation", "Where results.json, the figure and flags.txt go.")

LOWER = "--seeds, --updates, --window, --lanes, --test_lanes, --test_steps or --hidden"


def train_step(cell: str) -> tuple[tb.Recurrence, TrainStep]:
    """The model, and how it is trained."""
    readout = nn.Sequential([nn.Dense(2 * FLAGS.hidden), nn.gelu, nn.Dense(SYMBOLS)])
    model = CELLS[cell](FLAGS.hidden, encoder=nn.Embed(SYMBOLS, FLAGS.hidden), readout=readout)
    rate = optax.cosine_decay_schedule(FLAGS.learning_rate, FLAGS.updates)
    return model, tb.train_step(tb.gradient(model, loss), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))


def laid(windows: tb.Window, carry: jax.Array) -> tb.Window:
    """Windows for one of ``CARRIES``: with resets, or as they are, or each one lane further, so that lanes swap their carries."""
    further = jnp.where(carry == 2, jnp.arange(FLAGS.updates), 0)
    windows = jax.vmap(lambda window, n: jax.tree.map(lambda x: jnp.roll(x, n, 0), window))(windows, further)
    anew, as_cut = (jnp.asarray(w.resets) for w in (tb.stateless(windows), windows))
    return windows._replace(resets=jnp.where(carry == 0, anew, as_cut))


def read(model: tb.Recurrence, params: Any, test: tb.Window) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each step of the test, read from the initial carry on, over its lanes: the mean loss; the mean norm of the carry; and
    the most that the root mean square of one of its numbers is of what that number has reached in the first window."""

    def numbers(carry: Any) -> jax.Array:
        leaves = (h.reshape(len(h), -1) for h in jax.tree.leaves(carry) if h.dtype != bool)
        return jnp.concatenate([jnp.abs(h) for h in leaves], 1)

    def step(state: tuple, at_t: tuple) -> tuple[tuple, tuple]:
        (carry, met), (t, window) = state, at_t
        carry, logits = model.unroll(params, carry, window.inputs[:, None], None, None)
        squares = numbers(carry) ** 2
        size = jnp.sqrt(squares.mean(0))
        met = jnp.where(t < FLAGS.window, jnp.maximum(met, size), met)
        growth = jnp.where(met > 0, size / met, 0).max()
        return (carry, met), (loss(logits[:, 0], window).mean(), jnp.sqrt(squares.sum(1)).mean(), growth)

    carry = model.initial_carry(params, len(test.inputs))
    steps = jnp.arange(FLAGS.test_steps), tb.Window(test.inputs.T, test.targets.T)
    return lax.scan(step, (carry, jnp.zeros_like(numbers(carry)[0])), steps)[1]


def train(cell: str, test: tb.Window) -> tuple[Any, float]:
    """``(loss, norm, growth)`` of each test step, ``[seeds, carries, test_steps]``, and the seconds it took."""
    model, step = train_step(cell)

    def one_seed(key: jax.Array) -> Any:
        keys = jax.random.split(key, 2)
        stream = hidden_regime(keys[0], FLAGS.lanes, FLAGS.updates * FLAGS.window, lasts=FLAGS.lasts)
        windows = tb.split(stream, FLAGS.window)

        def one_carry(carry: jax.Array) -> Any:
            mine = laid(windows, carry)
            state = step.init(keys[1], jax.tree.map(lambda x: x[0], mine))
            state, _ = tb.train_windows(step, state, mine)
            return read(model, state.params, test)

        return jax.vmap(one_carry)(jnp.arange(len(CARRIES)))

    return launch.train_seeds(one_seed, FLAGS.seeds, LOWER)


def last_window_alone(test: tb.Window, best: np.ndarray) -> float:
    """What knowing a window's steps alone costs, in nats a step: Bayes' filter of these less that of all, late in the test."""
    cuts = tb.slide(test, FLAGS.window, stride=4)
    short = np.asarray(hidden_regime_floor(cuts, lasts=FLAGS.lasts))[:, -1].reshape(FLAGS.test_lanes, -1)
    more = short - best[:, FLAGS.window - 1 :: 4]
    return float(more[:, more.shape[1] // 2 :].mean())


def main() -> None:
    if unknown := [cell for cell in FLAGS.cells if cell not in CELLS]:
        raise ValueError(f"--cells has {short(unknown[0])!r}: choose of {', '.join(CELLS)}.")
    if FLAGS.test_steps < FLAGS.window:
        raise ValueError(f"--test_steps={FLAGS.test_steps} is less than --window={FLAGS.window}: give as many.")
    steps = len(CARRIES) * FLAGS.seeds * FLAGS.lanes * FLAGS.window * FLAGS.updates
    launch.check_fits("The streams", 9 * steps + 2 * FLAGS.test_lanes * FLAGS.test_steps * FLAGS.window, LOWER)
    directory = launch.workdir(FLAGS.workdir)
    test = hidden_regime(jax.random.key(1), FLAGS.test_lanes, FLAGS.test_steps, lasts=FLAGS.lasts)
    best = np.asarray(hidden_regime_floor(test, lasts=FLAGS.lasts))
    alone, edges, rows = last_window_alone(test, best), report.edges(FLAGS.test_steps), []
    with launch.progress(len(FLAGS.cells), "cells") as told:
        for done, cell in enumerate(FLAGS.cells, 1):
            (losses, *sizes), seconds = train(cell, test)
            for i, carry in enumerate(CARRIES):
                curves = (report.binned(x[:, i], edges).tolist() for x in (losses - best.mean(0), *sizes))
                measured = dict(zip(("excess", "norm", "growth"), curves, strict=True))
                rows.append({"cell": cell, "carry": carry, **measured, "seconds": seconds})
            told(done, f"{cell}: {seconds:.0f} s")
    launch.console.print(report.table(rows, edges, FLAGS.window))
    launch.say(f"Who knows the last {FLAGS.window} steps alone is {1000 * alone:.1f} thousandths above the filter.")
    figure = report.figure(rows, edges, FLAGS.window, alone)
    write_files(directory, {"figure.svg": report.themed(figure)})
    launch.write_results(directory, {"edges": edges, "rows": rows, "last_window_alone": alone}, figure)


if __name__ == "__main__":
    launch.run(main)
