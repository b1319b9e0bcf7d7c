"""Tokens and labels out of range, found before compute.

A gather in JAX takes an index below zero for one from the end, and for one past it has NaN or the last there is: a token -1 is
the last of the vocabulary, and a label of 5 among 5 classes a loss that is not a number, without a word. Whether a model looks its inputs up
in a table, or a loss its labels among the outputs, is found out by what they do with a few numbers, not by how they are written;
so a loss that has its own use for -100 is left alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.recurrence import Recurrence, some_numbers
from tbptt_jax.window import Window, is_scored, on_host

PyTree = Any
MOST = 16  # labels out of range that are tried


def check_ranges(model: Recurrence, loss: Any, params: PyTree, window: Window, axes: tuple[str, ...]) -> None:
    """Raises a ``ValueError`` for a token or label that a table of the model, or the outputs, does not have.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]`` or a tree.
      params: its parameters, of which only shapes and dtypes are used.
      window: with the leading ``axes``; looked at only in the host's memory. Padding is not, nor labels that are not scored.
      axes: ``("lanes", "time")``, or with the windows before them.
    """
    inputs, targets = (
        [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.integer)]
        for tree in (window.inputs, window.targets)
    )
    if not (inputs or targets) or not all(map(on_host, jax.tree.leaves(window))):
        return
    shape = jax.tree.leaves(window.inputs)[0].shape[: len(axes)]
    valid = np.ones(shape, bool) if window.valid is None else np.asarray(window.valid)
    leaves, tree = jax.tree.flatten((params, window.inputs))
    params_count = len(jax.tree.leaves(params))
    shapes = tuple(
        (jnp.shape(x) if i < params_count else (1, 1, *x.shape[len(axes) :]), x.dtype) for i, x in enumerate(leaves)
    )
    for i, x in enumerate(jax.tree.leaves(window.inputs)):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = np.where(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x, 0)
            rows = _table(model, tree, shapes, i, int(x.max()) if x.min() >= 0 else None)
            if rows is not None and (x.min() < 0 or x.max() >= rows):
                _refuse(
                    "inputs",
                    (x < 0) | (x >= rows),
                    x,
                    axes,
                    f"the model looks it up in a table of {rows} rows",
                    "padding",
                )
    if targets:
        _check_labels(model, loss, tree, shapes, window, shape, axes)


def _refuse(field: str, bad: np.ndarray, x: np.ndarray, axes: tuple[str, ...], what: str, out: str) -> None:
    place = np.argwhere(bad)[0]
    where = ", ".join(f"{name} {i}" for name, i in zip(axes, place, strict=False))
    count = int(bad.reshape(*bad.shape[: len(axes)], -1).any(-1).sum())
    rows = what.split()[-2]
    raise ValueError(
        f"`{field}` is {x[tuple(place)]} at {where} ({count} such steps), and {what}, 0 to {int(rows) - 1}. Number them within "
        f"these, or mark the step as {out}."
    )


@functools.lru_cache(maxsize=256)
def _outputs(model: Recurrence, tree: Any, shapes: tuple) -> PyTree:
    """The outputs' shapes for one step of one lane."""
    params, inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    return jax.eval_shape(lambda p, x: model.unroll(p, model.initial_carry(p, 1), x)[1], params, inputs)


@functools.lru_cache(maxsize=256)
def _table(model: Recurrence, tree: Any, shapes: tuple, which: int, largest: int | None) -> int | None:
    """How many rows the table has that the model looks up its ``which``-th input in; None: it does not, or has enough.

    Args:
      model: the recurrence.
      tree: of ``(params, inputs)``.
      shapes: and dtypes of its leaves, those of the inputs for one step of one lane.
      which: of the inputs' leaves.
      largest: only a table that is too small for it matters; None: any.
    """
    params, inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    dtype = jax.tree.leaves(inputs)[which].dtype
    most = np.iinfo(dtype).max if largest is None else largest
    rows = {p.shape[0] for p in jax.tree.leaves(params) if len(p.shape) > 1}
    sizes = sorted(n for n in rows if 1 < n <= most)
    if not sizes:
        return None
    signed = np.issubdtype(dtype, np.signedinteger)
    values = np.array([(n - 2, n - 1, n, min(n + 1, np.iinfo(dtype).max), -signed, -2 * signed) for n in sizes])
    lanes = values.size
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        params = jax.tree.map(lambda x: some_numbers(rng, x.shape, x.dtype), params)
        leaves, treedef = jax.tree.flatten(inputs)
        probes = [np.zeros((lanes, *x.shape[1:]), x.dtype) for x in leaves]
        probes[which] = probes[which] + values.reshape(-1, *[1] * (probes[which].ndim - 1)).astype(dtype)
        start = model.initial_carry(params, lanes)
        _, outputs = jax.jit(model.unroll)(params, start, jax.tree.unflatten(treedef, probes))
        read = np.concatenate(
            [np.asarray(y, np.complex128).reshape(*values.shape, -1) for y in jax.tree.leaves(outputs)], -1
        )
    last, end, past, further, minus, before = read.swapaxes(0, 1)
    finite = np.isfinite(end).all(1) & np.isfinite(last).all(1) & (end != last).any(1)
    wraps = finite & (end == minus).all(1) & (last == before).all(1) if signed else finite & False
    clamps = finite & (end == past).all(1) & (end == further).all(1) & (wraps | (not signed))
    beyond = finite & np.isnan(past).all(1)
    tables = [n for i, n in enumerate(sizes) if beyond[i] or clamps[i] or (wraps[i] and largest is None)]
    return min(tables, default=None)


def _check_labels(
    model: Recurrence, loss: Any, tree: Any, shapes: tuple, window: Window, shape: tuple, axes: tuple[str, ...]
) -> None:
    outputs = _outputs(model, tree, shapes)
    classes = {y.shape[-1] for y in jax.tree.leaves(outputs) if len(y.shape) > 2 and y.shape[-1] > 1}
    by_lane = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(axes) - 1 :]), window)
    scored = np.asarray(is_scored(by_lane)).reshape(shape)
    for i, labels in enumerate(jax.tree.leaves(window.targets)):
        if not jnp.issubdtype(labels.dtype, jnp.integer) or not classes:
            continue
        labels = np.asarray(labels)
        counts = scored.reshape(scored.shape + (1,) * (labels.ndim - scored.ndim))
        if labels.min() >= 0 and labels.max() < min(classes):
            continue
        for n in sorted(classes):
            bad = ((labels < 0) | (labels >= n)) & counts
            values, first = np.unique(labels[bad], return_index=True)
            for value, place in list(zip(values, np.argwhere(bad)[first], strict=True))[:MOST]:
                if _is_another(loss, outputs, window, i, tuple(place[: len(axes)]), int(value), n):
                    named = bad & (labels == value)
                    _refuse(
                        "targets",
                        named,
                        labels,
                        axes,
                        f"the loss looks it up among {n} classes",
                        "not scored, with weight 0",
                    )


def _is_another(loss: Any, outputs: PyTree, window: Window, which: int, place: tuple, value: int, classes: int) -> bool:
    """Whether the loss at ``place`` takes a label out of range for one of the classes, or has no number for it."""
    at = (*(slice(p, p + 1) for p in place[:-1]), slice(place[-1], place[-1] + 1))
    step = jax.tree.map(lambda x: x[at].reshape(1, 1, *x.shape[len(place) :]), window)
    leaves, tree = jax.tree.flatten(step.targets)
    rng = np.random.default_rng(0)

    def of(label: int) -> np.ndarray:
        labels = [*leaves]
        labels[which] = np.where(leaves[which] == value, label, leaves[which]).astype(leaves[which].dtype)
        losses = loss(drawn, step._replace(targets=jax.tree.unflatten(tree, labels)))
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(losses)])

    with jax.ensure_compile_time_eval():
        # From 0 to 1, so that they may be probabilities, or logits.
        drawn = jax.tree.map(lambda y: jnp.asarray(rng.uniform(0.1, 0.9, y.shape), y.dtype), outputs)
        try:
            given, alias, another = of(value), of(value % classes), of((value + 1) % classes)
            minus, end, last = of(-1), of(classes - 1), of(classes - 2)
        except Exception:  # a loss that reads more than one step
            return False
    if np.isnan(alias).any() or (alias == another).all():
        return False
    clamps = (given == end).all() and (minus == end).all() and (end != last).any()
    return bool(np.isnan(given).any() or ((given == alias).all() if value < 0 else clamps))
