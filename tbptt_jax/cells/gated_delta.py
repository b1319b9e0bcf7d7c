"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2025, *Gated delta networks: improving Mamba2 with delta rule*)."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.nn import initializers

from tbptt_jax.arrays import check_whole
from tbptt_jax.cells.heads import head_sizes, initial_log_rate, initial_step_bias, merge, rms_norm, split, unit
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_scan import Implementation, KeyValue, Masks, check_implementation, key_value
from tbptt_jax.cells.products import dot
from tbptt_jax.cells.short_convolution import initial_kernel, short_convolution
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


class Weights(NamedTuple):
    """A layer's parameters.

    Attributes:
      input: ``[inputs, heads * (2 * keys + values)]``, to q, k and v.
      kernel: ``[convolution, heads * (2 * keys + values)]``, of the convolution; None: there is none.
      gates: ``[inputs, 2 * heads]``, to α and β.
      log_rate: ``[heads]``, log A, how fast a head forgets.
      step_bias: ``[heads]``, of α.
      output_gate: ``[inputs, heads * values]``.
      norm: ``[values]``, the gain of the norm.
      output: ``[heads * values, features]``.
    """

    input: jax.Array
    kernel: jax.Array | None
    gates: jax.Array
    log_rate: jax.Array
    step_bias: jax.Array
    output_gate: jax.Array
    norm: jax.Array
    output: jax.Array


class Carry(NamedTuple):
    """A layer's carry.

    Attributes:
      inputs: ``[lanes, convolution - 1, heads * (2 * keys + values)]``, what the convolution reaches back to; None: there is none.
      memory: ``[lanes, heads, keys, values]``, S.
    """

    inputs: jax.Array | None
    memory: jax.Array


def gated_delta(
    features: int,
    *,
    heads: int = 1,
    key_size: int | None = None,
    value_size: int | None = None,
    convolution: int | None = 4,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of Gated DeltaNet layers: memories in which a value is replaced at its key, and that forget.

        q, k, v = SiLU(conv(x W)),   q ← q / ‖q‖,   k ← k / ‖k‖,   α = exp(−A softplus(x W_α + b_α)),   β = σ(x W_β)

        S ← α S,   S ← S + β k ⊗ (v − Sᵀ k),   o = Sᵀ q / √key_size,   y = (RMSNorm(o) ∘ SiLU(x W_g)) W_o

    of each head (eq. 10, and figure 1 for the block). ``params["cell"]`` is a tuple of
    :class:`tbptt_jax.cells.gated_delta.Weights`, one a layer; the carry is a tuple of
    :class:`tbptt_jax.cells.gated_delta.Carry`, zeros at first.

    Args:
      features: outputs of each layer.
      heads: memories, side by side.
      key_size: of a head's keys and queries; None: features / heads.
      value_size: of a head's values; None: features / heads.
      convolution: steps that the convolution before q, k and v reaches over; None: no convolution.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype.
      implementation: how a window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: now, if a size is not as described; else as :func:`tbptt_jax.lstm`.
    """
    key_size, value_size = head_sizes(features, heads, key_size, value_size)
    if convolution is not None:
        check_whole("convolution", convolution)
    check_implementation(implementation)
    channels = heads * (2 * key_size + value_size)

    def weights(key: jax.Array, inputs: int) -> Weights:
        of_input, of_kernel, of_gates, of_rate, of_step, of_output_gate, of_output = jax.random.split(key, 7)
        normal = initializers.lecun_normal()
        return Weights(
            input=normal(of_input, (inputs, channels)),
            kernel=None if convolution is None else initial_kernel(of_kernel, convolution, channels),
            gates=normal(of_gates, (inputs, 2 * heads)),
            log_rate=initial_log_rate(of_rate, heads),
            step_bias=initial_step_bias(of_step, heads),
            output_gate=normal(of_output_gate, (inputs, heads * value_size)),
            norm=jnp.ones(value_size),
            output=normal(of_output, (heads * value_size, features)),
        )

    def zeros(weights: Weights, lanes: int) -> Carry:
        dtype = weights.input.dtype
        inputs = None if convolution is None else jnp.zeros((lanes, convolution - 1, channels), dtype)
        return Carry(inputs, jnp.zeros((lanes, heads, key_size, value_size), dtype))

    def run(
        weights: Weights, carry: Carry, x: jax.Array, *of_window: jax.Array | None, starts: Carry | None, keys: Keys
    ) -> tuple[Carry, jax.Array]:
        check_inputs("Gated DeltaNet", x, weights.input.shape[0])
        masks, x = Masks(*of_window), x.astype(weights.input.dtype)
        begun_inputs, begun_memory = (None, None) if starts is None else starts
        qkv, inputs = dot(dtype, x, weights.input), carry.inputs
        if weights.kernel is not None and inputs is not None:
            inputs, qkv = short_convolution(weights.kernel, qkv, inputs, begun_inputs, masks)
        q, k, v = jnp.split(jax.nn.silu(qkv), [heads * key_size, 2 * heads * key_size], -1)
        alpha, beta = jnp.split(dot(dtype, x, weights.gates), 2, -1)
        coefficients = KeyValue(
            log_decay=-jnp.exp(weights.log_rate) * jax.nn.softplus(alpha + weights.step_bias),
            k=unit(split(k, heads)),
            v=split(v, heads),
            q=unit(split(q, heads)) / key_size**0.5,
            beta=jax.nn.sigmoid(beta),
        )
        memory, o = key_value(coefficients, carry.memory, begun_memory, masks, implementation)
        gated = rms_norm(o, weights.norm, 1e-6) * jax.nn.silu(split(dot(dtype, x, weights.output_gate), heads))
        return Carry(inputs, memory), dot(dtype, merge(gated), weights.output)

    return layered("Gated DeltaNet", weights, zeros, run, features, **options)
