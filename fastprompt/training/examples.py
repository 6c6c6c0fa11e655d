# SPDX-License-Identifier: Apache-2.0
"""Examples in files: an input text and the text that should come out."""

import csv
import json
import os
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

TABLES: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # no tabs in fields; a quote is itself
}
FIELD_LIMIT = 1 << 30  # characters; Python's own, 131,072, is less than a long document
Rows = Generator[tuple[int, dict[str, Any]], None, None]
"""The number of a line, and its fields."""


class Example(NamedTuple):
    """What the encoder reads, and what the decoder should say."""

    input: str
    target: str


def read_examples(
    path: str | os.PathLike[str], *, input_field: str = "input", target_field: str = "target"
) -> list[Example]:
    """The examples of a file: a JSON object per line, or, by the ending .csv or .tsv, a table under a line of names.

    Numbers are taken as they are written. Further fields are left out. A .csv may quote its fields, a .tsv does not.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no example, or one without these fields, each once; the message has the line.
    """
    path = Path(path)
    examples = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            wanted = (input_field, target_field)
            table = path.suffix.lower() in TABLES
            with closing(_table(path, file, wanted) if table else _json_lines(path, file, wanted)) as rows:
                for line, row in rows:
                    examples.append(Example(*(_text(path, line, row, name) for name in wanted)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 ({error}). Save it in that encoding") from None
    if not examples:
        raise ValueError(f"{path}: holds no example")
    return examples


def read_inputs(path: str | os.PathLike[str], *, input_field: str = "input") -> list[str]:
    """The inputs of a file as :func:`read_examples` reads it, whether it has targets or not."""
    return [each.input for each in read_examples(path, input_field=input_field, target_field=input_field)]


def check_targets(what: str, examples: Sequence[Example], choices: Sequence[str]) -> None:
    """ValueError, which begins with ``what``: a target is none of the choices."""
    if strange := {each.target for each in examples}.difference(choices):
        raise ValueError(f"{what}, got {preview(sorted(strange))}")


def preview(texts: Collection[str]) -> str:
    """The first five, and how many more there are: files have thousands."""
    more = len(texts) - 5
    return f"{list(texts)[:5]}" + (f" and {more:,} more" if more > 0 else "")


def _text(path: Path, line: int, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON may name half of a character
            raise ValueError(f"{path}, line {line}: {name!r} is no text: {value!r}") from None
        return value
    if name in row:
        raise ValueError(
            f"{path}, line {line}: {name!r} must be a text or a number, got {value!r}. Write one, or leave the "
            "example out"
        )
    raise ValueError(
        f"{path}, line {line}: must have a field {name!r}, got {sorted(map(str, row))}. Name its fields with "
        "input_field and target_field; on the command line, --input-field and --target-field"
    )


def _json_lines(path: Path, file: Any, wanted: Sequence[str]) -> Rows:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(
                text,
                parse_int=str,
                parse_float=str,
                parse_constant=str,
                object_pairs_hook=_Object,
            )
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: is no JSON: {error}") from None
        if not isinstance(row, _Object):
            raise ValueError(f"{path}, line {line}: must be a JSON object, got {type(row).__name__}")
        if any(row.names.count(name) > 1 for name in wanted):
            raise ValueError(
                f"{path}, line {line}: must name {wanted} once, got {row.names}. Leave out what is not meant"
            )
        yield line, row


class _Object(dict[str, Any]):
    """A JSON object, and its names as written: the dict has repeated ones once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _table(path: Path, file: Any, wanted: Sequence[str]) -> Rows:
    reader = csv.DictReader(file, **TABLES[path.suffix.lower()], strict=True)
    limit = csv.field_size_limit(FIELD_LIMIT)  # the whole process's, restored below
    try:
        names = list(reader.fieldnames or [])
        if not any(names) or any(names.count(name) > 1 for name in wanted):
            raise ValueError(f"{path}: its first line must name the fields, {wanted} once, got {names}")
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: has more fields than the {len(row) - 1} names"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, behind line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
