# SPDX-License-Identifier: Apache-2.0
"""The text: the documentation strings of the Python standard library, read from its sources.

Sources are parsed with `ast` and never imported, so reading them runs nobody's code and needs no network.
"""

import ast
import sysconfig
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Third-party packages; test suites and their data; sample programs; machine-dependent build settings.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "__pycache__",
}


class Document(NamedTuple):
    """One documentation string: dotted `module`, `qualname` inside it ("" for the module itself), clean `text`."""

    module: str
    qualname: str
    text: str

    @property
    def package(self) -> str:
        """The top-level module, e.g. "asyncio" for "asyncio.queues": the unit that is never split."""
        return self.module.partition(".")[0]


def stdlib_path(stdlib: str | Path | None = None) -> Path:
    """The standard library's folder: `stdlib`, or the running interpreter's."""
    path = Path(stdlib or sysconfig.get_paths()["stdlib"])
    if not (path / "os.py").is_file():
        raise FileNotFoundError(
            f"fastprompt.demo: no standard library sources in {path} (os.py is missing); "
            "pass the folder that holds os.py"
        )
    return path


def read_documents(
    stdlib: str | Path | None = None, packages: Container[str] | None = None
) -> list[Document]:
    """Every documentation string of the standard library, sorted by module, then in source order.

    `packages` limits the reading to these top-level modules. Files that do not parse are left out: a distribution
    may ship templates with a .py name.
    """
    root = stdlib_path(stdlib)
    documents: list[Document] = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any(part.startswith("config-") for part in parts):
            continue
        if packages is not None and parts[0] not in packages:
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documents.extend(Document(module, name, text) for name, text in _docstrings(tree, ""))
    return documents


def read_topics(stdlib: str | Path | None = None) -> dict[str, str]:
    """The language reference's chapters, {topic: text}, from `pydoc_data/topics.py`; empty where not installed."""
    path = stdlib_path(stdlib) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def without_overlap(
    documents: Iterable[Document], held_out: Iterable[Document], words: int = 8
) -> list[Document]:
    """`documents` less those that share a run of `words` consecutive words with any `held_out` document.

    Modules copy from each other (`posixpath` and `ntpath`), so a split by module alone would leak.
    """
    seen = set().union(*(_runs(document.text, words) for document in held_out))
    return [document for document in documents if seen.isdisjoint(_runs(document.text, words))]


def _docstrings(node: ast.AST, qualname: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield qualname, text.strip()
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
        yield from _docstrings(child, f"{qualname}.{name}".lstrip(".") if name else qualname)


def _runs(text: str, words: int) -> set[tuple[str, ...]]:
    """Every run of `words` words; a shorter text is one run of all of them."""
    split = text.lower().split()
    return {tuple(split[i : i + words]) for i in range(max(1, len(split) - words + 1))}
