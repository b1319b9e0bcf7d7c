"""Forecasts of people's own files: what is written, what the numbers mean, and that a bad file writes nothing."""

import csv

import numpy as np
import pytest
from programs import program_of
from test_experiments import launch, results  # in this folder

from experiments import series

SMALL = "--hidden=8", "--lanes=4", "--window=20", "--updates=120", "--learning_rate=0.02"


@pytest.fixture(scope="module")
def program():
    yield from program_of("forecast")


def write(path, names, table):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *table])
    return path


@pytest.fixture
def files(tmp_path):
    """y is a running mean of the last inputs, in units of its own: y - 50 = 30 (the mean of some ten x)."""
    found = {}
    for seed, (name, steps) in enumerate({"train": 1000, "valid": 200, "test": 200}.items()):
        x = np.random.default_rng(seed).normal(size=steps).repeat(3)[:steps]
        y = np.zeros(steps + 1)
        for t in range(steps):
            y[t + 1] = 0.9 * y[t] + 0.1 * x[t]
        found[name] = write(tmp_path / f"{name}.csv", ["t", "x", "y", "still"], zip(range(steps), x, 50 + 30 * y[1:], [4] * steps, strict=True))  # fmt: skip
    return found


def flags(files):
    return [f"--{name}={path}" for name, path in files.items()]


def test_it_writes_what_it_tells_and_goes_on(tmp_path, files):
    workdir = tmp_path / "run"
    arguments = *flags(files), "--inputs=x", "--targets=y,still", *SMALL
    ran = launch("forecast", workdir, *arguments)
    rows = list(csv.DictReader((workdir / "predictions.csv").open()))
    (workdir / "predictions.csv").rename(tmp_path / "predictions.csv")
    told = results(ran, workdir)
    observed, predicted = (np.array([float(row[f"y, {which}"]) for row in rows]) for which in ("observed", "predicted"))
    given = np.array([float(row["y"]) for row in csv.DictReader(files["test"].open())])
    np.testing.assert_allclose(observed, given, rtol=1e-6)
    assert [int(row["row"]) for row in rows] == list(range(200))
    assert told["test_rmse"]["y"] == pytest.approx(np.sqrt(((predicted - given) ** 2).mean()), rel=1e-5)
    scale = np.std([float(row["y"]) for row in csv.DictReader(files["train"].open())])
    still = told["test_rmse"]["still"]  # never changes while training: its deviation counts as 1
    assert told["test_mse"] == pytest.approx((told["test_rmse"]["y"] ** 2 / scale**2 + still**2) / 2, rel=1e-4)
    assert told["test_mse"] < 0.2 * told["test_mse_of_the_mean"] and told["valid_mse"] < 0.2
    assert told["updates"] == 120 and told["seconds"] > 0 and told["test_mse_of_the_row_before"] is None
    assert told["windows_skipped"] == 0 and told["carry"]["norm"] > 0 and told["carry"]["since_reset"] > 20
    assert told["flags"]["not_finite"] == "stop" and "devices" in told["flags"]  # of what launches share, too
    assert "--not_finite=stop\n" in (workdir / "flags.txt").read_text()

    (workdir / "results.json").unlink()
    again = launch("forecast", workdir, *arguments)
    assert "Going on from update 120" in again.stdout
    assert (workdir / "predictions.csv").read_bytes() == (tmp_path / "predictions.csv").read_bytes()


def test_a_rate_that_makes_an_update_infinite_stops_it_with_a_sentence(tmp_path, files):
    ran = launch(
        "forecast", tmp_path / "run", *flags(files), "--targets=y", *SMALL, "--updates=1", "--learning_rate=1e39"
    )
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "forecast: The loss of window 0 is" in ran.stderr and "or the update made of it, is not finite" in ran.stderr
    assert not (tmp_path / "run" / "results.json").exists()


def test_targets_alone_are_told_from_the_rows_before(tmp_path, files):
    del files["valid"]
    workdir = tmp_path / "run"
    ran = launch("forecast", workdir, *flags(files), "--targets=y", "--stateless", "--burn_in=5", "--influence=replay:2", *SMALL)  # fmt: skip
    rows = list(csv.DictReader((workdir / "predictions.csv").open()))
    (workdir / "predictions.csv").unlink()
    told = results(ran, workdir)
    assert (rows[0]["row"], rows[-1]["row"], len(rows)) == ("1", "199", 199)
    assert told["valid_mse"] is None and told["test_mse_of_the_row_before"] > 0


def test_its_own_data_is_a_file_that_can_be_given(tmp_path):
    train = series.tanks(0, 300)
    assert train.shape == (300, 2) and np.isfinite(train).all()
    np.testing.assert_array_equal(train, series.tanks(0, 300))
    assert not np.array_equal(train, series.tanks(1, 300))
    pump, level = series.tanks(0, 20_000).T  # in the long run, what comes in goes out, with the root of the level
    assert np.sqrt(level.clip(0)).mean() == pytest.approx(pump.mean(), rel=0.01)


BROKEN = {
    "a missing column": ("t,x\n1,2\n", "columns 'y'"),
    "text in a number's place": ("x,y\n1,2\n3,four\n", "line 3, column 'y': 'four'"),
    "NaN": ("x,y\n1,2\n3,nan\n", "line 3, column 'y'"),
    "a ragged row": ("x,y\n1,2\n3\n", "line 3: the row has 1 fields"),
    "nothing": ("", "line 1: there is nothing"),
    "a header only": ("x,y\n", "no rows"),
    "too few rows": ("x,y\n" + "1,2\n" * 79, "79 steps"),
}
WRONG = {
    "no test": (["--train={train}", "--targets=y"], "--test=FILE"),
    "no train": (["--targets=y"], "--train=FILE"),
    "a column twice": (["--train={train}", "--test={test}", "--inputs=y", "--targets=y"], "more than once"),
    "both states": (["--stateful", "--stateless"], "contradict"),
    "both budgets": (["--updates=3", "--epochs=3"], "one of them"),
    "burn-in of a carried state": (["--burn_in=3"], "--stateless"),
    "burn-in of a whole window": (["--stateless", "--window=5", "--burn_in=5"], "choose less"),
    "an influence": (["--influence=uroo"], "truncate, replay"),
}


@pytest.mark.parametrize("content, said", BROKEN.values(), ids=BROKEN)
def test_a_bad_file_is_a_sentence_with_its_place(program, tmp_path, capsys, content, said):
    bad = tmp_path / "bad.csv"
    bad.write_text(content)
    refused(
        program,
        tmp_path,
        capsys,
        [f"--train={bad}", f"--test={bad}", "--inputs=x", "--targets=y", "--lanes=4", "--window=20"],
        said,
    )


@pytest.mark.parametrize("arguments, said", WRONG.values(), ids=WRONG)
def test_flags_that_do_not_go_together_are_a_sentence(program, tmp_path, capsys, files, arguments, said):
    refused(program, tmp_path, capsys, [argument.format(**files) for argument in arguments], said)


def test_a_file_of_ones_own_is_not_written_over_by_what_is_generated(program, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    own = write(tmp_path / "run" / "test.csv", ["mine"], [[1]])
    before = own.read_bytes()
    refused(program, tmp_path, capsys, [], "test.csv is not the series that is generated here.*--test")
    assert list((tmp_path / "run").iterdir()) == [own] and own.read_bytes() == before


def refused(program, tmp_path, capsys, arguments, said):
    """In this process: what is refused computes nothing."""
    there = (tmp_path / "run").exists()
    from absl import flags
    from absl.testing import flagsaver

    with flagsaver.flagsaver(), pytest.raises(ValueError, match=said.replace("(", r"\(")) as raised:
        flags.FLAGS(["forecast", f"--workdir={tmp_path / 'run'}", *arguments])
        program.main()
    assert str(raised.value).endswith((".", "]", "]."))
    assert (tmp_path / "run").exists() == there
