# SPDX-License-Identifier: Apache-2.0
"""The running interpreter's standard library, parsed once for all of these tests."""

import pytest

from fastprompt.demo import corpus, task


@pytest.fixture(scope="session")
def documents():
    """All of them, from the sources."""
    return corpus.read_documents()


@pytest.fixture(scope="session")
def from_documents(documents):
    """function -> what it returns where it reads ``documents`` in place of the sources."""

    def read(stdlib=None, packages=None):
        assert stdlib is None
        return [each for each in documents if packages is None or each.package in packages]

    def call(function):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, "read_documents", read)
            return function()

    return call


@pytest.fixture(scope="session")
def splits(from_documents):
    """The task."""
    return from_documents(task.load_task)
