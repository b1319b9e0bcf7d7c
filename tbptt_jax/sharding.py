"""Lanes over devices: each device reads its own lanes, and the devices speak once a window.

    mesh = sharding.mesh(lane=2)
    step = tb.train_step(sharding.over_lanes(estimate, mesh), optimiser)
    state, metrics = tb.train_windows(step, state, sharding.place(windows, mesh))

Lanes do not mix, so nothing crosses devices inside the scan over time. The gradients, the weight and the loss are added up
in one all-reduce at the window's end; parameters and optimiser are the same everywhere. Trainings that have nothing to do
with each other, such as seeds and learning rates, go side by side along another axis: :func:`over_runs`.
"""

import functools
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
RUN, LANE = "run", "lane"


def mesh(run: int = 1, lane: int = 1) -> Mesh:
    """The first ``run * lane`` devices as a mesh with the axes ``"run"`` and ``"lane"``.

    Raises:
      ValueError: if there are fewer devices.
    """
    if run * lane > jax.device_count():
        raise ValueError(
            f"A mesh of {run} x {lane} devices was asked for, and there are {jax.device_count()}. On a CPU "
            "`jax.config.update('jax_num_cpu_devices', n)`, before anything is computed, makes n of them."
        )
    devices = jax.devices()[: run * lane]
    return jax.make_mesh((run, lane), (RUN, LANE), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)


def over_lanes(estimate: Estimate, mesh: Mesh) -> Estimate:
    """The same estimator with its lanes spread over the mesh's axis ``"lane"``; its results are one device's to rounding.

    The stream state looks as on one device, its arrays with an axis of lanes spread along it; so a checkpoint of one goes
    on with any number of devices. What an influence has besides, every device has its own, on a leading axis
    ``[devices, ...]``: so any influence is spread as it is; random ones draw for each device by itself.

    Args:
      estimate: the estimator, with the default normaliser or a constant one.
      mesh: a mesh with an axis ``"lane"``. Others, such as ``"run"``, are left alone.

    Raises:
      ValueError: now, if the mesh has no such axis; from ``init`` and ``update``, when they are traced, if the window's
        lanes do not divide by it.
    """
    if LANE not in mesh.shape:
        raise ValueError(f"The mesh has the axes {list(mesh.shape)}; lanes are spread over an axis named {LANE!r}.")
    devices = mesh.shape[LANE]

    def spread(f: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        spread = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={LANE}, check_vma=False)
        return jax.jit(spread)

    def streams(params: PyTree, window: Window) -> tuple[StreamState, list[int | None]]:
        """A device's stream state as shapes and, for each leaf, the axis that grows with the lanes."""
        lanes, _ = time_shape(window)
        if lanes % devices:
            raise ValueError(
                f"{lanes} lanes cannot be spread evenly over {devices} devices: give a multiple of {devices}."
            )

        def shapes(lanes: int) -> StreamState:
            some = jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes, *x.shape[1:]), x.dtype), window)
            return jax.eval_shape(estimate.init, jax.random.key(0), params, some)

        one, two = (shapes(n * lanes // devices) for n in (1, 2))
        leaves = zip(jax.tree.leaves(one[:2]), jax.tree.leaves(two[:2]), strict=True)
        return one, [
            next((axis for axis, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m), None)
            for a, b in leaves
        ]

    def specs(stream: StreamState, axes: list[int | None]) -> Any:
        each = [P(LANE) if axis is None else P(*[None] * axis, LANE) for axis in axes]
        carry, influence = jax.tree.unflatten(jax.tree.structure(stream[:2]), each)
        everywhere: Any = P()
        return StreamState(carry, influence, everywhere)

    def init(key: jax.Array, params: PyTree, window: Window) -> StreamState:
        own, axes = streams(params, window)

        def on_device(key: jax.Array, params: PyTree, window: Window) -> StreamState:
            return _with_devices(estimate.init(key, params, window), axes)

        return spread(on_device, (P(), P(), P(LANE)), specs(own, axes))(key, params, window)

    def update(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
        _, axes = streams(params, window)
        key, draw = jax.random.split(stream.key)

        def on_device(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
            own = _without_devices(stream, axes)
            own = own._replace(key=jax.random.fold_in(own.key, jax.lax.axis_index(LANE)))
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
            return grads, _with_devices(own, axes), Metrics(loss / total, weight)

        state = specs(stream, axes)
        grads, stream, metrics = spread(on_device, (P(), state, P(LANE)), (P(), state, P()))(
            params, stream._replace(key=draw), window
        )
        return grads, stream._replace(key=key), metrics

    return estimate._replace(init=init, update=update)


def over_runs(train: Callable[..., PyTree], mesh: Mesh, same: tuple = ()) -> Callable[..., PyTree]:
    """``jax.vmap(train)`` with the trainings spread over the mesh's axis ``"run"``: no device waits for another.

    Where they do not divide by the devices, the last one is repeated to fill up, and left out of the result.

    Args:
      train: ``(*same, *args) -> result`` of one training.
      mesh: a mesh with an axis ``"run"``.
      same: the first arguments, which are the same for all trainings, such as data that they share.

    Returns:
      ``(*args) -> results``, each leaf with a leading axis ``[runs, ...]``.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    if RUN not in mesh.shape:
        raise ValueError(f"The mesh has the axes {list(mesh.shape)}; trainings are spread over an axis named {RUN!r}.")

    def on_device(same: tuple, args: tuple) -> PyTree:
        return jax.vmap(functools.partial(train, *same))(*args)

    spread = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(RUN)), out_specs=P(RUN), axis_names={RUN}, check_vma=False
    )

    def all_runs(*args: PyTree) -> PyTree:
        runs = jax.tree.leaves(args)[0].shape[0]
        more = -runs % mesh.shape[RUN]
        filled = jax.tree.map(lambda x: x[jnp.minimum(jnp.arange(runs + more), runs - 1)] if more else x, args)
        return jax.tree.map(lambda x: x[:runs] if more else x, spread(same, filled))

    return all_runs


def own_lanes(lanes: int) -> slice:
    """Those of ``lanes`` that this process reads, as :func:`place` takes them; all of them if it is the only one."""
    each = lanes // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def place(windows: Window, mesh: Mesh) -> Window:
    """Puts stacked windows ``[windows, lanes, time, ...]`` where :func:`over_lanes` reads them.

    With several processes, each gives its :func:`own_lanes`.
    """
    sharding = NamedSharding(mesh, P(None, LANE))
    if jax.process_count() == 1:
        return jax.device_put(windows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), windows)


def _with_devices(stream: StreamState, axes: list[int | None]) -> StreamState:
    """A device's stream state with a leading axis of devices where there is none of lanes."""
    return _where_no_lanes(lambda leaf: leaf[None], stream, axes)


def _without_devices(stream: StreamState, axes: list[int | None]) -> StreamState:
    return _where_no_lanes(lambda leaf: leaf[0], stream, axes)


def _where_no_lanes(
    change: Callable[[jax.Array], jax.Array], stream: StreamState, axes: list[int | None]
) -> StreamState:
    leaves, treedef = jax.tree.flatten(stream[:2])
    leaves = [change(leaf) if axis is None else leaf for leaf, axis in zip(leaves, axes, strict=True)]
    carry, influence = jax.tree.unflatten(treedef, leaves)
    return StreamState(carry, influence, stream.key)
