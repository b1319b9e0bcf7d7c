"""The mLSTM (Beck et al. 2024, *xLSTM: extended long short-term memory*), section 2.3 and appendix A.3."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.nn import initializers

from tbptt_jax.arrays import scale
from tbptt_jax.cells.heads import check_parts, head_norm, head_sizes, merge, split
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_scan import Implementation, KeyValue, Masks, check_implementation, key_value, maximum
from tbptt_jax.cells.products import dot
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence

EPSILON = 1e-6  # added to the normaliser's denominator, as the authors do


class Weights(NamedTuple):
    """A layer's parameters.

    Attributes:
      input: ``[inputs, heads * (2 * keys + values)]``, to q, k and v.
      gates: ``[inputs, 2 * heads]``, to the input and the forget gate.
      gates_bias: ``[2 * heads]``.
      output_gate: ``[inputs, features]``.
      output_bias: ``[features]``.
      norm: ``[features]``, the gain of the norm; None: there is none.
    """

    input: jax.Array
    gates: jax.Array
    gates_bias: jax.Array
    output_gate: jax.Array
    output_bias: jax.Array
    norm: jax.Array | None


class Carry(NamedTuple):
    """A layer's carry.

    Attributes:
      c: ``[lanes, heads, keys, values]``, the memory, e^m times smaller than it is.
      n: ``[lanes, heads, keys]``, the normaliser, likewise.
      m: ``[lanes, heads]``, the stabiliser.
    """

    c: jax.Array
    n: jax.Array
    m: jax.Array


def mlstm(
    features: int,
    *,
    heads: int = 1,
    key_size: int | None = None,
    norm: bool = False,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of mLSTM layers: memories that are matrices, with an exponential input gate.

        i = exp(x w_i + b_i),   f = σ(x w_f + b_f),   o = σ(x W_o + b_o),   q, k, v = x W

        C ← f C + i k ⊗ v / √keys,   n ← f n + i k / √keys,   h = o ∘ Cᵀ q / max(|nᵀ q|, 1)

    of each head (eq. 19 to 27). All but the gates is kept e^m times smaller, m ← max(log f + m, log i), so that nothing
    overflows (eq. 49 to 51). ``params["cell"]`` is a tuple of :class:`tbptt_jax.cells.mlstm.Weights`, one a layer; the carry is
    a tuple of :class:`tbptt_jax.cells.mlstm.Carry`, zeros at first. The output is h.

    Args:
      features: outputs of each layer, the heads' values side by side.
      heads: memories.
      key_size: of a head's keys and queries; None: features / heads.
      norm: normalise what each head reads, before the output gate, as in the paper's block.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype.
      implementation: how a window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: now, if a size is not as described; else as :func:`tbptt_jax.lstm`.
    """
    check_parts("heads", heads, features=features)
    key_size, values = head_sizes(features, heads, key_size, None)
    check_implementation(implementation)

    def weights(key: jax.Array, inputs: int) -> Weights:
        of_input, of_bias, of_output = jax.random.split(key, 3)
        normal = initializers.lecun_normal()
        return Weights(
            input=normal(of_input, (inputs, heads * (2 * key_size + values))),
            gates=jnp.zeros((inputs, 2 * heads)),
            gates_bias=jnp.concatenate([0.1 * jax.random.normal(of_bias, (heads,)), jnp.linspace(3.0, 6.0, heads)]),
            output_gate=normal(of_output, (inputs, features)),
            output_bias=jnp.zeros(features),
            norm=jnp.ones(features) if norm else None,
        )

    def zeros(weights: Weights, lanes: int) -> Carry:
        dtype = weights.input.dtype
        n = jnp.zeros((lanes, heads, key_size), dtype)
        return Carry(jnp.zeros((*n.shape, values), dtype), n, jnp.zeros((lanes, heads), dtype))

    def run(
        weights: Weights, carry: Carry, x: jax.Array, *of_window: jax.Array | None, starts: Carry | None, keys: Keys
    ) -> tuple[Carry, jax.Array]:
        check_inputs("mLSTM", x, weights.input.shape[0])
        masks, x = Masks(*of_window), x.astype(weights.input.dtype)
        q, k, v = jnp.split(dot(dtype, x, weights.input), [heads * key_size, 2 * heads * key_size], -1)
        q, k, v = (split(each, heads) for each in (q, k, v))
        log_i, f = jnp.split(dot(dtype, x, weights.gates) + weights.gates_bias, 2, -1)
        m, log_decay, log_write = _stabilised(log_i, jax.nn.log_sigmoid(f), carry, starts, masks, implementation)
        k = scale(k, jnp.exp(log_write) / key_size**0.5)
        begun = None if starts is None else _joined(starts)
        # The normaliser is the memory of a further value, which is always 1.
        memory, read = key_value(KeyValue(log_decay, k, v, q), _joined(carry), begun, masks, implementation)
        o = jax.nn.sigmoid(dot(dtype, x, weights.output_gate) + weights.output_bias)
        h = _normalised(read, m)
        h = merge(h) if weights.norm is None else head_norm(h, weights.norm)
        return Carry(memory[..., :-1], memory[..., -1], m[:, -1]), o * h

    return layered("mLSTM", weights, zeros, run, features, **options)


def _stabilised(
    log_i: jax.Array,
    log_f: jax.Array,
    carry: Carry,
    starts: Carry | None,
    masks: Masks,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each step ``[lanes, time, heads]`` m and the logarithms of the stabilised gates, f and i, at most 0."""

    before, m = maximum(log_f, log_i, carry.m, None if starts is None else starts.m, masks, implementation)
    return m, log_f + before - m, log_i - m


def _joined(carry: Carry) -> jax.Array:
    """The memory and its normaliser, one more column, ``[..., heads, keys, values + 1]``."""
    return jnp.concatenate([carry.c, carry.n[..., None]], -1)


def _normalised(read: jax.Array, m: jax.Array) -> jax.Array:
    """Cᵀq / max(|nᵀq|, e^−m) of the stabilised C and n, their last column n; both are multiplied by e^m where that is below 1."""
    below = jnp.exp(jnp.minimum(m, 0))
    size = jnp.maximum(jnp.abs(read[..., -1]) * below, jnp.exp(-jnp.maximum(m, 0)))
    return scale(read[..., :-1], below / (size + EPSILON * below))
