"""Text: what is a target of what, which files are read how, and what a model writes."""

import gzip
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tbptt_jax as tb
from tbptt_jax import study
from tbptt_jax.study import text


def streams_of(window):
    """The sequences of a window, each as the list of its inputs and the last target, wherever it was laid."""
    found = []
    for lane in range(window.inputs.shape[0]):
        steps = np.flatnonzero(window.valid[lane])
        for begin in np.split(steps, np.flatnonzero(window.resets[lane][steps])[1:]):
            x, y = window.inputs[lane, begin], window.targets[lane, begin]
            np.testing.assert_array_equal(x[1:], y[:-1])  # each target is the next input of the same document
            found.append([*x.tolist(), int(y[-1])])
    return found


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), lanes=st.integers(1, 4))
def test_no_target_is_of_another_document_and_each_begins_anew(lengths, lanes):
    numbers = np.arange(sum(lengths))  # no two alike
    documents = np.split(numbers, np.cumsum(lengths)[:-1])
    if max(lengths) < 2:
        with pytest.raises(ValueError, match="nothing to predict"):
            tb.streams.documents(documents, lanes=lanes)
        return
    window = tb.streams.documents(documents, lanes=lanes)
    assert sorted(streams_of(window)) == [each.tolist() for each in documents if len(each) > 1]


@pytest.fixture
def files(tmp_path):
    def write(*texts):
        paths = [tmp_path / f"{i}.txt" for i in range(len(texts))]
        for path, each in zip(paths, texts, strict=True):
            path.write_bytes(each if isinstance(each, bytes) else each.encode())
        return [str(path) for path in paths]

    return write


def told(task, which):
    """The documents that a task lays, as texts, sorted."""
    window = getattr(task, which)()
    return sorted(text.decode(np.asarray(each), task.codec) for each in streams_of(window))


@pytest.mark.parametrize("unit", ["characters", "bytes"])
@pytest.mark.parametrize(
    ("documents", "end"), [("lines", "\n"), ("\n\n", "\n\n"), (r"\n\n", "\n\n"), ("<|end|>", "<|end|>")]
)
def test_a_document_ends_with_what_ends_it_and_the_last_whole_ones_are_held_out(files, documents, end, unit):
    wanted = [f"é{i:02}{'ab' * (i % 4)}{end}" for i in range(40)]
    paths = files(
        "".join(wanted[:30]) + end, "".join(wanted[30:])[: -len(end)]
    )  # an empty one, and one without its end
    wanted[-1] = wanted[-1].removesuffix(end)
    task = text.char_lm(paths, documents=documents, unit=unit, lanes=3)
    train, held_out = told(task, "train"), told(task, "test")
    assert (
        sorted(each for each in train + held_out if each != end) == wanted
    )  # an end alone of two characters is one too
    assert held_out == wanted[-len(held_out) :] and 2 <= len(held_out) <= 4


def test_several_files_are_documents_and_one_longer_than_a_lanes_share_is_read_as_stretches(files, capsys):
    parts = ["".join(map(chr, range(begin, begin + 90))) for begin in (100, 300, 500, 700)]
    task = text.char_lm(files(*parts), lanes=3)
    assert told(task, "train") == parts[:3] and len(task.test()[0]) == 89
    assert "4 documents, each begun anew: 3 to train on, held out 1." in capsys.readouterr().out
    wide = text.char_lm(files(*parts), lanes=27).train()
    assert wide.inputs.shape[0] == 27 and wide.valid.mean() > 0.95
    targets = np.sort(wide.targets[wide.valid])
    assert len(targets) == 3 * 89 and (np.diff(targets) > 0).all()  # each character but the first of each, once
    (train, targets), (held_out, _) = (getattr(text.char_lm(files("ab" * 500)), name)() for name in ("train", "test"))
    assert (len(train), len(held_out)) == (899, 99) and (targets[:-1] == train[1:]).all()


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1))
def test_bytes_and_a_texts_own_vocabulary_bring_any_text_back(written):
    own = {"unit": "characters", "vocabulary": tb.streams.characters(written)[1]}
    for codec in ({"unit": "bytes"}, own):
        assert text.decode(text.encode(written, codec), codec) == written


def test_bytes_are_those_of_the_file_and_are_mapped_and_packed_files_are_unpacked(files):
    raw = bytes(range(256)) * 8
    (inputs, _), _ = (getattr(text.char_lm(files(raw), unit="bytes"), name)() for name in ("train", "test"))
    assert isinstance(inputs, np.memmap) and bytes(inputs) == raw[: len(inputs)]
    (inputs, _) = text.char_lm(files(gzip.compress(("é" * 400).encode())), unit="bytes").train()
    assert bytes(inputs[:4]).decode() == "éé"


def test_a_runs_vocabulary_reads_other_texts_and_says_when_it_hardly_does(files):
    codec = text.char_lm(files("abc" * 50)).codec
    task = text.char_lm(["nowhere.txt"], codec=codec)  # no file is read
    assert task.codec == codec == {"unit": "characters", "vocabulary": ["�", "a", "b", "c"]}
    with warnings.catch_warnings(action="error"):
        inputs, _ = text.char_lm(files("cab" * 50 + "é"), codec=codec).train()
        np.testing.assert_array_equal(inputs[:3], [3, 1, 2])
    with pytest.warns(UserWarning, match="33% of the text's characters are not in the vocabulary"):
        text.char_lm(files("abé" * 50), codec=codec).train()


MISTAKES = {
    "no such end": ({"documents": "<|>"}, "'<|>', which is nowhere in the text"),
    "an empty end": ({"documents": ""}, "`documents` is empty"),
    "no such unit": ({"unit": "words"}, "`unit` is 'words'"),
    "all is held out": ({"held_out": 1.0}, "`held_out` is 1.0"),
    "another's codec": ({"codec": {"scale": 2.0}}, "`codec` is"),
    "a codec of characters": ({"codec": {"unit": "characters", "vocabulary": ["�", "a"]}, "unit": "bytes"}, "leave"),
    "documents of one": ({"documents": "b"}, None),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_text_or_no_setting_is_a_sentence(mistake, files):
    arguments, said = MISTAKES[mistake]
    if said:
        with pytest.raises(ValueError, match=said.replace("|", r"\|")):
            text.char_lm(files("aaaa" * 10), **arguments)
    else:
        with pytest.raises(ValueError, match="nothing to predict"):
            text.char_lm(files("b" * 40), **arguments)


@pytest.fixture(scope="module")
def model():
    task = text.char_lm(hidden=8, codec={"unit": "characters", "vocabulary": ["�", *"abcdefg \n"]})
    params = task.model.init(jax.random.key(0), jnp.zeros((1, 1), int))
    return task, jax.tree.map(lambda x: 3 * x, params)


@pytest.mark.parametrize("read", ["a", "bad cab\n", "fed a bag " * 20])
def test_at_temperature_zero_the_likeliest_is_written_as_an_unroll_over_all_of_it_has_it(model, read):
    task, params = model
    written = text.prompt(task.model, params, task.codec, read, 12, temperature=0.0)
    ids = text.encode(read + written, task.codec)
    _, logits = task.model.unroll(params, task.model.initial_carry(params, 1), jnp.asarray(ids[None]), None, None)
    np.testing.assert_array_equal(ids[-12:], 1 + logits[0, -13:-1, 1:].argmax(-1))
    assert text.prompt(task.model, params, task.codec, read, 12, temperature=1e-4, seed=3) == written
    half = text.prompt(task.model, params, task.codec, read, 5, temperature=0.0)
    assert half + text.prompt(task.model, params, task.codec, read + half, 7, temperature=0.0) == written


def test_what_is_drawn_is_as_likely_as_the_model_has_it_and_never_number_zero(model):
    task, params = model
    _, logits = task.model.unroll(params, task.model.initial_carry(params, 1), jnp.asarray([[1, 2]]), None, None)
    likely = np.asarray(jax.nn.softmax(logits[0, -1, 1:] / 2))
    drawn = [
        text.prompt(task.model, params, task.codec, "ab", 1, temperature=2.0, seed=jax.random.key(i))
        for i in range(400)
    ]
    counts = np.array([drawn.count(c) for c in task.codec["vocabulary"][1:]])
    assert counts.sum() == 400 and ((counts - 400 * likely) ** 2 / (400 * likely)).sum() < 27  # chi square, p < 0.001


def test_a_prompt_of_another_length_compiles_nothing_and_writing_ends_with_a_document(model):
    task, params = model
    text.prompt(task.model, params, task.codec, "a", 40)
    programs = text._read._cache_size(), text._write._cache_size()
    written = text.prompt(task.model, params, task.codec, "bad " * 50, 40, temperature=0.7, seed=1)
    assert (text._read._cache_size(), text._write._cache_size()) == programs and len(written) == 40
    ending = written[10:12]
    first = written.index(ending) + 2
    told = text.prompt(task.model, params, task.codec | {"end": ending}, "bad " * 50, 40, temperature=0.7, seed=1)
    assert told == written[:first]


def test_bytes_are_written_as_text(files):
    task = text.char_lm(files("日本語" * 50), unit="bytes", hidden=8)
    params = task.model.init(jax.random.key(0), jnp.zeros((1, 1), int))
    written = text.prompt(task.model, params, task.codec, "日 and é", 40)
    assert written and written.encode()  # whatever it drew


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "xylem"}, r"The prompt has 'l', 'm', 'x', 'y', which .* leave them out"),
        ({"text": ""}, "The prompt is empty: give"),
        ({"length": -1}, "`length` is -1"),
        ({"temperature": -0.5}, "`temperature` is -0.5"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"codec": {}}, "`codec` is"),
    ],
)
def test_a_prompt_that_cannot_be_is_a_sentence(model, change, said):
    task, params = model
    given = {"codec": task.codec, "text": "a", "length": 3} | change
    with pytest.raises(ValueError, match=said):
        text.prompt(task.model, params, **given)


def test_a_model_that_diverged_writes_nothing(model):
    task, params = model
    with pytest.raises(ValueError, match="not finite"):
        text.prompt(task.model, jax.tree.map(lambda x: x * jnp.nan, params), task.codec, "a", 3)


@pytest.mark.parametrize("unit", ["characters", "bytes"])
def test_a_run_learns_its_documents_is_kept_and_is_asked_after_its_files_are_gone(files, tmp_path, unit):
    words = ["alpha", "beta", "gamma", "delta"]
    paths = files("".join(f"{words[i % 4]} {words[i % 4]} {words[i % 4]}\n" for i in range(400)))
    task = study.task("char_lm", text=paths, documents="lines", unit=unit, hidden=24, lanes=8)
    run = study.fit(task, window=8, updates=300, learning_rate=0.02, workdir=tmp_path / "run")
    assert next(iter(study.evaluate(task, run.params).values())) < 0.6
    other = study.task("char_lm", text=files("ωψ χφ\n" * 400), documents="lines", unit=unit, hidden=24, lanes=8)
    with pytest.raises(ValueError, match="--noresume"):  # and the run's own record is left alone
        study.fit(other, window=8, updates=300, learning_rate=0.02, workdir=tmp_path / "run")
    for path in paths:
        pathlib.Path(path).unlink()
    again = study.load(tmp_path / "run")
    written = text.prompt(again.model, again.params, again.task.codec, "gam", 99, temperature=0.0)
    assert written.startswith("ma gamma gamma") and written == text.prompt(
        run.model, run.params, task.codec, "gam", 99, temperature=0.0
    )
