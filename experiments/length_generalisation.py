"""Length generalisation by carried state (Ruiz & Gu 2025): trained in windows of 64 steps, how does a model read 4,096?

Each cell is trained with its carry handed from window to window, begun anew in each window, or handed to another lane.

python -m experiments.length_generalisation
python -m experiments.length_generalisation --cells=min_gru,mamba2 --workdir=runs/others
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
from experiments import launch, pictures
from tbptt_jax.study.tasks.known import symbols as loss
from tbptt_jax.tasks import hidden_regime, hidden_regime_floor
from tbptt_jax.training import TrainStep

CELLS: dict[str, Any] = {
    "lru": functools.partial(tb.lru, r_min=0.9, r_max=0.999, max_phase=np.pi / 10),
    "gated_delta": functools.partial(tb.gated_delta, heads=2),
    "lstm": tb.lstm,
    "gru": tb.gru,
    "min_gru": tb.min_gru,
    "rg_lru": tb.rg_lru,
    "mlstm": functools.partial(tb.mlstm, heads=2),
    "mamba2": functools.partial(tb.mamba2, heads=2, state=16),
}
CARRIES = "begun anew", "carried", "another lane's"
SYMBOLS = 4

FLAGS = flags.FLAGS
flags.DEFINE_list("cells", ["lru", "gated_delta", "lstm"], f"Of {', '.join(CELLS)}.")
flags.DEFINE_integer("window", 64, "Steps of a window in training.", lower_bound=2)
flags.DEFINE_integer("test_steps", 4096, "Steps of each test stream.", lower_bound=4)
flags.DEFINE_integer("lasts", 2000, "Steps that a regime lasts, in the mean.", lower_bound=1)
flags.DEFINE_integer("hidden", 32, "Features of the cell.", lower_bound=2)
flags.DEFINE_integer("lanes", 32, "Streams to train on, side by side.", lower_bound=2)
flags.DEFINE_integer("test_lanes", 256, "Streams to test on.", lower_bound=1)
flags.DEFINE_integer("updates", 4000, "Updates, one a window.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.005, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 5, "Trainings of each kind, side by side.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/length_generalisation", "Where results.json, figures and flags.txt go.")

LOWER = "--seeds, --updates, --lanes, --test_lanes, --test_steps or --hidden"


def train_step(cell: str) -> tuple[tb.Recurrence, TrainStep]:
    """The model, and how it is trained."""
    readout = nn.Sequential([nn.Dense(2 * FLAGS.hidden), nn.gelu, nn.Dense(SYMBOLS)])
    model = CELLS[cell](FLAGS.hidden, encoder=nn.Embed(SYMBOLS, FLAGS.hidden), readout=readout)
    rate = optax.cosine_decay_schedule(FLAGS.learning_rate, FLAGS.updates)
    return model, tb.train_step(tb.gradient(model, loss), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))


def training_windows(key: jax.Array, carry: str) -> tb.Window:
    """Windows of a stream; which carry meets which is a matter of how they are laid, and of their resets."""
    stream = hidden_regime(key, FLAGS.lanes, FLAGS.updates * FLAGS.window, SYMBOLS, lasts=FLAGS.lasts)
    windows = tb.split(stream, FLAGS.window)
    if carry == "begun anew":
        return tb.stateless(windows)
    if carry == "another lane's":  # each window one lane further: a lane goes on with the text of the one before it
        return jax.vmap(lambda n, window: jax.tree.map(lambda x: jnp.roll(x, n, 0), window))(
            jnp.arange(FLAGS.updates), windows
        )
    return windows


def read(model: tb.Recurrence, params: Any, test: tb.Window) -> tuple[jax.Array, jax.Array]:
    """Of each step of the test, from zeros on: the mean loss, and the part of the carry outside of what the first window has."""

    def numbers(carry: Any) -> jax.Array:
        leaves = [h.reshape(len(h), -1) for h in jax.tree.leaves(carry) if jnp.issubdtype(h.dtype, jnp.inexact)]
        return jnp.concatenate([part for h in leaves for part in ((h.real, h.imag) if jnp.iscomplexobj(h) else (h,))], 1)

    def step(state: tuple, at_t: tuple) -> tuple[tuple, tuple]:
        carry, low, high = state
        t, x, y = at_t
        carry, logits = model.unroll(params, carry, x[:, None], None, None)
        h = numbers(carry)
        outside = ((h < low) | (h > high)).mean()
        low, high = (jnp.where(t < FLAGS.window, f(b, g(h, 0)), b) for f, g, b in ((jnp.minimum, jnp.min, low), (jnp.maximum, jnp.max, high)))
        return (carry, low, high), (loss(logits, tb.Window(x[:, None], y[:, None])).mean(), outside, jnp.linalg.norm(h, axis=1).mean())

    carry = model.initial_carry(params, len(test.inputs))
    zeros = numbers(carry)[0]
    return lax.scan(step, (carry, zeros, zeros), (jnp.arange(FLAGS.test_steps), test.inputs.T, test.targets.T))[1]


def edges() -> list[int]:
    out = [0, 1]
    while out[-1] < FLAGS.test_steps:
        out.append(min(2 * out[-1], FLAGS.test_steps))
    return out


def binned(x: Any) -> np.ndarray:
    e = edges()
    return np.stack([np.asarray(x)[..., a:b].mean(-1) for a, b in zip(e, e[1:])], -1)


def train(cell: str, carry: str, test: tb.Window, floor) -> dict[str, Any]:
    model, step = train_step(cell)

    def one_seed(key):
        keys = jax.random.split(key, 2)
        windows = training_windows(keys[0], carry)
        state = step.init(keys[1], jax.tree.map(lambda x: x[0], windows))
        state, m = tb.train_windows(step, state, windows)
        return read(model, state.params, test)

    (losses, outside, norm), seconds = launch.train_seeds(one_seed, FLAGS.seeds, LOWER)
    return dict(cell=cell, carry=carry, excess=(binned(losses) - floor), outside=binned(outside), norm=binned(norm), seconds=seconds)


def main() -> None:
    test = hidden_regime(jax.random.key(1), FLAGS.test_lanes, FLAGS.test_steps, SYMBOLS, lasts=FLAGS.lasts)
    fl = hidden_regime_floor(test, SYMBOLS, lasts=FLAGS.lasts)
    floor = binned(fl.mean(0))
    # what only 64 steps know
    W = FLAGS.window
    print("floor", np.round(floor, 4))
    windows = tb.split(test, W)
    flat = jax.tree.map(lambda x: x.reshape(-1, W), tb.Window(windows.inputs, windows.targets))
    lim = hidden_regime_floor(flat, SYMBOLS, lasts=FLAGS.lasts).reshape(-1, FLAGS.test_lanes, W)[:, :, -1]
    full = fl.reshape(FLAGS.test_lanes, -1, W)[:, :, -1].T
    print("64-limited minus full", np.round(1e3 * np.asarray((lim - full).mean(1))[[0, 1, 2, 4, 8, 16, 32, 63]], 2), 1e3*float((lim-full)[8:].mean()), 1e3*float((lim-full)[8:].std()/np.sqrt((lim-full)[8:].size)))
    for cell in FLAGS.cells:
        for carry in CARRIES:
            r = train(cell, carry, test, floor)
            print(cell, carry, f"{r['seconds']:.0f}s", flush=True)
            for s in range(FLAGS.seeds): print("   excess", " ".join(f"{1e3*v:7.1f}" for v in r["excess"][s]))
            print("  outside%", " ".join(f"{100*v:7.2f}" for v in r["outside"].mean(0)))
            print("     norm ", " ".join(f"{v:7.2f}" for v in r["norm"].mean(0)), flush=True)


if __name__ == "__main__":
    launch.run(main)
