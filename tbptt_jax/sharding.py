"""Lanes over devices: each device reads its own lanes, and the devices speak once a window.

    mesh = sharding.mesh(lane=sharding.lane_devices(lanes, window, units))
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

from tbptt_jax.arrays import check_whole, is_leaf
from tbptt_jax.gradient import Estimate, Metrics, StreamState, as_real, gradient, of_each, of_real
from tbptt_jax.influence.influence import WindowVJP
from tbptt_jax.noise import LANE
from tbptt_jax.window import Window, step_weights, time_shape

PyTree = Any
RUN = "run"


def mesh(run: int = 1, lane: int = 1) -> Mesh:
    """The first ``run * lane`` devices as a mesh with the axes ``"run"`` and ``"lane"``.

    Args:
      run: devices for trainings side by side, which :func:`over_runs` spreads.
      lane: devices for the lanes of each, which :func:`over_lanes` spreads.

    Returns:
      A mesh ``[run, lane]``, over the devices of all processes.

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


def lane_devices(lanes: int, window: int, units: int, at_most: int | None = None) -> int:
    """How many devices the lanes of an LSTM train faster over, for ``mesh(lane=...)``; 1 where the work is not worth splitting.

    A CPU's cores each read their own copy of the weights and meet at every window's end, while on one device they share
    both. Measured (``python -m benchmarks.speed --parts=window``), lanes are faster spread over the cores where there is
    enough to do between the meetings, from 64 units, with 8 lanes for each core, and windows of 2 (units / 128)³ steps, and
    where the copies fit into the caches, up to 512 units. Accelerators have memories of their own, and all are used.

    Args:
      lanes: how many there are.
      window: steps of a window.
      units: of the widest layer.
      at_most: devices to choose from. None: all.

    Returns:
      A number of devices that divides the lanes.

    Raises:
      ValueError: if one of these is not a whole number of at least 1.
    """
    at_most = jax.device_count() if at_most is None else at_most
    for name, value in {"lanes": lanes, "window": window, "units": units, "at_most": at_most}.items():
        check_whole(name, value)
    devices = min(at_most, jax.device_count())
    devices = next(n for n in range(devices, 0, -1) if lanes % n == 0)
    enough = lanes >= 8 * devices and window >= 2 * (units / 128) ** 3
    if jax.default_backend() == "cpu" and not (64 <= units <= 512 and enough):
        return 1
    return devices


def over_lanes(estimate: Estimate, mesh: Mesh) -> Estimate:
    """The same estimator with its lanes spread over the mesh's axis ``"lane"``; its results are one device's to rounding.

    The stream state looks as on one device, its arrays with an axis of lanes spread along it; so a checkpoint goes on with
    any number of devices. Whole numbers without lanes, such as counters, are the same on every device, and so is what a
    stored backward pass has of the parameters. Of other numbers without lanes, which an influence of one's own may have,
    every device has its own, on a leading axis ``[devices, ...]``: they go on with as many devices. What is drawn for a lane
    does not depend on the devices.

    Args:
      estimate: the estimator, with the default normaliser or a constant one.
      mesh: a mesh with an axis ``"lane"``. Others, such as ``"run"``, are left alone.

    Returns:
      The estimator, its ``update`` for windows placed by :func:`place`.

    Raises:
      ValueError: now, if ``mesh`` is none or has no such axis; from ``init`` and ``update``, when they are traced, if the window's
        lanes do not divide by it.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"`mesh` is {mesh!r}; it needs to be a mesh of devices: `tb.sharding.mesh(lane=2)` for two.")
    if LANE not in mesh.shape:
        raise ValueError(f"The mesh has the axes {list(mesh.shape)}; lanes are spread over an axis named {LANE!r}.")
    devices = mesh.shape[LANE]
    summed = gradient(estimate.model, estimate.loss, influence=estimate.influence, normaliser=1.0)

    def separate(window: Window) -> bool:
        return estimate.normaliser is None and not is_leaf(window.weights) and window.weights is not None

    def of(window: Window) -> Estimate:
        return summed if separate(window) else estimate

    def spread(f: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        spread = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={LANE}, check_vma=False)
        return jax.jit(spread)

    def shapes(params: PyTree, window: Window, times: int = 1) -> StreamState:
        """The stream state of a device, or of one that had so many times its lanes."""
        lanes = time_shape(window)[0] // devices * times
        some = jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes, *x.shape[1:]), x.dtype), window)
        return jax.eval_shape(of(window).init, jax.random.key(0), params, some)

    def places(params: PyTree, window: Window) -> list[P | None]:
        """Of each leaf of the stream state, where it is: along its lanes, the same everywhere, or None: each device's own."""
        lanes, _ = time_shape(window)
        if lanes % devices:
            raise ValueError(
                f"{lanes} lanes cannot be spread evenly over {devices} devices: give a multiple of {devices}."
            )

        def place(one: Any, two: Any, of_window: bool) -> P | None:
            grows = [axis for axis, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)) if n != m]
            if not grows:
                return P() if of_window or not jnp.issubdtype(one.dtype, jnp.inexact) else None
            # Lanes that share an axis with something else, such as time, do not come in the order of one device's.
            alone = len(grows) == 1 and one.shape[grows[0]] == lanes // devices
            return P(*[None] * grows[0], LANE) if alone else None

        both = (_leaves(shapes(params, window, times)) for times in (1, 2))
        return [place(one, two, of_window) for (one, of_window), (two, _) in zip(*both, strict=True)]

    def specs(stream: StreamState, at: list[P | None]) -> StreamState:
        return jax.tree.unflatten(jax.tree.structure(stream), [P(LANE) if place is None else place for place in at])

    def init(key: jax.Array, params: PyTree, window: Window) -> StreamState:
        at = places(params, window)

        def on_device(key: jax.Array, params: PyTree, window: Window) -> StreamState:
            return _with_devices(of(window).init(key, params, window), at)

        state = specs(shapes(params, window), at)
        return spread(on_device, (P(), P(), P(LANE)), state)(key, params, window)

    def update(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
        at = places(params, window)

        def on_device(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
            several = separate(window)
            if several:  # each loss is averaged over a weight of its own: that of all devices, known before
                weights = step_weights(window)
                totals = jax.tree.map(lambda w: jax.lax.psum(w.sum(), LANE), weights)
                shares = jax.tree.map(lambda w, t: w / jnp.where(t > 0, t, 1), weights, totals)
                window = window._replace(weights=shares)
            grads, own, (loss, weight) = of(window).update(params, _without_devices(stream, at), window)
            # With the window's own weight as the normaliser, what adds up is the gradient times that weight.
            by_weight = estimate.normaliser is None and not several
            scale = weight if by_weight else jnp.ones(())
            scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
            sums = jax.tree.map(jnp.multiply, loss, of_each(weight, loss))
            mine, unravel = ravel_pytree((as_real(scaled), sums, weight))
            numbers, sums, weight = unravel(jax.lax.psum(mine, LANE))  # one all-reduce
            positive = jax.tree.map(lambda w: jnp.where(w > 0, w, 1), weight)
            share = 1 / positive if by_weight else jnp.ones(())
            grads = jax.tree.map(lambda g: g * share.astype(g.dtype), of_real(numbers, grads))
            loss = jax.tree.map(jnp.divide, sums, of_each(positive, sums))
            return grads, _with_devices(own, at), Metrics(loss, totals if several else weight)

        state = specs(stream, at)
        return spread(on_device, (P(), state, P(LANE)), (P(), state, P()))(params, stream, window)

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
    """The lanes that this process reads, as :func:`place` takes them; all of them if it is the only one.

    Args:
      lanes: how many there are, of all processes.

    Returns:
      A slice of them, the same number for each process, in the order of the processes.

    Raises:
      ValueError: if they do not divide by the processes.
    """
    if lanes % jax.process_count():
        raise ValueError(
            f"{lanes} lanes cannot be read by {jax.process_count()} processes, as many by each: give a multiple of "
            f"{jax.process_count()}."
        )
    each = lanes // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def place(windows: Window, mesh: Mesh) -> Window:
    """Puts stacked windows where :func:`over_lanes` reads them.

    Args:
      windows: ``[windows, lanes, time, ...]``; with several processes, each gives those of its :func:`own_lanes`.
      mesh: a mesh with an axis ``"lane"``.

    Returns:
      The windows with all lanes, spread over that axis.

    Raises:
      ValueError: if the lanes do not divide by it.
    """
    sharding = NamedSharding(mesh, P(None, LANE))
    if jax.process_count() == 1:
        return jax.device_put(windows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), windows)


def _leaves(stream: StreamState) -> list[tuple[Any, bool]]:
    """The leaves, each with whether a stored backward pass has it: without lanes, it is then of the parameters."""
    parts = jax.tree.leaves(stream, is_leaf=lambda x: isinstance(x, WindowVJP))
    return [(leaf, isinstance(part, WindowVJP)) for part in parts for leaf in jax.tree.leaves(part)]


def _with_devices(stream: StreamState, at: list[P | None]) -> StreamState:
    """A device's stream state with a leading axis of devices where it is the device's own."""
    return _where_own(lambda leaf: leaf[None], stream, at)


def _without_devices(stream: StreamState, at: list[P | None]) -> StreamState:
    return _where_own(lambda leaf: leaf[0], stream, at)


def _where_own(change: Callable[[jax.Array], jax.Array], stream: StreamState, at: list[P | None]) -> StreamState:
    leaves, treedef = jax.tree.flatten(stream)
    leaves = [change(leaf) if place is None else leaf for leaf, place in zip(leaves, at, strict=True)]
    return jax.tree.unflatten(treedef, leaves)
