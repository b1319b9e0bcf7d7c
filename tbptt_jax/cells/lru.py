"""The linear recurrent unit (Orvieto et al. 2023, *Resurrecting recurrent neural networks for long sequences*)."""

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import check_whole
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_parts import as_complex, check_ring, eigenvalues, recur, ring
from tbptt_jax.cells.linear_scan import Implementation, Masks, check_implementation
from tbptt_jax.cells.products import dot
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


class Weights(NamedTuple):
    """A layer's parameters, all of them real: a complex matrix is its real parts and then its imaginary ones.

    Attributes:
      nu_log: ``[units]``, log ν, |λ| = exp(−ν).
      theta_log: ``[units]``, log θ, the phase of λ in radians.
      gamma_log: ``[units]``, log γ, the scale of the inputs.
      B: ``[inputs, 2 * units]``.
      C: ``[2 * units, features]``.
      D: ``[features]``, the diagonal of the matrix in the paper, as in its code; where a layer has another number of inputs
        than of outputs, the matrix ``[inputs, features]``.
    """

    nu_log: jax.Array
    theta_log: jax.Array
    gamma_log: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array


def lru(
    features: int,
    *,
    units: int | None = None,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of LRU layers: a complex, diagonal, linear recurrence whose eigenvalues begin on a ring.

        h ← λ ∘ h + γ ∘ (x B),   y = Re(h C) + x D,   λ = exp(−ν + iθ)

    with ν, θ and γ learned as their logarithms (equations 1, 5 to 7), so that |λ| is below 1. At first λ is uniform on the ring
    from ``r_min`` to ``r_max``, with phases from 0 to ``max_phase`` (lemma 3.2), and γ = √(1 − |λ|²).

    ``params["cell"]`` is a tuple of :class:`tbptt_jax.cells.lru.Weights`, one a layer; the carry is a tuple of complex ``h
    [lanes, units]``, one a layer, zeros at first.

    Args:
      features: outputs of each layer.
      units: complex numbers in h; None: as many as outputs.
      r_min: the least |λ| at first, from 0.
      r_max: the largest, up to 1. Near 1 a layer remembers long.
      max_phase: the largest phase at first, in radians. Where sequences are long, a tenth of π and less.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype. h is complex64, or
        complex128 with parameters in float64.
      implementation: how a window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: now, if there is no ring; else as :func:`tbptt_jax.lstm`.
    """
    check_whole("features", features)
    units = features if units is None else units
    check_whole("units", units)
    check_ring(r_min, r_max, max_phase)
    check_implementation(implementation)

    def weights(key: jax.Array, inputs: int) -> Weights:
        of_ring, of_b, of_c, of_d = jax.random.split(key, 4)
        nu_log, theta_log = ring(of_ring, units, r_min, r_max, max_phase)
        return Weights(
            nu_log,
            theta_log,
            0.5 * jnp.log(eigenvalues(nu_log, theta_log)[1]),
            jax.random.normal(of_b, (inputs, 2 * units)) / math.sqrt(2 * inputs),
            jax.random.normal(of_c, (2 * units, features)) / math.sqrt(units),
            jax.random.normal(of_d, (features,))
            if inputs == features
            else jax.random.normal(of_d, (inputs, features)) / math.sqrt(inputs),
        )

    def zeros(weights: Weights, lanes: int) -> jax.Array:
        return jnp.zeros((lanes, units), jnp.promote_types(weights.B.dtype, jnp.complex64))

    def run(
        weights: Weights, h: jax.Array, x: jax.Array, *masks: jax.Array | None, starts: jax.Array | None, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        check_inputs("LRU", x, weights.B.shape[0])
        x = x.astype(weights.B.dtype)
        eigenvalue, _ = eigenvalues(weights.nu_log, weights.theta_log)
        gamma = jnp.exp(weights.gamma_log)
        into = as_complex(dot(dtype, x, weights.B * jnp.concatenate([gamma, gamma])))
        h, hs = recur(eigenvalue, into, h, starts, Masks(*masks), implementation)
        y = dot(dtype, jnp.concatenate([hs.real, -hs.imag], -1).astype(x.dtype), weights.C)
        return h, y + (x * weights.D if weights.D.ndim == 1 else dot(dtype, x, weights.D))

    return layered("LRU", weights, zeros, run, features, **options)
