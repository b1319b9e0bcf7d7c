"""What all launches share: one workdir each, sizes that fit, streams that may be closed, signals, and words that stay words."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver
from programs import program_of

from experiments import launch, lock

ROOT = pathlib.Path(__file__).parents[1]
SWEEP = "truncation_sweep", "--windows=1,20", "--seeds=1", "--updates=20", "--budget=updates", "--carry=stateful"
CHARACTERS = "char_lm", "--hidden=8", "--lanes=4", "--window=8", "--updates=20"


def start(program, *arguments, **options):
    command = [sys.executable, "-m", f"experiments.{program}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    )


def holder(directory):
    """Another process that has the directory, until it is killed."""
    program = "import pathlib, sys, time; from experiments import lock; lock.take(pathlib.Path(sys.argv[1])); print('has it', flush=True); time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", program, str(directory)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert run.stdout.readline() == "has it\n"
    return run


def test_a_workdir_is_one_launch_s_own_and_that_of_one_that_died_is_free(tmp_path):
    other = holder(tmp_path)
    try:
        with pytest.raises(
            ValueError,
            match=rf"--workdir=.*: another launch is at work there, process {other.pid} on .*another --workdir",
        ):
            launch.workdir(str(tmp_path))
        ran = start(*SWEEP, f"--workdir={tmp_path}")
        _, told = ran.communicate()
        assert ran.returncode == 2 and f"process {other.pid} on" in told and not (tmp_path / "results.json").exists()
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / ".lock").exists()  # stale: the lock itself went with its owner
    again = holder(tmp_path)
    again.kill()
    again.wait()


TOO_LARGE = [
    ("char_lm", ["--hidden=1000000"], "--hidden"),
    ("char_lm", ["--windows_per_call=100000000", "--updates=100000000"], "--windows_per_call"),
    ("forecast", ["--influence=replay:1000000000"], "replay"),
    ("copy_memory", ["--lag=1000000000"], "--lag"),
    ("lag", ["--seeds=1000000000"], "--seeds"),
    ("lag", ["--steps=1000000000000"], "--steps=1000000000000"),
    ("first_bit", ["--hidden=1000000"], "--hidden"),
    ("influence_balancing", ["--steps=2000000000"], "--steps"),
    ("gradient_bias", ["--draws=1" + "0" * 30], "--draws=100.*: give a number of at most"),
    ("truncation_sweep", ["--seeds=1000000000"], "--seeds"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "named"), TOO_LARGE, ids=lambda x: x if isinstance(x, str) else x[0][:30]
)
def test_what_does_not_fit_is_a_sentence_before_anything_is_allocated(name, arguments, named, tmp_path, monkeypatch):
    made = program_of(name)
    program = next(made)
    try:
        monkeypatch.setattr(sys, "argv", [program.__file__])
        for flag in flags.FLAGS.flags_by_module_dict()[program.__name__]:
            flags.FLAGS.register_key_flag_for_module(program.__file__, flag)
        with flagsaver.flagsaver(), pytest.raises((ValueError, flags.Error), match=named) as refused:
            flags.FLAGS([name, f"--workdir={tmp_path / 'run'}", *arguments])
            launch.check_flags()
            program.main()
        assert str(refused.value).count("\n") == 0 and len(str(refused.value)) < 500
    finally:
        lock.release()
        next(made, None)
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("closing", "told"), [("2>&-", True), (">&-", False), (">&- 2>&- <&-", False), ("| head -1", True)], ids=str
)
def test_a_launch_whose_streams_are_closed_ends_as_it_would(tmp_path, closing, told):
    command = f"{sys.executable} -m experiments.{' '.join(CHARACTERS)} --workdir={tmp_path}/run {closing}"
    ran = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and bool(ran.stdout) == told and "Traceback" not in ran.stderr, ran.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["updates"] == 20
    refused = subprocess.run(
        ["bash", "-c", f"{command.replace('| head -1', '')} --window=0"], cwd=ROOT, capture_output=True
    )
    assert refused.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_what_cannot_be_told_is_said_and_the_files_are_whole(tmp_path):
    with open("/dev/full", "w") as full:
        ran = start(*CHARACTERS, f"--workdir={tmp_path}/run", stdout=full)
        _, told = ran.communicate()
    assert ran.returncode == 0 and "Standard output cannot be written to (No space left on device)" in told
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "", "a\nb", "/proc/x", "\udcff", "x" * 4000, __file__])
def test_a_workdir_that_will_not_do_is_a_short_sentence(path):
    with pytest.raises(ValueError, match=r"^--workdir[ =].*\.$") as refused:
        launch.workdir(path)
    assert len(str(refused.value)) < 250
    str(refused.value).encode()


def test_a_user_s_words_are_shown_as_they_are(capsys):
    launch.say("[/x] [red]a[/red] \x1b[31m \u202e \r é")
    assert capsys.readouterr().out == "[/x] [red]a[/red] \\x1b[31m \\u202e \\r é\n"
    assert [launch.cell(x) for x in ("=cmd()", "@x", "-1", "y", "")] == ["'=cmd()", "'@x", "'-1", "y", ""]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_asked_to_stop_keeps_what_is_done_and_goes_on(tmp_path, sent):
    arguments = (
        "truncation_sweep",
        "--windows=1,2,4,5,10,20",
        "--seeds=2",
        "--updates=3000",
        "--budget=updates",
        f"--workdir={tmp_path}",
    )
    run = start(*arguments)
    while not list((tmp_path / "points").glob("*.json")):
        time.sleep(0.01)
        assert run.poll() is None
    run.send_signal(sent)
    _, told = run.communicate()
    done = len(list((tmp_path / "points").glob("*.json")))
    assert (
        run.returncode == 128 + sent and f"{sent.name}: stopping after this point" in told and "Traceback" not in told
    )
    assert 0 < done < 12 and not (tmp_path / "results.json").exists()
    again = start(*arguments)
    out, _ = again.communicate()
    assert again.returncode == 0 and f"12 points of 2 trainings; {done} are done" in out


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_launch_that_keeps_nothing_ends_at_once_in_a_sentence(tmp_path, sent):
    run = start("lag", f"--workdir={tmp_path}", "--steps=2000000")
    while not tmp_path.joinpath(".lock").exists():
        time.sleep(0.01)
        assert run.poll() is None
    run.send_signal(sent)
    _, told = run.communicate(timeout=30)
    assert run.returncode == 128 + sent and re.search(
        rf"^lag: stopped by {sent.name}; the same command does what is missing\.$", told, re.M
    )
    assert not list(tmp_path.iterdir())
