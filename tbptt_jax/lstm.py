"""The LSTM whose window is one operation (Hochreiter & Schmidhuber 1997, *Long short-term memory*).

    i, f, o = σ(x W_x + h W_h + b),  g = tanh(…)        c ← f c + i g        h ← o tanh(c)

Only ``h W_h`` and the gates recur, so only they are inside the scan (Appleyard, Kočiský & Blunsom 2016, *Optimizing
performance of recurrent neural networks on GPUs*): the product with the inputs is one for all steps before it, and in the
backward pass the scan computes the cotangents of the gates alone; every weight's gradient is one product after it.
What the window keeps for its backward pass is the gates, the cells and, as its output, h: six numbers a unit and step.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree, check_whole, where_lanes
from tbptt_jax.flax_models import linen_parts, of_any_lanes
from tbptt_jax.lstm_gpu import PALLAS, Loops, cudnn
from tbptt_jax.recurrence import Recurrence, Segment, recurrence, scale_cotangent
from tbptt_jax.window import Window, time_shape

GATES = "ifgo"  # the order along the axis of four times the features, as PyTorch has it


class Weights(NamedTuple):
    """One layer's parameters, the gates side by side in the order input, forget, candidate, output.

    Attributes:
      input: ``[inputs, 4 * features]``.
      recurrent: ``[outputs, 4 * features]``; outputs are the features, or the projection's where there is one.
      bias: ``[4 * features]``.
      projection: ``[features, outputs]``, or None.
    """

    input: jax.Array
    recurrent: jax.Array
    bias: jax.Array
    projection: jax.Array | None = None


def lstm(
    features: int,
    *,
    readout: nn.Module | None = None,
    encoder: nn.Module | None = None,
    layers: int = 1,
    projection: int | None = None,
    dtype: Any = None,
    checkpoint: Segment = None,
    implementation: Literal["fused", "scan", "cudnn", "pallas"] | None = None,
) -> Recurrence:
    """A recurrence of LSTM layers, ``encoder`` → layers → ``readout``, each layer's window one fused operation.

    ``params["cell"]`` is a tuple of :class:`Weights`, one a layer; the carry is a tuple of ``(c [lanes, features],
    h [lanes, outputs])``, one a layer, zeros at first. The numbers are those of ``nn.OptimizedLSTMCell`` to rounding. At
    a step that is padding the output is the h that stands still.

    Args:
      features: units of each layer.
      readout: a Linen module without state, called on ``[lanes, time, outputs]``; ``params["readout"]``.
      encoder: likewise, called on the inputs, ``[lanes, time, ...] -> [lanes, time, inputs]``; ``params["encoder"]``.
      layers: how many, each fed with the outputs of the one before.
      projection: project h to this many outputs before it recurs (Sak, Senior & Beaufays 2014). None: no projection.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; carry, gates and sums stay in the
        parameters' dtype. None: the parameters' dtype throughout.
      checkpoint: see :func:`tbptt_jax.from_step`.
      implementation: None: ``"cudnn"`` on a GPU where that can do it, else ``"fused"``.

        - ``"fused"``, differentiated by hand: reverse mode and, as the transpose of what ``jax.vjp`` returns, forward
          mode (which ``uoro`` needs).
        - ``"scan"``, the same window left to JAX to differentiate, for ``jax.jvp`` and second derivatives.
        - ``"cudnn"``, NVIDIA's own: float32, without projection and without padding; reverse mode. A window in which a
          lane is reset after its first step is done by the fused scan.
        - ``"pallas"``, the fused window with its loops as kernels that keep the recurrent weights on the chip; without
          projection; reverse mode. On a CPU the kernels are interpreted, which is for tests.

    Raises:
      ValueError: now, if a size is not positive, or the implementation unknown or not for this; from ``init``, if the inputs
        have no axis of features, or a module has variables besides its parameters or looks along time or lanes; from ``unroll``, when it is
        traced, if what reaches the cell is not ``[lanes, time, inputs]`` of the weights' inputs, the carry does not fit,
        or ``"cudnn"`` was asked for and cannot do it.
    """
    for name, size in {"features": features, "layers": layers, "projection": projection}.items():
        if size is not None:
            check_whole(name, size)
    if implementation not in (None, "fused", "scan", "cudnn", "pallas"):
        raise ValueError(
            f"`implementation` is {implementation!r}; it needs to be 'fused', 'scan', 'cudnn', 'pallas', or None to choose."
        )
    if projection is not None and implementation in ("cudnn", "pallas"):
        raise ValueError(f"`implementation` is {implementation!r}, which has no projection: use 'fused', or None.")
    outputs = features if projection is None else projection

    begin, apply = linen_parts(encoder=encoder, readout=readout)

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        keys = jax.random.split(key, layers + 2)
        params: dict[str, Any] = {}
        x: Any = inputs
        if encoder is not None:
            x, params = begin("encoder", keys[0], params, x)
        if jnp.ndim(x) != 3:
            raise ValueError(
                f"What reaches the LSTM has shape {list(jnp.shape(x))}; it needs to be [lanes, time, features]: `x[..., None]` "
                "for a single feature, an `encoder` such as nn.Embed for tokens."
            )
        widths = [jnp.shape(x)[-1], *[outputs] * (layers - 1)]
        cell = tuple(_init(k, width, features, projection) for k, width in zip(keys[2:], widths, strict=True))
        if readout is not None:
            _, params = begin("readout", keys[1], params, jnp.zeros((lanes, 1, outputs)))
        return {**params, "cell": cell}

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        def zeros(width: int, weights: Weights) -> jax.Array:
            return jnp.zeros((lanes, width), weights.recurrent.dtype)

        return tuple((zeros(features, weights), zeros(outputs, weights)) for weights in params["cell"])

    def scan(
        params: PyTree,
        carry: PyTree,
        x: jax.Array,
        resets: jax.Array | None,
        valid: jax.Array | None,
        edges: jax.Array | None,
    ) -> tuple[PyTree, jax.Array]:
        kind = jnp.result_type(params["cell"][0].recurrent)
        simple = (dtype, projection, valid, edges) == (None,) * 4 and kind == jnp.float32
        if implementation == "cudnn" and not simple:
            raise ValueError(
                f"cuDNN's LSTM is float32, without `dtype`, projection, padding (`valid`) and edges; here are {kind} "
                f"parameters, dtype={dtype}, {'padding' if valid is not None else 'no padding'}: leave `implementation` None."
            )
        chosen = implementation or ("cudnn" if simple and jax.default_backend() == "gpu" else "fused")
        after = []
        for weights, before in zip(params["cell"], carry, strict=True):
            _check_inputs(x, weights)
            x = x.astype(weights.input.dtype)
            if chosen == "scan" or edges is not None:  # reweighted edges are left to JAX too
                state, x = _scanned(dtype, weights, before, x, resets, valid, edges)
            elif chosen == "cudnn":
                state, x = _by_cudnn(weights, before, x, resets)
            else:
                state, x = _fused(PALLAS if chosen == "pallas" else _SCANS, dtype, weights, before, x, resets, valid)
            after.append(state)
        return tuple(after), x

    return recurrence(
        of_any_lanes(init),
        initial_carry,
        scan,
        encoder and apply("encoder"),
        readout and apply("readout"),
        checkpoint,
    )


def from_flax(params: PyTree) -> Weights:
    """The weights of an ``nn.OptimizedLSTMCell`` or ``nn.LSTMCell``, with or without its outer ``"params"``.

    Args:
      params: for each gate of i, f, g, o, ``ii`` with kernel ``[inputs, features]``, and ``hi`` with kernel
        ``[features, features]`` and bias ``[features]``.

    Raises:
      KeyError: if one of these is missing.
    """
    params = params.get("params", params)
    return Weights(
        jnp.concatenate([params[f"i{gate}"]["kernel"] for gate in GATES], 1),
        jnp.concatenate([params[f"h{gate}"]["kernel"] for gate in GATES], 1),
        jnp.concatenate([params[f"h{gate}"]["bias"] for gate in GATES]),
    )


def to_flax(weights: Weights) -> PyTree:
    """The parameters of an ``nn.OptimizedLSTMCell`` with these weights: ``cell.apply(to_flax(weights), carry, x)``.

    Raises:
      ValueError: if the weights have a projection.
    """
    if weights.projection is not None:
        raise ValueError("These weights have a projection; Flax's LSTM cells have none.")
    parts = zip(GATES, *(jnp.split(w, 4, -1) for w in (weights.input, weights.recurrent, weights.bias)), strict=True)
    cell: dict[str, Any] = {}
    for gate, input_kernel, kernel, bias in parts:
        cell |= {f"i{gate}": {"kernel": input_kernel}, f"h{gate}": {"kernel": kernel, "bias": bias}}
    return {"params": cell}


def from_torch(state: Mapping[str, Any]) -> tuple[Weights, ...]:
    """The layers of a ``torch.nn.LSTM`` from its ``state_dict()``, or from arrays under the same names.

    PyTorch's two biases only ever appear as their sum, and become one.

    Args:
      state: for each layer, ``weight_ih_l0`` ``[4 * features, inputs]`` and ``weight_hh_l0`` ``[4 * features, outputs]``;
        where there are any, ``bias_ih_l0`` and ``bias_hh_l0`` ``[4 * features]``, ``weight_hr_l0`` ``[outputs, features]``.

    Returns:
      The weights of each layer, in order.

    Raises:
      ValueError: if the LSTM is bidirectional, or there is no ``weight_ih_l0``.
      KeyError: if a layer has ``weight_ih`` without ``weight_hh``.
    """
    if any(name.endswith("_reverse") for name in state):
        raise ValueError("This PyTorch LSTM is bidirectional; a stream is read in one direction only.")
    layers: list[Weights] = []
    while (name := f"_l{len(layers)}") and f"weight_ih{name}" in state:
        recurrent = jnp.asarray(state[f"weight_hh{name}"]).T
        bias = jnp.zeros(recurrent.shape[1:], recurrent.dtype)
        for key in (f"bias_ih{name}", f"bias_hh{name}"):
            bias = bias + jnp.asarray(state[key]) if key in state else bias
        down = jnp.asarray(state[f"weight_hr{name}"]).T if f"weight_hr{name}" in state else None
        layers.append(Weights(jnp.asarray(state[f"weight_ih{name}"]).T, recurrent, bias, down))
    if not layers:
        raise ValueError(f"There is no `weight_ih_l0` among {sorted(state)}: give the `state_dict()` of one nn.LSTM.")
    return tuple(layers)


def to_torch(layers: Sequence[Weights]) -> dict[str, jax.Array]:
    """Arrays under the names of a ``torch.nn.LSTM``'s ``state_dict()``; the second bias of each layer is 0.

    Args:
      layers: the weights of each layer, in order.

    Returns:
      Name → array, in the shapes that :func:`from_torch` reads; no layers, no arrays.
    """
    state = {}
    for n, weights in enumerate(layers):
        state[f"weight_ih_l{n}"] = weights.input.T
        state[f"weight_hh_l{n}"] = weights.recurrent.T
        state[f"bias_ih_l{n}"] = weights.bias
        state[f"bias_hh_l{n}"] = jnp.zeros_like(weights.bias)
        if weights.projection is not None:
            state[f"weight_hr_l{n}"] = weights.projection.T
    return state


def _scanned(
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    edges: jax.Array | None = None,
) -> tuple[tuple, jax.Array]:
    """The window as a plain scan: ``carry, x [lanes, time, inputs] -> carry, h [lanes, time, outputs]``."""
    dot = functools.partial(_dot, dtype)
    from_inputs = dot(x, weights.input) + weights.bias

    def step(carry: tuple, at_t: tuple) -> tuple[tuple, jax.Array]:
        from_input, reset, is_valid, edge = at_t
        before = c, h = _reset(carry if edge is None else scale_cotangent(edge, carry), reset)
        i, f, g, o = jnp.split(_gates(from_input + dot(h, weights.recurrent)), 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        h = h if weights.projection is None else dot(h, weights.projection)
        carry = (c, h) if is_valid is None else where_lanes(is_valid, (c, h), before)
        return carry, carry[1]

    carry, h = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (from_inputs, resets, valid, edges)))
    return carry, h.swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    loops: Loops,
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[tuple, jax.Array]:
    """:func:`_scanned`, with its backward pass written out, around what recurs."""
    return _scanned(dtype, weights, carry, x, resets, valid)  # not differentiated: nothing to keep


def _forward(
    loops: Loops,
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[tuple, tuple]:
    after, gates, cells, hs = loops.forward(dtype, weights, carry, _dot(dtype, x, weights.input), resets, valid)
    return (after, hs), (weights, carry, x, resets, valid, gates, cells, hs)


def _backward(loops: Loops, dtype: Any, residuals: tuple, cotangents: tuple) -> tuple:
    """Linear in the cotangents by construction, scan and all, so that JAX can transpose it into forward mode."""
    weights, carry, x, resets, valid, gates, cells, hs = residuals
    after, d_hs = cotangents

    # The cell's derivatives, of all steps at once: only products are left to the loop. Where the carry stands still its
    # cotangent does too, and nothing goes back through a reset.
    i, f, g, o = jnp.split(gates, 4, -1)
    squashed = jnp.tanh(cells)
    c_before, h_before = (
        jnp.concatenate([start[:, None], each[:, :-1]], 1) for start, each in zip(carry, (cells, hs), strict=True)
    )
    c_before, h_before = _reset((c_before, h_before), resets)
    # dc/di, dc/df, dc/dg and dh/do, before the activations; side by side in one array they would take four times as long
    by_gate = g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), squashed * o * (1 - o)
    by_cell, kept = o * (1 - squashed * squashed), f  # dh/dc, dc/dc_before
    if valid is not None:
        by_gate, by_cell = _reset((by_gate, by_cell), ~valid)
        kept = where_lanes(valid, kept, jnp.ones_like(kept))
    (kept,) = _reset((kept,), resets)

    d_carry, d_gates, d_outputs = loops.backward(
        dtype, weights, after, d_hs, gates, by_gate, by_cell, kept, resets, valid
    )
    d_projection = None if d_outputs is None else _over_steps(dtype, o * squashed, d_outputs)
    d_weights = Weights(
        _over_steps(dtype, x, d_gates), _over_steps(dtype, h_before, d_gates), d_gates.sum((0, 1)), d_projection
    )
    return d_weights, d_carry, _dot(dtype, d_gates, weights.input.T), None, None


_fused.defvjp(_forward, _backward)


def _scan_forward(
    dtype: Any, weights: Weights, carry: tuple, gates: jax.Array, resets: jax.Array | None, valid: jax.Array | None
) -> tuple[tuple, jax.Array, jax.Array, jax.Array]:
    dot = functools.partial(_dot, dtype)
    times_recurrent = _times(dtype, weights.recurrent, gates.shape[0])

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        carry, gates, cells, hs = state
        before = c, h = _reset(carry, _at(resets, t))
        # The gates take the place of the products they come from: the largest array of the window exists once. All four
        # are one elementwise pass, and lanes lead as they do outside, so nothing is transposed.
        activated = _gates(_at(gates, t) + (times_recurrent(h) + weights.bias))
        i, f, g, o = jnp.split(activated, 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        h = h if weights.projection is None else dot(h, weights.projection)
        carry = c, h = (c, h) if valid is None else where_lanes(_at(valid, t), (c, h), before)
        return (carry, _put(gates, activated, t), _put(cells, c, t), _put(hs, h, t)), None

    cells, hs = (jnp.zeros((*gates.shape[:2], each.shape[-1]), gates.dtype) for each in carry)
    return lax.scan(step, (carry, gates, cells, hs), jnp.arange(gates.shape[1]))[0]


def _scan_backward(
    dtype: Any,
    weights: Weights,
    d_carry: tuple,
    d_hs: jax.Array,
    gates: jax.Array,
    by_gate: tuple,
    by_cell: jax.Array,
    kept: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[tuple, jax.Array, jax.Array | None]:
    dot = functools.partial(_dot, dtype)
    times_transposed = _times(dtype, weights.recurrent.T, d_hs.shape[0])
    down = None if weights.projection is None else weights.projection.T

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        (d_c, d_h), d_gates, d_outputs = state
        d_h = d_output = d_h + _at(d_hs, t)
        if valid is not None:
            (d_output,) = _reset((d_output,), ~_at(valid, t))
        if down is not None:
            d_outputs = _put(d_outputs, d_output, t)
            d_output = dot(d_output, down)
        d_c = d_c + d_output * _at(by_cell, t)
        of_gates = (d_c, d_c, d_c, d_output)
        d_activated = jnp.concatenate([_at(by, t) * d for by, d in zip(by_gate, of_gates, strict=True)], -1)
        d_before = times_transposed(d_activated)
        if valid is not None:
            d_before = where_lanes(_at(valid, t), d_before, d_h)
        (d_before,) = _reset((d_before,), _at(resets, t))
        return ((d_c * _at(kept, t), d_before), _put(d_gates, d_activated, t), d_outputs), None

    # The cotangents of the gates take the place of the gates, whose derivatives are all there is left to know of them.
    start = d_carry, gates, None if down is None else jnp.zeros_like(d_hs)
    return lax.scan(step, start, jnp.arange(d_hs.shape[1]), reverse=True)[0]


_SCANS = Loops(_scan_forward, _scan_backward)


def _by_cudnn(weights: Weights, carry: tuple, x: jax.Array, resets: jax.Array | None) -> tuple[tuple, jax.Array]:
    """cuDNN knows no resets: one at the window's start is an initial carry, and for others the scan is there."""
    if resets is None:
        return cudnn(weights, carry, x)
    carry = _reset(carry, resets[:, 0])
    within = resets[:, 1:].any()
    scans = functools.partial(_fused, _SCANS, None)
    return lax.cond(within, lambda: scans(weights, carry, x, resets, None), lambda: cudnn(weights, carry, x))


def _gates(x: jax.Array) -> jax.Array:
    """σ, σ, tanh, σ of four blocks side by side, as one pass: σ(x) = (1 + tanh(x / 2)) / 2."""
    candidate = jnp.arange(x.shape[-1]) // (x.shape[-1] // 4) == GATES.index("g")
    scale = jnp.where(candidate, 1, 0.5).astype(x.dtype)
    return jnp.tanh(x * scale) * scale + (1 - scale)


def _dot(dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """``a [..., k] @ b [k, n]``: operands in ``dtype``, sums and result in that of ``a``."""
    result = a.dtype
    if dtype is not None:
        a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=result)


def _times(dtype: Any, w: jax.Array, lanes: int) -> Callable[[jax.Array], jax.Array]:
    """``x [lanes, k] -> x @ w``, for a loop: ``w [k, n]`` is laid out before it, as the products read it fastest.

    Where the layouts change places was found on two cores with 32 MiB of cache, by products of 8 to 64 rows with the
    weights of 512 to 2048 units; ``python -m benchmarks.speed --parts=window`` has shapes on either side.
    """
    on_cpu = jax.default_backend() == "cpu" and dtype is None and w.dtype == jnp.float32
    return _times_tiles(w) if on_cpu and w.nbytes >= 16 << 20 and lanes <= 32 else _times_rows(dtype, w)


def _times_rows(dtype: Any, w: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Rows filled up to whole vectors of 16: of rows of 1150 floats a product reads a sixth slower than of 1152."""
    n = w.shape[1]
    w = jnp.pad(w if dtype is None else w.astype(dtype), ((0, 0), (0, -n % 16)))
    return lambda x: _dot(dtype, x, w)[:, :n]


def _times_tiles(w: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Tiles of 64 columns, each in one piece of memory.

    A CPU's product of few rows goes through ``w`` 64 columns at a time, from row to row: once ``w`` no longer fits into the
    caches, each row of a wide ``w`` is a jump that no prefetch foresees, and a tile is a straight line. The tiles are a
    batch whose every product has the same x; in quarters of k that are then summed, because XLA hands a sum over to the
    library with the products and the repetition of x before it, and would else write x out again for every tile. Two
    halves of the columns, so that two cores have as much to do.
    """
    k, n = w.shape
    w = jnp.pad(w, ((0, -k % 4), (0, -n % 128)))
    # In this order one pass over w does it: [half, tile, quarter, k / 4, 64].
    tiles = w.reshape(len(w), -1, 64).swapaxes(0, 1).reshape(2, -1, 4, len(w) // 4, 64)

    def times(x: jax.Array) -> jax.Array:
        quarters = jnp.pad(x, ((0, 0), (0, -k % 4))).reshape(len(x), 4, -1).swapaxes(0, 1)
        repeated = jnp.broadcast_to(quarters, (*tiles.shape[:2], *quarters.shape))
        product = lax.dot_general(repeated, tiles, (((4,), (3,)), ((0, 1, 2), (0, 1, 2)))).sum(2)
        return product.transpose(2, 0, 1, 3).reshape(len(x), -1)[:, :n]

    return times


def _over_steps(dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """``[lanes, time, m]``, ``[lanes, time, n]`` → ``[m, n]``, summed over lanes and steps: a weight's gradient."""
    return _dot(dtype, a.reshape(-1, a.shape[-1]).T, b.reshape(-1, b.shape[-1]))


def _reset(tree: tuple, reset: jax.Array | None) -> tuple:
    """Zeros where ``reset``, ``[lanes]`` or ``[lanes, time]``, is True."""
    return tree if reset is None else where_lanes(reset, jax.tree.map(jnp.zeros_like, tree), tree)


def _at(x: jax.Array | None, t: jax.Array) -> Any:
    return None if x is None else lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def _put(x: jax.Array, value: jax.Array, t: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, t, 1)


def _init(key: jax.Array, inputs: int, features: int, projection: int | None) -> Weights:
    """Flax's initial values: each gate's own LeCun normal and orthogonal matrices, zero biases."""
    into, again, down = jax.random.split(key, 3)
    outputs = features if projection is None else projection

    def side_by_side(initial: Any, key: jax.Array, rows: int) -> jax.Array:
        # In a loop: two batched QR factorisations that meet on a CPU can wait for each other for ever (jaxlib 0.10).
        return jnp.concatenate([*lax.map(lambda key: initial(key, (rows, features)), jax.random.split(key, 4))], 1)

    return Weights(
        side_by_side(nn.initializers.lecun_normal(), into, inputs),
        side_by_side(nn.initializers.orthogonal(), again, outputs),
        jnp.zeros(4 * features),
        None if projection is None else nn.initializers.lecun_normal()(down, (features, projection)),
    )


def _check_inputs(x: jax.Array, weights: Weights) -> None:
    if jnp.ndim(x) != 3 or x.shape[-1] != weights.input.shape[0] or jnp.iscomplexobj(x):
        raise ValueError(
            f"What reaches the LSTM is {x.dtype}{list(jnp.shape(x))}; it needs to be real numbers [lanes, time, "
            f"{weights.input.shape[0]}], as when the parameters were initialised. An `encoder` can bring it there."
        )
