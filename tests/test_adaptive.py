"""Windows whose lengths a schedule decides: the stream goes on, a run that is gone on with decides the same, few programs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tbptt_jax as tb
from tbptt_jax import horizon, study, training
from tbptt_jax.study import feed, lengths

N, TIME, LANES = 5, 23, 2  # three groups of lanes, the last with one that is empty
NUMBERS = np.arange(1.0, N * TIME + 1).reshape(N, TIME, 1) / (N * TIME)
ONCE = 3 * TIME  # steps of a lane in one reading


def model(factor=0.5):
    return tb.from_step(
        lambda a, h, x: (a * h + x, a * h + x),
        lambda key, x: jnp.full(1, factor, float),
        lambda a, n: jnp.zeros((n, 1)),
    )


def loss(outputs, window):
    return ((outputs - window.targets) ** 2)[..., 0]


def task(factor=0.5, **more):
    return study.Task(model(factor), loss, **{"train": tb.sequences(NUMBERS, NUMBERS), "lanes": LANES, **more})


def told(*windows):
    """A schedule that is told what to choose at its looks, one a call of 4 updates."""

    def choose(model, loss, params, probe, carry):
        return horizon.Suggestion(windows[seen.pop(0) % len(windows)], 1, 0.1, True, "told")

    seen = list(range(1000))
    sizes = tuple(sorted({max(windows), *windows}))
    return study.adaptive(lengths=sizes)._replace(look=lengths.Look(4, 9, choose))


def told_depths(*wanted):
    """The same of depths."""

    def choose(model, loss, params, probe, carry):
        return horizon.Suggestion(4, 1, 0.1, True, "told", wanted[seen.pop(0) % len(wanted)])

    seen = list(range(1000))
    return study.adaptive_replay(depths=(0, 1, 3))._replace(look=lambda window: lengths.Look(4, 8, choose))


def same(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def bits(run):
    return run.state.params, run.state.optimiser, run.state.stream.carry, [call[:3] for call in run.calls]


fit = functools.partial(study.fit, windows_per_call=4, quiet=True)
CORPUS = NUMBERS.reshape(-1, 1)[:-1], NUMBERS.reshape(-1, 1)[1:]


@pytest.mark.parametrize("train, whole", [(tb.sequences(NUMBERS, NUMBERS), 23), (CORPUS, 19)], ids=["rows", "corpus"])
def test_one_length_by_a_schedule_gives_the_bits_of_that_window(train, whole):
    ask = {"updates": 34, "not_finite": "skip"}
    for window, size in (study.growing(whole, whole, updates=1), whole), (study.drawn(tb.schedules.fixed(5)), 5):
        same(bits(fit(task(train=train), window=window, **ask)), bits(fit(task(train=train), window=size, **ask)))


@pytest.mark.parametrize("padded", [4, 23])
def test_replay_sees_the_window_before_as_it_was_also_where_all_are_padded_alike(padded):
    window = study.Lengths(lambda place: study.Span(4, padded), (padded,), {})
    ask = {"updates": 17, "influence": "replay:1", "optimiser": optax.sgd(0.1)}
    run, plain = (fit(task(), window=each, **ask) for each in (window, 4))
    np.testing.assert_allclose(run.params, plain.params, rtol=1e-6)
    assert abs(fit(task(), window=4, updates=17, optimiser=optax.sgd(0.1)).params - plain.params) > 1e-5


SCHEDULES = {
    "told": lambda: told(2, 16, 4),
    "growing": lambda: study.growing(3, 16, epochs=2),
    "random": lambda: study.drawn(tb.schedules.random_length(6, deviation=2, least=2)),
    "artbp": lambda: study.drawn(tb.schedules.polynomial_tail(4)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_step_is_read_once_in_its_order_and_reset_where_the_data_is(schedule):
    window = schedule()
    stream = feed.stream_of(task(), tb.sequences(NUMBERS, NUMBERS), LANES)
    source = feed.of_lengths(task(), window, stream, per_call=4, updates=None, epochs=3)
    place, done, parts = source.begin, 0, []
    while (last := source.end(place, done)) > done:
        if source.looks(place, done):
            place, _ = source.look(place, training.TrainState((), (), tb.gradient(model(), loss).init(jax.random.key(0), jnp.ones(1), stream.read(0, 2)), 0))  # fmt: skip
        last = source.end(place, done)
        windows = source.read(place, done, last)
        for i in range(last - done):
            n = int(windows.valid[i].any(0).sum())
            assert not windows.valid[i, :, n:].any() and not windows.resets[i, :, n:].any()
            parts.append(jax.tree.map(lambda x, i=i, n=n: x[i, :, :n], windows))
        done, place = last, source.after(place, last)
    read = jax.tree.map(lambda *x: np.concatenate(x, 1), *parts)
    whole = tb.split(tb.sequences(NUMBERS, NUMBERS), TIME, lanes=LANES)
    begun = read.inputs.shape[1] - 3 * ONCE  # of the next reading
    assert (begun < 16) if window.sizes else begun == 0
    whole = jax.tree.map(lambda x: np.concatenate([*x] * 4, 1)[:, : 3 * ONCE + begun], whole)
    same(read._replace(edges=None), whole)
    if window.settings.get("drawn"):
        cuts = [tb.schedules.polynomial_tail(4)(jax.random.fold_in(jax.random.key(0), i), TIME) for i in range(9)]
        if read.edges is not None:
            np.testing.assert_allclose(read.edges[0], np.concatenate([cut.edges for cut in cuts]), rtol=1e-6)
    assert len(lasted := {part.inputs.shape[1] for part in parts}) > 2 and lasted <= {*(window.sizes or lasted)}


def test_the_carry_at_a_change_of_length_is_that_of_reading_the_same_steps():
    run = fit(task(), window=told(2, 16, 4), updates=20, learning_rate=0.0)
    assert len({call.window for call in run.calls}) == 3
    steps = feed.stream_of(task(), tb.sequences(NUMBERS, NUMBERS), LANES).read(0, run.calls[-1].steps)
    start = model().initial_carry(jnp.full(1, 0.5), LANES)
    carry, _ = model().unroll(run.params, start, steps.inputs, steps.resets, steps.valid)
    np.testing.assert_allclose(run.state.stream.carry, carry, rtol=1e-12)


ADAPTIVE = {
    "window": {"window": study.adaptive(0.05, lengths=(2, 4, 8, 16), every=8)},
    "drawn": {"window": study.drawn(tb.schedules.constant_tail(4))},
    "replay": {"window": 4, "influence": study.adaptive_replay(0.05, depths=(0, 1, 2), every=8)},
}


@pytest.mark.parametrize("how", ADAPTIVE.values(), ids=ADAPTIVE)
def test_killed_again_and_again_it_ends_with_the_same_bits_and_the_same_choices(tmp_path, how):
    ask = {**how, "epochs": 3, "checkpoint_every": 8, "learning_rate": 0.1}
    whole = fit(task(), **ask)
    kills = 0

    def kill(event):
        if event.kind == "call" and event.updates not in seen and event.updates % 8 == 4:
            seen.add(event.updates)  # a call that was not saved is made again
            raise KeyboardInterrupt

    seen = set()
    while True:
        try:
            run = fit(task(), **ask, workdir=tmp_path, listeners=[kill])
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 2
    same(bits(run), bits(whole))
    assert [c[4:] for c in run.calls] == [c[4:] for c in whole.calls] and run.choices == whole.choices
    loaded = study.load(tmp_path, task())
    assert loaded.choices == run.choices and 3 <= loaded.epochs == run.epochs < 3 + 16 / ONCE
    assert len(json.loads((tmp_path / "run.json").read_text())["choices"]) == len(run.choices)
    other = {"influence": "replay:2"} if "influence" in how else {"window": study.growing(2, 4, updates=3)}
    with pytest.raises(ValueError, match=f"there {[*how][-1]}"):
        fit(task(), workdir=tmp_path, **{**ask, **other})


def test_more_epochs_go_on_bit_for_bit(tmp_path):
    ask = {"window": study.adaptive(0.05, lengths=(2, 4, 8), every=4), "optimiser": optax.sgd(0.1)}
    half = fit(task(), epochs=1, workdir=tmp_path, **ask)
    both = fit(task(), epochs=2, workdir=tmp_path, **ask)
    assert half.calls[-1].steps - ONCE in range(8) and both.calls[-1].steps - 2 * ONCE in range(8)
    same(both.state.params, fit(task(), epochs=2, **ask).state.params)


def test_each_length_is_compiled_once_and_the_look_once():
    programs = training._train_windows._cache_size()
    run = fit(task(train=CORPUS), window=told(2, 16, 4), updates=40)
    assert len(run.choices) == 10 and training._train_windows._cache_size() - programs == 3
    looks = horizon.decay.__globals__["_traced"]
    before = looks._cache_size()
    run = fit(task(), window=study.adaptive(lengths=(2, 4, 8), every=4), updates=20)
    assert len(run.choices) == 3 and looks._cache_size() - before == 1


def test_looks_are_the_rarer_the_longer_they_lead_to_the_same():
    window = told(2, 2, 4, 4, 4, 4, 4, 4, 2)
    window = window._replace(look=window.look._replace(rarest=8))
    run = fit(task(), window=window, updates=140, learning_rate=0.0)
    apart = np.diff([choice.updates for choice in run.choices])
    np.testing.assert_array_equal(apart, [4, 8, 4, 8, 16, 32, 32, 32])


def test_another_seed_of_the_same_settings_compiles_nothing():
    of, window = task(), study.growing(2, 4, updates=8)
    fit(of, window=window, updates=16)
    programs = training._train_windows._cache_size()
    fit(of, window=window, updates=16, seed=1)
    assert training._train_windows._cache_size() == programs
    fit(of, window=window, updates=16, learning_rate=0.02)
    assert training._train_windows._cache_size() == programs + 2  # lengths


@pytest.mark.parametrize(
    "of, because",
    [
        (task(1.1), "does not fade"),
        (task(1e40), "Nothing could be measured"),
        (task(0.99), "No window up to 8 is known"),
        (
            task(train=tb.sequences(NUMBERS, NUMBERS)._replace(weights=np.eye(1, TIME) * np.ones((N, 1)))),
            "Nothing could",
        ),
    ],
    ids=["grows", "explodes", "fades slowly", "nothing is scored"],
)
def test_where_nothing_is_safe_windows_are_the_longest_and_the_reason_is_kept(of, because):
    window = study.adaptive(0.01, lengths=(2, 4, 8), probe=17)
    run = fit(of, window=window, updates=4, learning_rate=0.0, not_finite="skip")
    (choice,) = run.choices
    assert choice.window == run.calls[0].window == 8 and not choice.safe and because in choice.reason


def test_a_gradient_that_fades_fast_gets_the_shortest_window_whose_bias_is_measured_to_hold():
    run = fit(task(0.3), window=study.adaptive(0.2, lengths=(1, 2, 4, 8, 16)), updates=4, learning_rate=0.0)
    (choice,) = run.choices
    assert choice.safe and choice.bias_bound < 0.2 and choice.window == run.calls[0].window < 16
    assert run.calls[0].bias_bound == choice.bias_bound
    looser = study.adaptive(0.2, lengths=(1, 2, 4, 8, 16), bound="norms")
    assert fit(task(0.3), window=looser, updates=4, learning_rate=0.0).choices[0].window > choice.window


def test_of_many_lanes_a_look_is_at_some_of_each_kind():
    """Of two kinds in turn, one of which has no memory, both are seen."""
    inputs = np.random.default_rng(0).normal(size=(40, 16, 1))
    inputs[::2] = 0
    choose = study.adaptive(0.1, lengths=(2, 8)).look.choose
    seen = [
        choose(model(), loss, jnp.full(1, 0.5), tb.Window(x, 0 * x), np.zeros((40, 1))) for x in (inputs, 0 * inputs)
    ]
    assert [(found.window, found.relative_bias > 0) for found in seen] == [(8, True), (2, False)]


def test_a_depth_holds_from_the_next_window_on_as_if_it_had_always_been_that():
    params, cut = jnp.full(1, 0.9), tb.split(tb.sequences(NUMBERS[:LANES], NUMBERS[:LANES]), 2)

    def read(influence, *reaches):
        estimate, grads = tb.gradient(model(), loss, influence=influence), []
        update = jax.jit(estimate.update)
        state = estimate.init(jax.random.key(0), params, jax.tree.map(lambda x: x[0], cut))
        for n, reach in enumerate(reaches):
            if reach is not None:
                state = state._replace(influence=state.influence._replace(reach=jnp.int32(reach)))
            gradient, state, _ = update(params, state, jax.tree.map(lambda x, n=n: x[n], cut))
            grads.append(gradient)
        return np.array(grads)

    changing = read(tb.replay(3), None, 0, 0, 0, 0, 3, 1, 2, 0, 3)
    always = {0: read(tb.truncate(), *[None] * 10)} | {n: read(tb.replay(n), *[None] * 10) for n in (1, 2, 3)}
    expected = [always[n][i] for i, n in enumerate((3, 0, 0, 0, 0, 3, 1, 2, 0, 3))]
    np.testing.assert_allclose(changing, expected, rtol=1e-12)


def test_depths_that_are_told_are_gone_back_by_in_one_program():
    ask = {"window": 4, "updates": 22, "learning_rate": 0.1}
    programs = training._train_windows._cache_size()
    run = fit(task(), influence=told_depths(3, 0, 1), **ask)
    assert training._train_windows._cache_size() - programs == 2  # the last call is a shorter one
    assert [call.depth for call in run.calls] == [choice.depth for choice in run.choices] == [3, 0, 1, 3, 0, 1]
    assert {call.bias_bound for call in run.calls} == {0.1} and run.state.stream.influence.reach == 1
    same(bits(fit(task(), influence=told_depths(3), **ask)), bits(fit(task(), influence="replay:3", **ask)))
    none, truncated = (fit(task(), influence=past, **ask) for past in (told_depths(0), "truncate"))
    np.testing.assert_allclose(none.params, truncated.params, rtol=1e-12)
    assert none.epochs == truncated.epochs and not np.allclose(run.params, none.params)


@pytest.mark.parametrize("factor, depth, safe", [(0.0, 0, True), (0.5, 1, True), (0.99, 3, False), (1e40, 3, False)])
def test_the_smallest_depth_is_chosen_that_is_safe_or_the_deepest(factor, depth, safe):
    influence = study.adaptive_replay(0.05, depths=(0, 1, 3))
    run = fit(task(factor), window=4, influence=influence, updates=4, learning_rate=0.0, not_finite="skip")
    (choice,) = run.choices
    assert (choice.window, choice.depth, choice.safe) == (4, depth, safe)
    assert safe == (choice.bias_bound < 0.05)


def test_the_learning_rate_goes_by_the_steps_read():
    step = tb.train_step(
        tb.gradient(model(), loss), optax.chain(optax.scale(0.0), optax.add_decayed_weights(1.0), tb.schedules.by_steps(lambda steps: 0.01 * steps))
    )  # fmt: skip
    state = step.init(jax.random.key(0), tb.Window(NUMBERS[:, :3], NUMBERS[:, :3]))
    for length, factor in ((3, 1.0), (5, 0.97), (2, 0.97 * 0.92)):
        state, _ = step.update(state, tb.Window(NUMBERS[:, :length], NUMBERS[:, :length]))
        np.testing.assert_allclose(state.params, 0.5 * factor, rtol=1e-6)


def own(span, sizes=(), look=None):
    """A run by a schedule of one's own, whose windows are all this one."""
    fit(task(), window=study.Lengths(lambda place: span, sizes, {}, look), updates=1)


def losses(outputs, window):
    return {"one": loss(outputs, window), "other": loss(outputs, window)}


WRONG = {
    "tolerance": (lambda: study.adaptive(0.0), "positive"),
    "no number either": (lambda: study.adaptive(True), "`tolerance` is True; it needs to be a number"),
    "no number": (lambda: study.adaptive("0.5"), "`tolerance` is '0.5'; it needs to be a number"),
    "lengths": (lambda: study.adaptive(lengths=(8, 4)), "from short to long"),
    "probe": (lambda: study.adaptive(lengths=(4, 8), probe=9), "give at least 16"),
    "bound": (lambda: study.adaptive(bound="norm"), "needs to be 'gradients' or 'norms'"),
    "growing": (lambda: study.growing(8, 4, updates=1), "`last` to be the longer"),
    "neither": (lambda: study.growing(4, 8), "give one of them"),
    "drawn": (lambda: study.drawn(lambda key, time: 7), "random_length"),
    "long": (lambda: fit(task(), window=study.growing(16, 32, updates=1), updates=1), "longer than the stream"),
    "replay": (lambda: fit(task(), window=told(2, 4), influence="replay:2", updates=1), "windows of one length"),
    "one length": (lambda: study.adaptive(lengths=8), "`lengths` is 8; give several"),
    "epochs": (lambda: fit(task(), epochs="2", window=2), "`epochs` is '2'"),
    "depths": (lambda: study.adaptive_replay(depths=(2, 1)), "from small to large"),
    "one depth": (lambda: study.adaptive_replay(depths=2), "`depths` is 2; give several"),
    "few": (lambda: study.adaptive_replay(depths=(0, 3), probe=7), "give at least 8"),
    "never": (lambda: study.adaptive_replay(0.0), "positive"),
    "both": (lambda: fit(task(), window=told(2, 4), influence=told_depths(1), updates=1), "windows of one length"),
    "no past": (
        lambda: fit(task(), window=2, influence=told_depths(1), stateless=True, updates=1),
        "no past to go back",
    ),
    "stateless": (lambda: fit(task(), window=told(2, 4), stateless=True, updates=1), "know no past"),
    "growing by a word": (lambda: study.growing(4, 8, updates="1"), "`updates` is '1'; it needs to be a whole number"),
    "growing by a half": (lambda: study.growing(4, 8, updates=2.5), "`updates` is 2.5; it needs to be a whole number"),
    "growing if": (lambda: study.growing(4, 8, updates=True), "`updates` is True; it needs to be a whole number"),
    "epochs of a word": (lambda: study.growing(4, 8, epochs="1"), "`epochs` is '1'; it needs to be a positive number"),
    "epochs if": (lambda: study.growing(4, 8, epochs=True), "`epochs` is True; it needs to be a positive number"),
    "endless": (lambda: study.growing(4, 8, epochs=float("inf")), "`epochs` is inf; it needs to be a positive number"),
    "drawn of nothing": (lambda: study.drawn(lambda: 3), "a function of a key and of how many steps there are"),
    "seed": (lambda: study.drawn(tb.schedules.fixed(5), seed="a"), "`seed` is 'a'; it needs to be a whole number"),
    "a depth below": (lambda: study.adaptive_replay(depths=(-1, 2)), "`depths` has -1"),
    "window for influence": (lambda: fit(task(), window=4, influence=told(2), updates=1), "which is for `window`"),
    "influence for window": (lambda: fit(task(), window=told_depths(1), updates=1), "which is for `influence`"),
    "no span": (lambda: own(4), "returned 4; it needs to be a study.Span"),
    "no step": (lambda: own(study.Span(0)), "`Span.length` is 0"),
    "half a step": (lambda: own(study.Span(2.5)), "`Span.length` is 2.5"),
    "padded": (lambda: own(study.Span(5, 3)), "5 steps, padded to 3"),
    "edges": (lambda: own(study.Span(4, 4, np.ones(3))), r"4 steps, and edges \[3\]"),
    "sizes": (lambda: own(study.Span(7), (4,)), r"7 steps, and its `sizes` are \[4\]"),
    "no suggestion": (lambda: own(study.Span(4), look=study.Look(4, 8, lambda *seen: None)), "returned None"),
    "no look": (lambda: own(study.Span(4), look=study.Look(0, 8, lambda *seen: None)), "`look.every` is 0"),
    "losses": (lambda: fit(task()._replace(loss=losses), window=4, updates=1), "a run reports one number"),
    "cut": (lambda: fit(study.task("first_bit"), window=told(2, 4), updates=1), "cuts its windows itself"),
}


@pytest.mark.parametrize("ask, sentence", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_in_a_sentence(ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask()


def test_growing_windows_double_in_equal_stages():
    by_updates, by_steps = study.growing(4, 16, updates=10), study.growing(4, 16, epochs=2)
    places = [lengths.Place(updates=n, steps=10 * n, time=25, reading=50) for n in range(12)]
    assert [by_updates.next(place).length for place in places] == [4] * 5 + [8] * 5 + [16] * 2
    assert [by_steps.next(place).length for place in places] == [4] * 5 + [8] * 5 + [16] * 2


def test_numbers_of_numpy_are_as_those_of_python(tmp_path):
    two, eight = np.int64(2), np.int32(8)
    schedules = {
        "adaptive": study.adaptive(np.float64(0.5), lengths=np.array([2, 4]), every=eight, probe=eight),
        "growing": study.growing(two, eight, epochs=np.float64(0.5)),
        "drawn": study.drawn(tb.schedules.fixed(4), seed=two),
        "own": study.Lengths(lambda place: study.Span(two, eight, np.ones(2)), (8,), {}),
    }
    for name, window in schedules.items():
        assert fit(task(), window=window, updates=5, workdir=tmp_path / name).updates == 5
        json.dumps(window.settings)
    assert schedules["adaptive"].settings == study.adaptive(0.5, lengths=(2, 4), every=8, probe=8).settings
    some = study.adaptive_replay(np.float64(0.5), depths=np.arange(3), every=eight, probe=eight)
    assert json.dumps(some.settings) == json.dumps(study.adaptive_replay(depths=(0, 1, 2), every=8, probe=8).settings)


def test_what_is_left_of_a_run_by_steps_is_told_in_epochs_and_doing_it_works(tmp_path):
    ask = {"window": study.growing(2, 4, epochs=1), "workdir": tmp_path, "checkpoint_every": 4}

    def kill(event):
        if event.updates >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(task(), **ask, epochs=1, listeners=[kill])
    with pytest.raises(ValueError, match=r"a run of 1 epochs .* 8 updates are made, and 2 with .*: ask for 1 epochs"):
        fit(task(), **ask, epochs=2)
    assert fit(task(), **ask, epochs=1).epochs >= 1
    with pytest.raises(ValueError, match=r"of 1 epochs .*, and 0\.5 with .* give more epochs than 1"):
        fit(task(), **ask, epochs=0.5)


def test_windows_that_grow_are_at_their_longest_after_as_many_epochs_as_a_run_counts():
    run = fit(task(), window=study.growing(3, 12, epochs=2), epochs=4, windows_per_call=1, learning_rate=0.0)
    first = next(i for i, call in enumerate(run.calls) if call.window == 12)
    assert run.calls[first - 2].steps < 2 * ONCE <= run.calls[first - 1].steps
