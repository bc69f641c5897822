"""Readers give every record once, and from any place between two records on give the rest."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.bulk import readers
from router.bulk.readers import read_records
from router.bulk.records import BulkError, Cursor, Record
from router.bulk.sources import Columns, open_sources

TEXT, BEGIN = Columns(), Cursor()
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), max_size=12)
EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def records(path: Path, columns: Columns = TEXT, start: Cursor = BEGIN) -> list[Record]:
    return list(read_records(open_sources([str(path)], None), columns, start))


def assert_continues_anywhere(path: Path, columns: Columns) -> list[Record]:
    """Read a file from each place that its records name; return the records."""
    found = records(path, columns)
    for index, record in enumerate(found):
        assert records(path, columns, record.after) == found[index + 1 :]
    return found


@EXAMPLES
@given(TEXTS)
def test_jsonl_gives_each_text_from_anywhere(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": f"{n}"}) for n, text in enumerate(texts)))
    found = assert_continues_anywhere(path, Columns(id="id"))

    assert [(record.id, record.text) for record in found] == [(f"{n}", text) for n, text in enumerate(texts)]


@EXAMPLES
@given(TEXTS)
def test_csv_gives_each_text_from_anywhere_also_with_line_breaks_in_quotes(tmp_path: Path, texts: list[str]) -> None:
    path, written = tmp_path / "in.csv", io.StringIO(newline="")
    writer = csv.writer(written, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", "text"], *([f"{n}", text] for n, text in enumerate(texts))])
    path.write_bytes(written.getvalue().encode())
    found = assert_continues_anywhere(path, Columns(id="id"))

    assert [(record.id, record.text) for record in found] == [(f"{n}", text) for n, text in enumerate(texts)]


def test_plain_lines_have_their_numbers_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \nfour\nno newline")
    found = assert_continues_anywhere(path, Columns())

    assert [(record.id, record.text) for record in found] == [(1, "one"), (4, "four"), (5, "no newline")]


def test_numbers_run_on_over_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x\ny\n")
    sources = open_sources([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], None)
    found = list(read_records(sources, Columns(), Cursor()))

    assert [record.id for record in found] == [1, 2, 3, 4]
    assert list(read_records(sources, Columns(), found[1].after)) == found[2:]


def test_parquet_gives_each_row_from_anywhere(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "in.parquet"
    table = pa.table({"id": list(range(50)), "text": [f"text {n}" for n in range(50)], "more": [0.5] * 50})
    import pyarrow.parquet as pq

    pq.write_table(table, path, row_group_size=7)
    found = assert_continues_anywhere(path, Columns(id="id", kept=("more",)))

    assert [(record.id, record.text, record.kept["more"]) for record in found] == [
        (n, f"text {n}", 0.5) for n in range(50)
    ]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{torn", "invalid_json"),
        (b"[1]", "invalid_value"),
        (b'{"other": "a"}', "invalid_value"),
        (b'{"text": 5}', "invalid_value"),
        (b'{"text": ""}', "empty_input"),
        (b'{"text": "\xff"}', "invalid_value"),
        (b'{"text": "\\ud800"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused_alone(tmp_path: Path, line: bytes, code: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    found = records(path)

    assert [record.refusal and record.refusal.code for record in found] == [None, code, None]
    assert [record.text for record in found if record.refusal is None] == ["a", "b"]


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.csv"])
def test_a_line_of_any_length_is_refused_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    path = tmp_path / name
    ends = {"in.jsonl": ('{"text": "a"}', '{"text": "b"}'), "in.txt": ("a", "b"), "in.csv": ("text\na", "b")}[name]
    path.write_text(f"{ends[0]}\n{'x' * 1000}\n{ends[1]}\n")
    found = assert_continues_anywhere(path, Columns())

    assert [record.refusal and record.refusal.code for record in found] == [None, "invalid_value", None]
    assert [found[0].text, found[-1].text] == ["a", "b"]


def test_standard_input_goes_on_only_where_it_begins_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(content: bytes, start: Cursor = BEGIN) -> list[Record]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return list(read_records(open_sources(["-"], "lines"), Columns(), start))

    found = read(b"a\nb\nc\n")

    assert read(b"a\nb\nc\n", found[0].after) == found[1:]
    with pytest.raises(BulkError, match="does not begin as it did"):
        read(b"x\nb\nc\n", found[0].after)


def test_a_missing_column_or_an_unknown_format_stops_the_job(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,body\n1,a\n")
    (tmp_path / "in.dat").write_text("a")
    with pytest.raises(BulkError, match=r"no column 'text' \(its columns: id, body\)"):
        records(tmp_path / "in.csv")
    with pytest.raises(BulkError, match="name it with --format"):
        records(tmp_path / "in.dat")
    with pytest.raises(BulkError, match="is not a file"):
        records(tmp_path / "none.csv")
