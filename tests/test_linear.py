"""Linear recurrences: however a window is run, it is what a plain loop makes of it, and so is its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tbptt_jax as tb
from tbptt_jax import sharding
from tbptt_jax.cells.linear_scan import Masks, diagonal, key_value, maximum
from tbptt_jax.cells.linear_scan.key_value import CHUNK

WAYS = ("step", "associative", "chunked", None)
LANES, HEADS, KEYS, VALUES = 3, 2, 3, 4
LENGTHS = (1, CHUNK - 1, CHUNK, 2 * CHUNK + 3)


def numbers(rng, *shape, kind="real"):
    x = rng.normal(size=shape)
    return x + 1j * rng.normal(size=shape) if kind == "complex" else x


def masks(rng, time, edges=False):
    resets, valid = rng.uniform(size=(LANES, time)) < 0.1, rng.uniform(size=(LANES, time)) < 0.8
    return Masks(resets, valid, rng.uniform(size=(LANES, time)) if edges else None)


def vectors(time, kind="real", edges=False, seed=0):
    """``(a, b, h, start), masks``, some decays 0."""
    rng = np.random.default_rng(seed)
    a, b = numbers(rng, LANES, time, 4, kind=kind), numbers(rng, LANES, time, 4, kind=kind)
    a = np.where(rng.uniform(size=a.shape) < 0.1, 0, 0.7 * a)
    of = a, b, numbers(rng, LANES, 4, kind=kind), numbers(rng, LANES, 4, kind=kind)
    return jax.tree.map(jnp.asarray, (of, masks(rng, time, edges)))


def matrices(time, delta=True, edges=False, seed=0):
    """``(coefficients, S, start), masks``, some decays 0."""
    rng = np.random.default_rng(seed)
    log_decay = -np.abs(numbers(rng, LANES, time, HEADS))
    log_decay[rng.uniform(size=log_decay.shape) < 0.1] = -np.inf
    k = numbers(rng, LANES, time, HEADS, KEYS)
    k[:, 1::2] = k[:, :-1:2]  # keys that come again
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, q = numbers(rng, LANES, time, HEADS, VALUES), numbers(rng, LANES, time, HEADS, KEYS)
    beta = np.where(rng.uniform(size=(LANES, time, HEADS)) < 0.5, 1, rng.uniform(size=(LANES, time, HEADS)))
    state = numbers(rng, 2, LANES, HEADS, KEYS, VALUES)
    of = tb.KeyValue(log_decay, k, v, q, beta if delta else None), *state
    return jax.tree.map(jnp.asarray, (of, masks(rng, time, edges)))


@functools.partial(jax.jit, static_argnums=2)
def run_vectors(of, masks, way):
    hs = diagonal(*of, masks, way)
    return hs[:, -1], hs


@functools.partial(jax.jit, static_argnums=2)
def run_matrices(of, masks, way):
    coefficients, s, start = of
    return key_value(coefficients, s, start, masks, way)


def loop_vectors(of, masks):
    a, b, h, start = jax.tree.map(np.array, of)
    hs = np.zeros_like(b)
    for lane, t in np.ndindex(*b.shape[:2]):
        h[lane] = start[lane] if masks.resets[lane, t] else h[lane]
        h[lane] = a[lane, t] * h[lane] + b[lane, t] if masks.valid[lane, t] else h[lane]
        hs[lane, t] = h[lane]
    return h, hs


def loop_matrices(of, masks):
    (log_decay, k, v, q, beta), s, start = jax.tree.map(np.array, of)
    o = np.zeros_like(v)
    for lane, t, head in np.ndindex(*v.shape[:3]):
        at = lane, t, head
        if masks.resets[lane, t]:
            s[lane, head] = start[lane, head]
        if masks.valid[lane, t]:
            s[lane, head] *= np.exp(log_decay[at])
            u = v[at] if beta is None else beta[at] * (v[at] - s[lane, head].T @ k[at])
            s[lane, head] += np.outer(k[at], u)
        o[at] = s[lane, head].T @ q[at]
    return s, o


KINDS = {
    "real": (vectors, run_vectors, loop_vectors),
    "complex": (functools.partial(vectors, kind="complex"), run_vectors, loop_vectors),
    "delta rule": (matrices, run_matrices, loop_matrices),
    "matrix": (functools.partial(matrices, delta=False), run_matrices, loop_matrices),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def close(one, other, tolerance=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), one, other)


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(run, way, masks, of):
    """A real number of all that a window returns."""
    found = jax.tree.leaves(run(of, masks, way))
    rng = np.random.default_rng(1)
    return sum((x * numbers(rng, *x.shape)).real.sum() + (x * numbers(rng, *x.shape)).imag.sum() for x in found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(run, way, masks, of):
    return jax.grad(functools.partial(score, run, way, masks))(of)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_and_gradient(run, way, masks, of):
    return run(of, masks, way), jax.grad(functools.partial(score, run, way, masks))(of)


@kinds
@pytest.mark.parametrize("time", LENGTHS)
def test_however_a_window_is_run_it_is_that_of_a_loop_and_so_is_its_gradient(kind, time):
    make, run, loop = KINDS[kind]
    of, masks = make(time)
    found, by_step = run_and_gradient(run, "step", masks, of)
    close(found, loop(of, masks))
    for way in WAYS[1:]:
        close(run_and_gradient(run, way, masks, of), (found, by_step))
    rng = np.random.default_rng(2)
    along = jax.tree.map(lambda x: numbers(rng, *x.shape, kind="complex" if jnp.iscomplexobj(x) else "real"), of)

    def moved(by):
        return score(run, "step", masks, jax.tree.map(lambda x, d: x + by * d, of, along))

    slope = sum((g * d).sum().real for g, d in zip(*map(jax.tree.leaves, (by_step, along)), strict=True))
    assert abs((moved(1e-6) - moved(-1e-6)) / 2e-6 - slope) < 1e-6 * max(1, abs(slope))


@kinds
def test_edges_scale_what_goes_back_over_them(kind):
    make, run, _ = KINDS[kind]
    of, masks = make(9, edges=True)
    zero = masks._replace(edges=jnp.ones_like(masks.edges).at[:, 5].set(0.0))
    for way in WAYS:
        close(gradient(run, way, masks, of), gradient(run, "step", masks, of))
        cut = jax.jit(jax.grad(lambda of, way=way: run(of, zero, way)[0].real.sum()))(of)
        assert all((np.asarray(x)[:, :5] == 0).all() for x in jax.tree.leaves(cut) if x.shape[1:2] == (9,))


@kinds
def test_its_backward_pass_is_linear_and_can_be_transposed(kind):
    """As `uoro` does."""
    make, run, _ = KINDS[kind]
    of, masks = make(CHUNK + 2)
    for way in WAYS:

        @jax.jit
        def both(of, way=way):
            out, back = jax.vjp(lambda of: run(of, masks, way), of)
            (cotangents,) = back(out)
            (forward,) = jax.linear_transpose(back, out)((cotangents,))
            return (forward, out), (cotangents, cotangents)

        one, other = (sum((x * y).sum() for x, y in zip(*map(jax.tree.leaves, pair), strict=True)) for pair in both(of))
        close(one, other)


@kinds
def test_what_is_not_finite_ends_at_a_reset(kind):
    make, run, _ = KINDS[kind]
    of, masks = make(CHUNK + 1)
    masks = masks._replace(resets=masks.resets.at[:, 0].set(True))
    bad = (*of[:-2], of[-2] * jnp.nan, of[-1])
    for way in WAYS:
        close(run(bad, masks, way), run(of, masks, way))
        grads = gradient(run, way, masks, bad)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@kinds
def test_a_reset_may_return_to_what_is_given_for_each_step(kind):
    make, run, _ = KINDS[kind]
    of, masks = make(6)
    each = jnp.broadcast_to(of[-1][:, None], (LANES, 6, *of[-1].shape[1:]))
    for way in WAYS:
        close(run((*of[:-1], each), masks, way), run(of, masks, "step"))


@kinds
@pytest.mark.parametrize("way", WAYS)
def test_it_lowers_for_accelerators(kind, way):
    make, run, _ = KINDS[kind]
    of, masks = jax.tree.map(lambda x: x.astype(jnp.result_type(x, 0j) if x.dtype == complex else jnp.float32)
                             if x.dtype != bool else x, make(CHUNK + 1))  # fmt: skip
    step = jax.jit(jax.grad(functools.partial(score, run, way, masks)))
    assert jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(of).platforms == ("cpu", "cuda", "tpu")


def associative_memory(way):
    """A small model with a matrix state."""

    def coefficients(params, x):
        k, v, q = (x @ params[name] for name in "kvq")
        decay = jax.nn.log_sigmoid(x @ params["decay"])
        return tb.KeyValue(decay[..., None], *(y[..., None, :] for y in (k, v, q)), jnp.full((1, 1, 1), 0.5))

    def init(key, x):
        names = {"k": (3, 2), "v": (3, 2), "q": (3, 2), "decay": (3,)}
        return {name: jax.random.normal(jax.random.fold_in(key, n), s) for n, (name, s) in enumerate(names.items())}

    return tb.from_linear(coefficients, init, lambda p, lanes: jnp.zeros((lanes, 1, 2, 2)), implementation=way)


@pytest.mark.parametrize("make", [associative_memory, lambda way: tb.min_gru(4, implementation=way)])
def test_windows_with_resets_and_padding_train_in_one_program_on_one_device_and_on_two(make):
    """Where XLA's own associative scan ends the process."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4, 5, 3))
    resets, valid = np.zeros((2, 6, 4, 5), bool)
    resets[0, :, 0], valid[:] = True, True
    valid[-1, :, 2:] = False
    windows = tb.Window(x, resets=resets, valid=valid)
    trained = []
    for way in WAYS:
        estimate = tb.gradient(make(way), lambda y, window: (y**2).reshape(*y.shape[:2], -1).sum(-1))
        mesh = sharding.mesh(lane=2)
        spread = sharding.over_lanes(estimate, mesh), sharding.place(windows, mesh)
        for own, placed in ((estimate, windows), spread) if way is None else (spread,):
            step = tb.train_step(own, optax.sgd(0.1))
            state = step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], placed))
            trained.append(jax.device_get(tb.train_windows(step, state, placed)[0].params))
    for each in trained[1:]:
        close(each, trained[0])


def test_in_chunks_a_state_is_kept_for_each_chunk_and_not_for_each_step():
    def bytes_kept(way):
        time, keys = 8 * CHUNK, 64
        of = jax.tree.map(
            lambda x: jnp.ones(x, jnp.float32),
            tb.KeyValue(*[(1, time, 1, keys)] * 5),
            is_leaf=lambda x: type(x) is tuple and type(x[0]) is int,
        )
        of = of._replace(log_decay=of.log_decay[..., 0], beta=of.beta[..., 0])
        f = jax.jit(jax.grad(lambda of: key_value(of, jnp.zeros((1, 1, keys, keys)), None, Masks(), way)[1].sum()))
        return f.lower(of).compile().memory_analysis().temp_size_in_bytes

    assert 4 * bytes_kept("chunked") < bytes_kept("step")


def test_half_precision_is_added_up_in_the_dtype_of_the_state():
    (coefficients, s, start), masks = matrices(9)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), coefficients)
    same = jax.tree.map(lambda x: x.astype(s.dtype), half)
    for way in WAYS:
        run = jax.jit(functools.partial(key_value, implementation=way))
        close(run(half, s, start, masks), run(same, s, start, masks))


def test_what_from_linear_is_given_has_to_fit_the_carry():
    def model(coefficients, carry=(4,), **more):
        return tb.from_linear(coefficients, lambda key, x: (), lambda params, lanes: jnp.zeros((lanes, *carry)), **more)

    x = jnp.ones((2, 5, 4))
    for wrong in (
        lambda p, x: x,
        lambda p, x: (x, x[..., :3]),
        lambda p, x: (x, x + 1j),
        lambda p, x: tb.KeyValue(x, x, x, x),
    ):
        with pytest.raises(ValueError, match=r"it needs to return \(a, b\) with h = a \* h \+ b"):
            model(wrong).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="The function of the `coefficients` does not read each step by itself"):
        model(lambda p, x: (x, x.cumsum(1))).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="The readout does not read each step by itself"):
        model(lambda p, x: (x, x), readout=lambda p, h: h.cumsum(1)).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"`initial_carry` returned int.*floating-point or complex"):
        tb.from_linear(lambda p, x: (0.5, x), lambda key, x: (), lambda p, n: jnp.zeros((n, 4), int)).init(
            jax.random.key(0), x
        )
    memory = tb.from_linear(
        lambda p, x: tb.KeyValue(*[x[..., None, :]] * 4),
        lambda key, x: (),
        lambda p, n: jnp.zeros((n, 1, 4, 4), complex),
    )
    with pytest.raises(ValueError, match=r"`initial_carry` returned complex.*real numbers"):
        memory.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="`implementation` is 'parallel'; it needs to be one of"):
        model(lambda p, x: (x, x), implementation="parallel")


def test_the_largest_of_sums_is_that_of_a_loop_with_its_gradient_however_it_is_run():
    rng = np.random.default_rng(0)
    a, b, m, start, at = (jnp.asarray(numbers(rng, LANES, *shape)) for shape in ((9, 2), (9, 2), (2,), (9, 2), (9, 2)))
    of = masks(rng, 9)
    loop = np.zeros((2, LANES, 9, 2))
    for lane in range(LANES):
        h = m[lane]
        for t in range(9):
            loop[0, lane, t] = h = start[lane, t] if of.resets[lane, t] else h
            loop[1, lane, t] = h = jnp.maximum(h + a[lane, t], b[lane, t]) if of.valid[lane, t] else h

    def total(numbers, way):
        before, after = maximum(*numbers, of, way)
        return (before * at).sum() + (after * at * at).sum(), (before, after)

    derived = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, found), grads = derived((a, b, m, start), "associative")
    close(found, tuple(loop))
    (_, found), by_step = derived((a, b, m, start), "step")
    close((found, grads), (tuple(loop), by_step))
    with_nan = maximum(a, b, m * jnp.nan, start, of._replace(resets=of.resets | (np.arange(9) == 0)), None)[1]
    assert np.isfinite(with_nan).all()
