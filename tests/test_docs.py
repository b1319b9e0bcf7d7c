"""The documentation is true: its programs run as pasted and print what it says, its flags exist, its site builds."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys
import types

import launches
import pytest

import tbptt_jax as tb

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if blocks(page.name, "python")]
PAGES.remove("influences.md")  # test_influence.py runs it, and goes on with the influence that it defines


@pytest.mark.parametrize("page", PAGES)
def test_a_page_s_program_runs_as_pasted_and_prints_what_the_page_says(page):
    """In a process of its own: Keras takes its backend from the environment, and a reader has float32."""
    ran = launches.Forked(functools.partial(exec, "\n".join(blocks(page, "python")), {"__name__": "__main__"}))
    ran.communicate()
    assert ran.returncode == 0, ran.stderr
    said = "".join(blocks(page, "text"))
    assert NUMBER.sub("#", ran.stdout) == NUMBER.sub("#", said)
    for line, told in zip(ran.stdout.splitlines(), said.splitlines(), strict=True):
        for number, expected in zip(NUMBER.findall(line), NUMBER.findall(told), strict=True):
            near = {"rel": 0.1, "abs": 0.02} if "." in number else {"rel": 0.3}  # a window that is chosen
            assert float(number.replace(",", "")) == pytest.approx(float(expected.replace(",", "")), **near), line


def test_every_flag_that_the_pages_name_exists():
    def flags_of(name):
        program = (ROOT / "experiments" / f"{name}.py").read_text()
        own = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', program))
        return own.union(*(flags_of(of) for of in ("tasks", "training") if f"{of}.define" in program))

    shared = flags_of("launch") | flags_of("processes") | {"help", "flagfile"}
    launches = {path.stem: flags_of(path.stem) | shared for path in (ROOT / "experiments").glob("*.py")}
    named = 0
    for page in DOCS.glob("*.md"):
        for line in re.sub(r" \\\n", " ", page.read_text()).splitlines():
            for name, arguments in re.findall(r"-m experiments\.([a-z_]+)\b([^`#]*)", line):
                unknown = {flag.removeprefix("no") for flag in re.findall(r"--(\w+)", arguments)} - launches[name]
                assert not unknown, f"{page.name}: experiments.{name} has no {unknown}"
                named += 1
    assert named > 10
    everything = set().union(*launches.values())
    in_prose = set(re.findall(r"`--(?:no(?=resume))?(\w+)[=`]", (DOCS / "experiments.md").read_text()))
    assert in_prose <= everything, in_prose - everything


def test_every_public_name_is_in_the_reference_in_reading_order():
    body = ast.parse((ROOT / "tbptt_jax" / "__init__.py").read_text()).body
    names = [node.names[0].name for node in body if isinstance(node, ast.ImportFrom)]
    modules = {name for name in names if isinstance(getattr(tb, name), types.ModuleType)}
    tasks = [f"tasks.{path.stem}" for path in (ROOT / "tbptt_jax" / "tasks").glob("[!_]*.py")]
    pages = [(DOCS / "api" / f"{page}.md").read_text() for page in ("data", "models", "training", "tools")]
    paths = re.findall(r"^::: tbptt_jax\.(\S+)", "\n".join(pages), re.M)
    assert modules - {"tasks"} | set(tasks) <= set(paths)
    functions = [name for name in names if name not in modules]
    assert [name for path in paths if (name := path.rpartition(".")[2]) in functions] == functions


def test_the_site_builds_without_a_warning_and_asks_nothing_of_a_network(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 9
    for page in pages:
        html = page.read_text()
        assert not re.search(r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//', html), page
        assert not re.search(r'<link[^>]* rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//', html), page
        assert ":func:" not in html and ":class:" not in html and "\n::: " not in html, page
