"""The sweep's report: one page that needs nothing else, the same from the same results, whatever is missing in them."""

import copy
import csv
import html.parser
import re

import pytest

from experiments import report

SERIES = (("stateful", "truncate"), ("stateless", "truncate"))


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
    report.write(directory, of)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory.mktemp("report"), results())


def test_the_same_results_give_the_same_bytes(files, tmp_path):
    given = results()
    before = copy.deepcopy(given)
    assert written(tmp_path, given) == files and given == before
    pictures = {"final_metric.png", "curves.png", "cost.png", "bias.png", "decay.png"}
    assert set(files) == {"report.html", "rows.csv", *pictures}
    assert all(files[name].startswith(b"\x89PNG") for name in pictures)


def test_the_page_needs_nothing_but_itself(files):
    text = files["report.html"].decode()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & page.tags and "@import" not in text
    targets = [*page.all("href"), *(f"#{name}" for name in re.findall(r"url\(#(.*?)\)", text))]
    assert targets and all(target.startswith("#") for target in targets) and not page.all("src")
    assert text.count("url(") == text.count("url(#")
    names = page.all("id")
    assert len(names) == len(set(names)) and {target[1:] for target in targets} <= set(names)
    assert len(page.all("viewbox")) == page.all("role").count("img") == 12


def test_charts_take_the_colours_of_the_page_and_a_tick_for_each_window(files):
    text = files["report.html"].decode()
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    used = {name for chart in charts for name in re.findall(r"var\(--(\w+)\)", chart)}
    light, dark = (set(re.findall(r"--(\w+):#", block)) for block in re.findall(r":root\{(.*?)\}", text))
    assert {"ink", "muted", "rule", "s0", "s1", "w2", "w8"} <= used <= light == dark
    assert not [chart for chart in charts if re.search(r"#[0-9a-f]{6}\b", chart)]
    assert {">2</text>", ">8</text>"} <= set(re.findall(r">\d+</text>", charts[0]))


def test_every_row_is_in_the_table_and_in_the_csv(files):
    lines = list(csv.DictReader(files["rows.csv"].decode().splitlines()))
    rows = results()["rows"]
    assert len(lines) == len(rows) == 16
    for line, row in zip(lines, rows, strict=True):
        assert line["metrics"].split() == [str(x) for x in row["metrics"]]
        assert all(line[key] == str(row[key]) for key in ("budget", "carry", "window", "learning_rate", "final_metric"))
    assert "Show 16 rows" in Page(files["report.html"].decode()).text


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_best_rate_is_that_of_the_metric_and_one_that_diverged_is_never(better):
    rows = results(rates=(0.01, 0.1, 1.0), windows=(8, 2), budgets=("data",))["rows"]
    for row in rows:
        if row["learning_rate"] == {"higher": 0.01, "lower": 1.0}[better]:
            row["final_metric"] = [None, float("nan"), float("inf")][row["window"] % 3]
    best = report.best_rates(rows, higher=better == "higher")
    assert [row["window"] for row in best] == [2, 2, 8, 8]
    assert {row["learning_rate"] for row in best} == {0.1}


def nulls():
    told = results(windows=(2, 4, 8), rates=(0.01,), series=SERIES[:1])
    for row in told["rows"][1::2]:
        curve = {key: [None] * 3 if key in ("loss", "low", "high") else x for key, x in row["curve"].items()}
        told["rows"][told["rows"].index(row)] = {
            key: row[key] if key in (*report.POINT, "learning_rate") else None for key in row
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
    for stale in ("bias.png", "curves.png"):
        (tmp_path / stale).write_bytes(b"of a run before")
    made = written(tmp_path, told)
    page = Page(made["report.html"].decode())
    assert "nan" not in " ".join(page.text).split()
    assert ("bias.png" in made) == bool(told.get("bias")) and b"of a run before" not in made.values()
    assert len(made["rows.csv"].splitlines()) == 1 + len(told["rows"])
    assert ("Failed points" in page.text) == bool(told.get("failed"))


def test_what_is_told_is_text_never_markup(tmp_path):
    told = results(windows=(2,), rates=(0.01,), series=[("<script>a</script>", "$x_1$ & \"'</svg>")], budgets=("data",))
    told["failed"] = [{"error": "<script>b</script>"}]
    told["recommendation"]["sentence"] = told["command"] = told["git"] = told["task"] = "<script>c</script>"
    told["flags"] = told["versions"] = {"<script>d": "</script>"}
    page = Page(written(tmp_path, told)["report.html"].decode())
    assert "script" not in page.tags
    assert {
        "<script>b</script>",
        "<script>c</script>",
        "<script>a</script>, $x_1$ & \"'</svg>",
    } <= set(page.text)


def test_what_is_told_is_no_formula_of_a_spreadsheet(tmp_path):
    told = results(windows=(2,), rates=(0.01,), series=SERIES[:1], budgets=("data",))
    told["rows"][0] |= {"task": "=cmd|' /C calc'!A0", "final_metric": -0.5, "@note": "+1"}
    (line,) = csv.DictReader(written(tmp_path, told)["rows.csv"].decode().splitlines())
    assert (line["task"], line["final_metric"], line["'@note"]) == ("'=cmd|' /C calc'!A0", "-0.5", "'+1")


def test_a_failure_writes_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"have no metric, rows: give those of experiments\.truncation_sweep"):
        report.write(tmp_path, {"task": "lag"})
    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(tmp_path, results(windows=(2,), rates=(0.01,), series=SERIES[:1], budgets=("data",)))
    assert not list(tmp_path.iterdir())
