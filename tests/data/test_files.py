"""Data files: every format gives the same rows with their places; a bad file names its fault."""

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import files
from helpers.mutants import mutated

LETTERS = st.characters(exclude_categories=["Cs"])  # half of a surrogate pair is not text
TEXTS = st.text(LETTERS, max_size=20)
ROWS = st.lists(st.fixed_dictionaries({"a": TEXTS, "b": TEXTS}), min_size=1, max_size=4)
BLANK = st.lists(st.text(" \t", max_size=2), max_size=3)
GOOD = [{"text": "a"}, {"text": "b"}]
GOOD_LINES = '{"text": "a"}\n{"text": "b"}\n'


def read(folder: Path, name: str, content: str | bytes) -> list[files.Record]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return files.read_records(path)


def contents_of(found: list[files.Record]) -> list[object]:
    assert not any(record.fault for record in found), found
    return [record.content for record in found]


def check_lines(
    folder: Path, contents: list, blank: list[str], module: ModuleType = files, **style: object
) -> None:
    """The same rows, each with its line, from lines, from a list, and from both when indented.

    blank: the whitespace of a blank line before each of the first rows of the lines.
    """
    path = folder / "rows.jsonl"
    blank = blank[: len(contents)]
    texts = [json.dumps(row, **style) for row in contents]

    def read(text: str) -> list[files.Record]:
        path.write_bytes(text.encode())
        found = module.read_records(path)
        assert [record.content for record in found] == contents
        return found

    before = [space + "\n" for space in blank] + [""] * (len(texts) - len(blank))
    found = read("".join(space + text + "\n" for space, text in zip(before, texts)))
    lines = [1 + i + min(i + 1, len(blank)) for i in range(len(texts))]
    assert [row.where for row in found] == [f"{path}:{line}" for line in lines]
    for layout in ("[%s]", "\ufeff [\r\n%s\r\n]\r\n", "[%s,]"):
        read(layout % ",".join(texts))
    height = json.dumps(contents[0], indent=2).count("\n") + 1
    found = read(json.dumps(contents, indent=2, **style))
    places = [f"{path}:{2 + height * i}, row {i + 1}" for i in range(len(texts))]
    assert [row.where for row in found] == places
    found = read("\r\n".join(json.dumps(row, indent=2, **style) for row in contents))
    assert [row.where for row in found] == [f"{path}:{1 + height * i}" for i in range(len(texts))]


@given(ROWS, BLANK, st.booleans())
@example([{"a": "a\u2028b\x85c\x1dd", "b": "e\u2029f"}], [], False)
def test_json_rows_are_read_with_their_lines(
    tmp_path_factory: pytest.TempPathFactory, contents: list, blank: list, ascii: bool
) -> None:
    check_lines(tmp_path_factory.mktemp("rows"), contents, blank, ensure_ascii=ascii)


@given(
    ROWS, st.sampled_from(["csv", "tsv"]), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"])
)
def test_a_table_in_text_gives_the_same_rows_whatever_separates_its_columns(
    tmp_path_factory: pytest.TempPathFactory,
    contents: list,
    suffix: str,
    delimiter: str,
    newline: str,
) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["a", "b"], delimiter=delimiter)
    writer.writer = csv.writer(
        table, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL
    )
    writer.writeheader()
    writer.writerows(contents)
    # As for every text file, a line break within a text is read as \n.
    expected = [{key: re.sub("\r\n?", "\n", text) for key, text in row.items()} for row in contents]
    folder = tmp_path_factory.mktemp("table")
    assert contents_of(read(folder, f"rows.{suffix}", "\ufeff" + table.getvalue())) == expected


def test_a_row_of_a_table_is_named_by_the_line_in_which_it_ends(tmp_path: Path) -> None:
    table = 'prompt,completion,note\n"a, ""x""\nb",c,1\nd,e,2,3\nf,g\n\n'
    first, second, third = read(tmp_path, "rows.csv", table)
    place = str(tmp_path / "rows.csv")
    assert first == (f"{place}:3", {"prompt": 'a, "x"\nb', "completion": "c", "note": "1"}, "")
    assert second.where == f"{place}:4"
    assert second.fault == "it has more cells than the header has columns"
    assert third == (f"{place}:5", {"prompt": "f", "completion": "g", "note": None}, "")


def test_a_header_in_the_middle_of_a_table_is_a_fault(tmp_path: Path) -> None:
    _, second, _ = read(tmp_path, "rows.csv", 2 * "prompt,completion\na,b\n")
    assert second.fault == "it repeats the header, as the start of another file does"


def test_a_cell_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    text = "a" * 200_000
    assert contents_of(read(tmp_path, "rows.csv", f"text\n{text}\n")) == [{"text": text}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.jsonl.gz", "a.GZ"])
def test_a_file_may_be_compressed_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert contents_of(read(tmp_path, name, GOOD_LINES)) == GOOD
    assert contents_of(read(tmp_path, name, gzip.compress(GOOD_LINES.encode()))) == GOOD


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.jsonl", "jsonl"),
        ("A.JSONL.GZ", "jsonl"),
        ("a.b.csv.gz", "csv"),
        ("a.gz", ""),
        ("txt", ""),
    ],
)
def test_the_format_is_the_suffix_before_gz(name: str, expected: str) -> None:
    assert files.format_of(Path("folder.csv") / name) == expected


@pytest.mark.parametrize("indent", [None, 2])
def test_the_rows_may_be_the_data_of_one_object(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps({"version": 1, "data": GOOD}, indent=indent)
    found = read(tmp_path, "a.json", text)
    assert contents_of(found) == GOOD
    assert [record.where for record in found] == [
        f"{tmp_path / 'a.json'}:1, row {number}" for number in (1, 2)
    ]
    assert contents_of(read(tmp_path, "a.json", '{"data": 7}')) == [{"data": 7}]
    two = {"data": GOOD, "test": GOOD}
    assert contents_of(read(tmp_path, "a.json", json.dumps(two))) == [two], "no list is dropped"


def test_a_row_of_a_list_on_one_line_is_named_by_its_number(tmp_path: Path) -> None:
    found = read(tmp_path, "a.json", '[{"text": "a"}, {"text": "b"}, 7]')
    place = f"{tmp_path / 'a.json'}:1"
    assert [record.where for record in found] == [f"{place}, row {n}" for n in (1, 2, 3)]
    assert [bool(record.fault) for record in found] == [False, False, True]


def test_lists_of_turns_are_rows_on_lines_and_in_a_list(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": text}] for text in ("a", "b")]
    lines = "".join(json.dumps(each) + " \n" for each in turns)
    assert contents_of(read(tmp_path, "a.jsonl", lines)) == turns
    for indent in (None, 1):
        assert contents_of(read(tmp_path, "a.json", json.dumps(turns, indent=indent))) == turns


@pytest.mark.parametrize(
    "text, where, reason",
    [
        ('[{"text": "a"}\n {"text": "b"}]', 2, "Expecting ',' delimiter"),
        ('[{"text": "a"},\n {"text": "b"}', 2, "Expecting ',' delimiter"),  # a download cut short
        ('[{"text": "a"},\n\n', 3, "Expecting value"),
        (
            '[{"text": "a"},\n {"text": \n"b}]',
            3,
            "Invalid control character at|Unterminated string",
        ),
        ('[{"text": "a"}\n]\n{"text": "b"} x', 1, "Extra data"),
        ("[", 1, "Expecting value"),
        ('{\n "data": [\n  {"text": "a"}\n  {"text": "b"}\n ]\n}', 4, "Expecting ',' delimiter"),
        ('{"text": "a"}\n{\n "text": "a"\n "b": 1\n}\n{\n "text": "c"\n}', 4, "Expecting ',' deli"),
        ('{"text": "a"}\n{"text": "b"} {"text": "c"}', 2, "Extra data"),
    ],
)
def test_broken_json_is_a_bad_row_at_its_syntax_error(
    tmp_path: Path, text: str, where: int, reason: str
) -> None:
    [*good, bad] = read(tmp_path, "rows.json", text)
    assert not any(row.fault for row in good), bad
    number = f", row {len(good) + 1}" if text.startswith("[") else ""
    assert bad.where == f"{tmp_path / 'rows.json'}:{where}{number}", bad
    assert re.search(reason, bad.fault), bad


BAD_LINES = {
    "not json": "not JSON (Expecting value at column 1)",
    '{"prompt": "a", ': "not JSON (Expecting property name enclosed in double quotes at colu",
    "7": "it is not an object, its type is int",
    "[" * 99999: "",  # the message of Python's recursion limit
    '{"a": 1' + "0" * 5000 + "}": "Exceeds the limit",
    '{"text": "a", "text": "b"}': "an object has the key 'text' twice: keep one of them",
    "[" * 60 + "]" * 60: "it is nested more than 50 levels deep",
}


def check_faults(folder: Path, module: ModuleType = files) -> None:
    """Each bad line of a file has its number and its reason, and the good lines are read."""
    path = folder / "bad.jsonl"
    path.write_text("".join(f'{{"text": "a"}}\n{text}\n' for text in BAD_LINES))
    found = module.read_records(path)
    lines = range(1, 2 * len(BAD_LINES) + 1)
    assert [row.where for row in found] == [f"{path}:{line}" for line in lines]
    assert all((row.content, row.fault) == ({"text": "a"}, "") for row in found[::2])
    for row, reason in zip(found[1::2], BAD_LINES.values()):
        assert row.fault and reason in row.fault, row.fault


def test_each_bad_line_is_reported_and_no_good_one(tmp_path: Path) -> None:
    check_faults(tmp_path)


@given(st.text(LETTERS) | st.text('[]{},:" \n\\1a'))
def test_any_file_is_read_or_its_faults_are_reported(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    if not text:
        return
    found = read(folder, "rows.json", text)
    if not re.fullmatch(r"\s*(\[\s*\]\s*)?", text.removeprefix("\ufeff")):
        assert found
    for record in found:
        assert bool(record.fault) != isinstance(record.content, (dict, list))


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.parquet", "", "a.parquet is empty"),
        ("a.jsonl", LFS_POINTER, "is a Git LFS pointer, not the data: .* git lfs pull"),
        ("a.parquet", LFS_POINTER, "is a Git LFS pointer"),
        ("a.jsonl", GOOD_LINES.encode("utf-16"), "not UTF-8 text .* at byte 0"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:15], "is a damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-8] + bytes(8), "is a damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + bytes(8), "is a damaged gzip file"),
        ("a.csv", 'text\n"a"b\n', "a.csv:2: not CSV"),
        ("a.csv", 'a,b\nc, "d, e"\n', "a.csv:2: a space stands before a quotation mark"),
        ("a.tsv", 'a\tb\n "c"\td\n', "a.tsv:2: a space stands before a quotation mark"),
        ("a.csv", "text,text\na,b\n", "names a column twice in its first line: text, text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_cause(
    tmp_path: Path, name: str, content: str | bytes, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path, name, content)


def test_quotation_marks_after_a_comma_within_a_cell_are_text(tmp_path: Path) -> None:
    table = 'prompt,completion\n"a, ""b"", ",c "d" e\n'
    assert contents_of(read(tmp_path, "a.csv", table)) == [
        {"prompt": 'a, "b", ', "completion": 'c "d" e'}
    ]


def test_a_table_without_lines_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", "\n") == []


TABLE = [{"text": "a", "meta": {"x": None, "y": [{"z": None}]}}, {"text": None, "meta": None}]
PRESENT = [{"text": "a", "meta": {"y": [{}]}}, {}]  # what a table with null for absent keys holds


def test_parquet_is_read_if_the_library_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = SimpleNamespace(read_table=lambda path: SimpleNamespace(to_pylist=lambda: TABLE))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    found = read(tmp_path, "a.parquet", "PAR1")
    assert contents_of(found) == PRESENT
    assert [record.where for record in found] == [
        f"{tmp_path / 'a.parquet'}, row {number}" for number in (1, 2)
    ]

    def fail(path: Path) -> None:
        raise OSError("no footer\nmore")

    monkeypatch.setattr(parquet, "read_table", fail)
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet \(no footer\)$"):
        read(tmp_path, "a.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="a.parquet needs a library: pip install pyarrow"):
        read(tmp_path, "a.parquet", "PAR1")


def test_a_hub_data_set_is_read_if_the_library_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(name: str, split: str) -> list[dict]:
        assert (name, split) == ("some/set", "train")
        return TABLE

    library = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = files.read_hub("some/set")
    assert contents_of(found) == PRESENT
    assert [record.where for record in found] == ["some/set, row 1", "some/set, row 2"]
    monkeypatch.setattr(library, "load_dataset", lambda name, split: 1 / 0)
    with pytest.raises(
        ValueError, match=r"cannot be loaded as a hub data set \(division by zero\)$"
    ):
        files.read_hub("some/set")


def test_without_the_library_a_hub_data_set_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match="^--data some/set is not a file, and a hub .* pip install datasets$"
    ):
        files.read_hub("some/set")


def check_examples(folder: Path, module: ModuleType) -> None:
    """One example of each property above."""
    found = [{"a": "a\u2028b", "b": "c"}, {"a": "d", "b": "e\x85"}]
    check_lines(folder, found, [""], module, ensure_ascii=False)


@pytest.mark.parametrize(
    "old, new, check",
    [
        ("if text[start:end].strip()", "if True", check_examples),
        ("    line = 1\n    start = 0", "    line = 0\n    start = 0", check_examples),
        ('line += text.count("\\n", start, end) + 1', "line += 1", check_examples),
        ('line += text.count("\\n", counted, position)', "line += 1", check_examples),
        ("return len(text) if is_indented else start", "return len(text)", check_faults),
    ],
)
def test_a_mutant_of_the_reader_is_noticed(
    tmp_path: Path, old: str, new: str, check: Callable
) -> None:
    check(tmp_path, files)
    with pytest.raises((AssertionError, ValueError, IndexError, KeyError)):
        check(tmp_path, mutated(files, old, new, tmp_path))
