"""tools/mutate.py: what it changes in a source, and that it knows where the sources are."""

import itertools
import re

import pytest

from tools.mutate import ROOT, edits_of
from tools.mutations import LOSSES, SUBJECTS


def mutants(tmp_path, name, source, within=".*"):
    path = tmp_path / name
    path.write_text(source)
    return {source[:start] + text.decode() + source[end:] for start, end, text in edits_of(path, within)}


def test_what_is_changed_in_python(tmp_path):
    source = '"""1 < 2"""\ndef f(x: int = 3):\n    y = -x\n    if x < 1:\n        raise Error("1 + 1")\n    return y\n'
    wanted = [("y = -x", "pass"), ("-x", "(x)"), ("x < 1", "(x <= 1)"), ("x < 1", "(not (x < 1))"), ("< 1", "< (2)")]
    assert mutants(tmp_path, "f.py", source) == {source.replace(*pair) for pair in wanted}
    assert not mutants(tmp_path, "f.py", source, "g")


def test_what_is_changed_in_cpp(tmp_path):
    source = 'int f(int x) {  // x + 1\n  say("1 + 1", x);\n  return x < 1 && x;\n}\n\nint g() {\n  return 2 + 2;\n}\n'
    wanted = [('say("1 + 1", x);', ";"), ("x < 1", "x <= 1"), ("< 1", "< 2"), ("&&", "||")]
    assert mutants(tmp_path, "f.cpp", source, "f") == {source.replace(*pair) for pair in wanted}


@pytest.mark.parametrize("name", SUBJECTS)
def test_subjects_are_there(name):
    subject = SUBJECTS[name]
    assert all(list(ROOT.glob(test)) for test in subject.tests if test.startswith("tests/"))
    paths = (path for pattern in subject.sources for path in ROOT.glob(pattern))
    found = itertools.islice((edit for path in paths for edit in edits_of(path, subject.within)), 10)
    assert len(list(found)) == 10


@pytest.mark.parametrize("name", SUBJECTS)
def test_names_of_functions_are_there(name):
    """What is said of the mathematics goes for each language, which need not have all of it."""
    subject = SUBJECTS[name]
    text = "\n".join(path.read_text() for pattern in subject.sources for path in ROOT.glob(pattern))
    for word in set(subject.within.split("|")) - set(LOSSES.split("|")):
        if word.isidentifier():
            assert re.search(rf"\b(def |class )?{word}\b[(:]", text), word
