"""The sLSTM (Beck et al. 2024, *xLSTM: extended long short-term memory*), section 2.2 and appendix A.2."""

from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from tbptt_jax.arrays import where_lanes
from tbptt_jax.cells.heads import check_parts, head_norm, merge, split
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.products import dot
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence, scale_cotangent


class Weights(NamedTuple):
    """A layer's parameters, the gates side by side in the order input, forget, z, output.

    Attributes:
      input: ``[inputs, 4 * features]``.
      recurrent: ``[heads, features / heads, 4 * features / heads]``, a matrix of each head.
      bias: ``[4 * features]``.
      norm: ``[features]``, the gain of the norm; None: there is none.
    """

    input: jax.Array
    recurrent: jax.Array
    bias: jax.Array
    norm: jax.Array | None


class Carry(NamedTuple):
    """A layer's carry, every leaf ``[lanes, features]``.

    Attributes:
      h: the hidden state, before the norm.
      c: the cell state, e^m times smaller than it is.
      n: the normaliser, likewise; 0: nothing was written yet.
      m: the stabiliser.
    """

    h: jax.Array
    c: jax.Array
    n: jax.Array
    m: jax.Array


def slstm(
    features: int,
    *,
    heads: int = 1,
    forget: Literal["sigmoid", "exp"] = "sigmoid",
    norm: bool = False,
    dtype: Any = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of sLSTM layers: an LSTM with an exponential input gate and a normaliser.

        i = exp(ĩ),   f = σ(f̃) or exp(f̃),   z = tanh(z̃),   o = σ(õ),   with ĩ = x W_i + h R_i + b_i and so on

        c ← f c + i z,   n ← f n + i,   h = o c / n

    (eq. 8 to 14), R in blocks: heads do not see each other's h. c and n are kept e^m times smaller, m ← max(log f + m, ĩ), so
    that nothing overflows (eq. 15 to 17); what was not written to yet counts for nothing there. ``params["cell"]`` is a tuple of
    :class:`tbptt_jax.cells.slstm.Weights`, one a layer; the carry is a tuple of :class:`tbptt_jax.cells.slstm.Carry`, zeros at
    first. The output is h.

    Args:
      features: units of each layer.
      heads: blocks of the recurrent matrices.
      forget: the forget gate, a sigmoid or an exponential.
      norm: normalise each head of h on its way out, as in the paper's block.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: now, if a size or ``forget`` is not as described; else as :func:`tbptt_jax.lstm`.
    """
    check_parts("heads", heads, features=features)
    if forget not in ("sigmoid", "exp"):
        raise ValueError(f"`forget` is {forget!r}; it needs to be 'sigmoid' or 'exp'.")
    size = features // heads

    def weights(key: jax.Array, inputs: int) -> Weights:
        of_input, of_recurrent = jax.random.split(key)
        # From keeping nearly all to forgetting nearly all, as the authors begin.
        of_forget = jnp.tile(5 - 12 * jnp.linspace(0.0, 1.0, size) ** 0.3, heads)
        none, within = jnp.zeros(features), features**-0.5
        return Weights(
            input=initializers.lecun_normal()(of_input, (inputs, 4 * features)),
            recurrent=jax.random.uniform(of_recurrent, (heads, size, 4 * size), minval=-within, maxval=within),
            bias=jnp.concatenate([none, of_forget, none, none]),
            norm=jnp.ones(features) if norm else None,
        )

    def zeros(weights: Weights, lanes: int) -> Carry:
        return Carry(*(jnp.zeros((lanes, features), weights.input.dtype) for _ in Carry._fields))

    def cell(recurrent: jax.Array, carry: Carry, from_input: jax.Array) -> Carry:
        """A step, of ``from_input [lanes, 4 * features]``."""
        h = split(carry.h, heads)
        of_heads = jnp.einsum("lhk,hkn->lhn", h.astype(recurrent.dtype), recurrent, preferred_element_type=h.dtype)
        of_gates = [merge(gate) for gate in jnp.split(of_heads, 4, -1)]
        log_i, f, z, o = (a + b for a, b in zip(jnp.split(from_input, 4, -1), of_gates, strict=True))
        kept = (jax.nn.log_sigmoid(f) if forget == "sigmoid" else f) + carry.m
        m = jnp.where(carry.n == 0, log_i, jnp.maximum(kept, log_i))
        i = jnp.exp(log_i - m)
        f = jnp.exp(jnp.minimum(kept - m, 80.0))  # more than 0 at a first step only, of what is 0
        c, n = f * carry.c + i * jnp.tanh(z), f * carry.n + i
        return Carry(jax.nn.sigmoid(o) * c / n, c, n, m)

    def run(
        weights: Weights, carry: Carry, x: jax.Array, *of_window: jax.Array | None, starts: Carry | None, keys: Keys
    ) -> tuple[Carry, jax.Array]:
        check_inputs("sLSTM", x, weights.input.shape[0])
        begin = jax.tree.map(jnp.zeros_like, carry)
        recurrent = weights.recurrent if dtype is None else weights.recurrent.astype(dtype)

        def step(carry: Carry, at_t: tuple) -> tuple[Carry, jax.Array]:
            from_input, start, reset, is_valid, edge = at_t
            carry = carry if edge is None else scale_cotangent(edge, carry)
            if reset is not None:
                carry = where_lanes(reset, begin if start is None else start, carry)
            new = cell(recurrent, carry, from_input)
            carry = new if is_valid is None else where_lanes(is_valid, new, carry)
            return carry, carry.h

        from_input = dot(dtype, x.astype(weights.input.dtype), weights.input) + weights.bias
        carry, h = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (from_input, starts, *of_window)))
        h = h.swapaxes(0, 1)
        return carry, h if weights.norm is None else head_norm(split(h, heads), weights.norm)

    return layered("sLSTM", weights, zeros, run, features, **options)
