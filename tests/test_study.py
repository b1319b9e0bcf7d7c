"""A task of one's own: trained, killed, gone on with, swept, loaded, and used."""

import json
import shutil
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import launches
import numpy as np
import optax
import pytest

import tbptt_jax as tb
from tbptt_jax import study
from tbptt_jax.study.process import lock

FILE = """
import flax.linen as nn, numpy as np
import tbptt_jax as tb
from tbptt_jax import study

def loss(outputs, window):
    return ((outputs - window.targets) ** 2)[..., 0]

def task(hidden=4):
    def echo(seed, n, steps, delay=3):
        x = np.random.default_rng(seed).normal(size=(n, steps, 1)).astype(np.float32)
        return tb.sequences(x, np.roll(x, delay, 1))
    model = tb.from_linen(nn.GRUCell(hidden), readout=nn.Dense(1))
    return study.Task(model, loss, train=echo(0, 4, 60), valid=echo(1, 3, 30), test=echo(2, 3, 30), lanes=4,
                      figures=(study.Figure("error", loss),))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "echo.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def task(file):
    return study.task(f"{file}:task")


def equal(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def launch(name, file, workdir, *flags):
    return launches.begin(name, f"--task={file}:task", f"--workdir={workdir}", *flags)


def ended(workdir):
    """The bits that a run ended with, and its calls but for their seconds."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdecimal() else -1)
    saved = json.loads((newest / "run" / "metadata").read_text())["content"]
    calls = [[*call[:3], *call[4:]] for call in saved["data"]["calls"]]
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return newest.name, saved["leaves"], calls, [{**m, "seconds": 0} for m in metrics]


def test_killed_three_times_it_ends_with_the_bits_of_a_run_never_killed(file, tmp_path):
    """Last, best and averaged parameters, the update at which it stopped early, and what was reported, once."""
    small = ["--window=5", "--updates=900", "--windows_per_call=10", "--checkpoint_every=20", "--learning_rate=0.03"]
    flags = [*small, "--average=asgd:2", "--patience=12", "--log=jsonl,tensorboard"]
    whole = launch("fit", file, tmp_path / "whole", *flags)
    assert whole.wait() == 0, whole.communicate()
    last = int(ended(tmp_path / "whole")[0])
    for kill in range(1, 4):
        run = launch("fit", file, tmp_path / "killed", *flags)
        saved = tmp_path / "killed" / "checkpoints"
        while run.poll() is None and not any(
            int(p.name) >= last * kill // 5 for p in (saved.iterdir() if saved.exists() else ()) if p.name.isdecimal()
        ):
            time.sleep(0.005)
        run.kill()
        run.communicate()
    run = launch("fit", file, tmp_path / "killed", *flags)
    assert run.wait() == 0, run.communicate()
    assert ended(tmp_path / "killed") == ended(tmp_path / "whole")
    updates = [m["updates"] for m in ended(tmp_path / "killed")[3]]
    assert updates == sorted(set(updates)) and updates[-1] == last
    assert len(list((tmp_path / "killed" / "tensorboard").iterdir())) == 1
    results = [json.loads((tmp_path / name / "results.json").read_text())["scores"] for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_it_is_swept_over_windows_and_seeds_and_reported(file, tmp_path):
    run = launch("truncation_sweep", file, tmp_path, "--windows=2,5,10,30", "--seeds=3", "--updates=20")
    assert run.wait() == 0, run.communicate()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["window"] for row in rows} == {2, 5, 10, 30} and all(len(row["metrics"]) == 3 for row in rows)
    assert "error" in (tmp_path / "report.html").read_text()


def test_a_run_is_loaded_predicts_streams_and_is_exported(file, task, tmp_path):
    run = study.fit(task, window=5, updates=40, workdir=tmp_path / "run", checkpoint_every=10, windows_per_call=10)
    loaded = study.load(tmp_path / "run")
    equal(loaded.params, run.params)
    assert study.evaluate(loaded.task, loaded.params) == study.evaluate(task, run.params)
    _, whole = loaded.model.unroll(
        loaded.params,
        loaded.model.initial_carry(loaded.params, 3),
        jnp.asarray(task.test.inputs),
        task.test.resets,
        None,
    )
    _, outputs = tb.predict(loaded.model, loaded.params, tb.split(task.test, 7))
    np.testing.assert_allclose(tb.join(outputs, like=task.test), whole, rtol=1e-6, atol=1e-6)
    step, carry = tb.streaming(loaded.model, loaded.params), loaded.model.initial_carry(loaded.params, 3)
    tb.export(loaded.model, loaded.params, task.test.inputs[:, 0], path=tmp_path / "served")
    served = tb.load_exported(tmp_path / "served")
    beside = served.initial_carry(3)
    for t in range(4):
        carry, y = step(carry, task.test.inputs[:, t])
        beside, z = served.step(beside, task.test.inputs[:, t])
        np.testing.assert_allclose(y, whole[:, t], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(z, whole[:, t], rtol=1e-6, atol=1e-6)


def test_more_updates_go_on_bit_for_bit_where_the_optimiser_is_its_own(task, tmp_path):
    fit = {"window": 5, "optimiser": optax.adam(1e-2), "windows_per_call": 10}
    half = study.fit(task, updates=20, workdir=tmp_path / "run", **fit)
    both = study.fit(task, updates=40, workdir=tmp_path / "run", **fit)
    once = study.fit(task, updates=40, **fit)
    equal(both.state.params, once.state.params)
    assert half.updates == 20 and [c.loss for c in both.calls] == [c.loss for c in once.calls]


def test_a_run_that_stopped_early_stays_so_and_goes_on_with_more_updates(task, tmp_path, capsys):
    fit = {
        "window": 5,
        "learning_rate": 0.0,
        "windows_per_call": 2,
        "checkpoint_every": 2,
        "patience": 2,
        "quiet": True,
    }
    early = study.fit(task, updates=20, workdir=tmp_path, **fit)
    same = study.fit(task, updates=20, workdir=tmp_path, **fit)
    assert early.updates == same.updates == 6
    more = study.fit(task, updates=30, workdir=tmp_path, **fit)
    assert more.updates == 10 and study.fit(task, updates=30, workdir=tmp_path, **fit | {"patience": 9}).updates == 24
    assert not capsys.readouterr().out


def test_a_finished_run_goes_on_at_another_rate_and_is_begun_from(task, tmp_path):
    run = study.fit(task, window=5, updates=20, workdir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a run of 20 updates with the learning rate 0\.01"):
        study.fit(task, window=5, updates=20, learning_rate=0.001, workdir=tmp_path / "run")
    more = study.fit(task, window=5, updates=30, learning_rate=0.001, workdir=tmp_path / "run")
    assert more.updates == 30 and json.loads((tmp_path / "run" / "run.json").read_text())["legs"] == [
        [0, 20, 0.01],
        [20, 30, 0.001],
    ]
    other = study.fit(task, window=5, updates=1, learning_rate=0.0, start=more)
    equal(other.state.params, more.params)
    wider = task._replace(model=tb.from_linen(nn.GRUCell(5), readout=nn.Dense(1)))
    with pytest.raises(ValueError, match="has other parameters"):
        study.fit(wider, window=5, updates=1, start=run)


def test_an_influence_is_given_by_name_and_is_of_the_run(task, tmp_path):
    fit = {"window": 5, "updates": 24, "optimiser": optax.sgd(0.1)}
    named = study.fit(task, influence="replay:all", workdir=tmp_path, **fit)
    equal(named.state.params, study.fit(task, influence=tb.replay(named.windows), **fit).state.params)
    with pytest.raises(ValueError, match="influence 'replay:all', here 'replay:1'"):
        study.fit(task, influence="replay:1", workdir=tmp_path, **fit)


def test_a_run_whose_parameters_are_one_array_is_begun_from():
    model = tb.from_step(lambda a, h, x: (a * h + x, h), lambda key, x: jnp.ones(1), lambda a, n: jnp.zeros((n, 1)))
    x = np.ones((2, 10, 1), np.float32)
    task = study.Task(model, lambda y, w: ((y - w.targets) ** 2)[..., 0], tb.sequences(x, x), lanes=2)
    run = study.fit(task, window=5, updates=2)
    equal(study.fit(task, window=5, updates=1, learning_rate=0.0, start=run).state.params, run.params)


def test_the_best_parameters_are_those_of_the_best_look(task):
    fit = {"window": 5, "optimiser": optax.sgd(0.3), "windows_per_call": 10, "checkpoint_every": 10}
    run = study.fit(task, updates=60, **fit)
    looks = [call.valid["error"] for call in run.calls]
    again = study.fit(task, updates=run.calls[int(np.argmin(looks))].updates, **fit)
    equal(run.params, again.state.params)
    assert study.evaluate(task, run.params, task.valid)["error"] == pytest.approx(min(looks), rel=1e-6)


def test_the_moving_average_is_the_one_by_hand(task):
    fit = {"window": 5, "optimiser": optax.adam(1e-2), "windows_per_call": 1}
    task = task._replace(valid=None)
    mean = study.fit(task, updates=1, start=None, **fit).state
    mean = mean.params
    first = None
    for updates in range(1, 5):
        params = study.fit(task, updates=updates, **fit).state.params
        decay = min(0.5, updates / (9 + updates))
        first = (
            study.fit(task, updates=1, **{**fit, "optimiser": optax.sgd(0.0)}).state.params if first is None else first
        )
        mean = jax.tree.map(lambda m, p, d=decay: d * m + (1 - d) * p, first if updates == 1 else mean, params)
    run = study.fit(task, updates=4, average=study.ema(0.5), **fit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), run.params, mean)


def test_a_mapped_corpus_trains_to_the_bits_of_one_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(101, 1)).astype(np.float32))
    x = tb.streams.open_npy(tmp_path / "x.npy")
    model = tb.from_linen(nn.GRUCell(3), readout=nn.Dense(1))

    def loss(outputs, window):
        return ((outputs - window.targets) ** 2)[..., 0]

    def run(train):
        return study.fit(study.Task(model, loss, train, lanes=4), window=5, updates=13, windows_per_call=4).state.params

    read = []

    def lazily():
        read.append(1)
        return x[:-1], x[1:]

    equal(run((x[:-1], x[1:])), run(tb.lanes(np.asarray(x[:-1]), np.asarray(x[1:]), lanes=4)))
    equal(run((x[:-1], x[1:])), run(lazily))
    assert len(read) == 1


def test_a_sweeps_training_is_the_fit_of_its_seed(tmp_path):
    task = study.task("first_bit", hidden=3, lanes=50)
    study.sweep(
        task, [10], carry=["stateful"], seeds=2, updates=30, budget="updates", learning_rates=[0.02], workdir=tmp_path
    )
    run = study.fit(task, window=10, updates=30, learning_rate=0.02)
    with np.load(tmp_path / "points" / "updates-stateful-truncate-10.npz") as leaves:
        for i, leaf in enumerate(jax.tree.leaves(run.state.params)):
            np.testing.assert_allclose(leaves[f"arr_{i}"][0], leaf, rtol=1e-3, atol=1e-4)


WRONG = {
    "updates": ({"updates": 1, "epochs": 1}, "give one of them"),
    "neither": ({}, "give one of them"),
    "patience": ({"updates": 1, "patience": 1}, "the task has none"),
    "asgd": ({"updates": 1, "average": study.asgd()}, "the task has none"),
    "burn_in": ({"updates": 1, "burn_in": 2}, "stateless=True"),
    "window": ({"updates": 1, "window": 100}, "longer than the stream"),
    "not_finite": ({"updates": 1, "not_finite": "ignore"}, "'stop' or 'skip'"),
}


@pytest.mark.parametrize("given, sentence", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_in_a_sentence(task, tmp_path, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        study.fit(task._replace(valid=None), **{"window": 5, "workdir": tmp_path / "run", **given})
    assert not (tmp_path / "run").exists()


def test_references_that_are_none_are_refused(file, tmp_path):
    for reference, sentence in (
        ("nothing", "There is no task 'nothing': give one of first_bit"),
        (f"{file}:other", "has no function 'other'"),
        (f"{tmp_path}/none.py:task", "there is no file"),
        ("nowhere.to_be_found:task", "there is no module"),
    ):
        with pytest.raises(ValueError, match=sentence):
            study.task(reference)
    with pytest.raises(ValueError, match="has no argument units: its arguments are hidden"):
        study.task(f"{file}:task", units=3)
    with pytest.raises(ValueError, match="holds no run"):
        study.load(tmp_path)


def records(log, block=2**15):
    """Of a file of LevelDB's log format, which W&B's is, after a header of 7 bytes."""
    place, part = 7, b""
    while place + 7 <= len(log):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        part += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def test_weights_and_biases_has_each_step_once_also_over_a_resume(task, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def stop(event):
        if event.updates == 30:
            raise KeyboardInterrupt

    def fit(*more):
        listener = study.wandb(tmp_path / "run", "mine", project="p", mode="offline")
        study.fit(
            task,
            window=5,
            updates=50,
            windows_per_call=10,
            checkpoint_every=20,
            workdir=tmp_path / "run",
            listeners=[listener, *more],
        )

    with pytest.raises(KeyboardInterrupt):
        fit(stop)
    import wandb

    wandb.finish()
    fit()
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in records(next(run.glob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            steps += [int(item.value_json) for item in record.history.item if "_step" in (item.key, *item.nested_key)]
    assert steps == [10, 20, 30, 40, 50]


def test_a_workdir_that_another_process_holds_is_refused(task, tmp_path):
    (tmp_path / ".lock").write_text("elsewhere 1\n")
    with pytest.raises(ValueError, match="another launch is at work there, process 1 on elsewhere"):
        study.fit(task, window=5, updates=1, workdir=tmp_path)
    (tmp_path / ".lock").unlink()
    study.fit(task, window=5, updates=1, workdir=tmp_path)
    assert not lock._held
    shutil.rmtree(tmp_path)
