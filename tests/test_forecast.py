"""Forecasts of people's own files: what is written, what the numbers mean, and that a bad file writes nothing."""

import csv
import json
import re

import numpy as np
import pytest
from programs import program_of
from test_experiments import launch, results  # in this folder

from experiments import series, sweep_tasks

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


def test_a_gap_in_a_target_is_a_step_that_is_not_scored_and_one_in_an_input_is_filled(tmp_path, files):
    del files["valid"]
    rng, given = np.random.default_rng(0), {}
    for name, path in files.items():
        rows = list(csv.DictReader(path.open()))
        gaps = {column: rng.random(len(rows)) < 0.2 for column in ("x", "y", "still")}
        given[name] = np.array(
            [[np.nan if gaps[c][t] else float(row[c]) for c in ("y", "still")] for t, row in enumerate(rows)]
        )
        told = [
            [row["t"], *("-9999" if gaps[c][t] else row[c] for c in ("x", "y", "still"))] for t, row in enumerate(rows)
        ]
        write(path, ["t", "x", "y", "still"], told)
    arguments = *flags(files), "--inputs=x", "--targets=y,still", "--missing=-9999", *SMALL
    refused = launch("forecast", tmp_path / "refused", *arguments)
    gaps = [row["x"] == "-9999" for row in csv.DictReader(files["train"].open())]
    said = f"train.csv has {sum(gaps)} gaps in column 'x', from which the targets are told, the first in line {gaps.index(True) + 2}."
    assert refused.returncode == 2 and said in refused.stderr
    advice = re.search(r"--fill=\w+", refused.stderr)[0]
    workdir = tmp_path / "run"
    ran = launch("forecast", workdir, *arguments, advice)
    rows = list(csv.DictReader((workdir / "predictions.csv").open()))
    (workdir / "predictions.csv").unlink()
    told = results(ran, workdir)
    assert told["fill"] == "forward" and told["targets_missing"]["test"] == np.isnan(given["test"]).sum()
    predicted = np.array([[float(row[f"{name}, predicted"]) for name in ("y", "still")] for row in rows])
    assert [row["y, observed"] == "" for row in rows] == np.isnan(given["test"][:, 0]).tolist()
    mean, deviation = np.nanmean(given["train"], 0), np.nanstd(given["train"], 0)
    error = (predicted - given["test"]) / np.where(deviation > 0, deviation, 1)
    assert told["test_mse"] == pytest.approx(np.nanmean(error**2), rel=1e-6)
    assert told["test_mse_of_the_mean"] == pytest.approx(
        np.nanmean(((given["test"] - mean) / np.where(deviation > 0, deviation, 1)) ** 2)
    )
    assert told["test_mse"] < 0.5 * told["test_mse_of_the_mean"]


def test_what_is_missing_weighs_nothing_and_the_others_all_alike():
    rng = np.random.default_rng(0)
    inputs, targets, outputs = rng.normal(size=(30, 1)), rng.normal(size=(30, 2)), rng.normal(size=(1, 30, 2))
    targets[rng.random(targets.shape) < 0.3] = np.nan
    targets[3] = np.nan
    window = series.lanes(inputs, targets, 1)
    mean = (series.loss(outputs, window) * window.weights).sum() / window.weights.sum()
    np.testing.assert_allclose(mean, np.nanmean((outputs[0] - targets) ** 2), rtol=1e-6)
    assert series.lanes(inputs, np.nan_to_num(targets), 1).weights is None


@pytest.mark.parametrize(
    "fill, expected", [("forward", [5, 2, 2, 2, 8]), ("mean", [5, 2, 5, 5, 8]), ("zero", [0, 2, 0, 0, 8])]
)
def test_inputs_are_filled_from_what_was_before_or_from_the_training_file(tmp_path, fill, expected):
    path = write(tmp_path / "x.csv", ["x", "y"], zip(["", 2, "", "nan", 8], range(5), strict=True))
    found = series.read({"train": path}, ["x"], ["y"], [], fill)
    assert found["train"].inputs.ravel().tolist() == expected


def test_a_gap_in_the_last_row_is_no_gap_in_what_its_target_is_told_from(tmp_path):
    path = write(tmp_path / "x.csv", ["y"], [[1], [2], ["NA"]])
    (inputs, targets, _) = series.read({"train": path}, [], ["y"], [], None)["train"]
    np.testing.assert_array_equal(np.hstack([inputs, targets]), [[1, 2], [2, np.nan]])
    path.write_text("# station 7\ny\n\n2\n3\n")
    with pytest.raises(ValueError, match=r"1 gaps in column 'y'.*the first in line 3"):
        series.read({"train": path}, [], ["y"], [], None)


def test_a_column_is_standardised_whatever_its_size_and_one_that_never_changes_has_the_deviation_1():
    x = np.random.default_rng(0).normal(size=1000)
    with np.errstate(all="raise"):
        for size in (1e-200, 1e-9, 1, 1e8, 1e200):
            scale = series.scale_of(np.stack([x * size, np.full(1000, 0.1 * size)], 1))
            assert scale.mean[1] == 0.1 * size and scale.deviation[1] == 1
            np.testing.assert_allclose(
                [scale.mean[0], scale.deviation[0]], [x.mean() * size, x.std() * size], rtol=1e-9
            )
    train, test = (series.Series(np.full((9, 1), value), np.ones((9, 1)), 0) for value in (0.1, 1e39))
    with pytest.raises(ValueError, match="The test file has a number that is 1e\\+39 deviations"):
        series.standardised({"train": train, "test": test})


def test_a_test_file_may_know_no_target(tmp_path, files):
    del files["valid"]
    rows = list(csv.reader(files["test"].open()))[1:]
    write(files["test"], ["x", "y"], [[row[1], ""] for row in rows])
    workdir = tmp_path / "run"
    ran = launch("forecast", workdir, *flags(files), "--inputs=x", "--targets=y", *SMALL, "--updates=3")
    told = list(csv.DictReader((workdir / "predictions.csv").open()))
    (workdir / "predictions.csv").unlink()
    assert results(ran, workdir)["test_mse"] is None and "Warning" not in ran.stderr and "nan" not in ran.stdout
    assert [row["y, observed"] for row in told] == [""] * len(rows) and all(float(row["y, predicted"]) for row in told)


def test_a_sweep_reads_files_with_gaps_as_a_forecast_does(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("x;y\n" + "1,234;2,345\n2,345;-99\n;4,567\n" * 20)
    files = sweep_tasks.Files([], str(path), str(path), ["x"], ["y"])
    for given, said in (({}, "--decimal"), ({"decimal": ","}, "line 4. Say what is read there: --fill=forward")):
        with pytest.raises(ValueError, match=said):
            sweep_tasks.make("forecast", 2, 2, 5, files._replace(**given))
    files = files._replace(decimal=",", fill="mean", missing=["-99"])
    train, test = sweep_tasks.make("forecast", 2, 2, 5, files).data(None)
    assert train.weights.sum() == test.weights.sum() == 40 and np.isfinite(train.inputs).all()


def test_a_meter_at_a_hundred_million_is_forecast_as_one_at_zero(tmp_path, files):
    del files["valid"]
    told = []
    for i, offset in enumerate((0, 10**8)):
        for path in files.values():
            rows = list(csv.DictReader(path.open()))
            moved = [[row["t"], row["x"], f"{float(row['y']) + offset:.6f}", row["still"]] for row in rows]
            write(path, ["t", "x", "y", "still"], moved)
        launch("forecast", tmp_path / f"run{i}", *flags(files), "--inputs=x", "--targets=y", *SMALL)
        told.append(json.loads((tmp_path / f"run{i}" / "results.json").read_text()))
        last = list(csv.DictReader((tmp_path / f"run{i}" / "predictions.csv").open()))[-1]
        assert float(last["y, observed"]) == pytest.approx(float(rows[-1]["y"]) + offset, abs=1e-5)
    assert told[1]["test_mse"] == pytest.approx(told[0]["test_mse"], rel=1e-3)
    assert told[1]["test_rmse"]["y"] == pytest.approx(told[0]["test_rmse"]["y"], rel=1e-3)


def test_a_user_s_words_are_neither_markup_nor_formulas(tmp_path, files):
    del files["valid"]
    names = {"x": "[bold]x", "y": "=1+1[/y]$a$"}
    for path in files.values():
        path.write_text(path.read_text().replace("t,x,y", f"t,{names['x']},{names['y']}", 1))
    workdir = tmp_path / "[red]"
    ran = launch(
        "forecast", workdir, *flags(files), f"--inputs={names['x']}", f"--targets={names['y']}", *SMALL, "--updates=3"
    )
    assert ran.returncode == 0, ran.stderr
    assert f"root mean square error {names['y']}" in ran.stdout and f"Written to {workdir}" in ran.stdout
    header = next(csv.reader((workdir / "predictions.csv").open()))
    assert header[1:] == [f"'{names['y']}, observed", f"'{names['y']}, predicted"]


def test_a_burn_in_leaves_no_step_out(program, tmp_path):
    from absl import flags
    from absl.testing import flagsaver

    x = np.random.default_rng(0).normal(size=(1000, 1))
    with flagsaver.flagsaver():
        flags.FLAGS(["forecast", "--stateless", "--window=100", "--burn_in=83", "--lanes=4"])
        windows = program.cut(x, x)
    assert windows.inputs.shape[2] == 100 and (windows.weights * windows.valid).sum() == 1000
    assert ((windows.weights * windows.valid).sum((1, 2))[1:-1] == 4 * 17).all()


BROKEN = {
    "a missing column": ("t,x\n1,2\n", "columns 'y'"),
    "text in a number's place": ("x,y\n1,2\n3,four\n", "line 3, column 'y': 'four'"),
    "an infinite number": ("x,y\n1,2\n3,inf\n", "line 3, column 'y'"),
    "a gap in an input": ("x,y\n1,2\n,3\n", "1 gaps in column 'x'.*the first in line 3.*--fill=forward"),
    "a column of gaps": ("x,y\n1,\n2,\n", "no number in column 'y'"),
    "a point of decimals or thousands": ("x;y\n1.234;2\n", "line 2, column 'x'.*--decimal"),
    "a ragged row": ("x,y\n1,2\n3\n", "line 3: the row has 1 fields"),
    "nothing": ("", "line 1: there is nothing"),
    "a header only": ("x,y\n", "no rows"),
    "too few rows": ("x,y\n" + "1,2\n" * 79, "79 steps"),
}
WRONG = {
    "no test": (["--train={train}", "--targets=y"], "--test=FILE"),
    "no train": (["--targets=y"], "--train=FILE"),
    "fill of nothing": (["--fill=mean"], "--fill needs --train=FILE"),
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
