"""What deep stacks are made of: residual blocks with a norm before, and what is done at each step by itself.

    block = tb.stack(tb.residual(tb.gru(256)), tb.residual(tb.gated_mlp(768)))
    model = tb.stack(
        tb.pointwise(nn.Embed(256, 256)),
        tb.repeat(block, 12, remat=True),
        tb.pointwise(nn.Sequential([nn.RMSNorm(), nn.Dense(256)])),
    )

Params and carry are trees of the layers, in order.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree, at_least_float32, check_whole, quoted, where_lanes
from tbptt_jax.modules import Part, linen_parts, of_any_lanes
from tbptt_jax.noise import Keys, drawing, fold_in, takes_key
from tbptt_jax.recurrence import Draw, Recurrence, Segment, recurrence, unroll_window, windowed
from tbptt_jax.window import Window, time_shape

EPSILON = 1e-6  # of norms


def residual(model: Recurrence, norm: Literal["rms", "layer"] | None = "rms") -> Recurrence:
    """A residual block, ``x + model(norm(x))``, its norm before the model.

    ``params["model"]`` is the model's, ``params["norm"]`` the norm's gain, ones at first; the carry is the model's. The norm is
    over the last axis of each step, its sums in at least float32. All of it has the inputs' dtype, which is that of a whole stack
    of blocks: what makes the first one's inputs decides.

    Args:
      model: a recurrence whose outputs have the shape of its inputs, ``[lanes, time, ...]``.
      norm: ``"rms"``: g x / sqrt(mean |x|² + ε) (Zhang & Sennrich 2019, *Root mean square layer normalization*, eq. 4).
        ``"layer"``: g (x − mean x) / sqrt(var x + ε) (Ba et al. 2016, *Layer normalization*, eq. 3), without a bias. None: x.

    Raises:
      ValueError: now, if ``model`` or ``norm`` is not as described; from ``init`` and ``unroll``, if the inputs are no numbers
        ``[lanes, time, features]``, or the outputs have another shape or are complex and the inputs are not; and what the
        model raises.

    References: He et al. 2016, *Identity mappings in deep residual networks*; Xiong et al. 2020, *On layer normalization in
    the transformer architecture*, for the norm before.
    """
    _check_model(model)
    if norm not in ("rms", "layer", None):
        raise ValueError(f"`norm` is {norm!r}; it needs to be 'rms', 'layer', or None for no norm.")

    def normed(params: PyTree, x: jax.Array) -> jax.Array:
        if norm is None:
            return x
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - wide.mean(-1, keepdims=True) if norm == "layer" else wide
        power = jnp.mean((centred * centred.conj()).real, -1, keepdims=True)
        return (centred * lax.rsqrt(power + EPSILON) * params["norm"]["scale"]).astype(x.dtype)

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        _check_features(inputs)
        params = {} if norm is None else {"norm": {"scale": jnp.ones(jnp.shape(inputs)[-1])}}
        params["model"] = model.init(key, normed(params, jnp.asarray(inputs)))
        jax.eval_shape(lambda p, x: block.unroll(p, initial_carry(p, lanes), x), params, inputs)  # raises what it would
        return params

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        return model.initial_carry(params["model"], lanes)

    def read(params: PyTree, carry: PyTree, window: Window, key: jax.Array | None) -> tuple[PyTree, PyTree]:
        _check_features(window.inputs)
        x = jnp.asarray(window.inputs)
        if window.valid is not None:  # a NaN in the padding would reach the gradient as 0 * NaN
            x = where_lanes(jnp.asarray(window.valid, bool), x, jnp.zeros_like(x))
        window = window._replace(inputs=normed(params, x))
        carry, y = unroll_window(model, params["model"], carry, window, key)
        if getattr(y, "shape", None) != x.shape or jnp.iscomplexobj(y) > jnp.iscomplexobj(x):
            given, made = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree) for tree in (x, y))
            raise ValueError(
                f"The model makes outputs {made} of inputs {given}; a residual adds them up and needs one shape and one kind "
                "of number: give the model as many features as its inputs have, or bring these to it by "
                "`tb.pointwise(nn.Dense(n))`."
            )
        return carry, x + y.astype(x.dtype)

    block = windowed(init, initial_carry, read, takes_key(model.unroll))
    return block


def repeat(model: Recurrence, layers: int, *, remat: bool = False) -> Recurrence:
    """A model on top of itself so many times, each layer with parameters and a carry of its own: one loop over the layers.

    The numbers are those of ``stack(*[model] * layers)``, and what is compiled is one layer. Every leaf of params is ``[layers,
    ...]``, of the carry ``[lanes, layers, ...]``, where a stack has tuples.

    Args:
      model: a recurrence whose outputs have the tree, shapes and dtypes of its inputs, such as a :func:`residual` or a stack
        of some.
      layers: how many.
      remat: keep of each layer only its inputs and the carry that it begins with for the backward pass, and compute the rest
        again: memory for one layer at a time, for one more forward pass.

    Raises:
      ValueError: now, if ``model`` is none or ``layers`` is not a whole number from 1; from ``init`` and ``unroll``, if the
        outputs are not like the inputs, or the carry does not fit; and what the model raises.
    """
    _check_model(model)
    check_whole("layers", layers)

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        params = lax.map(lambda key: model.init(key, inputs), jax.random.split(key, layers))
        jax.eval_shape(
            lambda p, x: layered.unroll(p, initial_carry(p, lanes), x), params, inputs
        )  # raises what it would
        return params

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        return jax.vmap(lambda p: model.initial_carry(p, lanes), axis_size=layers, out_axes=1)(params)

    def read(params: PyTree, carry: PyTree, window: Window, key: jax.Array | None) -> tuple[PyTree, PyTree]:

        def layer(x: PyTree, of_layer: tuple) -> tuple[PyTree, PyTree]:
            number, params, carry = of_layer
            own = None if key is None or not takes_key(model.unroll) else fold_in(key, number)
            carry, y = unroll_window(model, params, carry, window._replace(inputs=x), own)
            given, made = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree) for tree in (x, y))
            if given != made:
                raise ValueError(
                    f"The model makes outputs {made} of inputs {given}; to be repeated it needs to make outputs like its "
                    "inputs: bring these to it, by `tb.pointwise` under `tb.stack`, or put different models on each other by `tb.stack`."
                )
            return y, carry

        by_layer = jnp.arange(layers), params, jax.tree.map(lambda h: jnp.swapaxes(h, 0, 1), carry)
        inputs = jax.tree.map(jnp.asarray, window.inputs)
        outputs, carry = lax.scan(jax.checkpoint(layer, prevent_cse=False) if remat else layer, inputs, by_layer)
        return jax.tree.map(lambda h: jnp.swapaxes(h, 0, 1), carry), outputs

    layered = windowed(init, initial_carry, read, takes_key(model.unroll))
    return layered


def pointwise(
    module: Part,
    *,
    init: Callable[[jax.Array, PyTree], dict[str, PyTree]] | None = None,
    rngs: Sequence[str] = ("dropout",),
    draw: Draw = "window",
    checkpoint: Segment = None,
) -> Recurrence:
    """What is done at each step by itself, as a recurrence with nothing to carry: a layer of :func:`tbptt_jax.stack`.

    The carry is ``()``. It is called on ``[lanes, time, ...]``, all steps at once.

    Args:
      module: a Linen module without state, whose parameters become ``params["module"]``; or a function ``(params, x) -> y``, which
        may take a ``key``.
      init: ``(key, inputs) -> params`` of a function; None: ``{}``.
      rngs: names that modules ask keys by.
      draw: how often what is random is drawn, see :func:`tbptt_jax.from_step`.
      checkpoint: see :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: now, if ``module`` is neither; from ``init``, if the inputs are not ``[lanes, time, ...]`` or have no axis of
        features, or the module has variables besides its parameters, draws where it is given no key, or looks along time or lanes.
    """
    if module is None:
        raise ValueError(
            "`module` is None; it needs to be a module, such as `nn.Dense(2)`, or a function `(params, x) -> y`."
        )
    begin, apply = linen_parts(rngs, module=module)

    def begin_all(key: jax.Array, inputs: PyTree) -> PyTree:
        time_shape(Window(inputs))
        params = {} if init is None else init(jax.random.fold_in(key, 1), inputs)
        _, params = begin("module", key, params, inputs)
        return params

    def nothing(params: PyTree, lanes: int) -> tuple[()]:
        return ()

    def scan(
        params: PyTree, carry: PyTree, x: PyTree, *masks: jax.Array | None, starts: PyTree, keys: Keys
    ) -> tuple[PyTree, PyTree]:
        return carry, x

    encoder = apply("module")
    return recurrence(
        of_any_lanes(begin_all), nothing, drawing(scan, False), encoder, None, checkpoint, draw, encoder_name="module"
    )


def gated_mlp(
    hidden: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
    dropout: float = 0.0,
    draw: Draw = "window",
    dtype: Any = None,
    checkpoint: Segment = None,
) -> Recurrence:
    """The gated feed-forward layer of each step, (activation(x W) ∘ x V) U: as many outputs as inputs, nothing carried.

    ``params["module"]`` has the kernels ``gate`` W, ``up`` V and ``down`` U, without biases.

    Args:
      hidden: units between; at 2/3 of the width of a layer without a gate it has as many parameters (often 8/3 of the inputs).
      activation: ``nn.silu``: SwiGLU. ``nn.gelu``: GeGLU. ``nn.sigmoid``: the GLU of Dauphin et al.
      dropout: the part of the hidden units that is left out in training; the kept ones are 1 / (1 - dropout) larger.
      draw: whether masks of dropout are drawn once a ``"window"`` or each ``"step"``.
      dtype: of the products, such as ``jnp.bfloat16``; None: that of parameters and inputs together.
      checkpoint: see :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: now, if ``hidden`` is not a whole number from 1, ``dropout`` not from 0 to below 1, or ``activation`` no function; from
        ``init``, as :func:`tbptt_jax.pointwise`.

    References: Shazeer 2020, *GLU variants improve transformer*, eq. 6; Dauphin et al. 2017, *Language modeling with gated
    convolutional networks*.
    """
    check_whole("hidden", hidden)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(
            f"`dropout` is {dropout!r}; it is the part that is left out and needs to be from 0 to below 1."
        )
    if not callable(activation):
        raise ValueError(f"`activation` is {activation!r}; it needs to be a function, such as `nn.silu`.")
    return pointwise(_GatedMLP(hidden, activation, dropout, dtype), draw=draw, checkpoint=checkpoint)


class _GatedMLP(nn.Module):
    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        h = self.activation(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
        return dense(x.shape[-1], "down")(nn.Dropout(self.dropout)(h))


def _check_model(model: Any) -> None:
    if not isinstance(model, Recurrence):
        raise ValueError(
            f"`model` is {quoted(model)}; it needs to be a Recurrence, as `tb.gru` and `tb.gated_mlp` make."
        )


def _check_features(x: Any) -> None:
    """Raises a ``ValueError`` unless ``x`` is one array of numbers ``[lanes, time, features]``, or of more axes."""
    if getattr(x, "ndim", 0) < 3 or not jnp.issubdtype(x.dtype, jnp.inexact):
        given = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", x)
        raise ValueError(
            f"What reaches the residual is {given}; it needs to be one array of floating-point numbers [lanes, time, features]: "
            "`x[..., None]` for a single feature, a layer such as `tb.pointwise(nn.Embed(n, features))` before it for tokens."
        )
