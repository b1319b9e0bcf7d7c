"""Truncation that adapts itself, on the copy task of Aicher, Foti & Fox (2019): each loss sees K steps back, K fixed or chosen.

python -m experiments.adaptive_copy
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
from experiments import adaptive_copy_report as report
from experiments import launch
from experiments.results import write_files
from tbptt_jax import study
from tbptt_jax.recurrence import unroll_window
from tbptt_jax.study.tasks.known import symbols as loss
from tbptt_jax.tasks import copy_stream, copy_stream_floor

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "fixed", ["5", "10"], "Windows, each of which sees the one before it: every loss sees K steps back or more."
)
flags.DEFINE_list(
    "chosen",
    ["norms", "gradients"],
    "The bounds on the bias by which K is chosen: the paper's, of norms, and the library's.",
)
flags.DEFINE_float("tolerance", 0.5, "The relative bias δ that the K which is chosen may have.", lower_bound=1e-6)
flags.DEFINE_integer("longest", 20, "The largest K to choose.", lower_bound=2)
flags.DEFINE_integer("look_every", 500, "Updates from one choice to the next.", lower_bound=1)
flags.DEFINE_integer("memory", 10, "Steps of a word, which is said again as many steps later.", lower_bound=1)
flags.DEFINE_integer("hidden", 50, "Units of each of the LSTM's two layers.", lower_bound=1)
flags.DEFINE_integer("lanes", 64, "Streams side by side.", lower_bound=1)
flags.DEFINE_integer(
    "steps", 4000, "Steps of each stream to train on; a quarter as many to judge and to test.", lower_bound=4
)
flags.DEFINE_integer("epochs", 100, "Times to read them.", lower_bound=1)
flags.DEFINE_float("learning_rate", 1.0, "SGD's, for each √K.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 3, "Trainings of each kind.", lower_bound=1)
flags.DEFINE_string(
    "workdir", "runs/adaptive_copy", "Where results.json, figure.svg, flags.txt and a run for each training go."
)

SYMBOLS = 4


def task() -> study.Task:
    """The stream, and an LSTM that begins as the authors' does."""
    cells = tb.lstm(FLAGS.hidden, layers=2, encoder=nn.Dense(FLAGS.hidden), readout=nn.Dense(SYMBOLS + 2))

    def init(key: jax.Array, inputs: Any) -> Any:
        """Matrices uniform in ±√(3 / their longer side), biases zero."""
        leaves, tree = jax.tree.flatten(cells.init(key, inputs))
        keys = jax.random.split(key, len(leaves))
        uniform = [
            jax.random.uniform(k, x.shape, minval=-1, maxval=1) * (3 / max(x.shape)) ** 0.5
            for k, x in zip(keys, leaves, strict=True)
        ]
        return tree.unflatten([u if x.ndim > 1 else jnp.zeros_like(x) for u, x in zip(uniform, leaves, strict=True)])

    def drawn(steps: int) -> Any:
        return lambda key: copy_stream(key, FLAGS.lanes, steps, SYMBOLS, FLAGS.memory, FLAGS.memory)

    train, test = drawn(FLAGS.steps), drawn(FLAGS.steps // 4)
    figures = (study.Figure("nats", loss),)
    return study.Task(cells._replace(init=init), loss, train, test, test, FLAGS.lanes, figures, name="adaptive_copy")


def sgd() -> optax.GradientTransformationExtraArgs:
    """Of windows of K steps: gradients clipped to a norm of 1/K, decayed weights, and a rate that goes by √K."""

    def update(grads: Any, state: Any, params: Any = None, *, window: tb.Window, **others: Any) -> tuple[Any, Any]:
        del others
        steps = jnp.any(window.valid, 0).sum() if window.valid is not None else window.targets.shape[1]
        clipped = jnp.minimum(1.0, 1 / (steps * optax.tree.norm(grads)))
        rate = FLAGS.learning_rate * jnp.sqrt(steps)
        return jax.tree.map(lambda g, p: -rate * (clipped * g + 1e-5 * p), grads, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@functools.partial(jax.jit, static_argnames=("model", "loss"))
def by_carry(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tuple[jax.Array, jax.Array]:
    """Of the last step's loss: φ_k = E‖∂l_s/∂h_{s-k}‖, and ‖E Σ ∂l_s/∂h_{s-j}‖ over j ≤ k, for k = 1, 2, … ``[time]``, over the lanes."""
    along = jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], window)

    def last_loss(nudges: Any) -> jax.Array:
        def step(carry: Any, at_t: tuple) -> tuple[Any, jax.Array]:
            nudge, now = at_t
            carry, outputs = unroll_window(model, params, jax.tree.map(jnp.add, carry, nudge), now)
            return carry, loss(outputs, now).sum()

        return jax.lax.scan(step, carry, (nudges, along))[1][-1]

    time = len(along.targets)
    back = jax.grad(last_loss)(jax.tree.map(lambda h: jnp.zeros((time, *h.shape)), carry))
    lags = jnp.concatenate([x[::-1] for x in jax.tree.leaves(back)], -1)  # [lags, lanes, units]
    return jnp.linalg.norm(lags, axis=-1).mean(1), jnp.linalg.norm(jnp.cumsum(lags.mean(1), 0), axis=-1)


def by_norms(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tuple[np.ndarray, np.ndarray]:
    """E(K) and ‖ĝ_K‖ for K = 1, 2, … as the paper has them: sums of norms, by the carry."""
    phi, kept = (np.asarray(x, np.float64) for x in by_carry(model, loss, params, window, carry))
    tail = np.arange(len(phi) // 2, len(phi))
    rate = np.exp(np.polyfit(tail, np.log(phi[tail] + 1e-30), 1)[0])
    beyond = phi[-1] * rate / (1 - rate) if rate < 1 else np.inf
    return phi.sum() - np.cumsum(phi) + beyond, kept


def by_gradients(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tuple[np.ndarray, np.ndarray]:
    """E(K) and ‖ĝ_K‖ as the library has them: norms of sums, by the parameters."""
    half = window.targets.shape[1] // 2
    fading = tb.horizon.decay(
        model, loss, params, window, lags=half, carry=carry, burn_in=half, probes=16, lengths=[half]
    )
    return (fading.left_out + fading.beyond)[1:], fading.kept[1:]


BOUNDS = {"norms": by_norms, "gradients": by_gradients}


def chosen(bound: str) -> study.Lengths:
    """Windows of K, the smallest with δ(K) = E(K) / max (‖ĝ_K'‖ − E(K')) over K' ≤ K below the tolerance, if every loss sees K steps back."""

    def choose(*stream: Any) -> tb.horizon.Suggestion:
        left_out, kept = BOUNDS[bound](*stream)
        at_least = np.maximum.accumulate(kept - left_out)
        delta = np.where(at_least > 0, left_out / np.where(at_least > 0, at_least, 1), np.inf)
        below = np.flatnonzero(delta[1 : FLAGS.longest] < FLAGS.tolerance)
        K = int(below[0]) + 2 if len(below) else FLAGS.longest
        return tb.horizon.Suggestion(K, K, float(delta[K - 1]), len(below) > 0, f"by the bound on {bound}")

    def next_span(place: study.Place) -> study.Span:
        return study.Span(place.choice.window if place.choice else FLAGS.longest, FLAGS.longest)

    settings = {"bound": bound, "tolerance": FLAGS.tolerance, "longest": FLAGS.longest, "every": FLAGS.look_every}
    return study.Lengths(next_span, (FLAGS.longest,), settings, study.Look(FLAGS.look_every, 4 * FLAGS.longest, choose))


def train(name: str, seed: int, workdir: Any) -> dict[str, Any]:
    """One training: the perplexity on the validation stream over time, and on the test stream at its best."""
    window = chosen(name) if name in BOUNDS else int(name)
    run = study.fit(
        task(), window=window, epochs=FLAGS.epochs, influence="replay:1", optimiser=sgd(), seed=seed, workdir=workdir,
        checkpoint_every=500, settings={name: FLAGS[name].value for name in ("learning_rate", "hidden", "memory", "steps")}, devices=1, quiet=True,
    )  # fmt: skip
    steps = [call.steps or call.updates * int(name) for call in run.calls]
    return {
        "K": name,
        "seed": seed,
        "test": float(np.exp(study.evaluate(run.task, run.params, seed=seed)["nats"])),
        "curve": [
            (n / FLAGS.steps, float(np.exp(call.valid["nats"])))
            for n, call in zip(steps, run.calls, strict=True)
            if call.valid
        ],
        "mean_window": steps[-1] / run.updates,
        "choices": [(choice.steps / FLAGS.steps, choice.window, choice.bias_bound) for choice in run.choices],
        "seconds": sum(call.seconds for call in run.calls),
    }


def main() -> None:
    kinds = [*launch.positive_integers("fixed", FLAGS.fixed, at_most=FLAGS.steps), *FLAGS.chosen]
    directory, rows = launch.workdir(FLAGS.workdir), []
    with launch.progress(len(kinds) * FLAGS.seeds, "trainings") as told:
        for name in map(str, kinds):
            for seed in range(FLAGS.seeds):
                rows.append(train(name, seed, directory / f"{name}-{seed}"))
                told(len(rows), f"K {name}: {rows[-1]['test']:.3f}")
    floor = float(np.exp(copy_stream_floor(SYMBOLS, FLAGS.memory, FLAGS.memory)))
    launch.console.print(report.table(rows, floor))
    figure = report.figure(rows, floor, FLAGS.tolerance)
    write_files(directory, {"figure.svg": report.themed(figure)})
    launch.write_results(directory, {"rows": rows, "floor": floor}, figure)


if __name__ == "__main__":
    launch.run(main)
