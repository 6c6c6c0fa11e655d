# SPDX-License-Identifier: Apache-2.0
"""The corpus: what is read from a standard library, and what counts as a repetition."""

import sys

import pytest

from fastprompt.demo import corpus


@pytest.fixture
def stdlib(tmp_path):
    """A standard library of four files, one of which must be skipped and one of which does not parse."""
    (tmp_path / "os.py").write_text(
        '"""Files."""\n\nclass A:\n    """An A."""\n\n    def f(self):\n        """Do f."""\n'
    )
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").write_text(
        'raise SystemExit("imported")\ndef g():\n    if 1:\n        """No."""\n'
    )
    (tmp_path / "pkg" / "sub.py").write_text('async def g():\n    """Do\n       g.\n    """\n')
    (tmp_path / "pkg" / "test" / "t.py").write_text('"""A test."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    return tmp_path


def test_reads_every_docstring_without_importing(stdlib):
    assert corpus.read_documents(stdlib) == [
        ("os", "", "Files."),
        ("os", "A", "An A."),
        ("os", "A.f", "Do f."),
        ("pkg.sub", "g", "Do\ng."),
    ]


def test_packages_limit_the_reading(stdlib):
    documents = corpus.read_documents(stdlib, packages={"pkg"})
    assert [document.package for document in documents] == ["pkg"]


def test_topics(stdlib):
    assert corpus.read_topics(stdlib) == {}
    (stdlib / "pydoc_data").mkdir()
    (stdlib / "pydoc_data" / "topics.py").write_text("topics = {'if': 'The if statement.'}\n")
    assert corpus.read_topics(stdlib) == {"if": "The if statement."}


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"os\.py is missing"):
        corpus.read_documents(tmp_path)


def test_overlap_is_found_across_line_breaks_and_case():
    held_out = [corpus.Document("b", "", "x one two three four five six seven eight y")]
    repeats = corpus.Document("a", "", "One two three\nfour five six seven eight")
    differs = corpus.Document("a", "", "one two three four five six seven nine")
    assert corpus.without_overlap([repeats, differs], held_out) == [differs]


def test_the_running_interpreter_has_documents(monkeypatch):
    monkeypatch.delitem(sys.modules, "poplib", raising=False)
    documents = corpus.read_documents(packages={"json", "poplib"})
    assert {document.module for document in documents} >= {"json", "json.decoder", "poplib"}
    assert documents == corpus.read_documents(packages={"json", "poplib"})
    assert "poplib" not in sys.modules
