"""Lanes over devices: each device reads its own lanes, and the devices speak once a window.

    mesh = jax.make_mesh((2,), ("lane",), axis_types=(jax.sharding.AxisType.Auto,))
    step = tb.train_step(sharding.over_lanes(estimate, mesh), optimiser)
    state, metrics = tb.train_windows(step, state, sharding.place(windows, mesh))

Lanes do not mix, so nothing crosses devices inside the scan over time. The gradients, the weight and the loss are added up
in one all-reduce at the window's end; parameters and optimiser are the same everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tbptt_jax.gradient import Estimate, Metrics, StreamState
from tbptt_jax.window import Window, time_shape

PyTree = Any
LANE = "lane"


def over_lanes(estimate: Estimate, mesh: Mesh) -> Estimate:
    """The same estimator with its lanes spread over the mesh's axis ``"lane"``; its results are one device's to rounding.

    Every device has a stream state of its own, on a leading axis: leaves ``[devices, lanes / devices, ...]``. So any
    influence is spread as it is; random ones draw for each device by itself.

    Args:
      estimate: the estimator, with the default normaliser or a constant one.
      mesh: a mesh with an axis ``"lane"``. Others, such as ``"run"`` for trainings side by side, are left alone.

    Raises:
      ValueError: now, if the mesh has no such axis; from ``init`` and ``update``, when they are traced, if the window's
        lanes do not divide by it.
    """
    if LANE not in mesh.shape:
        raise ValueError(f"The mesh has the axes {list(mesh.shape)}; lanes are spread over an axis named {LANE!r}.")
    devices = mesh.shape[LANE]

    def spread(f: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={LANE}, check_vma=False)

    def check_lanes(window: Window) -> None:
        lanes, _ = time_shape(window)
        if lanes % devices:
            raise ValueError(
                f"{lanes} lanes cannot be spread evenly over {devices} devices: give a multiple of {devices}."
            )

    def init(key: jax.Array, params: PyTree, window: Window) -> StreamState:
        check_lanes(window)

        def on_device(key: jax.Array, params: PyTree, window: Window) -> StreamState:
            own = jax.random.fold_in(key, jax.lax.axis_index(LANE))
            return jax.tree.map(lambda x: x[None], estimate.init(own, params, window))

        return spread(on_device, (P(), P(), P(LANE)), P(LANE))(key, params, window)

    def update(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
        check_lanes(window)

        def on_device(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
            own = jax.tree.map(lambda x: x[0], stream)
            grads, own, (loss, weight) = estimate.update(params, own, window)
            # With the window's own weight as the normaliser, what adds up is the gradient times that weight.
            scale = weight if estimate.normaliser is None else jnp.ones_like(weight)
            mine, unravel = ravel_pytree(
                (jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), loss * weight, weight)
            )
            grads, loss, weight = unravel(jax.lax.psum(mine, LANE))  # one all-reduce
            total = jnp.where(weight > 0, weight, 1)
            share = 1 / total if estimate.normaliser is None else jnp.ones_like(total)
            grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
            return grads, jax.tree.map(lambda x: x[None], own), Metrics(loss / total, weight)

        return spread(on_device, (P(), P(LANE), P(LANE)), (P(), P(LANE), P()))(params, stream, window)

    return estimate._replace(init=init, update=update)


def place(windows: Window, mesh: Mesh) -> Window:
    """Puts stacked windows ``[windows, lanes, time, ...]`` where :func:`over_lanes` reads them."""
    return jax.device_put(windows, NamedSharding(mesh, P(None, LANE)))
