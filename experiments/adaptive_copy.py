"""Truncation that adapts itself, on the copy task of Aicher, Foti & Fox (2019): every loss sees K steps back, K fixed or chosen.

python -m experiments.adaptive_copy
"""

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
from experiments.adaptive_copy_lengths import chosen
from experiments.results import write_files
from tbptt_jax import study
from tbptt_jax.horizon.suggest import BOUNDS
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
flags.DEFINE_list("lengths", [str(K) for K in range(4, 21)], "The K to choose from.")
flags.DEFINE_integer("look_every", 450, "Updates from one choice to the next.", lower_bound=1)
flags.DEFINE_integer("memory", 10, "Steps of a word, which is said again as many steps later.", lower_bound=1)
flags.DEFINE_integer("hidden", 50, "Units of each of the LSTM's two layers.", lower_bound=1)
flags.DEFINE_integer("lanes", 64, "Streams side by side.", lower_bound=1)
flags.DEFINE_integer(
    "steps", 4000, "Steps of each stream to train on; a quarter as many to judge and to test.", lower_bound=4
)
flags.DEFINE_integer("epochs", 80, "Times to read them.", lower_bound=1)
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
        return jax.tree.unflatten(
            tree, [u if x.ndim > 1 else jnp.zeros_like(x) for u, x in zip(uniform, leaves, strict=True)]
        )

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


def train(name: str, seed: int, workdir: Any) -> dict[str, Any]:
    """One training: the perplexity on the validation stream over time, and on the test stream at its best."""
    lengths = launch.positive_integers("lengths", FLAGS.lengths, at_most=FLAGS.steps)
    window = chosen(name, FLAGS.tolerance, lengths, FLAGS.look_every) if name in BOUNDS else int(name)
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
    if unknown := [bound for bound in FLAGS.chosen if bound not in BOUNDS]:
        raise ValueError(f"--chosen has {launch.short(unknown[0])!r}: choose of {', '.join(BOUNDS)}.")
    launch.check_fits("The streams", 12 * (SYMBOLS + 2) * FLAGS.lanes * FLAGS.steps, "--lanes or --steps")
    launch.positive_integers("lengths", FLAGS.lengths, at_most=FLAGS.steps)
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
