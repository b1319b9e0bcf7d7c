"""The sweep over window lengths: fair budgets, the same numbers however often it is killed, and shares that join."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import launches
import numpy as np
import pytest
from launches import ENVIRONMENT, ROOT
from programs import program_of, refused

import tbptt_jax as tb
from tbptt_jax import horizon, study
from tbptt_jax.study.findings import recommend
from tbptt_jax.study.lengths import Look
from tbptt_jax.study.points import mark
from tbptt_jax.study.task import NAMES
from tbptt_jax.study.trainings import Training, compiled, cut, train

SMALL = (
    "--windows=10,20",
    "--influences=truncate,replay:1",
    "--learning_rates=0.02,0.005",
    "--seeds=3",
    "--updates=30",
    "--hidden=4",
)
POINTS = 2 * 3 * 2  # windows, of stateful truncate and replay:1 and of stateless, in two budgets


def start(workdir, *arguments):
    return launches.begin("truncation_sweep", f"--workdir={workdir}", *arguments)


def sweep(workdir, *arguments):
    return launches.run("truncation_sweep", f"--workdir={workdir}", *arguments)


def numbers(workdir):
    """What does not depend on how fast, how often and where it was run."""
    told = json.loads((workdir / "results.json").read_text())
    for row in told["rows"]:
        del row["seconds"], row["compile_seconds"]
    return {name: told[name] for name in ("rows", "bias", "decay", "suggested", "recommendation", "metric", "failed")}


@pytest.fixture(scope="module")
def program():
    yield from program_of("truncation_sweep")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    ran = sweep(workdir, *SMALL)
    assert ran.returncode == 0, ran.stderr
    return workdir


def test_it_writes_a_report_of_fair_rows(whole):
    rows = numbers(whole)["rows"]
    assert len(rows) == POINTS * 2  # rates
    assert {"report.html", "rows.csv", "results.json", "flags.txt", "sweep.json"} <= {p.name for p in whole.iterdir()}
    needed = "task carry influence window learning_rate seeds budget updates steps final_loss final_metric temp_bytes"
    for row in rows:
        assert set(needed.split()) <= row.keys() and len(row["metrics"]) == 3 and row["temp_bytes"] > 0
        assert row["influence"] == "truncate" or row["carry"] == "stateful"
        assert row["final_metric"] == pytest.approx(sum(row["metrics"]) / 3, rel=1e-5)
    by = {(row["budget"], row["window"]): row for row in rows}
    assert {by["data", k]["steps"] for k in (10, 20)} == {30 * 20 * 100}
    assert [by["data", k]["updates"] for k in (10, 20)] == [60, 30]
    assert {by["updates", k]["updates"] for k in (10, 20)} == {30}
    assert [by["updates", k]["steps"] for k in (10, 20)] == [30_000, 60_000]
    for row in rows:  # theory is told, and a stateless window cannot beat it
        if row["carry"] == "stateless":
            assert row["exact_metric"] == {10: 0.75, 20: 1}[row["window"]] >= row["final_metric"] - 1e-6
    losses = [bias["relative_bias"] for bias in numbers(whole)["bias"] if bias["window"] == 20]
    assert max(losses) < 1e-4  # one window over the sequence is full BPTT


def test_a_training_among_many_is_the_training_alone_also_of_two_processes(whole, tmp_path):
    """Its seed and rate, whatever else is trained beside it, wherever."""
    alone = (
        "--windows=10",
        "--carry=stateful",
        "--learning_rates=0.005",
        "--seeds=1",
        "--budget=data",
        "--updates=60",
        "--hidden=4",
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = [f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2", "--devices=1", "--tensorboard"]
    runs = [start(tmp_path, *alone, *together, f"--process={i}") for i in range(2)]
    told = [run.communicate() for run in runs]
    assert not any(run.returncode for run in runs), told
    assert len(list((tmp_path / "tensorboard").glob("*/events*"))) == 1
    (one,) = numbers(tmp_path)["rows"]
    (among,) = (
        row
        for row in numbers(whole)["rows"]
        if [row[f] for f in ("budget", "carry", "influence", "window", "learning_rate")]
        == ["data", "stateful", "truncate", 10, 0.005]
    )
    assert one["losses"][0] == pytest.approx(among["losses"][0], rel=1e-4)


def test_killed_at_any_moment_it_ends_with_the_same_numbers(whole, tmp_path):
    chance = random.Random(0)
    for _ in range(int(os.environ.get("TBPTT_KILLS", "2"))):
        running = start(tmp_path, *SMALL)
        # A moment of its own kind each time: while it compiles, or some points on.
        if chance.random() < 0.3:
            time.sleep(chance.uniform(1, 8))
        else:
            wanted = len(list((tmp_path / "points").glob("*.json"))) + chance.randint(1, 3)
            while running.poll() is None and len(list((tmp_path / "points").glob("*.json"))) < wanted:
                time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.communicate()
    ran = sweep(tmp_path, *SMALL)
    assert ran.returncode == 0, ran.stderr
    assert numbers(tmp_path) == numbers(whole)


def test_asked_to_stop_it_ends_with_its_point_kept(tmp_path):
    running = start(tmp_path, *SMALL, "--influences=truncate")
    while running.poll() is None and not list((tmp_path / "points").glob("*.json")):
        time.sleep(0.002)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate()
    assert running.returncode == 128 + signal.SIGTERM, err
    assert "SIGTERM: stopping after this point, kept. Again: at once." in err and "Traceback" not in err
    kept = len(list((tmp_path / "points").glob("*.json")))
    assert f"Stopped after {kept} of 8 points; the same command does the others." in out
    assert kept < 8 and {path.name for path in tmp_path.iterdir()} == {"points", "sweep.json"}


def test_a_second_sweep_in_its_workdir_is_refused_before_anything_is_compiled(program, tmp_path, monkeypatch):
    monkeypatch.setattr("tbptt_jax.study.engines.compiled", None)
    (tmp_path / ".lock").write_text("elsewhere 1\n")
    refused(program, monkeypatch, tmp_path, SMALL, "another launch is at work there, process 1 on elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_shares_done_apart_join_to_the_whole(whole, tmp_path):
    shares = [tmp_path / "a", tmp_path / "b"]
    assert sweep(shares[0], *SMALL, "--points=1/2").returncode == 0
    merge = "--merge=" + ",".join(map(str, shares))
    early = sweep(tmp_path / "both", *SMALL, merge)
    assert early.returncode == 2 and f"{POINTS // 2} of {POINTS} points" in early.stderr
    assert not (tmp_path / "both").exists()
    assert sweep(shares[1], *SMALL, "--points=2/2").returncode == 0
    assert sweep(tmp_path / "both", *SMALL, merge).returncode == 0
    assert numbers(tmp_path / "both") == numbers(whole)


def test_a_point_that_fails_is_told_and_the_others_go_on(program, tmp_path, monkeypatch):
    broken = (
        "import experiments.truncation_sweep as s\n"
        "from tbptt_jax.study import engines\n"
        "train = engines.train\n"
        "def fails(training, *rest):\n"
        "    if training.window == 5: raise RuntimeError('the machine <says> no')\n"
        "    return train(training, *rest)\n"
        "engines.train = fails\n"
        "s.launch.run(s.main)\n"
    )
    arguments = [
        "--task=influence_balancing",
        "--windows=5,20",
        "--carry=stateful",
        "--seeds=1",
        "--budget=data",
        "--updates=5",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", broken, f"--workdir={tmp_path}", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert ran.returncode == 1 and "the machine <says> no" in ran.stdout
    told = numbers(tmp_path)
    assert [row["window"] for row in told["rows"]] == [20]
    assert [(point["window"], point["error"]) for point in told["failed"]] == [
        (5, "RuntimeError: the machine <says> no")
    ]
    assert "&lt;says&gt;" in (tmp_path / "report.html").read_text()

    joined = tmp_path / "joined"  # what failed is no reason not to join what did not, and the result is this sweep's
    assert sweep(joined, *arguments, f"--merge={tmp_path}").returncode == 0
    assert numbers(joined) == told
    refused(program, monkeypatch, joined, [*arguments, "--updates=6"], "updates 5, here 6")


def test_an_influence_too_large_is_told_and_the_others_go_on(tmp_path):
    large = ["--task=first_bit", "--hidden=400", "--influences=truncate,rtrl", "--windows=20"]
    ran = sweep(tmp_path, *large, "--carry=stateful", "--seeds=1", "--budget=data", "--updates=1")
    assert ran.returncode == 1 and "rtrl would carry a matrix of 100 lanes" in ran.stdout, ran.stderr
    told = numbers(tmp_path)
    assert [row["influence"] for row in told["rows"]] == ["truncate"]
    assert [point["influence"] for point in told["failed"]] == ["rtrl"]


def test_what_diverged_is_never_the_best_and_curves_are_there_once(tmp_path):
    tiny = [
        "--task=influence_balancing",
        "--windows=1,10",
        "--carry=stateful",
        "--seeds=1",
        "--updates=3",
        "--budget=data",
    ]
    for _ in range(2):
        ran = sweep(tmp_path, *tiny, "--learning_rates=0.001,1e38", "--tensorboard")
        assert ran.returncode == 0, ran.stderr
    told = numbers(tmp_path)
    assert sorted(row["final_metric"] is None for row in told["rows"]) == [False, False, True, True]
    assert all(row["relative_bias"] is not None for row in told["bias"])
    assert {len(list(run.iterdir())) for run in (tmp_path / "tensorboard").iterdir()} == {1}


@pytest.mark.parametrize("name", NAMES)
def test_every_task_trains_and_is_evaluated(name):
    task = study.task(name, **({} if name == "influence_balancing" else {"hidden": 3, "lanes": 4}))
    training = Training(20, "stateful", "truncate", 3, (0.01,), 1)
    program = compiled(task, training, tb.sharding.mesh(run=1))()
    trained = train(training, program)
    assert np.isfinite(trained.losses).all() and np.isfinite(trained.scores).all() and trained.weights.sum() > 0
    assert 0 < program.temp_bytes < program.bytes


WRONG = {
    "a window that does not fit": (["--windows=5,30"], "from 1 to 20"),
    "no window": (["--windows=0"], "whole numbers"),
    "an influence": (["--influences=truncate,uroo"], "truncate, replay"),
    "a negative rate": (["--learning_rates=-0.1"], "positive numbers"),
    "a rate that is none": (["--learning_rates=fast"], "positive numbers"),
    "a rate with two points": (["--learning_rates=1.2.3"], "positive numbers"),
    "a depth": (["--influences=replay:x"], "replay:x, which is none"),
    "a flag of another task": (["--text=mine.txt"], "--task=first_bit has no use for it"),
    "a carry": (["--carry=statefull"], "stateful, stateless or both"),
    "a share": (["--points=3/2"], "from 1 to N"),
    "files that do not go together": (["--task=forecast", "--train=x.csv"], "give train, test and targets"),
    "a schedule alone": (["--windows=auto"], "--windows is empty: give at least one number"),
    "a schedule of a task with cuts of its own": (["--windows=5,auto"], "'first_bit' cuts its windows itself"),
    "a schedule that carries nothing": (["--task=lag", "--windows=5,auto", "--carry=stateless"], "--carry no stateful"),
    "a schedule and replay": (["--task=lag", "--windows=5,auto", "--influences=replay:1"], "add truncate"),
    "a schedule that is none": (["--task=lag", "--windows=5,growing:8:4:2"], "`last` to be the longer"),
    "a text that is not there": (["--task=char_lm", "--text=nowhere.txt"], "cannot be read"),
}


@pytest.mark.parametrize("arguments, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_before_anything_is_done(program, tmp_path, monkeypatch, arguments, said):
    refused(program, monkeypatch, tmp_path / "run", arguments, said)


def row(window, metrics, budget="data"):
    mean = sum(metrics) / len(metrics)
    point = {"budget": budget, "carry": "stateful", "influence": "truncate", "window": window, "temp_bytes": window}
    return {**point, "metrics": metrics, "final_metric": mean, "final_loss": 0.0, "seeds": len(metrics)}


def test_what_is_recommended_is_as_good_in_every_seed():
    metric = {"name": "test accuracy", "better": "higher"}
    some_learned = [row(2, [1, 1, 1, 0.5, 0.5]), row(10, [0.99, 1, 1, 1, 1]), row(20, [1] * 5)]
    assert recommend(some_learned, metric, 0.5)["window"] == 10
    assert recommend([row(k, [1] * 5) for k in (1, 5, 20)], metric, 0.5)["window"] == 1
    lower = [row(4, [0.40, 0.42]), row(8, [0.30, 0.31]), row(16, [0.30, 0.32])]
    assert recommend(lower, {"name": "loss", "better": "lower"}, 0.7)["window"] == 8


def test_what_is_recommended_names_the_swept_argument_that_does_it():
    wide, narrow = (
        [{**row(k, scores), "params": {"hidden": h}} for k in (2, 8)] for h, scores in ((8, [1, 1]), (4, [0.6, 0.6]))
    )
    found = recommend([*narrow, *wide], {"name": "test accuracy", "better": "higher"}, 0.5)
    assert (found["window"], found["params"]) == (2, {"hidden": 8}) and "windows of 2, hidden 8:" in found["sentence"]


def test_a_shorter_last_window_counts_and_theory_counts_it():
    task = study.task("first_bit", hidden=3, lanes=10)
    windows = cut(task, tb.tasks.first_bit(jax.random.key(0), 20), 15, 10)  # of 15 steps and of 5
    assert windows.weights.sum((1, 2)).tolist() == [10, 10, 10, 10]
    assert windows.weights[0, :, 14].all() and windows.weights[1, :, 4].all()
    assert task.exact(False, 15) == 0.75 and task.exact(True, 15) == 1


def test_the_workdir_of_another_sweep_is_refused(program, tmp_path, monkeypatch):
    mark(tmp_path, {"task": "first_bit", "seeds": 3})
    refused(program, monkeypatch, tmp_path, [*SMALL, "--seeds=4"], "seeds 3, here 4")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


NUMBERS = np.sin(np.arange(180.0)).reshape(3, 60, 1)  # two groups of two lanes, the last with one that is empty
STREAMS = tb.sequences(NUMBERS, NUMBERS.cumsum(1) / 10)
TINY = study.Task(
    model=tb.from_step(
        lambda a, h, x: (a * h + x, a * h + x),
        lambda key, x: 0.1 + 0.3 * jax.random.uniform(key, (1,), float),
        lambda a, n: jnp.zeros((n, 1)),
    ),
    loss=lambda y, window: ((y - window.targets) ** 2)[..., 0],
    train=STREAMS,
    test=STREAMS,
    lanes=2,
)
ASK = {"carry": ["stateful"], "learning_rates": (0.02, 0.1), "seeds": 2, "updates": 60, "budget": "data"}


def by_parameter(stop=()):
    """Windows that are chosen by the model's parameter alone; a look whose number is in ``stop`` ends the launch, once."""

    def choose(model, loss, params, probe, carry):
        seen.append(None)
        if len(seen) in stop:
            stop.remove(len(seen))
            raise KeyboardInterrupt
        return horizon.Suggestion((2, 8)[int(abs(float(params[0])) * 1e4) % 2], 3, 0.1, True, "by its parameter")

    seen = []
    return study.adaptive(lengths=(2, 8))._replace(look=Look(50, 9, choose))


def test_a_schedules_row_is_that_of_a_fit_for_each_seed_and_rate_bit_for_bit(tmp_path):
    told = study.sweep(TINY, [3, 10, by_parameter()], workdir=tmp_path, **ASK)
    rows = [row for row in told["rows"] if row["window"] == "auto"]
    longest = 12  # windows of 10 in a reading
    for rate, row in zip(ASK["learning_rates"], rows, strict=True):
        how = {"learning_rate": rate, "not_finite": "skip", "quiet": True, "epochs": 60 / longest}
        runs = [study.fit(TINY, window=by_parameter(), seed=seed, **how) for seed in range(2)]
        assert row["metrics"] == row["losses"] == [study.evaluate(TINY, run.params)["loss"] for run in runs]
        for run, looks, windows in zip(runs, row["looks"], row["windows"], strict=True):
            assert [(look["updates"], look["window"]) for look in looks] == [(c.updates, c.window) for c in run.choices]
            assert len(looks) > 2 and windows[0] == [0, run.choices[0].window]
            assert windows[-1][0] == round(run.calls[-1].steps * 1.5)  # of all lanes; the last goes on to its end
        assert row["updates"] == round(np.mean([run.updates for run in runs]))
        assert row["mean_window"] == np.mean([run.calls[-1].steps / run.updates for run in runs])
        with np.load(tmp_path / "points" / "data-stateful-truncate-auto.npz") as kept:
            (params,) = kept.values()
        np.testing.assert_array_equal(params[ASK["learning_rates"].index(rate)], runs[0].params)
    assert all(0 <= row["steps"] - 180 * 5 < 1.5 * 8 for row in told["rows"])  # of all, at equal data
    assert told["recommendation"]["window"] in (3, 10)  # what is recommended is a number


def test_killed_at_its_looks_a_sweep_with_a_schedule_ends_with_the_same_numbers(tmp_path):
    ask, stop, found = {**ASK, "learning_rates": (0.1,), "budget": "both"}, [7, 3, 2], []
    for name, kills in (("whole", []), ("killed", stop)):
        while kills:
            with pytest.raises(KeyboardInterrupt):
                study.sweep(TINY, [3, by_parameter(kills)], workdir=tmp_path / name, **ask)
        study.sweep(TINY, [3, by_parameter()], workdir=tmp_path / name, **ask)
        found.append(numbers(tmp_path / name))
        for row in found[-1]["rows"]:
            row.pop("look_seconds", None)
            for look in (look for each in row.get("looks", []) for look in each):
                del look["seconds"]
    assert found[0] == found[1] and not stop
    with pytest.raises(ValueError, match="there schedules"):
        study.sweep(TINY, [3], workdir=tmp_path / "killed", **ask)


def test_schedules_of_one_name_or_too_long_are_refused(tmp_path):
    two = [study.adaptive(0.5, lengths=(2, 4)), study.adaptive(0.1, lengths=(2, 4))]
    with pytest.raises(ValueError, match="is called 'auto'"):
        study.sweep(TINY, [3, *two], workdir=tmp_path, **ASK)
    with pytest.raises(ValueError, match="Windows of 64 steps are longer"):
        study.sweep(TINY, [3, two[0], study.adaptive()._replace(name="long")], workdir=tmp_path, **ASK)
    assert not list(tmp_path.iterdir())
