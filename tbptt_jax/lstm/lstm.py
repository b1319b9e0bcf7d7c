"""The LSTM (Hochreiter & Schmidhuber 1997, *Long short-term memory*) as a recurrence, each layer's window one operation."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, check_whole
from tbptt_jax.flax_models import linen_parts, of_any_lanes
from tbptt_jax.lstm.gpu import PALLAS
from tbptt_jax.lstm.weights import Weights, initial_weights
from tbptt_jax.lstm.window import SCANS, by_cudnn, fused, scanned
from tbptt_jax.recurrence import Recurrence, Segment, recurrence
from tbptt_jax.window import Window, time_shape


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
        cell = tuple(initial_weights(k, width, features, projection) for k, width in zip(keys[2:], widths, strict=True))
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
                state, x = scanned(dtype, weights, before, x, resets, valid, edges)
            elif chosen == "cudnn":
                state, x = by_cudnn(weights, before, x, resets)
            else:
                state, x = fused(PALLAS if chosen == "pallas" else SCANS, dtype, weights, before, x, resets, valid)
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


def _check_inputs(x: jax.Array, weights: Weights) -> None:
    if jnp.ndim(x) != 3 or x.shape[-1] != weights.input.shape[0] or jnp.iscomplexobj(x):
        raise ValueError(
            f"What reaches the LSTM is {x.dtype}{list(jnp.shape(x))}; it needs to be real numbers [lanes, time, "
            f"{weights.input.shape[0]}], as when the parameters were initialised. An `encoder` can bring it there."
        )
