"""Mamba-2 (Dao & Gu 2024, *Transformers are SSMs: generalized models and efficient algorithms through structured state space
duality*), the block of section 7."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.nn import initializers

from tbptt_jax.arrays import check_whole
from tbptt_jax.cells.heads import check_parts, initial_log_rate, initial_step_bias, merge, rms_norm, split
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_scan import Implementation, KeyValue, Masks, check_implementation, key_value
from tbptt_jax.cells.products import dot
from tbptt_jax.cells.short_convolution import initial_kernel, short_convolution
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


class Weights(NamedTuple):
    """A layer's parameters; ``inner`` is ``expand * features``.

    Attributes:
      input: ``[inputs, 2 * inner + 2 * groups * state + heads]``, to z, x, B, C and Δ.
      kernel: ``[convolution, inner + 2 * groups * state]``, of the convolution of x, B and C.
      bias: ``[inner + 2 * groups * state]``, its bias.
      step_bias: ``[heads]``, of Δ.
      log_rate: ``[heads]``, log(−A).
      skip: ``[heads]``, D.
      norm: ``[inner]``, the gain of the norm.
      output: ``[inner, features]``.
    """

    input: jax.Array
    kernel: jax.Array
    bias: jax.Array
    step_bias: jax.Array
    log_rate: jax.Array
    skip: jax.Array
    norm: jax.Array
    output: jax.Array


class Carry(NamedTuple):
    """A layer's carry.

    Attributes:
      inputs: ``[lanes, convolution - 1, inner + 2 * groups * state]``, what the convolution reaches back to.
      memory: ``[lanes, heads, state, inner / heads]``, H.
    """

    inputs: jax.Array
    memory: jax.Array


def mamba2(
    features: int,
    *,
    heads: int = 1,
    state: int = 64,
    groups: int = 1,
    expand: int = 2,
    convolution: int = 4,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of Mamba-2 layers: state spaces whose step Δ, and what is written and read, the inputs choose.

        z, u, B, C, Δ = x W,   u, B, C ← SiLU(conv(u, B, C) + b),   Δ ← softplus(Δ + b_Δ)

        H ← exp(Δ A) H + Δ B ⊗ u,   o = Hᵀ C + D u,   y = RMSNorm(o ∘ SiLU(z)) W_o

    with A < 0 a number of each head, and B and C shared by the heads of a group. ``params["cell"]`` is a tuple of
    :class:`tbptt_jax.cells.mamba2.Weights`, one a layer; the carry is a tuple of :class:`tbptt_jax.cells.mamba2.Carry`,
    zeros at first.

    Args:
      features: outputs of each layer.
      heads: into which the ``expand * features`` inner features are split; the authors take heads of 64.
      state: the size of B and C.
      groups: of heads that share B and C.
      expand: inner features for each output.
      convolution: steps that the convolution reaches over.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype.
      implementation: how a window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: now, if a size is not as described; else as :func:`tbptt_jax.lstm`.
    """
    for name, size in {"features": features, "state": state, "expand": expand, "convolution": convolution}.items():
        check_whole(name, size)
    inner = expand * features
    check_parts("heads", heads, **{"expand * features": inner})
    check_parts("groups", groups, heads=heads)
    check_implementation(implementation)
    channels = inner + 2 * groups * state

    def weights(key: jax.Array, inputs: int) -> Weights:
        of_input, of_kernel, of_step, of_rate, of_output = jax.random.split(key, 5)
        return Weights(
            input=initializers.lecun_normal()(of_input, (inputs, inner + channels + heads)),
            kernel=initial_kernel(of_kernel, convolution, channels),
            bias=jnp.zeros(channels),
            step_bias=initial_step_bias(of_step, heads),
            log_rate=initial_log_rate(of_rate, heads),
            skip=jnp.ones(heads),
            norm=jnp.ones(inner),
            output=initializers.lecun_normal()(of_output, (inner, features)),
        )

    def zeros(weights: Weights, lanes: int) -> Carry:
        dtype = weights.input.dtype
        return Carry(
            jnp.zeros((lanes, convolution - 1, channels), dtype),
            jnp.zeros((lanes, heads, state, inner // heads), dtype),
        )

    def run(
        weights: Weights, carry: Carry, x: jax.Array, *of_window: jax.Array | None, starts: Carry | None, keys: Keys
    ) -> tuple[Carry, jax.Array]:
        check_inputs("Mamba-2", x, weights.input.shape[0])
        masks = Masks(*of_window)
        begun_inputs, begun_memory = (None, None) if starts is None else starts
        z, ubc, delta = jnp.split(
            dot(dtype, x.astype(weights.input.dtype), weights.input), [inner, inner + channels], -1
        )
        inputs, ubc = short_convolution(weights.kernel, ubc, carry.inputs, begun_inputs, masks)
        u, b, c = jnp.split(jax.nn.silu(ubc + weights.bias), [inner, inner + groups * state], -1)
        u, delta = split(u, heads), jax.nn.softplus(delta + weights.step_bias)
        b, c = (jnp.repeat(split(each, groups), heads // groups, -2) for each in (b, c))
        coefficients = KeyValue(-jnp.exp(weights.log_rate) * delta, k=b, v=delta[..., None] * u, q=c)
        memory, o = key_value(coefficients, carry.memory, begun_memory, masks, implementation)
        gated = merge(o + weights.skip[:, None] * u) * jax.nn.silu(z)
        normed = merge(rms_norm(split(gated, groups), weights.norm.reshape(groups, -1), 1e-5))
        return Carry(inputs, memory), dot(dtype, normed, weights.output)

    return layered("Mamba-2", weights, zeros, run, features, **options)
