"""The LSTM (Hochreiter & Schmidhuber 1997, *Long short-term memory*) as a recurrence, each layer's window one operation."""

import functools
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, check_whole
from tbptt_jax.begin import from_first_step
from tbptt_jax.cells.layers import Options, check_inputs, check_rates, dropped_weights, layered
from tbptt_jax.cells.lstm.gpu import PALLAS
from tbptt_jax.cells.lstm.weights import Weights, initial_weights
from tbptt_jax.cells.lstm.window import SCANS, Zoneout, by_cudnn, fused, scanned
from tbptt_jax.cells.zoneout import stays
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


def lstm(
    features: int,
    *,
    projection: int | None = None,
    weight_drop: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    layer_norm: bool = False,
    dtype: Any = None,
    implementation: Literal["fused", "scan", "cudnn", "pallas"] | None = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of LSTM layers, ``encoder`` → layers → ``readout``, each layer's window one fused operation.

    ``params["cell"]`` is a tuple of :class:`Weights`, one a layer; the carry is a tuple of ``(c [lanes, features],
    h [lanes, outputs])``, one a layer, zeros at first. The numbers are those of ``nn.OptimizedLSTMCell`` to rounding. At
    a step that is padding the output is the h that stands still.

    Args:
      features: units of each layer.
      projection: project h to this many outputs before it recurs (Sak, Senior & Beaufays 2014). None: no projection.
      weight_drop: the part of the recurrent weights that is left out in training, drawn once a window for all lanes, the kept
        ones 1 / (1 - weight_drop) larger (Merity, Keskar & Socher 2018, *Regularizing and optimizing LSTM language models*).
        Taken to the nearest of 1/256, 2/256, ... 255/256.
      zoneout: how likely a unit is to keep its c, and its h, in a step, in training; each step draws anew. Otherwise c and h are
        the mean over the draws of the step (Krueger et al. 2017, *Zoneout*, eq. 2 to 5). One rate for both, or one for each;
        taken to the nearest of 1/256, 2/256, ... 255/256.
      layer_norm: LN(x W_x) and LN(h W_h) in the place of these products, each over all four gates and with its gains, and
        o tanh(LN(c)) in that of o tanh(c), with gains and a bias; c itself recurs as it is (Ba, Kiros & Hinton 2016, *Layer
        normalization*, eq. 20 to 22).
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; carry, gates and sums stay in the
        parameters' dtype. None: the parameters' dtype throughout.
      implementation: None: ``"fused"``, which was the fastest on CPUs and GPUs alike (docs/speed.md).

        - ``"fused"``, differentiated by hand: reverse mode and, as the transpose of what ``jax.vjp`` returns, forward
          mode (which ``uoro`` needs).
        - ``"scan"``, the same window left to JAX to differentiate, for ``jax.jvp`` and second derivatives.
        - ``"cudnn"``, NVIDIA's own: float32, without projection and without padding; reverse mode. A window in which a
          lane is reset after its first step is done by the fused scan. No zoneout, no layer normalisation.
        - ``"pallas"``, the fused window with its loops as kernels that keep the recurrent weights on the chip, which holds
          those of some 64 units in float32: for narrow layers. Without projection, zoneout and layer normalisation;
          reverse mode. On a CPU the kernels are interpreted, which is for tests.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`, ``encoder``, ``readout``, ``layers``, ``dropout`` ...

    Raises:
      ValueError: now, if a size is not positive, a rate not from 0 to below 1, or the implementation unknown or not for this;
        from ``init``, if the inputs have no axis of features, or a module has variables besides its parameters or looks along
        time or lanes; from ``unroll``, when it is traced, if what reaches the cell is not ``[lanes, time, inputs]`` of the
        weights' inputs, the carry does not fit, or the implementation asked for cannot do it.
    """
    for name, size in {"features": features, "projection": projection}.items():
        if size is not None:
            check_whole(name, size)
    if implementation not in (None, "fused", "scan", "cudnn", "pallas"):
        raise ValueError(
            f"`implementation` is {implementation!r}; it needs to be 'fused', 'scan', 'cudnn', 'pallas', or None to choose."
        )
    if projection is not None and implementation in ("cudnn", "pallas"):
        raise ValueError(f"`implementation` is {implementation!r}, which has no projection: use 'fused', or None.")
    outputs = features if projection is None else projection
    rates = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    if len(rates) != 2:
        raise ValueError(f"`zoneout` is {zoneout}; it needs to be one rate, or two: of c and of h.")
    check_rates(weight_drop=weight_drop)
    for rate in rates:
        check_rates(zoneout=rate)
    plain = rates == (0, 0) and not layer_norm
    if not plain and implementation in ("cudnn", "pallas"):
        raise ValueError(
            f"`implementation` is {implementation!r}, which has no zoneout and no layer normalisation: use 'fused', or None."
        )

    def weights(key: jax.Array, inputs: int) -> Weights:
        return initial_weights(key, inputs, features, projection, layer_norm)

    def zeros(weights: Weights, lanes: int) -> PyTree:
        return tuple(jnp.zeros((lanes, width), weights.recurrent.dtype) for width in (features, outputs))

    def run(
        weights: Weights,
        carry: PyTree,
        x: jax.Array,
        resets: jax.Array | None,
        valid: jax.Array | None,
        edges: jax.Array | None,
        starts: PyTree,
        keys: Keys,
    ) -> tuple[PyTree, jax.Array]:
        check_inputs("LSTM", x, weights.input.shape[0])
        kind = weights.recurrent.dtype
        simple = plain and (dtype, projection, valid, edges) == (None,) * 4 and kind == jnp.float32
        if implementation == "cudnn" and not simple:
            raise ValueError(
                f"cuDNN's LSTM is float32, without `dtype`, projection, padding (`valid`) and edges; here are {kind} "
                f"parameters, dtype={dtype}, {'padding' if valid is not None else 'no padding'}: leave `implementation` None."
            )
        chosen = implementation or "fused"
        x = x.astype(weights.input.dtype)
        weights = weights._replace(recurrent=dropped_weights(weights.recurrent, weight_drop, keys))
        still = Zoneout(*stays(rates, (features, outputs), x, keys.step))
        left_to_jax = functools.partial(scanned, dtype, weights, carry, x, resets, valid, edges, starts, still)
        if chosen == "scan" or edges is not None:  # reweighted edges are left to JAX too
            return left_to_jax()

        def whole(carry: PyTree, resets: jax.Array | None) -> tuple[PyTree, jax.Array]:
            if chosen == "cudnn":
                return by_cudnn(weights, carry, x, resets)
            return fused(PALLAS if chosen == "pallas" else SCANS, dtype, weights, carry, x, resets, valid, still)

        return from_first_step(whole, left_to_jax, carry, resets, starts)

    return layered(
        "LSTM",
        weights,
        zeros,
        run,
        outputs,
        draws=weight_drop > 0 or max(rates) > 0,
        **options,
    )
