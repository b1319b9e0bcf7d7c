"""How wrong a truncated gradient is: the bias and the spread of each influence against full BPTT, on a task."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import tbptt_jax as tb
from tbptt_jax.study.influences import influence as named_influence
from tbptt_jax.study.process.machine import check_fits, check_training, size
from tbptt_jax.study.task import Task, keys_of
from tbptt_jax.study.trainings import shape_of, streams_of


def probe_of(task: Task, seed: int, lanes: int, steps: int) -> tb.Window:
    """Of a seed's training streams ``lanes`` continuous ones ``[lanes, time, ...]``, of ``steps`` steps if there are so many.

    Short sequences follow one another, each reset where it begins.
    """
    rows = shape_of(task).rows
    lanes = min(lanes, rows)

    def draw(seed: jax.Array) -> tb.Window:
        streams = streams_of(task, "train", keys_of(seed).train)
        time = jax.tree.leaves(streams.inputs)[0].shape[1]
        groups = min(rows // lanes, -(-steps // time))
        some = jax.tree.map(lambda x: x[: groups * lanes], streams)
        windows = tb.split(some, time, lanes=lanes)  # [groups, lanes, time, ...]
        joined = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(lanes, groups * time, *x.shape[3:]), windows)
        return jax.tree.map(lambda x: x[:, :steps], joined)

    return jax.jit(draw)(seed)


def is_random(name: str) -> bool:
    """Whether an influence's estimates differ from draw to draw."""
    return name == "uoro" or name.count(":") == 2


def bias(
    task: Task,
    params: Any,
    windows: Sequence[int],
    influences: Sequence[str] = ("truncate",),
    *,
    lanes: int = 8,
    steps: int = 400,
    draws: int = 32,
    seed: int = 1,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """The distance of each influence's gradient from that of full BPTT, for each window.

    Args:
      task: with the model, the loss and the streams that are probed.
      params: where the gradient is taken.
      windows: lengths in steps.
      influences: names, such as ``"replay:3"``.
      lanes: of the probe.
      steps: of the probe.
      draws: estimates of each random influence.
      seed: of the probe's data, and of the draws.
      report: is given each row as it is measured.

    Returns:
      A row for each influence and window: as :func:`tbptt_jax.horizon.bias.bias` has them.

    Raises:
      ValueError: if what is kept of it does not fit into memory.
    """
    check_bias(task, windows, influences, lanes=lanes, steps=steps, draws=draws)
    probe, key = probe_of(task, seed, lanes, steps), jax.random.key(seed)
    rows = []
    for name in influences:
        for window in windows:
            began, random = time.perf_counter(), is_random(name)
            past, times = named_influence(name, -(-steps // window)), draws if random else 1
            found = tb.horizon.bias(task.model, task.loss, params, probe, window, past, key=key, draws=times)
            rows.append(
                {
                    "influence": name,
                    "window": window,
                    "relative_bias": found.relative_bias,
                    "cosine": found.cosine,
                    "relative_std": found.relative_std if random else 0.0,
                    "draws": times,
                    "relative_bias_standard_error": found.relative_std / np.sqrt(draws) if random else 0.0,
                    "groups": {group: part._replace(groups={})._asdict() for group, part in found.groups.items()},
                    "seconds": time.perf_counter() - began,
                }
            )
            report(rows[-1])
    return rows


def check_bias(
    task: Task, windows: Sequence[int], influences: Sequence[str], *, lanes: int, steps: int, draws: int
) -> None:
    """Raises a ``ValueError`` if what :func:`bias` keeps does not fit into memory; to be asked before a training."""
    like = jax.eval_shape(lambda: probe_of(task, 0, lanes, 1).inputs)
    params = jax.eval_shape(task.model.init, jax.random.key(0), like)
    for window in {min(windows), max(windows)}:
        example = jax.eval_shape(lambda k=window: tb.split(probe_of(task, 0, lanes, k), k))
        for name in influences:
            estimate = tb.gradient(task.model, task.loss, influence=named_influence(name, -(-steps // window)))
            step = tb.train_step(estimate, optax.sgd(0.0))
            check_training(step, example, 1, f"the model's size, the lanes or the reach of {name}")
    check_fits("The estimates", draws * size(params), "`draws` or the model's size")
