"""The sweep's report: one page that needs nothing else, the same from the same results, whatever is missing in them."""

import copy
import csv
import html.parser
import importlib.resources
import re

import pytest

from tbptt_jax import study
from tbptt_jax.study.report import FIELDS, charts, reading

SERIES = (("stateful", "truncate"), ("stateless", "truncate"))
KINDS = {"final_metric.svg", "curves.svg", "reach.svg", "cost.svg", "bias.svg", "decay.svg"}


def results(windows=(2, 8), rates=(0.01, 0.1), seeds=2, series=SERIES, budgets=("data", "updates")):
    def row(budget, carry, influence, window, rate):
        updates = 64 // window if budget == "data" else 8
        score = window / 10 - rate
        x = [1, updates // 2, updates]
        return {
            "task": "first_bit", "carry": carry, "influence": influence, "window": window, "learning_rate": rate,
            "seeds": seeds, "budget": budget, "updates": updates, "steps": updates * window, "final_loss": 1 - score,
            "final_metric": score, "losses": [1 - score] * seeds, "metrics": [score + s / 100 for s in range(seeds)],
            "exact_metric": 1.0 if carry == "stateful" else None,
            "curve": {
                "updates": x, "steps": [n * window for n in x],
                "loss": [0.7, 0.4, 0.1], "low": [0.6, 0.3, 0.05], "high": [0.8, 0.5, 0.2],
            },
            "seconds": 0.5 * updates, "compile_seconds": 1.0, "temp_bytes": 4096 * window,
        }  # fmt: skip

    return {
        "task": "first_bit",
        "metric": {"name": "test accuracy", "better": "higher", "unit": ""},
        "rows": [row(b, c, i, k, r) for b in budgets for c, i in series for k in windows for r in rates],
        "bias": [
            {"model": model, "influence": "truncate", "window": k, "relative_bias": 0.5**k, "cosine": 0.9}
            for model in ("untrained", "trained")
            for k in windows
        ],
        "decay": {"trained": {"norms": [0.5**lag for lag in range(9)], "rate": 0.5}},
        "suggested": {"trained": {"window": 5, "reason": "Windows of 5 bound the relative bias by 0.1."}},
        "failed": [],
        "recommendation": {"window": 8, "carry": "stateful", "influence": "truncate", "sentence": "Use windows of 8."},
        "command": "python -m experiments.truncation_sweep --seeds=2",
        "git": "abc",
        "flags": {"seeds": seeds},
        "versions": {"jax": "0"},
        "device": "2 x cpu",
    }


class Page(html.parser.HTMLParser):
    """Reads a page to its end, each tag closed in its turn; gathers attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.tags, self.text, self.open = [], set(), [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())

    def all(self, name):
        return [value for key, value in self.attributes if key == name]


def written(directory, of):
    study.report(directory, of)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory.mktemp("report"), results())


def best(**settings):
    return reading.best_rates(
        [{**row, "series": reading.series_of(row)} for row in results(**settings)["rows"]], higher=True
    )


def test_the_same_results_give_the_same_bytes(files, tmp_path):
    given = results()
    before = copy.deepcopy(given)
    assert written(tmp_path, given) == files and given == before
    assert set(files) == {"report.html", "rows.csv", *KINDS}


def test_the_page_and_its_charts_need_nothing_but_themselves(files):
    text = files["report.html"].decode()
    page = Page(text)
    assert not {"script", "link", "img", "image", "iframe", "object", "base"} & page.tags
    assert "@import" not in text and "url(" not in text and not page.all("src")
    targets, names = page.all("href"), page.all("id")
    assert targets and all(target.startswith("#") for target in targets)
    assert len(names) == len(set(names)) and {target[1:] for target in targets} <= set(names)
    for name in KINDS:
        assert not {"script", "image", "style"} & Page(files[name].decode()).tags and b"var(" not in files[name]


def test_every_chart_has_a_text_and_every_box_that_scrolls_takes_the_keyboard(files):
    page = Page(files["report.html"].decode())
    assert page.all("role").count("img") == files["report.html"].count(b"<svg") == 15
    assert all(page.all("aria-label")) and page.all("class").count("scroll") == page.all("role").count("region")
    assert page.all("tabindex").count("0") == page.all("role").count("region") + 1  # and the command


def test_charts_take_their_colours_from_the_page_in_light_and_dark_in_sight_of_it(files):
    used = set(
        re.findall(r"var\(--(\w+)\)", "".join(re.findall(r"<svg.*?</svg>", files["report.html"].decode(), re.S)))
    )
    css = (importlib.resources.files("tbptt_jax.study.report") / "palette.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in css.split("@media"))
    assert {"ink", "muted", "rule", "s0", "s1", "w0", "w7"} <= used <= light.keys() == dark.keys()

    def luminance(colour):
        shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colours in (light, dark):
        page = luminance(colours.pop("page"))
        colours.pop("rule")
        for colour in colours.values():
            low, high = sorted((page, luminance(colour)))
            assert (high + 0.05) / (low + 0.05) > 2.5, colour


def test_series_and_windows_differ_without_colour():
    series = [f"{carry}, {influence}" for carry in ("stateful", "stateless") for influence in "abcd"]
    line, marks = charts.lines(series)
    assert len(set(marks["encoding"]["shape"]["scale"]["range"])) == len(series)
    assert line["encoding"]["strokeDash"]["condition"]["test"] == "indexof(datum.series, 'stateless') == 0"
    (panel, *_) = charts.curve_panels(best(), [2, 8], float("nan"))
    assert len(set(panel["layer"][2]["encoding"]["shape"]["scale"]["range"])) == 2


def test_every_number_of_the_page_comes_from_the_results(files):
    lines = list(csv.DictReader(files["rows.csv"].decode().splitlines()))
    rows, text = results()["rows"], files["report.html"].decode()
    assert len(lines) == len(rows) == 16 and "Show 16 rows" in Page(text).text
    for line, row in zip(lines, rows, strict=True):
        assert line["metrics"].split() == [str(x) for x in row["metrics"]]
        assert all(line[key] == str(row[key]) for key in ("budget", "carry", "window", "learning_rate", "final_metric"))
    table = text[text.index("Show 16 rows") : text.index("Repeat this run</h2>")]
    cells = [re.findall(r"<td.*?>(.*?)</td>", line) for line in re.findall(r"<tr>(<td.*?)</tr>", table)]
    assert cells == [[reading.value(row[field]) for field in FIELDS] for row in rows]
    drawn = {(at["x"], at["series"], at["y"]) for panel in charts.metric_panels(best(), {"name": "a", "unit": "", "better": "higher"}) for at in panel["data"]["values"]}  # fmt: skip
    assert drawn == {
        (row["window"], reading.series_of(row), row["final_metric"]) for row in rows if row["learning_rate"] == 0.01
    }


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_best_rate_is_that_of_the_metric_and_one_that_diverged_is_never(better):
    rows = results(rates=(0.01, 0.1, 1.0), windows=(8, 2), budgets=("data",))["rows"]
    for row in rows:
        row["series"] = reading.series_of(row)
        if row["learning_rate"] == {"higher": 0.01, "lower": 1.0}[better]:
            row["final_metric"] = [None, float("nan"), float("inf")][row["window"] % 3]
    chosen = reading.best_rates(rows, higher=better == "higher")
    assert [row["window"] for row in chosen] == [2, 2, 8, 8]
    assert {row["learning_rate"] for row in chosen} == {0.1}


def test_the_time_to_reach_a_loss_is_that_of_the_first_place_of_the_curve_at_or_below_it():
    rows = best(windows=(2, 4, 8), rates=(0.01,), series=SERIES[:1], budgets=("data",))
    ends = {2: [0.9, None, 0.8], 4: [0.6, 0.2, 0.3], 8: [0.7, 0.3, 0.25]}
    for row in rows:
        row["final_metric"], row["metrics"] = (0.1 if row["window"] == 2 else 0.9), [0.9, 0.9]
        row["curve"] |= {"loss": ends[row["window"]]}
    level, reached = reading.time_to_reach(rows, higher=True)
    assert level == 0.3  # the higher end of the two that are as good as the best
    for row, at in zip(rows, reached, strict=True):
        place = {2: None, 4: 1, 8: 1}[row["window"]]
        if place is None:
            assert all(at[unit] != at[unit] for unit in ("updates", "steps", "seconds"))
        else:
            assert [at["updates"], at["steps"]] == [row["curve"][unit][place] for unit in ("updates", "steps")]
            assert at["seconds"] == row["seconds"] * at["updates"] / row["updates"]


@pytest.mark.parametrize(
    ("at", "ask", "bias", "says"),
    [
        (2, 8, 0.4, "Why 2, when the gradients suggest 8? … off by 0.4 of its length, but a carried state can hold"),
        (2, 8, 0.05, "Why 2, when the gradients suggest 8? … The bound is cautious: … bias of windows of 2 is 0.05."),
        (2, 8, None, "Why 2, when the gradients suggest 8? … cut the gradient short, but a carried state can hold"),
        (8, 2, 0.05, "Why 8, when the gradients suggest only 2? … accuracy 0.79 with windows of 8, … 0.19 with 2."),
        (8, 5, 0.05, "Why 8, when the gradients suggest only 5? … windows of 5 to 7 were not trained."),
        (8, 8, 0.05, "Training and gradients agree on 8: test accuracy 0.79 … the best of all … (measured, 0.05)"),
        (None, 8, 0.05, ""),
    ],
)
def test_the_page_says_why_the_recommended_and_the_suggested_window_differ(at, ask, bias, says, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "svg", lambda panels: "<svg></svg>")  # not looked at here
    told = results(rates=(0.01,), windows=(2, 8), series=SERIES[:1], budgets=("data",))
    told["recommendation"]["window"] = at
    told["suggested"]["trained"]["window"] = ask
    told["bias"] = [{"model": "trained", "influence": "truncate", "window": at, "relative_bias": bias}] if at else []
    text = " ".join(" ".join(Page(written(tmp_path, told)["report.html"].decode()).text).split())
    assert all(part in text for part in says.split(" … ")) if says else "gradients suggest" not in text


def test_a_tasks_own_parameters_tell_a_series_from_another(tmp_path):
    told = results(rates=(0.01,), series=SERIES[:1])
    told["rows"] += [{**row, "params": {"hidden": 16}, "final_metric": 0.5} for row in told["rows"]]
    made = written(tmp_path, told)
    assert "stateful, truncate, hidden 16" in made["final_metric.svg"].decode()
    lines = list(csv.DictReader(made["rows.csv"].decode().splitlines()))
    assert [line["params"] for line in lines] == [""] * 4 + ['{"hidden": 16}'] * 4


def nulls():
    told = results(windows=(2, 4, 8), rates=(0.01,), series=SERIES[:1])
    for row in told["rows"][1::2]:
        curve = {key: [None] * 3 if key in ("loss", "low", "high") else x for key, x in row["curve"].items()}
        told["rows"][told["rows"].index(row)] = {
            key: row[key] if key in ("budget", "carry", "influence", "window", "learning_rate") else None for key in row
        } | {"metrics": [None, 0.5], "losses": [None, None], "curve": curve}
    told["bias"][0] |= {"relative_bias": None, "cosine": None}
    told["decay"]["untrained"] = {"norms": [None, 0.0, 0.1], "rate": None}
    told["suggested"]["untrained"] = {"window": None, "reason": "None."}
    return told


LACKING = {
    "nulls": nulls(),
    "one window, one seed, one rate": results(windows=(5,), rates=(0.01,), seeds=1, series=SERIES[:1], budgets=("updates",)),
    "no bias, one point failed": {**results(windows=(2,), series=SERIES[1:]), "bias": [], "decay": {}, "suggested": {}, "failed": [{"window": 9, "error": "Out of memory."}]},
    "nothing": {"task": "lag", "metric": {"name": "loss", "better": "lower", "unit": "nats"}, "rows": []},
    "all diverged": {**results(windows=(2,), series=SERIES[:1]), "bias": [], "rows": [{**row, "final_metric": None, "final_loss": None, "metrics": [], "curve": {}} for row in results(windows=(2,), series=SERIES[:1])["rows"]]},
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lacking", LACKING)
def test_what_is_lacking_is_left_out(lacking, tmp_path):
    told = LACKING[lacking]
    for stale in ("bias.svg", "curves.svg"):
        (tmp_path / stale).write_bytes(b"of a run before")
    made = written(tmp_path, told)
    page = Page(made["report.html"].decode())
    assert not {"nan", "None", "undefined", "NaN"} & set(" ".join(page.text).split())
    assert ("bias.svg" in made) == bool(told.get("bias")) and b"of a run before" not in made.values()
    assert len(made["rows.csv"].splitlines()) == 1 + len(told["rows"])
    assert ("Failed points" in page.text) == bool(told.get("failed"))


def scheduled(scores=(0.6, 0.6), seconds=3.0):
    """Results with a schedule's rows: two seeds of 64 steps, in windows of 2, then 8; a look of each found nothing safe."""
    told = results(rates=(0.01,), series=SERIES[:1])
    for row in [row for row in told["rows"] if row["window"] == 8]:
        score = sum(scores) / len(scores)
        looks = [{"updates": n, "steps": at, "window": k, "bias_bound": b, "horizon": 3, "safe": safe, "reason": "Why.", "seconds": 0.25}
                 for n, at, k, b, safe in ((0, 0, 2, 0.25, True), (16, 32, 8, None, False))]  # fmt: skip
        told["rows"].append({**row, "window": "auto", "updates": 20, "steps": 64, "final_metric": score, "metrics": list(scores), "exact_metric": None,
                             "seconds": seconds, "look_seconds": 1.0, "mean_window": 3.2, "temp_bytes": None,
                             "windows": [[[0, 2], [32, 8], [64, 8]]] * 2, "looks": [looks] * 2})  # fmt: skip
    return {**told, "settings": {"schedules": {"auto": {"adaptive": 0.5}}}}


@pytest.mark.parametrize(
    ("scores", "beside"),
    [
        ((0.6, 0.6), "worse than the best window of one length, 8, with 0.79."),
        ((0.7, 0.88), "as good as the best window of one length, 8, with 0.79, within the spread of seeds."),
        ((0.95, 0.95), "better than the best window of one length, 8, with 0.79."),
    ],
)
def test_what_a_schedule_chose_how_well_it_did_and_what_it_cost_is_told(scores, beside):
    (data, updates) = reading.on_schedules(scheduled(scores)["rows"], {"name": "accuracy", "better": "higher"})
    score = reading.value(sum(scores) / 2)
    assert data["sentence"] == (
        f"Auto (stateful, truncate), at equal data, ends at accuracy {score}, {beside} Of its steps it read 50% in windows "
        "of 2 and 50% in windows of 8; a window had 3.2 steps in the mean. At 2 of 4 looks no window was known to be safe, "
        "and the longest was used. It took 3 s, of them 1 for 4 looks, and 1 s to compile. The 2 windows of one length took "
        "20 s and 2 s to compile, and read 2 times as many steps."
    )
    assert "at equal updates" in updates["sentence"] and "read 1.25 times as many steps" in updates["sentence"]


def test_a_schedule_stands_beside_the_windows_and_its_choices_are_drawn_and_kept(tmp_path, files):
    made = written(tmp_path, scheduled())
    page, text = Page(made["report.html"].decode()), " ".join(Page(made["report.html"].decode()).text)
    assert "Windows that change in training" in page.text and "Auto at equal data" in page.text
    assert ">auto<" in made["final_metric.svg"].decode() and ">auto<" in made["curves.svg"].decode()
    assert {"schedules.svg", "looks.csv"} == set(made) - set(files)
    looks = list(csv.DictReader(made["looks.csv"].decode().splitlines()))
    assert [(x["budget"], x["seed"], x["steps"], x["chosen"], x["bias_bound"], x["safe"]) for x in looks] == [
        (budget, seed, *look)
        for budget in ("data", "updates")
        for seed in "01"
        for look in (("0", "2", "0.25", "True"), ("32", "8", "", "False"))
    ]
    rows = list(csv.DictReader(made["rows.csv"].decode().splitlines()))
    assert [row["mean_window"] for row in rows if row["window"] == "auto"] == ["3.2"] * 2
    assert not {"nan", "None", "undefined"} & set(text.split())
    (windows, bias, *_) = charts.schedule_panels(reading.on_schedules(scheduled()["rows"], {"name": "a", "better": "higher"}), {"auto": 0.5})  # fmt: skip
    assert [(at["x"], at["y"]) for at in windows["data"]["values"]] == [(0, 2), (32, 8), (64, 8)] * 2
    assert [at["y"] for at in bias["data"]["values"]] == [0.25, None] * 2
    study.report(tmp_path, results())
    assert not (tmp_path / "looks.csv").exists() and not (tmp_path / "schedules.svg").exists()


def test_what_is_told_is_text_never_markup(tmp_path):
    told = results(windows=(2,), rates=(0.01,), series=[("<script>a</script>", "$x_1$ & \"'</svg>")], budgets=("data",))
    told["failed"] = [{"error": "<script>b</script>"}]
    told["recommendation"]["sentence"] = told["command"] = told["git"] = told["task"] = "<script>c</script>"
    told["about"] = told["metric"]["name"] = told["metric"]["unit"] = "<script>e</script>"
    told["flags"] = told["versions"] = {"<script>d": "</script>"}
    page = Page(written(tmp_path, told)["report.html"].decode())
    assert "script" not in page.tags
    assert {"<script>b</script>", "<script>c</script>", "<script>a</script>, $x_1$ & \"'</svg>"} <= set(page.text)


def test_what_is_told_is_no_formula_of_a_spreadsheet(tmp_path):
    told = results(windows=(2,), rates=(0.01,), series=SERIES[:1], budgets=("data",))
    told["rows"][0] |= {"task": "=cmd|' /C calc'!A0", "final_metric": -0.5, "@note": "+1"}
    (line,) = csv.DictReader(written(tmp_path, told)["rows.csv"].decode().splitlines())
    assert (line["task"], line["final_metric"], line["'@note"]) == ("'=cmd|' /C calc'!A0", "-0.5", "'+1")


def test_a_failure_writes_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="have no metric, rows: give those of a sweep"):
        study.report(tmp_path, {"task": "lag"})
    monkeypatch.setattr(charts, "svg", lambda panels: 1 / (len(panels) - 1))  # the page draws one by one
    with pytest.raises(ZeroDivisionError):
        study.report(tmp_path, results(windows=(2,), rates=(0.01,), series=SERIES[:1], budgets=("updates",)))
    assert not list(tmp_path.iterdir())
