"""Forecasts of people's own files: what is written, what the numbers mean, and that a bad file writes nothing."""

import csv
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import program_of, refused
from test_experiments import launch  # in this folder

import tbptt_jax as tb
from tbptt_jax import study
from tbptt_jax.study import forecasting, series, tables
from tbptt_jax.study.task import reader

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


def results(ran, workdir):
    assert ran.returncode == 0, ran.stderr
    names = sorted(path.name for path in workdir.iterdir() if path.is_file())
    assert names == ["figure.png", "flags.txt", "results.json", "run.json"]
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((workdir / "results.json").read_text())


def a_series(inputs, targets, **others):
    return tables.Series(inputs, targets, np.arange(len(inputs)), **others)


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
    assert [row["row"] for row in rows] == [str(row) for row in range(201)]  # and one past the end
    assert rows[0]["y, predicted"] == rows[-1]["y, observed"] == "" and all(row["y, predicted"] for row in rows[1:])
    assert told["valid_mse"] is None and told["test_mse_of_the_row_before"] > 0


def test_its_own_data_is_a_file_that_can_be_given(tmp_path):
    train = tables.tanks(0, 300)
    assert train.shape == (300, 2) and np.isfinite(train).all()
    np.testing.assert_array_equal(train, tables.tanks(0, 300))
    assert not np.array_equal(train, tables.tanks(1, 300))
    pump, level = tables.tanks(0, 20_000).T  # in the long run, what comes in goes out, with the root of the level
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
    layout = series.Layout(["x"], ["y", "z"], 1, False, dict.fromkeys("xyz", (0, 1)))
    window = series.streams(layout, [a_series(inputs, targets)], 1)
    mean = (series.loss(outputs, window) * window.weights).sum() / window.weights.sum()
    np.testing.assert_allclose(mean, np.nanmean((outputs[0] - targets) ** 2), rtol=1e-6)
    assert series.streams(layout, [a_series(inputs, np.nan_to_num(targets))], 1).weights is None


@pytest.mark.parametrize(
    "fill, expected", [("forward", [5, 2, 2, 2, 8]), ("mean", [5, 2, 5, 5, 8]), ("zero", [0, 2, 0, 0, 8])]
)
def test_inputs_are_filled_from_what_was_before_or_from_the_training_file(tmp_path, fill, expected):
    path = write(tmp_path / "x.csv", ["x", "y"], zip(["", 2, "", "nan", 8], range(5), strict=True))
    (found,) = tables.read({"train": path}, ["x"], ["y"], fill=fill)["train"]
    assert found.inputs.ravel().tolist() == expected


def test_a_gap_in_the_last_row_is_no_gap_in_what_its_target_is_told_from(tmp_path):
    path = write(tmp_path / "x.csv", ["y"], [[1], [2], ["NA"]])
    data = tables.read({"train": path, "test": path}, [], ["y"])
    assert [len(data[name][0].rows) for name in ("train", "test")] == [2, 3]
    path.write_text("# station 7\ny\n\n2\n3\n")
    with pytest.raises(ValueError, match=r"1 gaps in column 'y'.*the first in line 3"):
        tables.read({"train": path}, [], ["y"])


def test_a_column_is_standardised_whatever_its_size_and_one_that_never_changes_has_the_deviation_1():
    x = np.random.default_rng(0).normal(size=1000)
    with np.errstate(all="raise"):
        for size in (1e-200, 1e-9, 1, 1e8, 1e200):
            mean, deviation = tables.scale_of(np.stack([x * size, np.full(1000, 0.1 * size)], 1))
            assert mean[1] == 0.1 * size and deviation[1] == 1
            np.testing.assert_allclose([mean[0], deviation[0]], [x.mean() * size, x.std() * size], rtol=1e-9)
    train, test = (a_series(np.full((9, 1), value), np.ones((9, 1))) for value in (0.1, 1e39))
    layout = series.layout_of({"train": [train]}, ["x"], ["y"])
    with pytest.raises(ValueError, match="The test file has a number that is 1e\\+39 deviations"):
        series.streams(layout, [test], 1, "test")


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


def test_a_task_reads_files_with_gaps_and_is_made_again_from_its_codec_without_them(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("x;y\n" + "1,234;2,345\n2,345;-99\n;4,567\n" * 20)
    arguments = {"train": str(path), "test": str(path), "inputs": "x", "targets": ["y"], "lanes": 2}
    for given, said in (({}, "--decimal"), ({"decimal": ","}, "line 4. Say what is read there: --fill=forward")):
        with pytest.raises(ValueError, match=said):
            study.task("forecast", **arguments, **given)
    arguments |= {"decimal": ",", "fill": "mean", "missing": ["-99"]}
    task = study.task("forecast", **arguments)
    train, test = task.train(), task.test()
    assert train.weights.sum() == test.weights.sum() == 40 and np.isfinite(train.inputs).all()
    path.unlink()
    again = study.task("forecast", **arguments, codec=json.loads(json.dumps(task.codec)))
    assert again.codec == task.codec


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


def test_a_burn_in_leaves_no_step_out():
    x = np.random.default_rng(0).normal(size=(1000, 1))
    layout = series.Layout(["x"], ["y"], 1, False, dict.fromkeys("xy", (0, 1)))
    task = series.task_of(layout, dict, ["train"])
    count, _, read = reader(task, series.streams(layout, [a_series(x, x)], 4), 100, 4, stateless=True, burn_in=83)
    windows = read(0, count)
    assert windows.inputs.shape[2] == 100 and (windows.weights * windows.valid).sum() == 1000
    assert ((windows.weights * windows.valid).sum((1, 2))[1:-1] == 4 * 17).all()


def copying(outputs):
    """A model that answers with its first input, so many times."""

    def step(params, carry, x):
        return carry, jnp.tile(x[:, :1], outputs)

    return tb.from_step(step, lambda key, inputs: {}, lambda params, lanes: jnp.zeros((lanes, 1)))


@pytest.mark.parametrize("direct", [False, True])
def test_a_model_that_copies_the_past_is_the_naive_forecast(direct):
    """However it looks ahead: the rows are those that are meant."""
    layout = series.Layout(["y", "x"], ["y"], 3, direct, {"x": (1, 2), "y": (3, 4)})
    rng = np.random.default_rng(0)
    test = [a_series(rng.normal(size=(n, 2)), rng.normal(size=(n, 1)), name=str(n)) for n in (12, 1, 7)]
    test = [each._replace(inputs=np.hstack([each.targets, each.inputs[:, 1:]])) for each in test]
    found = forecasting.forecasts(copying(3 if direct else 1), {}, layout, test)
    for each, forecast in zip(test, found, strict=True):
        given = forecasting.by_row(each, forecast)[: len(each.rows)]
        np.testing.assert_allclose(given, forecasting.naive(each, 3), atol=1e-5)
    steps = forecasting.scores(layout, test, test, found)
    assert [step["rmse"]["model"] for step in steps] == [
        pytest.approx(step["rmse"]["naive"], abs=1e-5) for step in steps
    ]
    assert [step["rows"]["y"] for step in steps] == [17, 15, 13]


@pytest.fixture
def trained():
    """A task that is not trained, which looks three steps ahead from y's past and x, and its parameters."""
    layout = series.Layout(["x", "y"], ["y"], 3, False, {"x": (0.5, 2.0), "y": (-1.0, 3.0)})
    model = series.task_of(layout, dict, ["train"], hidden=5).model
    return layout, model, model.init(jax.random.key(0), jnp.zeros((1, 1, 2)))


def by_hand(layout, model, params, each, origin, steps):
    """The forecasts of ``steps`` rows from an origin, each time all that was read is read again."""
    past = each.targets[: max(origin, 1), 0].tolist()  # what stands before row 1, 2, …
    told = []
    for k in range(steps):
        y = np.array([np.nan, *past][: origin + k + 1])
        read = np.stack([(each.inputs[: origin + k + 1, 0] - 0.5) / 2, (y + 1) / 3], 1)
        outputs = model.unroll(
            params, model.initial_carry(params, 1), jnp.asarray(np.nan_to_num(read)[None], jnp.float32)
        )[1]
        told.append(float(outputs[0, -1, 0]) * 3 - 1)
        past = [*each.targets[:origin, 0], *told]
    return told


def test_forecasts_are_fed_back_as_the_past_also_beyond_the_last_known_row(trained):
    layout, model, params = trained
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 20, 1))
    y[15:] = np.nan  # rows to come, whose x is known
    each = a_series(np.hstack([x, y]), y)
    (found,) = forecasting.forecasts(model, params, layout, [each])
    for origin in (1, 2, 9, 15):
        expected = by_hand(layout, model, params, each, origin, 3)
        np.testing.assert_allclose(found.ahead[origin, :, 0], expected, atol=1e-5)
    np.testing.assert_allclose(found.beyond[:, 0], by_hand(layout, model, params, each, 15, 5), atol=1e-5)
    (one,) = forecasting.forecasts(model, params, layout._replace(ahead=1), [each])
    np.testing.assert_allclose(one.ahead[:16, 0], found.ahead[:16, 0], atol=1e-5)
    heads, rows = forecasting.table(layout, [each], [found])
    assert heads == ["row", "y, observed", "y, predicted", "y, predicted 2 ahead", "y, predicted 3 ahead"]
    assert [row[0] for row in rows] == list(range(20)) and all(row[2] != "" for row in rows[1:])
    assert [row[1] == "" for row in rows] == [t >= 15 for t in range(20)]
    origins = forecasting.backtest(layout, [each], [found], 4)
    assert [origin["row"] for origin in origins] == [1, 5, 8, 12]
    expected = np.sqrt(np.mean((found.ahead[8, :, 0] - y[8:11, 0]) ** 2))
    assert origins[2]["rmse"]["y"] == pytest.approx(expected)


def test_a_series_is_forecast_alike_alone_among_others_and_in_rows_that_are_mixed(tmp_path, trained):
    layout, model, params = trained
    rng = np.random.default_rng(2)
    rows = [[name, f"day {t}", *rng.normal(size=2)] for name, n in (("b", 9), ("=a", 12), ("c", 4)) for t in range(n)]
    mixed = sorted(rows, key=lambda row: (int(row[1][4:]), row[0]))
    names = ["shop", "day", "x", "y"]
    found = {}
    for how, order in (("apart", rows), ("mixed", mixed)):
        path = write(tmp_path / f"{how}.csv", names, order)
        data = tables.read({"train": path, "test": path}, ["x", "y"], ["y"], series="shop", time="day")["test"]
        told = forecasting.forecasts(model, params, layout, data)
        found[how] = dict(zip([each.name for each in data], told, strict=True))
        table = forecasting.table(layout, data, told, "shop", "day")
        assert table[0][:3] == ["row", "shop", "day"] and len(table[1]) == 25
        assert all(
            [row[1], row[2], row[3]] == [order[row[0]][0], order[row[0]][1], order[row[0]][3]] for row in table[1]
        )
    assert list(found["mixed"]) == ["=a", "b", "c"]
    for each in data:
        (alone,) = forecasting.forecasts(model, params, layout, [each])
        for other in (found["apart"][each.name], found["mixed"][each.name]):
            np.testing.assert_allclose(alone.ahead, other.ahead, atol=1e-5)
    window = series.streams(layout, data, 2)
    assert window.resets.sum() == 3 and window.valid.sum() == 25 and window.weights.sum() == 25 - 3


def test_a_test_that_goes_on_where_training_ended_is_the_end_of_both_joined(tmp_path, trained):
    layout, model, params = trained
    rows = np.random.default_rng(3).normal(size=(30, 2)).tolist()
    paths = {name: write(tmp_path / f"{name}.csv", ["x", "y"], part) for name, part in (("train", rows[:20]), ("test", rows[20:]), ("both", rows))}  # fmt: skip
    given = str(paths["train"]), str(paths["test"])
    data = series.data_of(train=given[0], test=given[1], inputs="x,y", targets="y", warm_up="train")
    both = series.data_of(train=given[0], test=str(paths["both"]), inputs="x,y", targets="y")
    told, whole = (forecasting.forecasts(model, params, layout, each["test"]) for each in (data, both))
    np.testing.assert_array_equal(told[0].ahead, whole[0].ahead)
    table, of_both = forecasting.table(layout, data["test"], told)[1], forecasting.table(layout, both["test"], whole)[1]
    assert table == [[row[0] - 20, *row[1:]] for row in of_both[20:]] and all(row[2] != "" for row in table)
    assert series.streams(layout, data["test"], 1).weights.sum() == 10
    last = series.data_of(train=given[0], test=given[1], inputs="x,y", targets="y", warm_up=5)["test"][0]
    np.testing.assert_array_equal(last.inputs, rows[15:])


def test_direct_targets_are_those_of_the_steps_to_come_and_end_with_the_file():
    y = np.arange(6.0)[:, None]
    layout = series.Layout(["y"], ["y"], 3, True, {"y": (0, 1)})
    window = series.streams(layout, [a_series(y, y)], 1)
    values, there = window.targets
    np.testing.assert_array_equal(np.where(there, values, -1)[0, 1:], [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, -1], [5, -1, -1]])  # fmt: skip
    assert window.inputs[0, 1:, 0].tolist() == [0, 1, 2, 3, 4] and not there[0, 0].any()
    np.testing.assert_allclose(window.weights[0], [0, 1, 1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("by", ["recursive", "direct"])
def test_a_launch_looks_ahead_and_past_the_end(tmp_path, files, by):
    workdir = tmp_path / "run"
    arguments = "--inputs=y,x", "--targets=y", "--time=t", "--warm_up=50", "--ahead=3", f"--ahead_by={by}", "--season=3"
    rows = list(csv.reader(files["test"].open()))
    write(files["test"], rows[0], [*rows[1:-2], *([t, x, "", ""] for t, x, *_ in rows[-2:])])
    ran = launch("forecast", workdir, *flags(files), *arguments, "--origins=5", *SMALL)
    told = list(csv.DictReader((workdir / "predictions.csv").open()))
    (workdir / "predictions.csv").unlink()
    found = results(ran, workdir)
    assert "Read one row late, as the past of what is told: y." in ran.stdout
    assert [row["t"] for row in told[:200]] == [row[0] for row in rows[1:]] and all(
        row["y, predicted"] for row in told[:200]
    )
    assert [row["y, observed"] == "" for row in told[:200]] == [t >= 198 for t in range(200)]
    assert len(told) == (
        200 if by == "recursive" else 201
    )  # the outputs of the last origin reach further than the file's x
    assert [step["ahead"] for step in found["steps_ahead"]] == [1, 2, 3] and len(found["origins"]) == 5
    first, last = (found["steps_ahead"][k]["rmse"] for k in (0, 2))
    assert (
        first["model"]["y"] < first["naive"]["y"] < first["seasonal"]["y"] and last["model"]["y"] < last["naive"]["y"]
    )
    assert json.loads((workdir / "run.json").read_text())["codec"]["ahead"] == 3


def test_many_series_of_one_file_each_begin_anew(tmp_path):
    """Only its first row tells a series' level."""
    rng = np.random.default_rng(0)
    paths = {}
    for name, n in (("train", 60), ("test", 20)):
        levels = rng.choice([-1, 1], n)
        rows = [[k, level if t == 0 else 0, level] for k, level in enumerate(levels) for t in range(10)]
        paths[name] = write(tmp_path / f"{name}.csv", ["id", "x", "y"], rows)
    workdir = tmp_path / "run"
    ran = launch("forecast", workdir, *flags(paths), "--series=id", "--inputs=x", "--targets=y", *SMALL, "--updates=200", "--window=10")  # fmt: skip
    told = list(csv.DictReader((workdir / "predictions.csv").open()))
    (workdir / "predictions.csv").unlink()
    found = results(ran, workdir)
    assert found["test_mse"] < 0.02 and found["carry"]["since_reset"] <= 10
    assert [row["id"] for row in told] == [str(k) for k in range(20) for _ in range(10)]


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
GIVEN = "--train={train}", "--test={test}"
WRONG = {
    "no test": (["--train={train}", "--targets=y"], "--test=FILE"),
    "no train": (["--targets=y"], "--train=FILE"),
    "a series that is an input": ([*GIVEN, "--inputs=x", "--targets=y", "--series=x"], "series column 'x' is among"),
    "recursion without a past": (
        [*GIVEN, "--inputs=x", "--targets=y", "--ahead=2", "--ahead_by=recursive"],
        "or choose direct",
    ),
    "too many origins": ([*GIVEN, "--targets=y", "--ahead=20", "--origins=181"], "180 rows from which 20 steps"),
    "another file to warm up": ([*GIVEN, "--targets=y", "--warm_up=valid"], "it needs to be 'train'"),
    "more rows than there are": ([*GIVEN, "--targets=y", "--warm_up=1001"], "from 0 to 1000"),
    "fill of nothing": (["--fill=mean"], "--fill needs --train=FILE"),
    "a column twice": (["--train={train}", "--test={test}", "--inputs=x,x", "--targets=y"], "more than once"),
    "both states": (["--stateful", "--stateless"], "contradict"),
    "both budgets": (["--updates=3", "--epochs=3"], "one of them"),
    "burn-in of a carried state": (["--burn_in=3"], "--stateless"),
    "burn-in of a whole window": (["--stateless", "--window=5", "--burn_in=5"], "choose less"),
    "an influence": (["--influence=uroo"], "truncate, replay"),
}


@pytest.mark.parametrize("content, said", BROKEN.values(), ids=BROKEN)
def test_a_bad_file_is_a_sentence_with_its_place(program, tmp_path, monkeypatch, content, said):
    (bad := tmp_path / "bad.csv").write_text(content)
    arguments = f"--train={bad}", f"--test={bad}", "--inputs=x", "--targets=y", "--lanes=4", "--window=20"
    assert refused(program, monkeypatch, tmp_path / "run", arguments, said).endswith((".", "]"))


@pytest.mark.parametrize("arguments, said", WRONG.values(), ids=WRONG)
def test_flags_that_do_not_go_together_are_a_sentence(program, tmp_path, monkeypatch, files, arguments, said):
    arguments = [argument.format(**files) for argument in arguments]
    assert refused(program, monkeypatch, tmp_path / "run", arguments, said).endswith((".", "]"))


def test_a_file_of_ones_own_is_not_written_over_by_what_is_generated(program, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    own = write(tmp_path / "run" / "test.csv", ["mine"], [[1]])
    before = own.read_bytes()
    refused(program, monkeypatch, tmp_path / "run", [], "test.csv is not the series that is generated here.*--test")
    assert own.read_bytes() == before
