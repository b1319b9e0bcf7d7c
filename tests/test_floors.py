import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tbptt_jax as tb


def test_stateless_windows_end_on_their_exact_floor_and_a_carry_goes_below_it():
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model = tb.from_linen(nn.OptimizedLSTMCell(12, **kinds), readout=nn.Dense(1, **kinds))
    window, lanes, steps = 5, 64, 10_000
    loss = lambda y, w: optax.sigmoid_binary_cross_entropy(y, w.targets)[..., 0]  # noqa: E731
    step = tb.train_step(tb.gradient(model, loss), optax.adam(optax.cosine_decay_schedule(0.02, steps // window)))
    train, test = (tb.split(tb.tasks.lag(jax.random.key(i), lanes, steps), window) for i in (0, 1))
    reached = {}
    for name, cut in (("stateless", tb.stateless), ("stateful", lambda windows: windows)):
        windows = cut(train)
        state = step.init(jax.random.key(2), jax.tree.map(lambda x: x[0], windows))
        state, _ = tb.train_windows(step, state, windows)
        reached[name] = float(tb.evaluate(model, loss, state.params, cut(test)).loss)
    floor, standard_error = tb.tasks.lag_floor(window), 0.35 / np.sqrt(lanes * steps)
    assert floor - 4 * standard_error < reached["stateless"] < floor + 0.01
    assert reached["stateful"] < floor - 0.05
