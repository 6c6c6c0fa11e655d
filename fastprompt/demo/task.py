# SPDX-License-Identifier: Apache-2.0
"""The task: which area of the standard library does a documentation string belong to?

An area follows one or two chapters of the library reference. The split is by module: a module's documents are all in
train, all in dev or all in test, and a training document that shares eight consecutive words with a held-out one is
dropped. Nothing of the dev and test modules is in the text that the shipped T5 was pretrained on
(`pretraining_documents`).
"""

from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from .corpus import Document, read_documents, read_topics, without_overlap

AREAS: dict[str, tuple[str, ...]] = {
    "network": (
        "ftplib", "http", "ipaddress", "nntplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "wsgiref",
        "xmlrpc",
    ),
    "mail": ("email", "imaplib", "mailbox", "mimetypes", "poplib", "quopri", "smtpd", "smtplib"),
    "numbers": ("_pydecimal", "_pylong", "colorsys", "decimal", "fractions", "numbers", "random", "statistics"),
    "files": (
        "_compression", "_pyio", "bz2", "filecmp", "fileinput", "fnmatch", "genericpath", "glob", "gzip", "io",
        "linecache", "lzma", "ntpath", "os", "pathlib", "posixpath", "shutil", "stat", "tarfile", "tempfile",
        "zipapp", "zipfile",
    ),
    "processes": (
        "_threading_local", "asyncio", "concurrent", "multiprocessing", "queue", "sched", "selectors", "signal",
        "subprocess", "threading",
    ),
    "graphics": ("tkinter", "turtle"),
    "code": (
        "ast", "code", "codeop", "compileall", "dis", "importlib", "inspect", "modulefinder", "pkgutil", "py_compile",
        "pyclbr", "runpy", "symtable", "tokenize", "types", "typing", "zipimport",
    ),
}  # fmt: skip
"""{area: its top-level modules}. Modules that the running interpreter lacks are simply absent."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "dev": (
        "http.cookies", "socket", "urllib.error", "urllib.parse", "wsgiref.handlers", "xmlrpc.server",
        "email.feedparser", "email.generator", "email.parser", "email.utils", "mimetypes", "poplib",
        "numbers",
        "bz2", "filecmp", "fileinput", "fnmatch", "genericpath", "linecache", "ntpath", "posixpath",
        "asyncio.futures", "asyncio.locks", "asyncio.queues", "asyncio.timeouts", "asyncio.transports",
        "multiprocessing.managers", "multiprocessing.pool", "queue", "sched",
        "tkinter.commondialog", "tkinter.dialog", "tkinter.dnd", "tkinter.font", "tkinter.simpledialog",
        "tkinter.tix",
        "compileall", "dis", "importlib._abc", "importlib.abc", "importlib.machinery", "pyclbr", "symtable", "types",
    ),
    "test": (
        "ftplib", "http.server", "socketserver", "telnetlib", "urllib.response", "urllib.robotparser",
        "wsgiref.simple_server", "wsgiref.util",
        "email._policybase", "email.contentmanager", "email.header", "email.headerregistry", "email.iterators",
        "email.mime", "imaplib",
        "fractions", "random",
        "glob", "lzma", "shutil", "zipfile",
        "asyncio.runners", "asyncio.streams", "asyncio.subprocess", "asyncio.taskgroups", "asyncio.tasks",
        "concurrent.futures.process", "concurrent.futures.thread", "multiprocessing.connection",
        "multiprocessing.shared_memory", "multiprocessing.synchronize", "threading",
        "tkinter.colorchooser", "tkinter.filedialog", "tkinter.messagebox", "tkinter.scrolledtext", "tkinter.ttk",
        "ast", "codeop", "importlib.metadata", "importlib.resources", "importlib.util", "pkgutil", "runpy",
        "zipimport",
    ),
}  # fmt: skip
"""{split: its modules, each with its submodules}; every other module is train."""

MIN_WORDS = 12
"""Shorter documents ("Return the value.") carry no area; they are not part of the task."""

CAPS = {"train": 160, "dev": 60, "test": 60}
"""Most documents per area and split, so that no area dominates."""


class Example(NamedTuple):
    """One classification example: `text` on one line, its area's word `label`, the dotted `module` it is from."""

    text: str
    label: str
    module: str


def split_of(module: str) -> str:
    """The split of a dotted module name: "dev", "test" or, for every module not held out, "train"."""
    for split, held_out in HELD_OUT.items():
        if any(module == name or module.startswith(name + ".") for name in held_out):
            return split
    return "train"


def load_task(stdlib: str | Path | None = None) -> dict[str, list[Example]]:
    """{"train" | "dev" | "test": examples} from a standard library's folder, by default the running interpreter's.

    Deterministic: an area's modules give one document each in turn, in source order, up to the area's cap.
    """
    area_of = {package: area for area, packages in AREAS.items() for package in packages}
    documents = read_documents(stdlib, packages=area_of)
    train, held_out = _divide(documents)
    pools = {
        split: [document for document in held_out if split_of(document.module) == split] for split in HELD_OUT
    }
    task: dict[str, list[Example]] = {}
    for split, pool in {"train": train, **pools}.items():
        task[split] = []
        for area in AREAS:
            chosen = _in_turn([document for document in pool if area_of[document.package] == area])
            task[split] += [
                Example(" ".join(document.text.split()), area, document.module)
                for document in chosen[: CAPS[split]]
            ]
    return task


def pretraining_documents(stdlib: str | Path | None = None) -> list[Document]:
    """The text for pretraining: all documentation strings and the language reference, less what is held out.

    Left out are the dev and test modules, and every document or paragraph that shares eight consecutive words with one.
    """
    train, held_out = _divide(read_documents(stdlib))
    topics = [
        Document("pydoc_data.topics", topic, paragraph)
        for topic, text in read_topics(stdlib).items()
        for paragraph in text.split("\n\n")
        if paragraph.strip()
    ]
    return train + without_overlap(topics, held_out)


def _divide(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out): by module, then without the train documents that repeat a held-out one."""
    held_out = [document for document in documents if split_of(document.module) != "train"]
    train = [document for document in documents if split_of(document.module) == "train"]
    return without_overlap(train, held_out), held_out


def _in_turn(documents: list[Document]) -> list[Document]:
    """The documents of MIN_WORDS or more, each text once: the first of every module, the second of every module, ..."""
    modules: dict[str, list[Document]] = {}
    seen = set()
    for document in documents:
        words = tuple(document.text.split())
        if len(words) >= MIN_WORDS and words not in seen:
            seen.add(words)
            modules.setdefault(document.module, []).append(document)
    rows = zip_longest(*modules.values())
    return [document for row in rows for document in row if document is not None]
