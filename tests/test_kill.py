"""A run that is killed, again and again, ends as if it had not been.

`TBPTT_KILLS=20 pytest tests/test_kill.py` kills it 20 times; otherwise it is 4.
"""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import launches
import numpy as np
import optax
import pytest
from launches import ROOT
from streams import first, loss, lstm, stream

import tbptt_jax as tb
from tbptt_jax.study import feed, guard, loop

KILLS = int(os.environ.get("TBPTT_KILLS", "4"))
UPDATES = 730  # of which 50 are a call; the last call is shorter


def start(directory, workdir, *flags):
    small = ["--window=7", "--lanes=3", "--hidden=8", f"--updates={UPDATES}", "--checkpoint_every=50"]
    text = directory / "text.txt"
    text.write_text("the cat sat on the mat, and the dog ran. " * 40)
    return launches.begin("char_lm", f"--workdir={directory / workdir}", *small, f"--text={text}", *flags)


def checkpoints(workdir):
    if not (workdir / "checkpoints").exists():
        return []
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def wait_for(workdir, update, run):
    """Until the run has saved ``update`` or a later one, or has ended."""
    while run.poll() is None and max(checkpoints(workdir), default=0) < update:
        time.sleep(0.002)


def finish(directory, workdir, *flags):
    out, err = (run := start(directory, workdir, *flags)).communicate()
    assert run.returncode == 0, err
    return out


def ended(workdir):
    """The bits of the final state by their checksums, all that was told, and the results but for times and places."""
    saved = json.loads((workdir / "checkpoints" / str(UPDATES) / "run" / "metadata").read_text())["content"]
    results = json.loads((workdir / "results.json").read_text())
    for changes in ("seconds", "characters_per_second"):
        del results[changes]
    del results["flags"]["workdir"], results["flags"]["resume"]
    return saved["leaves"], [call[:2] for call in saved["data"]["calls"]], results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with the run ``whole``, not interrupted, and the seconds that one takes when nothing is to be compiled."""
    directory = tmp_path_factory.mktemp("runs")
    finish(directory, "whole")
    began = time.monotonic()
    finish(directory, "whole", "--noresume")
    return directory, time.monotonic() - began


def test_killed_at_any_moment_it_ends_with_the_same_bits(whole):
    directory, seconds = whole
    rng, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        run = start(directory, f"killed{runs}")
        try:
            run.wait(rng.uniform(0.2, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            kills += 1
        _, err = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), err
        if run.returncode == 0:
            assert ended(directory / f"killed{runs}") == ended(directory / "whole")
            runs += 1
    finish(directory, f"killed{runs}")
    assert ended(directory / f"killed{runs}") == ended(directory / "whole")


def test_killed_with_its_lanes_over_two_devices_it_ends_with_the_same_bits(whole):
    directory, _ = whole
    wide = "--hidden=64", "--lanes=16", "--devices=2"  # from which on it takes both
    finish(directory, "two", *wide)
    run = start(directory, "two_killed", *wide)
    wait_for(directory / "two_killed", 300, run)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert "Going on from update" in finish(directory, "two_killed", *wide)
    assert ended(directory / "two_killed") == ended(directory / "two")


def test_killed_while_it_writes_a_checkpoint_the_one_before_it_is_used(whole):
    directory, _ = whole
    run = start(directory, "torn")
    wait_for(directory / "torn", 200, run)
    while True:  # stand still, and see whether a half of a checkpoint is there
        os.kill(run.pid, signal.SIGSTOP)
        half = list((directory / "torn" / "checkpoints").glob("*tmp*"))
        if half:
            break
        os.kill(run.pid, signal.SIGCONT)
        time.sleep(0.001)
        assert run.poll() is None
    run.kill()
    run.communicate()
    good = max(checkpoints(directory / "torn"))
    assert good < int(re.match(r"\d+", half[0].name)[0])
    assert f"Going on from update {good} of {UPDATES}" in finish(directory, "torn")
    assert ended(directory / "torn") == ended(directory / "whole")
    assert not list((directory / "torn" / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_the_call_it_is_in_and_says_so(whole, sent):
    directory, _ = whole
    workdir = directory / sent.name
    run = start(directory, sent.name, "--checkpoint_every=100")
    wait_for(workdir, 100, run)
    run.send_signal(sent)
    out, err = run.communicate()
    assert run.returncode == 128 + sent and f"{sent.name}: stopping after this call" in err and "Traceback" not in err
    (stopped,) = re.findall(r"Stopped at update (\d+) of", out)
    assert max(checkpoints(workdir)) == int(stopped) < UPDATES and not (workdir / "results.json").exists()
    assert f"Going on from update {stopped} of" in finish(directory, sent.name, "--checkpoint_every=50")
    assert ended(workdir) == ended(directory / "whole")


def test_a_second_signal_ends_it_at_once():
    program = (
        "import os, signal, time, hashlib\n"
        "from tbptt_jax.study.process.signals import stop_asked\n"
        "with stop_asked() as asked:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while not asked(): time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"  # minutes in C, where no Python handler runs
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode == 128 + signal.SIGTERM and "SIGTERM: stopping after this call" in ran.stderr


def trainer(directory, windows, step, updates, **options):
    """``(**more options) -> (state, calls)`` trains as a fit does, on windows in memory."""
    train = functools.partial(
        loop.train,
        step,
        lambda: step.init(jax.random.key(0), first(windows)),
        locate=lambda state, window: guard.first_not_finite(lstm(), loss, state, window),
        directory=directory,
        settings={},
        **{"every": 8, "skip": False, **options},
    )

    def state_and_calls(**more):
        numbered = feed.of_windows(
            lambda first, last: jax.tree.map(lambda x: x[first:last], windows), updates, {**options, **more}["per_call"]
        )
        kept, calls, _ = train(feed=numbered, **more)
        return kept.state, calls

    return state_and_calls


def saved(directory):
    return max((int(p.name) for p in directory.iterdir() if p.name.isdecimal()), default=0)


@pytest.mark.parametrize("per_call, every", [(8, 8), (6, 6)], ids=["midst", "last"])
def test_a_loss_that_is_not_finite_stops_it_names_the_place_and_saves_what_was_before(tmp_path, per_call, every):
    windows = tb.split(stream(), 3)
    step = tb.train_step(tb.gradient(lstm(), loss), optax.adam(1e-2))
    before, _ = trainer(tmp_path / "before", windows, step, 5)(per_call=5)
    windows.targets[5, 0, 1:] = 1e200  # its square is inf
    train = trainer(tmp_path / "run", windows, step, 8, per_call=per_call, every=every)
    told = r"The loss of window 5 is inf, first in lane 0 at step 1: lower the learning rate.*saved, as update 5 in"
    for _ in range(2):  # the same command stops there again
        with pytest.raises(ValueError, match=told):
            train()
        assert saved(tmp_path / "run") == 5
    with tb.checkpoint.open(tmp_path / "run", {"updates in a call": per_call}) as store:
        there = store.restore(loop.Kept(jax.eval_shape(lambda: before), ())).state.state
    for left, right in zip(jax.tree.leaves(there[:2]), jax.tree.leaves(before[:2]), strict=True):
        np.testing.assert_array_equal(left, right)
    state, calls = train(skip=True)  # and may be told to go on from there
    assert [call.updates for call in calls] == sorted({5, 8, *range(per_call, 8, per_call)})
    whole, (call,) = trainer(tmp_path / "whole", windows, step, 8, skip=True)(per_call=8)
    assert sum(call.skipped for call in calls) == call.skipped == 1 and state.updates == whole.updates == 7
    assert sum(call.weight for call in calls) == call.weight < windows.weights[:8][windows.valid[:8]].sum()
    np.testing.assert_allclose(sum(call.loss * call.weight for call in calls), call.loss * call.weight, rtol=1e-12)
    for left, right in zip(jax.tree.leaves(state[:2]), jax.tree.leaves(whole[:2]), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12)


UPDATE = r"The loss of window 5 is [\d.]+, and its gradient, or the update made of it, is not finite: lower"


@pytest.mark.parametrize(
    "updates, part, told",
    [
        (6, "params", UPDATE),  # the last
        (8, "params", UPDATE),
        (8, "carry", "The carry at the end of window 5 is not finite: lower"),
        (8, "influence", "What the influence knows after window 5 is not finite: lower"),
    ],
)
def test_what_is_not_finite_besides_the_loss_stops_it_at_its_own_window(tmp_path, part, told, updates):
    step, windows = (
        tb.train_step(tb.gradient(lstm(), loss, influence=tb.rtrl() if part == "influence" else None), optax.sgd(1e-2)),
        tb.split(stream(), 3),
    )

    def update(state, window):
        new, metrics = step.update(state, window)
        whole = new if part == "params" else new.stream
        spoilt = jax.tree.map(lambda x: jax.numpy.where(state.updates == 5, np.inf, x), getattr(whole, part))
        whole = whole._replace(**{part: spoilt})
        return whole if part == "params" else new._replace(stream=whole), metrics

    train = trainer(tmp_path, windows, step._replace(update=update), updates, per_call=updates)
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            train()
        assert saved(tmp_path) == 5
    state, (_, call) = train(skip=True)
    assert call.skipped == updates - state.updates == updates - 5  # it is spoilt at each that would be the sixth


def test_a_run_that_is_not_finite_from_its_first_window_saves_nothing(tmp_path):
    windows, step = tb.split(stream(), 3), tb.train_step(tb.gradient(lstm(), loss), optax.sgd(np.inf))
    with pytest.raises(ValueError, match=r"window 0 .*lower the learning rate"):
        trainer(tmp_path, windows, step, 8)(per_call=4)
    assert not saved(tmp_path)


def test_or_its_window_is_left_out_and_counted(tmp_path):
    windows = tb.split(stream(), 3)
    step = tb.train_step(tb.gradient(lstm(), loss), optax.adam(1e-2))

    def run(directory, windows, updates):
        return trainer(tmp_path / directory, windows, step, updates, per_call=4, skip=True)()

    without, its_calls = run("without", jax.tree.map(lambda x: np.delete(x, 5, 0), windows), 7)
    assert [call.skipped for call in its_calls] == [0, 0] and all(0 < call.norm < 10 for call in its_calls)
    last_reset = [np.flatnonzero(lane)[-1] for lane in np.concatenate(windows.resets[:4], 1)]
    assert its_calls[0].since_reset == 12 - min(last_reset)
    windows.targets[5, 0, 1:] = 1e200  # its square is inf
    state, calls = run("with", windows, 8)
    assert [call.skipped for call in calls] == [0, 1] and state.updates == 7
    np.testing.assert_allclose([call[:2] for call in calls], [call[:2] for call in its_calls], rtol=1e-12)
    for left, right in zip(jax.tree.leaves(state[:2]), jax.tree.leaves(without[:2]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_carrys_health_is_its_largest_norm_and_what_is_saturated():
    carry = {"h": np.array([[0.0, 3.0], [4.0, 0.1]]), "steps": np.array([1000, 2000])}
    norm, saturated = tb.carry_health(carry)
    assert np.isclose(norm, np.hypot(4, 0.1)) and saturated == 0.5
    assert tb.carry_health({"steps": np.array([1])}) == (0, 0)


def test_a_finished_run_is_not_trained_again_and_another_is_refused(whole):
    directory, _ = whole
    before = ended(directory / "whole")
    (directory / "whole" / "results.json").unlink()
    assert f"Going on from update {UPDATES} of {UPDATES}" in finish(directory, "whole")
    assert ended(directory / "whole") == before
    assert {p.name for p in (directory / "whole").iterdir()} == {
        "checkpoints",
        "figure.png",
        "flags.txt",
        "results.json",
        "run.json",
    }
    run = start(directory, "whole", "--seed=1")
    _, err = run.communicate()
    assert run.returncode == 2 and "there seed 0, here 1" in err and "Another workdir is free" in err
    assert ended(directory / "whole") == before
