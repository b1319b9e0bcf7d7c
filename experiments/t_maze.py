"""Agents in a T-maze (Bakker 2002) whose corridor is longer than their windows: the carry brings the cue to the junction.

python -m experiments.t_maze --algorithm=ppo
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import lax
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import tbptt_jax as tb
from experiments import launch
from experiments.agents import Agent, chrono
from experiments.ppo import EPOCHS, ppo
from experiments.r2d2 import BATCHES, r2d2
from tbptt_jax.rollout import Steps
from tbptt_jax.study.process import machine
from tbptt_jax.tasks.t_maze import ACTIONS

FLAGS = flags.FLAGS
flags.DEFINE_enum("algorithm", "ppo", ["ppo", "r2d2"], "Recurrent PPO, or R2D2.")
flags.DEFINE_integer("corridor", 20, "Steps from the cue to the junction.", lower_bound=1)
flags.DEFINE_integer("window", 10, "Steps of a window; R2D2 burns in one more.", lower_bound=1)
flags.DEFINE_string("influence", "replay:2", f"What PPO's gradient knows of the past. {launch.INFLUENCES}")
flags.DEFINE_integer(
    "keeps",
    None,
    "Steps that the LSTM's units keep at first, from 1 up to it; default 1, for R2D2 the corridor.",
    lower_bound=1,
)
flags.DEFINE_integer("hidden", 32, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("lanes", 16, "Mazes side by side.", lower_bound=1)
flags.DEFINE_integer("updates", 1500, "Windows of experience that are learned from.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.002, "Adam's rate at the start; it falls to zero linearly.", lower_bound=0.0)
flags.DEFINE_integer("seeds", 5, "Trainings, side by side.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/t_maze", "Where results.json, figure.png and flags.txt go.")

LOWER = "--seeds, --updates, --lanes, --window or --hidden"
EPISODES = 500  # of the test


def agent() -> tuple[tb.Recurrence, Agent]:
    """The model, and how it is trained."""
    policy = FLAGS.algorithm == "ppo"
    keeps = FLAGS.keeps or (1 if policy else FLAGS.corridor)
    model = chrono(tb.lstm(FLAGS.hidden, readout=nn.Dense(ACTIONS + policy)), keeps)
    each = EPOCHS if policy else BATCHES
    rate = optax.linear_schedule(FLAGS.learning_rate, 0.0, each * FLAGS.updates)
    settings = (
        model,
        tb.tasks.t_maze(FLAGS.corridor),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, eps=1e-3)),
    )
    if not policy:
        return model, r2d2(*settings, FLAGS.lanes, FLAGS.window)
    past = launch.influence(FLAGS.influence, FLAGS.updates, "influence")
    return model, ppo(*settings, FLAGS.lanes, FLAGS.window, past)


def train() -> dict[str, Any]:
    """A row: of each seed, the share of new episodes in which the best known actions lead to the goal, and its curve."""
    model, made = agent()
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    launch.check_fits("The agents", FLAGS.seeds * machine.size(shapes), f"{LOWER} or the reach of --influence")
    best = tb.rollout(model, tb.tasks.t_maze(FLAGS.corridor), lambda key, outputs: outputs[..., :ACTIONS].argmax(-1))

    def found(steps: Steps) -> jax.Array:
        return steps.done & (steps.reward > 0)

    def update(state: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        state, steps = made.update(state, key)
        return state, (found(steps).sum(), steps.done.sum())

    def one_seed(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 4)
        state, counts = lax.scan(update, made.init(keys[0]), jax.random.split(keys[1], FLAGS.updates))
        params = state.train.params
        # Twice as long as the shortest way, and no longer than the first turn.
        _, window = best.update(params, best.init(keys[2], params, EPISODES), keys[3], 2 * (FLAGS.corridor + 1))
        first = jnp.cumsum(window.targets.done, 1) == 1
        return *counts, (first & found(window.targets)).any(1).mean()

    (goals, ends, success), seconds = launch.train_seeds(one_seed, FLAGS.seeds, LOWER)
    width = -(-FLAGS.updates // 50)
    starts = np.arange(0, FLAGS.updates, width)
    goals, ends = (np.add.reduceat(x, starts, 1) for x in (goals, ends))
    return {
        "algorithm": FLAGS.algorithm,
        "influence": FLAGS.influence if FLAGS.algorithm == "ppo" else "truncate",
        "corridor": FLAGS.corridor,
        "window": FLAGS.window,
        "success": success.tolist(),
        "updates": np.minimum(starts + width, FLAGS.updates).tolist(),
        "curve": (goals / np.maximum(ends, 1)).tolist(),
        "episodes": ends.sum(1).tolist(),
        "seconds": seconds,
    }


def picture(row: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.4))
    for seed, curve in enumerate(row["curve"]):
        axes.plot(row["updates"], curve, color=f"C{seed % 10}", alpha=0.8, label=f"seed {seed}" if seed < 10 else None)
    axes.axhline(0.5, color="k", linestyle="--", linewidth=1, label="without memory, at best")
    axes.set(xlabel="updates", ylabel="episodes that end at the goal, while it learns", ylim=(0, 1.02))
    axes.set_title(f"{row['algorithm']}: corridor {row['corridor']}, windows of {row['window']}")
    axes.legend()
    return figure


def main() -> None:
    launch.influence(FLAGS.influence, 1, "influence")
    directory = launch.workdir(FLAGS.workdir)
    launch.say(f"{FLAGS.algorithm}: {FLAGS.seeds} seeds, {FLAGS.updates} updates each, in one program.")
    row = train()
    solved = f"{sum(x >= 0.99 for x in row['success'])} of {FLAGS.seeds}"
    by_seed = " ".join(f"{x:.3f}" for x in row["success"])
    told = (row["algorithm"], row["influence"], by_seed, solved, f"{row['seconds']:.0f}")
    title = f"Goals found in {EPISODES} new episodes, corridor {FLAGS.corridor}, windows of {FLAGS.window}; without memory .5"
    heads = "algorithm", "influence", "by seed", "solved", "s"
    launch.console.print(launch.table(title, heads, [told]))
    launch.write_results(directory, {"rows": [row]}, picture(row))


if __name__ == "__main__":
    launch.run(main)
