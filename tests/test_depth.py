"""Depth in time and in layers: what is computed again changes nothing but memory, and blocks are what they say."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import (
    F64,
    FEATURES,
    LANES,
    TIME,
    UNITS,
    assert_close,
    compiled,
    first,
    loss,
    stream,
    summed_gradient,
)

import tbptt_jax as tb
from tbptt_jax import noise, sharding, testing

WIDTH = 3


def embed(**options):
    return tb.pointwise(nn.Dense(WIDTH, **F64), **options)


def out(**options):
    return tb.pointwise(nn.Dense(2, **F64), **options)


def block(dropout=0.0, **options):
    return tb.residual(tb.gru(WIDTH, **options)), tb.residual(tb.gated_mlp(4, dropout=dropout, **options), "layer")


def deep(layers=2, remat=False, dropout=0.0, **options):
    return tb.stack(embed(), *(part for _ in range(layers) for part in block(dropout, **options)), out(), remat=remat)


def looped(layers=2, remat=False, dropout=0.0, **options):
    """`deep()` with one loop over its layers."""
    return tb.stack(embed(), tb.repeat(tb.stack(*block(dropout, **options)), layers, remat=remat), out())


def params_of(model, inputs=FEATURES):
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, inputs)))
    return jax.tree.map(lambda p: 1.5 * p.astype(jnp.float64) + 0.1, params)


def narrow(params, y):
    return y[..., :FEATURES]


def bare(units=UNITS, **options):
    step = lambda params, h, x: 2 * (jnp.tanh(h @ params + x @ params[:FEATURES]),)  # noqa: E731
    init = lambda key, x: jax.random.normal(key, (units, units)) / units  # noqa: E731
    return tb.from_step(step, init, lambda params, lanes: jnp.zeros((lanes, units)), readout=narrow, **options)


def linen(units=UNITS, **options):
    return tb.from_linen(nn.GRUCell(units, **F64), readout=narrow, **options)


def lstm(units=UNITS, **options):
    return tb.lstm(units, readout=narrow, **options)


def gru(units=UNITS, **options):
    return tb.gru(units, layers=2, zoneout=0.2, readout=narrow, **options)


def stacked(units=UNITS, **options):
    return tb.stack(lstm(units, **options), tb.residual(linen(units, **options)))


cells = pytest.mark.parametrize("make", [bare, linen, lstm, gru, stacked])


@functools.cache
def without_segments(make):
    """``(params, (gradient, metrics))`` of the stream in one window."""
    params = params_of(make())
    return params, summed_gradient(tb.gradient(make(), loss), params, tb.split(stream(rubbish=np.nan), TIME))


@pytest.mark.parametrize(
    "make, lengths",
    [(make, (8, 3)) for make in (linen, lstm, gru, stacked)]
    + [(bare, lengths) for lengths in ((8, 3), (16, 5, 2), (100, TIME), (64, 48, 4), (TIME, 1))],
)
def test_segments_within_segments_change_nothing_but_memory(make, lengths):
    window, (params, expected) = tb.split(stream(rubbish=np.nan), TIME), without_segments(make)
    assert_close(summed_gradient(tb.gradient(make(checkpoint=lengths), loss), params, window), expected, rtol=1e-12)


def test_a_tuple_of_one_length_is_that_length():
    x = jnp.zeros((2, 20, FEATURES))

    def program(checkpoint):
        model = bare(checkpoint=checkpoint)
        return str(jax.make_jaxpr(lambda p: model.unroll(p, model.initial_carry(p, 2), x))(params_of(model)))

    assert program((8,)) == program(8) != program((8, 2))
    assert program((100, 8)) == program(8)  # one segment of all steps is none


@cells
def test_segments_within_segments_take_less_memory_than_segments(make):
    def size(checkpoint):
        model, x = make(16, checkpoint=checkpoint), jax.ShapeDtypeStruct((4, 1024, FEATURES), jnp.float64)
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        total = lambda p, x: model.unroll(p, model.initial_carry(p, 4), x)[1].sum()  # noqa: E731
        return compiled(jax.jit(jax.grad(total)).lower(params, x)).memory_analysis().temp_size_in_bytes

    whole, segments, nested = map(size, (None, 64, (64, 8)))
    assert whole > 2 * segments and segments > 1.2 * nested


@pytest.mark.parametrize("norm, theirs", [("rms", nn.RMSNorm), ("layer", lambda **kinds: nn.LayerNorm(use_bias=False, **kinds)), (None, None)])  # fmt: skip
def test_a_residual_adds_the_model_of_the_norm_as_flax_has_it(norm, theirs):
    window, cell = stream(rubbish=np.nan), tb.gru(FEATURES)
    model = tb.residual(cell, norm)
    params = params_of(model)
    x = jnp.where(window.valid[..., None], window.inputs, 0)
    normed = theirs(**F64).apply({"params": params["norm"]}, x) if norm else x
    carry = cell.initial_carry(params["model"], len(x))
    end, y = jax.jit(cell.unroll)(params["model"], carry, normed, window.resets, window.valid)
    assert_close(jax.jit(model.unroll)(params, carry, window.inputs, window.resets, window.valid), (end, x + y))


def test_a_norm_adds_up_in_float32_and_hands_on_half_precision():
    x = jnp.asarray(300 + np.random.default_rng(0).normal(size=(2, 3, 4096)), jnp.float16)  # whose squares are infinite
    same = tb.residual(tb.pointwise(lambda params, x: x))
    y = same.unroll(same.init(jax.random.key(0), x), (), x)[1]
    assert y.dtype == jnp.float16
    exact = np.asarray(x, float)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True)) + exact
    np.testing.assert_allclose(np.asarray(y, float), exact, rtol=1e-3)
    block = tb.stack(tb.residual(tb.gru(3)), tb.residual(tb.gated_mlp(4)))
    model = tb.stack(tb.pointwise(nn.Dense(3, dtype=jnp.bfloat16)), tb.repeat(block, 2))
    params = jax.tree.map(lambda p: p.astype(jnp.float32), jax.jit(model.init)(jax.random.key(0), x))
    carry, y = jax.jit(model.unroll)(params, model.initial_carry(params, 2), x)
    assert y.dtype == jnp.bfloat16
    assert {h.dtype for h in jax.tree.leaves(carry)} == {jnp.dtype("float32")}


def test_a_gated_mlp_is_the_formula_of_each_step():
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    for activation in (nn.silu, nn.gelu, nn.sigmoid):
        model = tb.gated_mlp(4, activation=activation)
        params = params_of(model, 3)
        w, v, u = (params["module"]["params"][name]["kernel"] for name in ("gate", "up", "down"))
        carry, y = jax.jit(model.unroll)(params, model.initial_carry(params, 2), x)
        assert carry == ()
        np.testing.assert_allclose(y, (activation(x @ w) * (x @ v)) @ u, rtol=1e-12)


def test_a_layer_of_each_step_may_be_a_function_with_parameters_and_draws():
    def noisy(params, x, key=None):
        drawn = 0 if key is None else jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(key)
        return params["gain"] * x + drawn

    model = tb.pointwise(noisy, init=lambda key, x: {"gain": jnp.full(x.shape[-1], 2.0)})
    x = jnp.ones((2, 5, 3))
    params = model.init(jax.random.key(0), x)
    assert (model.unroll(params, (), x)[1] == 2).all()
    drawn = model.unroll(params, (), x, key=noise.lane_keys(jax.random.key(0), 2))[1]
    assert not np.allclose(drawn[0], drawn[1])


@pytest.mark.parametrize("remat", [False, True])
def test_a_loop_over_layers_is_the_layers_one_after_another(remat):
    """Outputs, gradients and what is drawn: as many layers of `stack`, in one program."""
    one, other = tb.stack(*block(0.5)), tb.stack(*block(0.5))
    window, keys = stream(rubbish=np.nan), noise.lane_keys(jax.random.key(1), LANES)
    window = window._replace(inputs=np.concatenate([window.inputs, window.inputs[..., :1]], -1))
    loop, layers = tb.repeat(one, 2, remat=remat), tb.stack(one, other, remat=remat)
    params = params_of(layers, WIDTH)

    def total(model, params, stacked):
        carry = jax.tree.map(lambda h: h + 0.1, model.initial_carry(params, LANES))
        end, y = model.unroll(params, carry, window.inputs, window.resets, window.valid, key=keys)
        end = jax.tree.map(lambda *h: jnp.stack(h, 1), *end) if stacked else end
        return jnp.sum(jnp.where(window.valid[..., None], y, 0) ** 2), end

    derived = jax.jit(jax.value_and_grad(total, 1, has_aux=True), static_argnums=(0, 2))
    (value, end), grads = derived(layers, params, True)
    stacked = lambda tree: jax.tree.map(lambda *p: jnp.stack(p), *tree)  # noqa: E731
    (got, got_end), got_grads = derived(loop, stacked(params), False)
    assert_close((got, got_end, got_grads), (value, end, stacked(grads)))
    fresh = jax.jit(loop.init)(jax.random.key(0), window.inputs)
    assert jax.tree.structure(fresh) == jax.tree.structure(stacked(params))
    assert not np.allclose(*fresh[0]["model"]["cell"][0].recurrent)


def test_uoro_goes_forward_through_layers_computed_again():
    def estimated(model):
        params, estimate = params_of(model), tb.gradient(model, loss, influence=tb.uoro(), normaliser=1.0)
        return summed_gradient(estimate, params, tb.split(stream(rubbish=np.nan), 6))[0]

    assert_close(estimated(deep(1, remat=True, checkpoint=(4, 2))), estimated(deep(1)), rtol=1e-10)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(estimated(looped(remat=True))))


def test_with_layers_computed_again_the_backward_pass_keeps_their_inputs():
    """In a loop so does what is compiled; without one a CPU's compiler may compute all layers again at once."""
    x = jnp.zeros((4, 64, WIDTH))

    def kept(model):
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        forward = lambda p: model.unroll(p, model.initial_carry(p, 4), x)[1]  # noqa: E731
        return sum(r.size for r in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)))

    def temporary(remat):
        model = tb.repeat(tb.stack(*block()), 6, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        total = lambda p, x: model.unroll(p, model.initial_carry(p, 4), x)[1].sum()  # noqa: E731
        return compiled(jax.jit(jax.grad(total)).lower(params, x)).memory_analysis().temp_size_in_bytes

    parts = [part for _ in range(6) for part in block()]
    assert 4 * kept(tb.stack(*parts, remat=True)) < kept(tb.stack(*parts))
    assert 2 * temporary(True) < temporary(False)


def test_a_model_that_carries_nothing_is_taken_everywhere(tmp_path):
    model = tb.stack(
        embed(), tb.residual(tb.gated_mlp(4)), tb.repeat(tb.gated_mlp(4), 2, remat=True), out(checkpoint=4)
    )
    params, window = params_of(model), stream(rubbish=np.nan)
    windows = tb.split(window, 6)
    carry = model.initial_carry(params, LANES)
    assert not jax.tree.leaves(carry) and [float(x) for x in tb.training.carry_health(carry)] == [0, 0]
    expected = summed_gradient(tb.gradient(model, loss, normaliser=1.0), params, tb.split(window, TIME))[0]
    for estimate in (
        tb.gradient(model, loss, normaliser=1.0),
        tb.gradient(model, loss, influence=tb.replay(2), normaliser=1.0),
        sharding.over_lanes(tb.gradient(model, loss, normaliser=1.0), sharding.mesh(lane=2)),
    ):
        assert_close(summed_gradient(estimate, params, windows)[0], expected, rtol=1e-10)
    for influence in (tb.rtrl(), tb.uoro()):
        with pytest.raises(ValueError, match="has no past to know of: use `truncate"):
            tb.gradient(model, loss, influence=influence).init(jax.random.key(0), params, first(windows))

    _, outputs = tb.predict(model, params, windows)
    outputs = outputs.swapaxes(0, 1).reshape(LANES, -1, 2)
    tb.export(model, params, window.inputs[:, 0], tmp_path / "model")
    served = tb.load_exported(tmp_path / "model")
    for step in (tb.streaming(model, params), served.step):
        _, y = step(carry, window.inputs[:, 0])
        np.testing.assert_allclose(y[window.valid[:, 0]], outputs[:, 0][window.valid[:, 0]], atol=1e-12)
    assert served.initial_carry(LANES) == carry


MODELS = {
    "blocks, drawing": deep(1, remat=True, dropout=0.5, checkpoint=(4, 2)),
    "a loop over blocks, drawing": looped(2, remat=True, dropout=0.5),
    "nothing carried": tb.stack(embed(), tb.residual(tb.gated_mlp(4), None), out(checkpoint=3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_deep_models_keep_the_laws_of_a_recurrence(name):
    testing.check_recurrence(MODELS[name], np.random.default_rng(0).normal(size=(3, 8, FEATURES)))


X = np.zeros((2, 5, 3))
MISTAKES = {
    "segments that grow": (lambda: unrolled(checkpoint=(8, 64)), r"`checkpoint` is \(8, 64\); each segment lies within the one before"),
    "segments of one length": (lambda: unrolled(checkpoint=(8, 8)), r"needs to be shorter, as in \(64, 8\)"),
    "no segments": (lambda: unrolled(checkpoint=()), r"`checkpoint` is \(\); it needs a segment's length"),
    "a segment of a root": (lambda: unrolled(checkpoint=("sqrt", 8)), "`checkpoint` is 'sqrt'; it needs to be a whole number"),
    "another word": (lambda: unrolled(checkpoint="log"), "`checkpoint` is 'log'; it needs a segment's length in steps"),
    "a list of segments": (lambda: unrolled(checkpoint=[64, 8]), r"`checkpoint` is \[64, 8\]; it needs .* a tuple of lengths"),
    "a norm by another name": (lambda: tb.residual(tb.gru(3), "batch"), "`norm` is 'batch'; it needs to be 'rms'"),
    "a module in the place of a recurrence": (lambda: tb.residual(nn.Dense(3)), "it needs to be a Recurrence"),
    "a residual of other features": (
        lambda: tb.residual(tb.gru(4)).init(jax.random.key(0), X),
        r"makes outputs float64\[2, 5, 4\] of inputs float64\[2, 5, 3\]; a residual adds them up",
    ),
    "a complex branch of real numbers": (
        lambda: tb.residual(tb.pointwise(lambda params, x: 1j * x)).init(jax.random.key(0), X),
        r"makes outputs complex128.* one kind of number",
    ),
    "a residual of tokens": (
        lambda: tb.residual(tb.gru(4)).init(jax.random.key(0), np.zeros((2, 5), int)),
        r"What reaches the residual is int64\[2, 5\].*nn.Embed",
    ),
    "a repeated layer that widens": (
        lambda: tb.repeat(tb.gru(4), 2).init(jax.random.key(0), X),
        r"makes outputs float64\[2, 5, 4\] of inputs float64\[2, 5, 3\]; to be repeated",
    ),
    "no layers": (lambda: tb.repeat(tb.gru(3), 0), "`layers` is 0"),
    "nothing at each step": (lambda: tb.pointwise(None), "`module` is None; it needs to be a module"),
    "a look along time": (
        lambda: tb.pointwise(lambda params, x: jnp.cumsum(x, 1)).init(jax.random.key(0), X),
        "The module does not read each step by itself",
    ),
    "a module among layers": (lambda: tb.stack(nn.Dense(3), tb.gru(3)), r"A module becomes one by `tb.pointwise\(module\)`"),
    "an activation by its name": (lambda: tb.gated_mlp(4, activation="silu"), "`activation` is 'silu'; it needs to be a function"),
    "an option that a cell has not": (lambda: tb.slstm(4, drop=0.1), "The sLSTM has no option `drop`; .* `dropout`"),
    "a module where a function is needed": (
        lambda: tb.from_step(lambda p, h, x: (h, x), None, None, readout=nn.Dense(3)),
        r"`readout` is Dense.* `tb.pointwise\(module\)`",
    ),
    "hidden units dropped altogether": (lambda: tb.gated_mlp(4, dropout=1.0), "`dropout` is 1.0"),
}  # fmt: skip


def unrolled(**options):
    bare(**options).unroll(params_of(bare()), jnp.zeros((2, UNITS)), X[..., :FEATURES])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(mistake):
    make, sentence = MISTAKES[mistake]
    with pytest.raises(ValueError, match=sentence) as told:
        make()
    assert str(told.value).endswith(".")
