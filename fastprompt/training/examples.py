# SPDX-License-Identifier: Apache-2.0
"""Examples in files: an input text and the text that should come out."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SEPARATORS = {".csv": ",", ".tsv": "\t"}


class Example(NamedTuple):
    """What the encoder reads, and what the decoder should say."""

    input: str
    target: str


def read_examples(
    path: str | os.PathLike[str], *, input_field: str = "input", target_field: str = "target"
) -> list[Example]:
    """The examples of a file: a JSON object per line, or, by the ending .csv or .tsv, a table under a line of names.

    Numbers are taken as they are written. Further fields are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no example, or one without these fields; the message has the line.
    """
    path = Path(path)
    examples = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = _table(path, file) if path.suffix.lower() in SEPARATORS else _json_lines(path, file)
        for line, row in rows:
            examples.append(Example(*(_text(path, line, row, name) for name in (input_field, target_field))))
    if not examples:
        raise ValueError(f"{path}: holds no example")
    return examples


def _text(path: Path, line: int, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return str(value)
    raise ValueError(
        f"{path}, line {line}: needs a text {name!r}, got {value!r}; its fields are {sorted(map(str, row))}. "
        "Name the fields with input_field and target_field"
    )


def _json_lines(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: must be a JSON object, got {type(row).__name__}")
        yield line, row


def _table(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, delimiter=SEPARATORS[path.suffix.lower()])
    for row in reader:
        yield reader.line_num, row
