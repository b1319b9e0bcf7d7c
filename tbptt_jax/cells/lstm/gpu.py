"""The LSTM's loop over time on NVIDIA GPUs: cuDNN's, and kernels that keep the recurrent weights on the chip.

:func:`cudnn` is a whole window, forward and backward, by the library. :data:`PALLAS` is only what recurs, in the place of
the scans of :mod:`tbptt_jax.cells.lstm.window`: one program runs through all steps of a few lanes, so that a step is no launch of
its own and the weights are fetched once a window (Diamos et al. 2016, *Persistent RNNs: stashing recurrent weights
on-chip*).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import rnn
from jax.experimental.pallas import triton as pltriton

from tbptt_jax.cells.lstm.weights import Weights

LANES = 16  # of one program: the least that a tensor core's product takes
ON_CHIP = 227 * 1024  # bytes of shared memory that one program can have, on Hopper


class Loops(NamedTuple):
    """What recurs in an LSTM's window, forward and backward; gates side by side in the order i, f, g, o.

    Attributes:
      forward: ``(dtype, weights, carry, gates, resets, valid, zoneout) -> (carry, gates, cells, hs, of_h)``. The gates given
        are what comes from the inputs; those returned are activated, ``[lanes, time, 4 * features]``; cells and hs are the
        carry after each step, ``[lanes, time, features]`` and ``[lanes, time, outputs]``; of_h is what layer
        normalisation was given in the products with h, or None.
      backward: ``(dtype, weights, d_carry, d_hs, gates, by_gate, by_cell, kept, resets, valid, zoneout, norms) ->
        (d_carry, d_gates, d_outputs, shared, d_norm)``, linear in d_carry and d_hs. gates are the activated ones, not to be
        read: d_gates may be written over them. by_gate, one for each gate, and by_cell, each ``[lanes, time, features]``,
        are the cell's derivatives, 0 where the step is padding; kept, ``[lanes, time, features]``, is how much of the cell
        before a step is in the one after it. d_outputs, what reaches the projection, is None without one. Without
        layer normalisation these are None: norms, what that was given from the inputs, h and the cell, each centred, and the
        factors it scaled them by; d_norm; and shared, ``[lanes, time, 1]``, of which the products' cotangents are made.

    Only the scans know zoneout and layer normalisation.
    """

    forward: Callable[..., tuple]
    backward: Callable[..., tuple]


def cudnn(weights: Weights, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
    """A window by cuDNN: ``carry, x [lanes, time, inputs] -> carry, h [lanes, time, features]``, all float32.

    Products are float32 throughout, not TF32. Under ``vmap`` the windows go one after another.
    """
    c, h = carry
    y, h, c = _window(x, h[None], c[None], flat_weights(weights))
    return (c[0], h[0]), y


@jax.custom_vjp
def _window(x: jax.Array, h: jax.Array, c: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _window_forward(x, h, c, weights)[0]


@jax.custom_batching.sequential_vmap
def _window_forward(x: jax.Array, h: jax.Array, c: jax.Array, weights: jax.Array) -> tuple:
    lanes, time, _ = x.shape
    lengths = jnp.full(lanes, time, jnp.int32)
    return rnn.lstm_fwd(x, h, c, weights, lengths, *_settings(x, h))


@jax.custom_batching.sequential_vmap
def _window_backward(residuals: tuple, cotangents: tuple) -> tuple:
    return functools.partial(rnn.lstm_bwd, *_settings(*residuals[:2]))(residuals, cotangents)[:4]


def _settings(x: jax.Array, h: jax.Array) -> tuple[int, int, int, float, bool, lax.Precision]:
    """Inputs, units, layers, dropout, whether bidirectional, and the precision of the products."""
    return x.shape[-1], h.shape[-1], 1, 0.0, False, lax.Precision.HIGHEST


_window.defvjp(_window_forward, _window_backward)


def flat_weights(weights: Weights) -> jax.Array:
    """One layer's weights in cuDNN's order: W_ih, W_hh, each gate's matrix transposed, then two biases that are added."""
    parts = weights.input.T, weights.recurrent.T, weights.bias, jnp.zeros_like(weights.bias)
    return jnp.concatenate([part.ravel() for part in parts])


def _forward(
    dtype: Any,
    weights: Weights,
    carry: tuple,
    gates: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    *unused: Any,
) -> tuple[tuple, jax.Array, jax.Array, jax.Array, None]:
    lanes, time, _ = gates.shape
    features = carry[0].shape[-1]

    def kernel(pre: Any, w: Any, c: Any, h: Any, keep: Any, valid: Any, gates: Any, cells: Any, hs: Any) -> None:
        matrices = [w[gate] for gate in range(4)]

        def step(t: jax.Array, carry: tuple) -> tuple:
            c, h = before = carry[0] * keep[:, t][:, None], carry[1] * keep[:, t][:, None]
            z = [pre[:, t, gate] + _dot(h, matrix) for gate, matrix in enumerate(matrices)]
            i, f, g, o = (jnp.tanh(x) if gate == 2 else jax.nn.sigmoid(x) for gate, x in enumerate(z))
            c = f * c + i * g
            h = o * jnp.tanh(c)
            c, h = (jnp.where(valid[:, t][:, None] > 0, new, old) for new, old in zip((c, h), before, strict=True))
            for gate, value in enumerate((i, f, g, o)):
                gates[:, t, gate] = value
            cells[:, t], hs[:, t] = c, h
            return c, h

        lax.fori_loop(0, time, step, (c[...], h[...]))

    layout = _Layout(lanes, time, features, gates.dtype)
    pre, matrices = layout.by_gate(gates + weights.bias), layout.matrices(dtype, weights.recurrent)
    masks = layout.mask(resets, False), layout.mask(valid, True)
    activated, cells, hs = layout.call(
        kernel, (pre, matrices, *map(layout.lanes_only, carry), *masks), ("by_gate", "by_unit", "by_unit")
    )
    return (cells[:, -1], hs[:, -1]), activated, cells, hs, None


def _backward(
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
    *unused: Any,
) -> tuple[tuple, jax.Array, None, None, None]:
    del gates  # a kernel's outputs are never filled before it
    lanes, time, features = by_cell.shape

    def kernel(
        d_hs: Any, by_gate: Any, by_cell: Any, kept: Any, w: Any, d_c: Any, d_h: Any, keep: Any, valid: Any,
        d_gates: Any, d_cells: Any, d_before: Any,
    ) -> None:  # fmt: skip
        matrices = [w[gate] for gate in range(4)]

        def step(back: jax.Array, carry: tuple) -> tuple:
            t = time - 1 - back
            d_c, d_h = carry
            d_h = d_h + d_hs[:, t]
            d_output = d_h * valid[:, t][:, None]
            d_c = d_c + d_output * by_cell[:, t]
            d_all = jnp.zeros_like(d_h)
            for gate, matrix in enumerate(matrices):
                d_gate = by_gate[:, t, gate] * (d_output if gate == 3 else d_c)
                d_gates[:, t, gate] = d_gate
                d_all = d_all + _dot(d_gate, matrix)
            d_c = d_c * kept[:, t]
            d_h = jnp.where(valid[:, t][:, None] > 0, d_all, d_h) * keep[:, t][:, None]
            return d_c, d_h

        d_cells[...], d_before[...] = lax.fori_loop(0, time, step, (d_c[...], d_h[...]))

    layout = _Layout(lanes, time, features, by_cell.dtype)
    steps = (
        layout.by_unit(d_hs),
        layout.by_gate(jnp.concatenate(by_gate, -1)),
        layout.by_unit(by_cell),
        layout.by_unit(kept),
    )
    matrices = layout.matrices(dtype, weights.recurrent, transposed=True)
    masks = layout.mask(resets, False), layout.mask(valid, True)
    own = *steps, matrices, *map(layout.lanes_only, d_carry), *masks
    d_gates, d_c, d_h = layout.call(kernel, own, ("by_gate", "lanes_only", "lanes_only"))
    return (d_c, d_h), d_gates, None, None, None


PALLAS = Loops(_forward, _backward)


class _Layout(NamedTuple):
    """Arrays as the kernels take them: lanes in blocks of 16, units a power of two, gates on an axis of their own."""

    lanes: int
    time: int
    features: int
    dtype: Any

    def by_unit(self, x: jax.Array) -> jax.Array:
        return self.fill(x, {0: -self.lanes % LANES, 2: self.more})

    def by_gate(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.lanes, self.time, 4, self.features)
        return self.fill(x, {0: -self.lanes % LANES, 3: self.more})

    def lanes_only(self, x: jax.Array) -> jax.Array:
        return self.fill(x, {0: -self.lanes % LANES, 1: self.more})

    def mask(self, flags: jax.Array | None, inverse: bool) -> jax.Array:
        """1 where a carry is kept (``flags`` are resets), or where a step counts (``inverse``: they are ``valid``)."""
        if flags is None:
            flags = jnp.full((self.lanes, self.time), inverse)
        return self.fill((flags == inverse).astype(self.dtype), {0: -self.lanes % LANES})

    def matrices(self, dtype: Any, recurrent: jax.Array, transposed: bool = False) -> jax.Array:
        """``[gate, from, to]``."""
        width = self.features + self.more
        needed = width * (4 * width * jnp.dtype(dtype or recurrent.dtype).itemsize + LANES * self.dtype.itemsize)
        if needed > ON_CHIP:
            raise ValueError(
                f"`implementation` is 'pallas', whose kernels keep the recurrent weights on the chip: those of {self.features} units "
                f"take {needed // 1024} KiB there, and it has {ON_CHIP // 1024}. Use 'fused', or None."
            )
        each = recurrent.reshape(-1, 4, self.features).transpose((1, 2, 0) if transposed else (1, 0, 2))
        return self.fill(each if dtype is None else each.astype(dtype), {1: self.more, 2: self.more})

    @property
    def more(self) -> int:
        return max(16, pl.next_power_of_2(self.features)) - self.features

    def fill(self, x: jax.Array, more: dict[int, int]) -> jax.Array:
        return jnp.pad(x, [(0, more.get(axis, 0)) for axis in range(x.ndim)])

    def call(self, kernel: Callable[..., None], own: tuple, out: tuple[str, ...]) -> list[jax.Array]:
        """Runs ``kernel`` for each block of lanes; on a CPU interpreted."""
        width, rows = self.features + self.more, self.lanes + -self.lanes % LANES
        shapes = {
            "by_gate": (rows, self.time, 4, width),
            "by_unit": (rows, self.time, width),
            "lanes_only": (rows, width),
        }

        def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
            rest = (0,) * (len(shape) - 1)
            if shape[0] == rows:
                return pl.BlockSpec((LANES, *shape[1:]), lambda block: (block, *rest))
            return pl.BlockSpec(shape, lambda block: (0, *rest))  # the matrices: all of them for each block

        found = pl.pallas_call(
            kernel,
            grid=(rows // LANES,),
            in_specs=[spec(x.shape) for x in own],
            out_specs=[spec(shapes[kind]) for kind in out],
            out_shape=[jax.ShapeDtypeStruct(shapes[kind], self.dtype) for kind in out],
            compiler_params=pltriton.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=1),
            interpret=jax.default_backend() == "cpu",
        )(*own)
        return [self.cut(x, kind) for x, kind in zip(found, out, strict=True)]

    def cut(self, x: jax.Array, kind: str) -> jax.Array:
        x = x[: self.lanes, ..., : self.features]
        return x.reshape(self.lanes, self.time, 4 * self.features) if kind == "by_gate" else x


@functools.partial(jax.jit, inline=True)
def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` with operands in b's dtype, all of their bits, and sums in a's."""
    return jnp.dot(a.astype(b.dtype), b, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype)
