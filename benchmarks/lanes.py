"""Lanes over the CPU's cores, a JAX device each, against one device: ``python -m benchmarks.lanes``.

A train window of ``tb.lstm`` (forward, backward, update) in a compiled run of several; the two take turns in one process.
"""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import tbptt_jax as tb
from tbptt_jax import sharding

SHAPES = (
    (32, 64, 64, 128),
    (32, 128, 128, 256),
    (16, 256, 256, 512),
    (64, 64, 512, 512),
    (20, 70, 400, 1150),
    (12, 20, 1, 10),
)

FLAGS = flags.FLAGS
flags.DEFINE_integer("run", 4, "Windows in one compiled run.")
flags.DEFINE_integer("turns", 7, "Timed runs of each.")


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("lane",), axis_types=(jax.sharding.AxisType.Auto,))
    print(
        f"jax {jax.__version__}, {devices} {jax.devices()[0].device_kind} devices; ms a window, median; ratio [quartiles]"
    )
    print("| lanes, time, inputs, units | one device | lanes spread | one / spread |\n|---|---|---|---|")
    for lanes, steps, inputs, units in SHAPES:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(FLAGS.run, lanes, steps, inputs)).astype(np.float32)
        windows = tb.Window(x, rng.normal(size=(FLAGS.run, lanes, steps, units)).astype(np.float32))
        one = tb.gradient(tb.lstm(units), lambda y, w: jnp.sum(y * w.targets, -1))
        sides: list[Any] = []
        for estimate, cut in ((one, windows), (sharding.over_lanes(one, mesh), sharding.place(windows, mesh))):
            step = tb.train_step(estimate, optax.sgd(1e-6))
            sides.append([step, step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], windows)), cut])
        times: list[list[float]] = [[], []]
        for _ in range(FLAGS.turns + 2):
            for side, each in zip(sides, times, strict=True):
                began = time.perf_counter()
                side[1], _ = jax.block_until_ready(tb.train_windows(*side))
                each.append(1e3 * (time.perf_counter() - began) / FLAGS.run)
        alone, spread = (np.array(each[2:]) for each in times)
        low, middle, high = np.percentile(alone / spread, [25, 50, 75])
        shape = f"{lanes}, {steps}, {inputs}, {units}"
        print(
            f"| {shape} | {np.median(alone):.2f} | {np.median(spread):.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
