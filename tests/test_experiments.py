"""The launches, small: what they write, and that a mistake writes nothing."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from xml.etree import ElementTree

import jax.numpy as jnp
import launches
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from launches import ENVIRONMENT, ROOT
from programs import program_of, refused

import tbptt_jax as tb
from experiments import adaptive_copy_lengths
from experiments import launch as shared
from tbptt_jax.study.process import lock, machine

TINY = "influence_balancing", "--runs=truncate@10", "--steps=100", "--seeds=1"
LONG = "influence_balancing", "--runs=truncate@1", "--steps=500000000", "--seeds=1"


def command(name, workdir, *arguments):
    return [sys.executable, "-m", f"experiments.{name}", f"--workdir={workdir}", *arguments]


def launch(name, workdir, *arguments):
    return launches.run(name, f"--workdir={workdir}", *arguments)


def results(ran, workdir):
    assert ran.returncode == 0, ran.stderr
    there = {p.name for p in workdir.iterdir() if p.is_file()}
    assert there - {"run.json"} == {"figure.png", "flags.txt", "results.json"}
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.parametrize("program", ["first_bit"], indirect=True)
def test_first_bit_tells_the_seeds_story(program, tmp_path, monkeypatch):
    ways = program.systems()
    assert len(ways) == 15
    monkeypatch.setattr(program, "systems", lambda: [way for way in ways if way.window not in (4, 5)])
    with flagsaver.flagsaver():
        flags.FLAGS(["", f"--workdir={tmp_path}", "--updates=220", "--seeds=2", "--devices=1"])
        program.main()
    lock.release()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 11
    for row in rows:
        assert {"system", "window", "seeds", "test_accuracy", "test_loss", "exact_accuracy", "exact_loss"} <= row.keys()
        if row["system"].startswith("stateful contiguous") or row["system"] == "stateless full":
            assert row["test_accuracy"] >= 0.999, row
        elif row["exact_accuracy"]:
            assert abs(row["test_accuracy"] - row["exact_accuracy"]) <= 0.001, row
    sliding = next(row for row in rows if row["system"] == "stateless sliding")
    assert (sliding["train_windows"], sliding["test_windows"]) == ([11000, 10, 1], [2200, 10, 1])
    assert sliding["accuracy_by_start"]["0"] > 0.99 and sliding["accuracy_by_start"]["1"] < 0.51


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat \x1b[31msat on the mat, and\u202e the dog ran. " * 40)
    return path


def test_char_lm_reads_any_text_and_goes_on(tmp_path, text):
    small = ("--window=7", "--lanes=3", "--hidden=8", "--layers=2", "--updates=60", "--learning_rate=0.02")
    ran = launch("char_lm", tmp_path / "run", f"--text={text}", *small)
    told = results(ran, tmp_path / "run")
    assert "\x1b" in told["prompt"] and r"\x1b[31m" in ran.stdout  # a text is told of, not obeyed
    assert not {"\x1b", "\u202e"} & set(ran.stdout)
    assert told["window"] == 7 and told["steps"] == 420 and told["characters_per_second"] > 0
    assert told["curve"][-1][1] < told["curve"][0][1]
    assert 0 < told["bits_per_character"] < 4.5 and len(told["sample"]) == 400
    assert set(told["sample"]) <= set(text.read_text())
    asked = [launch("char_lm", tmp_path / "run", "--prompt=the", "--temperature=0", "--length=9") for _ in range(2)]
    assert asked[0].stdout == asked[1].stdout and len(asked[0].stdout) == len("the") + 9 + 1, asked[0].stderr
    more = launch("char_lm", tmp_path / "run", f"--text={text}", *small, "--updates=80", "--learning_rate=0.01")
    told = results(more, tmp_path / "run")
    assert "Going on from update 60 of 80" in more.stdout and told["updates"] == 80
    less = launch("char_lm", tmp_path / "run", f"--text={text}", *small, "--learning_rate=0.001")
    assert less.returncode == 2 and "To go on with it give more updates than 80" in less.stderr


def test_char_lm_begins_from_another_run_with_its_vocabulary_on_documents_of_another_text(tmp_path, text):
    small = ("--window=7", "--lanes=3", "--updates=30")
    assert launch("char_lm", tmp_path / "run", f"--text={text}", "--hidden=8", *small).returncode == 0
    (tmp_path / "other.txt").write_text("the dog\n and the cat.\n" * 40)
    other = (f"--text={tmp_path / 'other.txt'}", "--documents=lines", f"--init_from={tmp_path / 'run'}", "--stateless")
    ran = launch("char_lm", tmp_path / "other", *other, *small)
    vocabularies = [
        json.loads((tmp_path / of / "run.json").read_text())["codec"]["vocabulary"] for of in ("run", "other")
    ]
    assert vocabularies[0] == vocabularies[1] and len(results(ran, tmp_path / "other")["prompt"]) < 8
    assert "80 documents, each begun anew: 72 to train on, held out 8." in ran.stdout, ran.stderr
    assert "9% of the text's characters are not in the vocabulary" in " ".join(ran.stderr.split()), ran.stderr


def test_gradient_bias_knows_what_is_exact(tmp_path):
    small = ("--windows=2,20", "--steps=40", "--lags=20", "--updates=20", "--hidden=4", "--lanes=2", "--draws=4")
    told = results(launch("gradient_bias", tmp_path, "--influences=truncate,replay:all,rtrl,uoro", *small), tmp_path)
    assert {"suggested_window", "decay", "safe"} <= told.keys() and 0 < told["decay"] < 1
    by = {(row["influence"], row["window"]): row for row in told["rows"]}
    assert len(by) == 8 and all({"relative_bias", "cosine", "relative_std"} <= row.keys() for row in by.values())
    assert by["truncate", 2]["relative_bias"] > by["truncate", 20]["relative_bias"] > 1e-3
    assert max(by[name, k]["relative_bias"] for name in ("rtrl", "replay:all") for k in (2, 20)) < 1e-5
    assert by["uoro", 2]["relative_std"] > 0


def test_length_generalisation_reads_far_beyond_its_windows_in_light_and_dark(tmp_path):
    small = "--window=8", "--test_steps=40", "--updates=3", "--seeds=2", "--lanes=3", "--test_lanes=4", "--hidden=4"
    ran = launch("length_generalisation", tmp_path, "--cells=lru,lstm", *small)
    svg = (tmp_path / "figure.svg").read_text()
    (tmp_path / "figure.svg").unlink()
    told = results(ran, tmp_path)
    assert [(row["cell"], row["carry"]) for row in told["rows"]] == [
        (cell, carry) for cell in ("lru", "lstm") for carry in ("reset", "carried", "swapped")
    ]
    assert told["edges"] == [0, 1, 2, 4, 8, 16, 32, 40]
    assert all(np.shape(row[name]) == (2, 7) for row in told["rows"] for name in ("excess", "norm", "growth"))
    assert all(np.allclose(np.array(row["growth"])[:, 0], 1) for row in told["rows"])
    assert "prefers-color-scheme: dark" in svg and "var(--s0)" in svg and "#0072b2" not in svg.partition("<defs>")[2]
    assert "var(--page)" in svg and ElementTree.fromstring(svg).tag.endswith("svg")


def test_adaptive_copy_trains_with_k_fixed_and_chosen_in_light_and_dark(tmp_path):
    small = (
        "--epochs=2",
        "--steps=400",
        "--lanes=3",
        "--hidden=4",
        "--look_every=20",
        "--seeds=1",
        "--lengths=3,6",
        "--fixed=5",
    )
    ran = launch("adaptive_copy", tmp_path, *small)
    svg = (tmp_path / "figure.svg").read_text()
    (tmp_path / "figure.svg").unlink()
    told = results(ran, tmp_path)
    fixed, norms, gradients = told["rows"]
    assert (fixed["K"], fixed["mean_window"], fixed["choices"]) == ("5", 5, [])
    for row in (norms, gradients):
        assert 2.9 <= row["mean_window"] <= 6 and len(row["choices"]) > 2
        assert all(window in (3, 6) for _, window, _ in row["choices"])
        assert row["curve"][-1][0] >= 2 and row["test"] > 1
    assert "prefers-color-scheme: dark" in svg and ElementTree.fromstring(svg).tag.endswith("svg")


def test_k_is_the_first_of_the_lengths_that_the_papers_bound_asks_for():
    """Gradients that fade by .8 a step: δ(K) = .8^K / (1 − 2·.8^K) falls below a half at 7."""
    model = tb.from_step(lambda a, h, x: (a * h + x, a * h + x), lambda key, x: jnp.full(1, 0.8), lambda a, n: jnp.zeros((n, 1)))  # fmt: skip
    window = tb.Window(jnp.ones((3, 80, 1)), jnp.ones((3, 80, 1)))
    stream = lambda outputs, window: outputs[..., 0], jnp.full(1, 0.8), window, jnp.zeros((3, 1))
    for lengths, chosen in ((range(1, 21), 7), ((4, 12, 20), 12)):
        found = adaptive_copy_lengths.chosen("norms", 0.5, lengths, 10).look.choose(model, *stream)
        assert (found.window, found.horizon, found.safe) == (chosen, 7, True)
        assert found.relative_bias == pytest.approx(0.8**7 / (1 - 2 * 0.8**7), rel=1e-4)


def test_a_training_that_diverges_is_told_and_written(tmp_path):
    ran = launch("influence_balancing", tmp_path, "--runs=truncate@1", "--steps=500", "--learning_rate=9", "--seeds=1")
    assert results(ran, tmp_path)["rows"] == [{"influence": "truncate", "window": 1, "theta": [None]}]
    assert "[nan]" in ran.stdout or "[inf]" in ran.stdout or "[-inf]" in ran.stdout


MISTAKES = {
    "unreadable": ("char_lm", ["--text={dir}/none.txt"], "none.txt cannot be read: No such file"),
    "a directory": ("char_lm", ["--text={dir}"], "cannot be read: Is a directory"),
    "empty": ("char_lm", ["--text={dir}/empty.txt"], "empty.txt is empty"),
    "too short": ("char_lm", ["--text={dir}/text.txt", "--lanes=100", "--window=50"], "100 lanes of a corpus of 1691 steps have 17 steps each, and windows of 50 were asked for"),
    "not finite": ("char_lm", ["--learning_rate=nan"], "--learning_rate=nan: give a finite number"),
    "window of 0": ("char_lm", ["--window=0"], "--window=0"),
    "window of a schedule": ("char_lm", ["--window=growing:8:4:1"], "`last` to be the longer"),
    "schedule without a past": ("char_lm", ["--text={dir}/text.txt", "--lanes=4", "--window=auto", "--stateless"], "know no past"),
    "schedule of lengths that are drawn": ("awd_lstm", ["--window=auto"], "'full' draws the lengths of its windows itself"),
    "odd": ("first_bit", ["--train=11"], "--train=11 is odd"),
    "lanes": ("first_bit", ["--lanes=3000"], "--lanes=3000 is more than --train=1000"),
    "influence": ("gradient_bias", ["--influences=replay"], "--influences has replay, which is none. Any of truncate"),
    "depths": ("char_lm", ["--influence=replay:auto", "--depths=4,2"], "--influence=replay:auto: `depths` are [4, 2]; give them from small"),
    "survival": ("gradient_bias", ["--influences=replay:2:1.5"], "`survival` is 1.5"),
    "window": ("gradient_bias", ["--windows=5,0"], "--windows has '0': give whole numbers from 1 to 400"),
    "no influence": ("copy_memory", ["--influences="], "--influences is empty. Any of truncate"),
    "no devices": ("char_lm", ["--devices=0"], "--devices=0"),
    "run": ("influence_balancing", ["--runs=rtrl"], "write INFLUENCE@WINDOW"),
    "cell": ("length_generalisation", ["--cells=lru,rnn"], "--cells has 'rnn': choose of lru, rg_lru"),
    "test": ("length_generalisation", ["--test_steps=9"], "--test_steps=9 is less than --window=64"),
    "bound": ("adaptive_copy", ["--chosen=norm"], "--chosen has 'norm': choose of gradients, norms"),
    "sequence": ("copy_memory", ["--window=99"], "--window=99 is longer than a sequence of 30 steps"),
}  # fmt: skip


AS_PROCESS = {  # what is told, and its status, whoever finds it: the parser of flags, the launch, what it calls
    "unknown flag": (["--windows=3"], 1, "Unknown command line flag 'windows'"),
    "no flag at all": (["mine.txt"], 1, "Unknown arguments: mine.txt"),
    "no such flag": ([f"--{'x' * 5000}"], 1, f"No flag is called --{'x' * 38}…{'x' * 39} or like it."),
    "latin-1": (["--text={dir}/latin.txt"], 2, "latin.txt is not UTF-8: line 1, byte 4 of it, is 0xe9"),
}


@pytest.fixture
def program(request):
    yield from program_of(request.param)


@pytest.fixture
def texts(tmp_path, text):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    return tmp_path


@pytest.mark.parametrize("program, arguments, said", MISTAKES.values(), ids=MISTAKES, indirect=["program"])
def test_a_mistake_is_a_sentence_and_writes_nothing(program, arguments, said, texts, monkeypatch):
    refused(program, monkeypatch, texts / "run", [argument.format(dir=texts) for argument in arguments], said)


@pytest.mark.parametrize("arguments, status, said", AS_PROCESS.values(), ids=AS_PROCESS)
def test_a_process_ends_with_the_sentence_and_its_status(arguments, status, said, texts):
    ran = launch("char_lm", texts / "run", *(argument.format(dir=texts) for argument in arguments))
    told = ran.stdout + ran.stderr
    assert ran.returncode == status and said in " ".join(told.split()) and "Traceback" not in told, told
    assert not (texts / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused_before_computing(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    ran = launch("first_bit", blocked / "run")
    assert ran.returncode == 2 and "cannot be written to" in ran.stderr and "Traceback" not in ran.stderr
    assert not stat.S_ISDIR(blocked.stat().st_mode) and not ran.stdout


MORE_THAN_FITS = [
    ("char_lm", "--hidden=20000", "the model's size"),
    ("char_lm", "--windows_per_call=100000000 --updates=1000000000", "windows_per_call"),
    ("forecast", "--influence=replay:1000000000", "replay"),
    ("first_bit", "--seeds=1000000000", "--seeds"),
    ("first_bit", "--hidden=20000", "--hidden"),
    ("copy_memory", "--lag=1000000000", "--lag"),
    ("copy_memory", "--updates=1000000000", "--updates"),
    ("copy_memory", "--influences=replay:1000000000", "reach of replay"),
    ("lag", "--lanes=1000000000", "--lanes"),
    ("lag", "--hidden=20000", "--hidden"),
    ("length_generalisation", "--updates=1000000000", "--updates"),
    ("length_generalisation", "--hidden=20000", "--hidden"),
    ("adaptive_copy", "--lanes=1000000000", "--lanes"),
    ("adaptive_copy", "--hidden=20000", "model's size"),
    ("influence_balancing", "--steps=2000000000", "--steps"),
    ("influence_balancing", "--runs=replay:1000000000@10", "reach of replay"),
    ("gradient_bias", "--draws=1000000000", "draws"),
    ("gradient_bias", "--hidden=20000", "model's size"),
    ("truncation_sweep", "--seeds=1000000000", "seeds"),
    ("truncation_sweep", "--hidden=20000", "model's size"),
    ("truncation_sweep", "--task=copy_memory --lanes=10000000", "--lanes"),
]


@pytest.mark.parametrize("program", sorted({name for name, *_ in MORE_THAN_FITS}), indirect=True)
def test_what_does_not_fit_is_refused_before_it_is_allocated_with_what_to_lower(program, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 10**9)
    monkeypatch.setattr(sys, "argv", [program.__name__])
    for given, lower in (case[1:] for case in MORE_THAN_FITS if program.__name__ == f"experiments.{case[0]}"):
        with flagsaver.flagsaver(), pytest.raises(ValueError, match=r"GB: lower .*" + lower):
            flags.FLAGS(["", f"--workdir={tmp_path / 'run'}", *given.split()])
            program.main()
        lock.release()
        there = {path.name for path in (tmp_path / "run").glob("*")}
        assert there <= {"train.csv", "valid.csv", "test.csv"}, given  # the series that is generated
    with flagsaver.flagsaver():
        flags.FLAGS(["", f"--{'steps' if 'steps' in flags.FLAGS else 'updates'}=1000000000000"])
        with pytest.raises(ValueError, match=r"=1000000000000: give a number of at most 2147483647"):
            shared.check_flags()


@pytest.mark.parametrize("streams", [">&- 2>&-", ">/dev/full", "2>/dev/full | head -c 1 >/dev/null", "<&- >&-"])
def test_a_stream_that_is_closed_or_full_costs_no_results_and_no_status(streams, tmp_path):
    script = f'set -o pipefail; "$@" {streams}'
    ran = subprocess.run(
        ["bash", "-c", script, "-", *command(*TINY[:1], tmp_path, *TINY[1:])], cwd=ROOT, env=ENVIRONMENT
    )
    assert ran.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.png", "flags.txt", "results.json"]
    if streams == ">&- 2>&-":
        script = f'"$@" --runs=rtrl {streams}'
        wrong = ["bash", "-c", script, "-", *command(*TINY[:1], tmp_path)]
        assert subprocess.run(wrong, cwd=ROOT, env=ENVIRONMENT).returncode == 2


def test_a_path_is_never_read_as_markup(tmp_path):
    workdir = tmp_path / "[/x] [red]:cat: $a$"
    ran = launch(*TINY[:1], workdir, *TINY[1:])
    results(ran, workdir)
    assert f"Written to {workdir}: results.json" in ran.stdout


def start(workdir):
    """A launch that would take hours, once it is at work."""
    begun = launches.begin(*LONG[:1], f"--workdir={workdir}", *LONG[1:])
    while begun.poll() is None and not ((workdir / lock.NAME).exists() and (workdir / lock.NAME).read_text()):
        time.sleep(0.01)
    return begun


def test_a_launch_that_is_done_waits_for_no_thread():
    program = (
        "import sys, threading, time\n"
        "from experiments import launch\n"
        "def main():\n"
        "    threading.Thread(target=time.sleep, args=[10**6]).start()\n"
        "    print('done')\n"
        "    sys.exit(3)\n"
        "launch.run(main)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300
    )
    assert (ran.returncode, ran.stdout) == (3, "done\n"), ran.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_launch_at_once_with_a_sentence_and_its_status(sent, tmp_path):
    begun = start(tmp_path / "run")
    begun.send_signal(sent)
    _, told = begun.communicate()
    assert begun.returncode == 128 + sent and told.endswith("the same command does what is missing.\n")
    assert f"influence_balancing: stopped by {sent.name}" in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()  # nothing was in it


def test_a_workdir_has_one_launch_at_a_time_and_is_taken_over_from_one_that_was_killed(tmp_path):
    first = start(tmp_path)
    second = launch(*TINY[:1], tmp_path, *TINY[1:])
    said = (
        f"another launch is at work there, process {first.pid} on {socket.gethostname()}: wait for it, stop it, or give"
    )
    assert second.returncode == 2 and said in second.stderr and not second.stdout
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
    first.kill()
    first.communicate()
    assert (tmp_path / lock.NAME).exists()
    results(launch(*TINY[:1], tmp_path, *TINY[1:]), tmp_path)


def test_a_lock_of_another_host_stands_until_its_file_is_removed(tmp_path):
    path = tmp_path / lock.NAME
    path.write_text("elsewhere 1\n")
    with pytest.raises(
        ValueError, match=r"process 1 on elsewhere, or was killed: if it is gone, remove the file \.lock in it"
    ):
        shared.workdir(str(tmp_path))
    assert path.read_text() == "elsewhere 1\n"
    path.unlink()
    assert shared.workdir(str(tmp_path)) == shared.workdir(str(tmp_path)) == tmp_path  # this process's own
    assert path.read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    lock.release()
    assert not list(tmp_path.iterdir())


def test_where_a_drive_has_no_locks_the_process_is_looked_for(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    path = tmp_path / lock.NAME
    path.write_text(f"{socket.gethostname()} {os.getppid()}\n")
    with pytest.raises(ValueError, match=f"process {os.getppid()} on"):
        shared.workdir(str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    path.write_text(f"{socket.gethostname()} {gone.pid}\n")
    shared.workdir(str(tmp_path))
    lock.release()


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "", "a\nb", "a\udcff", "x" * 4000, "/dev/null"])
def test_a_workdir_that_is_none_is_a_short_sentence(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--workdir") as raised:
        shared.workdir(path)
    assert len(str(raised.value)) < 300 and "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_what_is_quoted_is_short_and_moves_no_cursor_and_a_cell_is_no_formula():
    assert shared.plain("a\x1b[2J\r\n\u202e\udcff", keep="\n") == "a\\x1b[2J\\r\n\\u202e\\udcff"
    assert shared.plain("é" * 80, 80) == "é" * 80
    short = shared.plain("a" * 4000 + ".csv", 80)
    assert len(short) == 80 and short.startswith("a") and short.endswith(".csv")
    assert [shared.cell(text) for text in ("=1+1", "@x", "-2", "a=b", "")] == ["'=1+1", "'@x", "'-2", "a=b", ""]
