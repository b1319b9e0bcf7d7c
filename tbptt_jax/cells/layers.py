"""Layers of a recurrent cell as a recurrence: ``encoder`` → dropout → layers, with dropout between them → ``readout``."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, check_whole
from tbptt_jax.begin import InitialCarry, begin_from
from tbptt_jax.modules import Part, linen_parts, of_any_lanes
from tbptt_jax.noise import LEVELS, Keys, drawing, level, of_part, random_bytes, shared
from tbptt_jax.recurrence import Draw, Recurrence, Segment, recurrence
from tbptt_jax.window import Window, time_shape


class Options(TypedDict, total=False):
    """What every cell's function takes besides its own arguments. Where parts are modules, they are Linen modules without state.

    Attributes:
      encoder: what comes before the layers: a Linen module without state, called on the inputs, ``[lanes, time, ...] -> [lanes,
        time, inputs]``; ``params["encoder"]``. Or a function ``(params, inputs)`` of all parameters, which may take a ``key``.
      readout: likewise what comes after them, called on ``[lanes, time, outputs]``; ``params["readout"]``. With an
        ``encoder=nn.Embed(n, features)`` tied weights are ``readout=lambda params, y: y @
        params["encoder"]["params"]["embedding"].T``.
      layers: how many, each fed with the outputs of the one before.
      dropout: the part of a layer's outputs that is left out of the next one's inputs, in training; the kept ones are 1 / (1 -
        dropout) larger.
      input_dropout: likewise of the first layer's inputs.
      residual: add a layer's inputs to its outputs, where they are as many (He et al. 2016).
      init: ``(key, inputs) -> params`` of the functions among these, a dict beside the others.
      initial_carry: what a lane begins from, and after a reset. None: zeros. ``"learned"``: ``params["initial_carry"]``, zeros
        at first. A function ``(params, x [lanes, ...]) -> carry`` of the inputs of its first step, for what is known of a
        sequence; its parameters are of ``init``. The gradient reaches it in the window in which the lane begins.
      rngs: names that modules ask keys by.
      draw: ``"window"``: a mask is drawn once a window and held. ``"step"``: each step has its own.
      checkpoint: see :func:`tbptt_jax.from_step`.
    """

    encoder: Part
    readout: Part
    layers: int
    dropout: float
    input_dropout: float
    residual: bool
    init: Callable[[jax.Array, PyTree], dict[str, PyTree]] | None
    initial_carry: InitialCarry
    rngs: Sequence[str]
    draw: Draw
    checkpoint: Segment


def layered(
    name: str,
    weights: Callable[[jax.Array, int], PyTree],
    zeros: Callable[[PyTree, int], PyTree],
    run: Callable[..., tuple[PyTree, jax.Array]],
    outputs: int,
    *,
    draws: bool = False,
    layers: int = 1,
    encoder: Part = None,
    readout: Part = None,
    init: Callable[[jax.Array, PyTree], dict[str, PyTree]] | None = None,
    initial_carry: InitialCarry = None,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    residual: bool = False,
    rngs: Sequence[str] = ("dropout",),
    draw: Draw = "window",
    checkpoint: Segment = None,
    **unknown: Any,
) -> Recurrence:
    """A recurrence of layers of one cell; ``params["cell"]`` is a tuple of weights, the carry a tuple, one a layer.

    Args:
      name: of the cell, for sentences.
      weights: ``(key, inputs) -> weights`` of a layer fed with so many features.
      zeros: ``(weights, lanes) -> carry`` of a layer.
      run: ``(weights, carry, x [lanes, time, inputs], resets, valid, edges, *, starts, keys) -> (carry, y [lanes, time,
        outputs])``, a layer's window: starts, a carry ``[lanes, time, ...]``, is what a reset returns to, None: zeros; of
        ``keys``, a :class:`tbptt_jax.noise.Keys`, it draws.
      outputs: of a layer.
      draws: whether ``run`` draws anything.

    The others are :class:`Options`.

    Raises:
      ValueError: now, if a rate or ``layers`` is not as described, or an option unknown; from ``init`` and ``unroll``, as :func:`tbptt_jax.lstm`.
    """
    if unknown:
        raise ValueError(
            f"The {name} has no option {', '.join(f'`{each}`' for each in unknown)}; besides its own it has "
            f"{', '.join(f'`{each}`' for each in Options.__annotations__)}."
        )
    check_whole("layers", layers)
    check_rates(dropout=dropout, input_dropout=input_dropout)
    begin, apply = linen_parts(rngs, encoder=encoder, readout=readout)

    def init_all(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        keys = jax.random.split(key, layers + 2)
        params: dict[str, Any] = {} if init is None else init(jax.random.fold_in(key, layers + 2), inputs)
        x: Any = inputs
        if encoder is not None:
            x, params = begin("encoder", keys[0], params, x)
        if jnp.ndim(x) != 3:
            raise ValueError(
                f"What reaches the {name} has shape {list(jnp.shape(x))}; it needs to be [lanes, time, features]: `x[..., None]` "
                "for a single feature, an `encoder` such as nn.Embed for tokens."
            )
        widths = [jnp.shape(x)[-1], *[outputs] * (layers - 1)]
        params = {**params, "cell": tuple(weights(k, width) for k, width in zip(keys[2:], widths, strict=True))}
        if readout is not None:
            _, params = begin("readout", keys[1], params, jnp.zeros((lanes, 1, outputs)))
        return params

    def all_zeros(params: PyTree, lanes: int) -> PyTree:
        return tuple(zeros(of_layer, lanes) for of_layer in params["cell"])

    begin_all, start, of_data = begin_from(initial_carry, of_any_lanes(init_all), all_zeros)

    def scan(
        params: PyTree, carry: PyTree, x: jax.Array, *masks: jax.Array | None, starts: PyTree, keys: Keys
    ) -> tuple[PyTree, jax.Array]:
        if initial_carry == "learned":
            lanes, time = x.shape[:2]
            starts = jax.tree.map(
                lambda h: jnp.broadcast_to(h[:, None], (lanes, time, *h.shape[1:])), start(params, lanes)
            )
        starts = [None] * layers if starts is None else starts
        x = dropped(x, input_dropout, of_part(keys, layers), draw)
        after = []
        for number, (of_layer, before, of_start) in enumerate(zip(params["cell"], carry, starts, strict=True)):
            own = of_part(keys, number)
            if number:
                x = dropped(x, dropout, of_part(own, 1), draw)
            state, y = run(of_layer, before, x, *masks, starts=of_start, keys=of_part(own, 0))
            x = y + x if residual and x.shape == y.shape else y
            after.append(state)
        return tuple(after), x

    return recurrence(
        begin_all,
        start,
        drawing(scan, draws or dropout > 0 or input_dropout > 0),
        encoder and apply("encoder"),
        readout and apply("readout"),
        checkpoint,
        draw,
        of_data,
    )


def dropped(x: jax.Array, rate: float, keys: Keys, draw: Draw) -> jax.Array:
    """Dropout of ``x [lanes, time, features]``: of the same features at each step of a window, or of others at each.

    References: Srivastava et al. 2014, *Dropout*; Gal & Ghahramani 2016, *A theoretically grounded application of dropout in
    recurrent neural networks*, for masks that are held.
    """
    if rate == 0 or keys.window is None or keys.step is None:
        return x

    def mask(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 1 - rate, x.shape[2:])

    masks = jax.vmap(jax.vmap(mask))(keys.step) if draw == "step" else jax.vmap(mask)(keys.window)[:, None]
    return jnp.where(masks, x / (1 - rate), jnp.zeros_like(x))


def dropped_weights(w: jax.Array, rate: float, keys: Keys) -> jax.Array:
    """Weights of which a part is left out, drawn once a window for all lanes.

    Reference: Merity, Keskar & Socher 2018, *Regularizing and optimizing LSTM language models*, section 2 (DropConnect).
    """
    if rate == 0 or keys.window is None:
        return w
    left_out = random_bytes(shared(keys.window), w.shape) < level(rate)
    return jnp.where(left_out, jnp.zeros_like(w), w / (1 - level(rate) / LEVELS))


def check_inputs(name: str, x: jax.Array, inputs: int) -> None:
    """Raises a ``ValueError`` unless what reaches a layer is real numbers ``[lanes, time, inputs]``."""
    if jnp.ndim(x) != 3 or x.shape[-1] != inputs or jnp.iscomplexobj(x):
        raise ValueError(
            f"What reaches the {name} is {x.dtype}{list(jnp.shape(x))}; it needs to be real numbers [lanes, time, "
            f"{inputs}], as when the parameters were initialised. An `encoder` can bring it there."
        )


def check_rates(**rates: float) -> None:
    """Raises a ``ValueError`` unless each is a probability below 1."""
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(
                f"`{name}` is {rate!r}; it is the part that is left out and needs to be from 0 to below 1."
            )
