"""Teacher forcing, free running, and what is between: whether a model reads what was true a step before, or what it said.

    def feed(tokens, logits, key):  # instead of the given token the most likely one
        return logits.argmax(-1)

    model = tb.scheduled_sampling(reader, feed, 0.25, like=jnp.zeros(128))

The model is read a step at a time, since what it reads next is known no earlier.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, quoted, where_lanes
from tbptt_jax.noise import fold_in, lane_keys
from tbptt_jax.recurrence import Draw, Recurrence, Segment, from_step, unroll_window, windowed
from tbptt_jax.window import Window, time_shape

Feed = Callable[[PyTree, PyTree, jax.Array | None], PyTree]
OfInputs = Callable[[PyTree], jax.Array]


class ForcingCarry(NamedTuple):
    """Attributes:
    model: the carry of the model itself.
    outputs: those of the step before, leaves ``[lanes, ...]``.
    begun: ``[lanes]`` bool; False: there was no step before.
    """

    model: PyTree
    outputs: PyTree
    begun: jax.Array


def scheduled_sampling(
    model: Recurrence,
    feed: Feed,
    probability: float | OfInputs,
    *,
    like: PyTree,
    free: bool | OfInputs = False,
    draw: Draw = "window",
    checkpoint: Segment = None,
) -> Recurrence:
    """The same model, which reads its own output of the step before in the place of a given input, with a probability.

    At each step of each lane it is drawn anew which of the two is read. The first step of a stream, and that after a reset,
    reads what is given. The output of the step before is in the carry, so cutting changes nothing but the draws; what of the
    gradient comes through it belongs to an earlier window at an edge, and crosses by the influence. ``lax.stop_gradient``
    in ``feed`` keeps it out everywhere, as in the paper.

    In training a key is given, and it is drawn. In :func:`tbptt_jax.evaluate`, :func:`tbptt_jax.predict` and
    :func:`tbptt_jax.streaming` nothing is: all is read as it is given, teacher forcing, or with ``free`` as the model says.
    The parameters are those of ``model``, so a model may be trained with one and evaluated with the other.

    Args:
      model: the recurrence.
      feed: ``(inputs, outputs, key) -> inputs``, all ``[lanes, ...]``: the inputs of a step with what the model said a step
        before in them, such as the most likely token, a mean, or a token that is drawn. ``key`` ``[lanes]`` has a key of each
        lane, or is None where nothing is drawn.
      probability: of its own output, from 0 (teacher forcing) to 1; 1 - ε of the paper. Or a function of a step's
        inputs, ``inputs [lanes, ...] -> [lanes]``, where a schedule is data: a leaf of the inputs that rises from window to
        window.
      like: the outputs of one step of one lane, arrays of these shapes and dtypes, or ``jax.ShapeDtypeStruct``.
      free: without a key, whether its own output is read. Or a function of a step's inputs, ``inputs [lanes, ...] -> [lanes]``
        bool, where a part is given, as a prompt is.
      draw: what the model itself draws, such as dropout, is held over a window or drawn at each ``"step"``, as
        :func:`tbptt_jax.from_step` has it; give what the model was given.
      checkpoint: see :func:`tbptt_jax.from_step`; that of ``model`` has one step to work on.

    Raises:
      ValueError: now, if ``model`` is none, or ``probability`` or ``draw`` is not as described; from ``init`` and ``unroll``, before any compute,
        if the outputs are not like ``like``, or ``feed`` makes other inputs than it was given; and what the model raises.

    Reference: Bengio et al. 2015, *Scheduled sampling for sequence prediction with recurrent neural networks*, section 2.4.
    """
    if not isinstance(model, Recurrence):
        raise ValueError(
            f"`model` is {quoted(model)}; it needs to be a Recurrence, as `tb.lstm` and `tb.from_linen` make."
        )
    if not callable(probability) and not (isinstance(probability, int | float) and 0 <= probability <= 1):
        raise ValueError(f"`probability` is {quoted(probability)}; it needs to be a number from 0 to 1, or a function.")
    if draw not in ("window", "step"):
        raise ValueError(f"`draw` is {draw!r}; it needs to be 'window' or 'step': how often what is random is drawn.")

    def initial_carry(params: PyTree, lanes: int) -> ForcingCarry:
        said = jax.tree.map(lambda x: jnp.zeros((lanes, *jnp.shape(x)), jnp.result_type(x)), like)
        return ForcingCarry(model.initial_carry(params, lanes), said, jnp.zeros(lanes, bool))

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        params = model.init(key, inputs)
        lanes, _ = time_shape(Window(inputs))
        for keys in (None, lane_keys(key, lanes)):  # raises what it would
            jax.eval_shape(lambda p, x, k=keys: forced.unroll(p, initial_carry(p, lanes), x, key=k), params, inputs)
        return params

    def step(params: PyTree, carry: ForcingCarry, x: PyTree, key: jax.Array | None = None) -> tuple[PyTree, PyTree]:
        inputs, number = x
        number = number.max()  # the padding's is 0
        if key is None:
            own, drawn, of_model = _of(free, inputs, carry.begun), None, None
        else:
            now, of_model = fold_in(fold_in(key, 0), number), fold_in(key, 1)
            drawn = fold_in(now, 1)
            own = jax.vmap(jax.random.uniform)(fold_in(now, 0)) < _of(probability, inputs, carry.begun)
            of_model = fold_in(of_model, number) if draw == "step" else of_model
        if own is not False:
            fed = feed(inputs, carry.outputs, drawn)
            _check("`feed` makes inputs", fed, inputs, "those it was given")
            fed = jax.tree.map(lambda new, given: jnp.asarray(new, given.dtype), fed, inputs)
            inputs = where_lanes(own & carry.begun, fed, inputs)
        one_step = Window(jax.tree.map(lambda x: x[:, None], inputs))
        end, outputs = unroll_window(model, params, carry.model, one_step, of_model)
        outputs = jax.tree.map(lambda y: y[:, 0], outputs)
        _check(
            "The model has outputs",
            outputs,
            carry.outputs,
            "those of `like`, which is one lane's: shapes without [lanes, time]",
        )
        return ForcingCarry(end, outputs, jnp.ones_like(carry.begun)), outputs

    stepwise = from_step(step, init, initial_carry, checkpoint=checkpoint)

    def read(params: PyTree, carry: ForcingCarry, window: Window, key: jax.Array | None) -> tuple[ForcingCarry, PyTree]:
        lanes, time = time_shape(window)
        numbered = window.inputs, jnp.broadcast_to(jnp.arange(time), (lanes, time))
        return unroll_window(stepwise, params, carry, window._replace(inputs=numbered), key)

    forced = windowed(init, initial_carry, read, True)
    return forced


def _of(value: bool | float | OfInputs, inputs: PyTree, lanes: jax.Array) -> bool | float | jax.Array:
    """A number, or what a function makes of a step's inputs, for each lane."""
    if not callable(value):
        return value
    by_lane = value(inputs)
    if jnp.shape(by_lane) != lanes.shape:
        raise ValueError(
            f"A function of a step's inputs returned shape {list(jnp.shape(by_lane))}; `probability` and `free` need one "
            f"number for each lane, {list(lanes.shape)}."
        )
    return by_lane


def _check(what: str, has: PyTree, needs: PyTree, whose: str) -> None:
    """Raises a ``ValueError`` unless two trees are of one kind."""

    def kinds(tree: PyTree) -> tuple:
        of = jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(x), [jnp.issubdtype(jnp.result_type(x), kind) for kind in of]) for x in leaves]

    if kinds(has) != kinds(needs):
        one, other = (
            jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree) for tree in (has, needs)
        )
        raise ValueError(f"{what} {one}; they need the tree, shapes and kinds of number {other}, {whose}.")
