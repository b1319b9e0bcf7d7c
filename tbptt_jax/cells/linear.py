"""Linear recurrences as models: what is learned computes the coefficients of all steps at once, and only a sum recurs."""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree
from tbptt_jax.cells.linear_scan import Implementation, KeyValue, Masks, check_implementation, diagonal, key_value
from tbptt_jax.noise import Keys, drawing, takes_key
from tbptt_jax.recurrence import Draw, Recurrence, Segment, recurrence
from tbptt_jax.step_by_step import check_step_by_step
from tbptt_jax.window import Window, time_shape


def from_linear(
    coefficients: Callable[[PyTree, PyTree], tuple[PyTree, PyTree] | KeyValue],
    init: Callable[[jax.Array, PyTree], PyTree],
    initial_carry: Callable[[PyTree, int], PyTree],
    *,
    encoder: Callable[[PyTree, PyTree], PyTree] | None = None,
    readout: Callable[..., PyTree] | None = None,
    implementation: Implementation = None,
    draw: Draw = "window",
    checkpoint: Segment = None,
) -> Recurrence:
    """A recurrence from the coefficients of h ← a ∘ h + b, which do not depend on h.

    Resets, padding and edges are taken care of. The carry may be real or complex, and a tree; a and b are then trees like it.

    Args:
      coefficients: ``(params, x [lanes, time, ...]) -> (a, b)``, each ``[lanes, time, ...]`` with the carry's axes, or what
        broadcasts to that, as an ``a`` that is a parameter does. Or a :class:`KeyValue`, for a carry that is a matrix
        ``[lanes, heads, keys, values]``.
      init: ``(key, inputs [lanes, time, ...]) -> params``.
      initial_carry: ``(params, lanes) -> h``, every leaf ``[lanes, ...]``.
      encoder: ``(params, inputs [lanes, time, ...]) -> x [lanes, time, ...]``.
      readout: ``(params, h [lanes, time, ...]) -> outputs [lanes, time, ...]``; one that takes ``x`` is given the encoder's
        outputs too: ``(params, h, x)``. Of a :class:`KeyValue` it is given what the queries read, ``[lanes, time, heads,
        values]``, in the place of h.
      implementation: how a window is run; all give the same numbers to rounding. None: chosen by platform, as the page on cells
        has it.

        - ``"step"``: one step after another.
        - ``"associative"``: all steps at once, in log2(time) passes; of a :class:`KeyValue` all chunks at once.
        - ``"chunked"``: in chunks, whose steps are taken together.
      draw: how often what an encoder or a readout draws is drawn: see :func:`tbptt_jax.from_step`.
      checkpoint: see :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: now, if the implementation is unknown; from ``init``, if a function does not read each step of each lane by
        itself; from ``unroll``, when it is traced, if the coefficients do not fit the carry.
    """
    check_implementation(implementation)
    takes_x = readout is not None and "x" in inspect.signature(readout).parameters
    draws = readout is not None and takes_key(readout)

    def read(params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
        return _broadcast(coefficients(params, x), carry, *jax.tree.leaves(x)[0].shape[:2])

    def scan(
        params: PyTree, carry: PyTree, x: PyTree, *masks: jax.Array | None, starts: PyTree, keys: Keys
    ) -> tuple[PyTree, PyTree]:
        start = initial_carry(params, jax.tree.leaves(x)[0].shape[0])
        found = read(params, carry, x)
        if isinstance(found, KeyValue):
            carry, h = key_value(found, carry, start, Masks(*masks), implementation)
            return carry, (h, x)
        run = functools.partial(diagonal, masks=Masks(*masks), implementation=implementation)
        h = jax.tree.map(run, *found, carry, start)
        return jax.tree.map(lambda h: h[:, -1], h), (h, x)

    def out(params: PyTree, h_and_x: tuple, key: jax.Array | None = None) -> PyTree:
        h, x = h_and_x
        if readout is None:
            return h
        return readout(params, h, **({"x": x} if takes_x else {}), **({"key": key} if draws else {}))

    def checked_init(key: jax.Array, inputs: PyTree) -> PyTree:
        params = init(key, inputs)
        lanes, _ = time_shape(Window(inputs))
        x = inputs if encoder is None else jax.eval_shape(encoder, params, inputs)
        shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (params, x))
        carry = jax.eval_shape(lambda p: initial_carry(p, lanes), params)

        def of_steps(params: PyTree, x: PyTree) -> PyTree:
            return read(params, carry, x)

        jax.eval_shape(of_steps, *shapes)  # says what does not fit the carry
        check_step_by_step("function of the `coefficients`", of_steps, *shapes)
        return params

    return recurrence(checked_init, initial_carry, drawing(scan, False), encoder, drawing(out, draws), checkpoint, draw)


def _broadcast(found: PyTree, carry: PyTree, lanes: int, time: int) -> PyTree:
    """The coefficients as trees like the carry, each leaf ``[lanes, time, ...]``.

    Raises:
      ValueError: if they do not fit the carry.
    """

    def leaf(x: jax.Array, shape: tuple[int, ...], is_complex: bool) -> jax.Array:
        if jnp.iscomplexobj(x) and not is_complex:
            raise ValueError("complex numbers, and the carry is real")
        return jnp.broadcast_to(x, (lanes, time, *shape))

    def like_carry(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x, h: leaf(x, h.shape[1:], jnp.iscomplexobj(h)), tree, carry)

    try:
        if isinstance(found, KeyValue):
            _, heads, keys, values = carry.shape
            shapes: tuple[tuple[int, ...], ...] = (heads,), (heads, keys), (heads, values), (heads, keys), (heads,)
            return KeyValue(*(x if x is None else leaf(x, s, False) for x, s in zip(found, shapes, strict=True)))  # type: ignore[arg-type]
        a, b = found
        return like_carry(a), like_carry(b)
    except (TypeError, ValueError, AttributeError) as error:
        returned, needed = (
            jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree) for tree in (found, carry)
        )
        raise ValueError(
            f"`coefficients` returned {returned} for {lanes} lanes of {time} steps and the carry {needed}: it needs to return "
            "(a, b) with h = a * h + b, each a tree like the carry, every leaf [lanes, time, ...] with the carry's further axes "
            "or what broadcasts to that, complex only where the carry is; or a tb.KeyValue and a carry [lanes, heads, keys, values]."
        ) from error
