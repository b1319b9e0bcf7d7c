"""The recipe of AWD-LSTM: what is dropped, tied and drawn, and a run that is gone on with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tbptt_jax as tb
from tbptt_jax import noise, study
from tbptt_jax.study.tasks.awd_lstm import awd_lstm, cut_at_random, embed, language_model

SMALL = {"most": 400, "least": 1, "hidden": 4, "layers": 1, "lanes": 2, "readings": 2}


def test_embedding_dropout_drops_a_token_wherever_it_stands_in_a_lane_and_nowhere_else():
    tokens = np.random.default_rng(0).integers(0, 40, (3, 200))
    table = jnp.ones((40, 2))
    rows = np.asarray(embed(table, tokens, 0.3, noise.lane_keys(jax.random.key(1), 3)))
    masks = []
    for lane in range(3):
        of_token = {int(w): rows[lane, tokens[lane] == w] for w in np.unique(tokens[lane])}
        assert all((r == r[0, 0]).all() for r in of_token.values())
        assert {float(r[0, 0]) for r in of_token.values()} == {0.0, 1 / 0.7}
        masks.append([float(of_token[w][0, 0]) if w in of_token else None for w in range(40)])
    assert masks[0] != masks[1] != masks[2]
    np.testing.assert_array_equal(embed(table, tokens, 0.3, None), table[tokens])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_share_one_array(tied):
    model = language_model(11, 3, 1, tied=tied)
    tokens = jnp.arange(8).reshape(2, 4)
    params = model.init(jax.random.key(0), tokens)
    assert [x.shape for x in jax.tree.leaves(params)].count((11, 3)) == (1 if tied else 2)
    _, y = jax.jit(model.unroll)(params, model.initial_carry(params, 2), tokens)
    weights = params["embedding" if tied else "decoder"]
    np.testing.assert_allclose(y["logits"], y["h"] @ weights.T + params["bias"], rtol=1e-6, atol=1e-6)


def test_cut_at_random_reads_each_step_once_in_each_reading_in_windows_of_one_shape():
    stream = np.arange(2 * 300).reshape(2, 300)
    windows = cut_at_random(tb.lanes(np.arange(601)[:-1], np.arange(601)[1:], lanes=2), 20, 2, readings=3)
    for lane in range(2):
        read = windows.inputs[:, lane][windows.valid[:, lane]]
        np.testing.assert_array_equal(read, np.tile(stream[lane], 3))
    lengths = windows.valid[:, 0].sum(-1)
    assert windows.inputs.shape[2] == lengths.max() and len(set(lengths.tolist())) > 3
    assert windows.resets.sum() == 2 * 3  # where a reading begins


def test_a_run_goes_on_bit_for_bit_and_is_judged_without_noise(tmp_path):
    task = study.task("awd_lstm", **SMALL)
    optimiser = optax.chain(optax.clip_by_global_norm(0.25), optax.adam(1e-2), tb.schedules.scale_by_length(10))
    fit = {"window": 10, "optimiser": optimiser, "average": study.asgd(0), "windows_per_call": 2, "checkpoint_every": 2,
           "quiet": True}  # fmt: skip
    study.fit(task, updates=4, workdir=tmp_path, **fit)
    both, once = study.fit(task, updates=8, workdir=tmp_path, **fit), study.fit(task, updates=8, **fit)
    jax.tree.map(np.testing.assert_array_equal, both.state.params, once.state.params)
    seen, expected = ([(*call[:3], call.valid) for call in run.calls] for run in (both, once))
    assert seen == expected
    judged = once.calls[-1].valid["bits per word"]
    assert study.evaluate(task, once.state.optimiser.mean, task.valid)["bits per word"] == pytest.approx(judged)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"unit": "lines"}, "'words' or"), ({"held_out": 0.5}, "between 0 and"), ({"most": 6}, "longer")],
)
def test_what_cannot_be_trained_on_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        awd_lstm(**SMALL | wrong)
