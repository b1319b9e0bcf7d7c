"""The launches, small: what they write, and that a mistake writes nothing."""

import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def launch(name, workdir, *arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # compiling takes the time
    command = [sys.executable, "-m", f"experiments.{name}", f"--workdir={workdir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def results(ran, workdir):
    assert ran.returncode == 0, ran.stderr
    assert sorted(p.name for p in workdir.iterdir() if p.is_file()) == ["figure.png", "flags.txt", "results.json"]
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((workdir / "results.json").read_text())


def test_first_bit_tells_the_seeds_story(tmp_path):
    ran = launch("first_bit", tmp_path, "--updates=220", "--seeds=2")
    rows = results(ran, tmp_path)["rows"]
    assert len(rows) == 15 and "100%" not in ran.stderr
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
    path.write_text("the cat sat on the mat, and the dog ran. " * 40)
    return path


@pytest.mark.parametrize("stateless", ["--nostateless", "--stateless"])
def test_char_lm_reads_any_text_and_goes_on(tmp_path, text, stateless):
    small = ("--window=7", "--lanes=3", "--hidden=8", "--layers=2", "--updates=60", "--learning_rate=0.02")
    told = results(launch("char_lm", tmp_path / "run", f"--text={text}", stateless, *small), tmp_path / "run")
    assert told["window"] == 7 and told["steps"] == 420 and told["characters_per_second"] > 0
    assert told["curve"][-1][1] < told["curve"][0][1]
    assert 0 < told["bits_per_character"] < 4.5 and len(told["sample"]) == 400
    assert set(told["sample"]) <= set(text.read_text())


def test_gradient_bias_knows_what_is_exact(tmp_path):
    small = ("--windows=2,10", "--steps=40", "--lags=20", "--updates=20", "--hidden=4", "--lanes=2", "--draws=4")
    told = results(launch("gradient_bias", tmp_path, "--influences=truncate,replay:all,rtrl,uoro", *small), tmp_path)
    assert {"suggested_window", "decay", "safe"} <= told.keys() and 0 < told["decay"] < 1
    by = {(row["influence"], row["window"]): row for row in told["rows"]}
    assert len(by) == 8 and all({"relative_bias", "cosine", "relative_std"} <= row.keys() for row in by.values())
    assert by["truncate", 2]["relative_bias"] > by["truncate", 10]["relative_bias"] > 1e-3
    assert max(by[name, k]["relative_bias"] for name in ("rtrl", "replay:all") for k in (2, 10)) < 1e-5
    assert by["uoro", 2]["relative_std"] > 0


def test_a_training_that_diverges_is_told_and_written(tmp_path):
    ran = launch("influence_balancing", tmp_path, "--runs=truncate@1", "--steps=500", "--learning_rate=9", "--seeds=1")
    assert results(ran, tmp_path)["rows"] == [{"influence": "truncate", "window": 1, "theta": [None]}]
    assert "[nan]" in ran.stdout or "[inf]" in ran.stdout or "[-inf]" in ran.stdout


MISTAKES = {
    "unreadable": ("char_lm", ["--text={dir}/none.txt"], "none.txt cannot be read: No such file"),
    "a directory": ("char_lm", ["--text={dir}"], "cannot be read: Is a directory"),
    "empty": ("char_lm", ["--text={dir}/empty.txt"], "empty.txt is empty"),
    "latin-1": ("char_lm", ["--text={dir}/latin.txt"], "latin.txt is not UTF-8: byte 3 is 0xe9"),
    "too short": ("char_lm", ["--text={dir}/text.txt", "--lanes=100", "--window=50"], "100 lanes with windows of 50 need more than 5000"),
    "unknown flag": ("char_lm", ["--windows=3"], "Unknown command line flag 'windows'"),
    "no flag at all": ("char_lm", ["mine.txt"], "Unknown arguments: mine.txt"),
    "not finite": ("char_lm", ["--learning_rate=nan"], "--learning_rate=nan: give a finite number"),
    "window of 0": ("char_lm", ["--window=0"], "--window=0"),
    "odd": ("first_bit", ["--train=11"], "--train=11 is odd"),
    "lanes": ("first_bit", ["--lanes=3000"], "--lanes=3000 is more than --train=1000"),
    "influence": ("gradient_bias", ["--influences=replay"], "--influences has replay, which is none. Any of truncate"),
    "survival": ("gradient_bias", ["--influences=replay:2:1.5"], "`survival` is 1.5"),
    "window": ("gradient_bias", ["--windows=5,0"], "--windows has '0': give whole numbers from 1 to 400"),
    "no influence": ("copy_memory", ["--influences="], "--influences is empty. Any of truncate"),
    "no devices": ("char_lm", ["--devices=0"], "--devices=0"),
    "run": ("influence_balancing", ["--runs=rtrl"], "write INFLUENCE@WINDOW"),
    "sequence": ("copy_memory", ["--window=99"], "--window=99 is longer than a sequence of 30 steps"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_writes_nothing(mistake, tmp_path, text):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    name, arguments, sentence = MISTAKES[mistake]
    ran = launch(name, tmp_path / "run", *(a.format(dir=tmp_path) for a in arguments))
    told = ran.stdout + ran.stderr
    assert ran.returncode != 0 and sentence in " ".join(told.split()) and "Traceback" not in told, told
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused_before_computing(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    ran = launch("first_bit", blocked / "run")
    assert ran.returncode == 2 and "cannot be written to" in ran.stderr and "Traceback" not in ran.stderr
    assert not stat.S_ISDIR(blocked.stat().st_mode) and not ran.stdout
