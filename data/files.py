"""Reads data files into records: one value per row, with its place in the file.

    .jsonl .ndjson .json    values, each on its own lines, or one list, or {"data": [...]}
    .csv .tsv               a header, then one row per line; each cell is text; the header tells
                            whether commas, tabs or semicolons separate the columns
    .parquet                needs pyarrow
    owner/name              the train split of a data set on the Hugging Face hub; needs datasets

All but .parquet may be compressed with gzip. Upper and lower case are the same in a suffix. A row
is at fault here only if it cannot be read; what it means is in rows.py.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from checkpoints import io

TEXT_FORMAT = "txt"
JSON_FORMATS = ("jsonl", "ndjson", "json")
DELIMITERS = {"csv": ",\t;", "tsv": "\t,;"}  # the first one in the header counts
ROW_FORMATS = (*JSON_FORMATS, *DELIMITERS, "parquet")
FORMATS = (TEXT_FORMAT, *ROW_FORMATS)
GZIP_MAGIC = b"\x1f\x8b"
LFS_MAGIC = b"version https://git-lfs"
DECODER = json.JSONDecoder()
JSON_WHITESPACE = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """One row as it stands in a file, or why it cannot be read.

    where: its file and line; in a list or a table, its number, too.
    """

    where: str
    content: object
    fault: str = ""


def format_of(path: Path) -> str:
    """The format that the name of a file tells: the suffix in lower case, without .gz.

    >>> format_of(Path("my.JSONL.gz"))
    'jsonl'
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix.removeprefix(".")


def read_records(path: Path) -> list[Record]:
    """The rows of a file in order, including rows that cannot be read.

    Raises: ValueError if the file as a whole cannot be read.
    """
    suffix = format_of(path)
    if suffix == "parquet":
        return _read_parquet(path)
    if suffix in DELIMITERS:
        return _read_csv(path, DELIMITERS[suffix])
    return _read_json(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, which may be compressed with gzip.

    Raises: ValueError if the file is empty, no UTF-8, damaged, or a Git LFS pointer.
    """
    opener = gzip.open if _read_start(path).startswith(GZIP_MAGIC) else open
    try:
        # Windows may put a byte order mark first.
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): get it again") from None


def read_hub(name: str) -> list[Record]:
    """The rows of the train split of a data set on the hub.

    Raises: ValueError if the data set cannot be loaded or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--data {name} is not a file, and a hub data set needs a library: pip install datasets"
        ) from None
    try:
        return _records_of_table(datasets.load_dataset(name, split="train"), name)
    except Exception as error:  # its network and file libraries raise errors of many types
        raise ValueError(
            f"--data {name} is not a file, and cannot be loaded as a hub data set "
            f"({io.first_line(error)})"
        ) from None


def _read_start(path: Path) -> bytes:
    """The first bytes of a file. Raises: ValueError if there are none, or a pointer instead."""
    with open(path, "rb") as file:
        start = file.read(len(LFS_MAGIC))
    if not start:
        raise ValueError(f"{path} is empty")
    if start == LFS_MAGIC:
        raise ValueError(f"{path} is a Git LFS pointer, not the data: get them with git lfs pull")
    return start


def _read_parquet(path: Path) -> list[Record]:
    _read_start(path)
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} needs a library: pip install pyarrow") from None
    try:
        table = parquet.read_table(path)
    except (ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({io.first_line(error)})") from None
    return _records_of_table(table.to_pylist(), str(path))


def _records_of_table(table: Iterator[dict], name: str) -> list[Record]:
    """The rows of an Arrow table, which has no line numbers."""
    return [
        Record(f"{name}, row {number}", _without_nulls(row)) for number, row in enumerate(table, 1)
    ]


def _without_nulls(value: object) -> object:
    """A value without the keys whose value is null, at any depth.

    All objects in a column of a table have the same keys. Arrow writes null for a key that an
    object does not have.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _read_csv(path: Path, delimiters: str) -> list[Record]:
    """The rows below the header; `where` has the line in which a row ends."""
    text = read_text(path)
    first_line, *_ = text.split("\n", 1)
    delimiter = next((each for each in delimiters if each in first_line), delimiters[0])
    spaced = re.search(rf'(?:^|{delimiter}) +"[^"{delimiter}\n]', text, re.MULTILINE)
    if spaced:
        line = text.count("\n", 0, spaced.end()) + 1
        raise ValueError(
            f"{path}:{line}: a space stands before a quotation mark that begins a cell, so it does "
            "not quote the cell: remove the space"
        )
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise ValueError(f"{path} names a column twice in its first line: {', '.join(header)}")
        for row in reader:
            fault = ""
            if None in row:
                fault = "it has more cells than the header has columns"
            elif list(row.values()) == header:
                fault = "it repeats the header, as the start of another file does"
            records.append(Record(f"{path}:{reader.line_num}", row, fault))
    except csv.Error as error:
        line = reader.reader.line_num
        raise ValueError(f"{path}:{line}: not CSV ({error})") from None
    return records


def _read_json(path: Path) -> list[Record]:
    text = read_text(path)
    start = _skip_whitespace(text, 0)
    if text.startswith("[", start) and not _has_a_list_per_line(text, start):
        elements = enumerate(_list_elements(text, start + 1), 1)
        return [_parse_json(each, path, line, f", row {n}") for n, (line, each) in elements]

    records = [_parse_json(each, path, line) for line, each in _successive_values(text)]
    if len(records) == 1:
        [(where, content, _)] = records
        lists = _lists_in(content) if isinstance(content, dict) else {}
        if lists.keys() == {"data"}:
            rows = lists["data"]
            return [Record(f"{where}, row {number}", row) for number, row in enumerate(rows, 1)]
    return records


def _lists_in(content: dict) -> dict[str, list]:
    return {key: value for key, value in content.items() if isinstance(value, list)}


def _parse_json(text: str, path: Path, line: int, number: str = "") -> Record:
    where = f"{path}:{line}{number}"
    try:
        return Record(where, io.parse_json(text.encode(), (dict, list), unique_keys=True))
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}{number}"
        return Record(where, None, f"not JSON ({error.msg} at column {error.colno})")
    except ValueError as error:
        return Record(where, None, str(error))


def _has_a_list_per_line(text: str, start: int) -> bool:
    """Whether a list ends on the line on which it starts, and other lines follow."""
    newline = text.find("\n", start)
    if newline < 0 or _skip_whitespace(text, newline) == len(text):
        return False
    return _end_of_value(text, start) == len(text[start:newline].rstrip()) + start


def _successive_values(text: str) -> Iterator[tuple[int, str]]:
    """Each value with what else is on its last line. After a syntax error, the next line follows.

    The lines are not those of splitlines(), which also splits at U+2028 and five other characters
    that a JSON string may contain.
    """
    line = 1
    start = 0
    while start < len(text):
        newline = text.find("\n", _end_of_value(text, start))
        end = newline if newline >= 0 else len(text)
        if text[start:end].strip():
            yield line, text[start:end]
        line += text.count("\n", start, end) + 1
        start = end + 1


def _end_of_value(text: str, start: int) -> int:
    """The index after the JSON value at `start`; `start` itself if it is not one.

    An indented value with a syntax error reaches to the end of the text.
    """
    try:
        _, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        newline = text.find("\n", start, error.pos)
        is_indented = newline >= 0 and text.startswith('"', _skip_whitespace(text, newline))
        return len(text) if is_indented else start
    except (ValueError, RecursionError):  # a number of too many digits, too many brackets
        return start
    return end


def _list_elements(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Each element of a JSON list; start: the index after the opening bracket.

    After a syntax error, the rest of the file is one element; parsing it reports the error.
    """
    line = 1
    counted = 0  # line breaks before this index are counted in `line`
    position = _skip_whitespace(text, start)
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            _, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = len(text)
        delimiter = _skip_whitespace(text, end)
        if not text.startswith((",", "]"), delimiter):
            yield line, "[" + text[position:]
            return
        yield line, text[position:end]
        if text[delimiter] == ",":
            position = _skip_whitespace(text, delimiter + 1)
        else:
            position = delimiter
    rest = text[position + 1 :].strip()
    if rest:
        yield line, rest


def _skip_whitespace(text: str, position: int) -> int:
    return JSON_WHITESPACE.match(text, position).end()
