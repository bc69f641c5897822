"""Tests the reading of input files: offsets, lines that are too long, ids that come twice."""

import io
from pathlib import Path

import pytest

from router.batches.lines import BadLine, Line, LineReader, parse_line, scan_file
from tests.testkit.batches import line


def read_all(data: bytes, max_bytes: int = 10, offset: int = 0, number: int = 1) -> list[Line]:
    return list(LineReader(io.BytesIO(data), offset, number, max_bytes))


def test_lines_know_where_the_next_one_begins() -> None:
    data = b"\xef\xbb\xbfa\n\n  \r\nbb\r\nc"

    assert read_all(data) == [Line(1, 5, b"a\n"), Line(4, 14, b"bb\r\n"), Line(5, 15, b"c")]
    for known in read_all(data):
        rest = [found for found in read_all(data) if found.number > known.number]
        assert read_all(data, offset=known.end, number=known.number + 1) == rest


@pytest.mark.parametrize("size", [10, 11, 12, 3 * 2**20])
def test_a_line_that_is_too_long_is_skipped(size: int) -> None:
    data = b"a\n" + b"x" * size + b"\nb\n"

    first, second, third = read_all(data)

    assert (first.raw, third.raw) == (b"a\n", b"b\n")
    assert second.raw == (b"x" * size + b"\n" if size <= 10 else None)
    assert (second.end, third.end) == (size + 3, size + 5)


def test_reads_are_bounded_by_lines_and_bytes() -> None:
    reader = LineReader(io.BytesIO(b"aaaa\n" * 5), 0, 1, 10)

    assert [len(reader.read(2, 100)), len(reader.read(10, 6)), len(reader.read(10, 100))] == [2, 2, 1]
    assert reader.read(10, 100) == []


def write(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(rows))
    return path


def test_ids_that_come_again_are_found(tmp_path: Path) -> None:
    path = write(tmp_path, line("a"), "", line("b"), "{", "{", line("a"), line("a"), line("c"))

    scan = scan_file(path, 1000, lambda: False)

    assert (scan.total, scan.is_whole) == (7, True)
    assert scan.repeated is not None and scan.repeated.nonzero()[0].tolist() == [4, 5]
    assert scan_file(write(tmp_path, line("a"), line("b")), 1000, lambda: False).repeated is None


def test_a_scan_ends_at_the_most_lines_and_when_it_is_stopped(tmp_path: Path) -> None:
    path = write(tmp_path, *map(line, "abc"))

    assert not scan_file(path, 1000, lambda: False, max_lines=2).is_whole
    assert scan_file(path, 1000, lambda: False, max_lines=3).is_whole
    many = write(tmp_path, *(line(f"{number}") for number in range(3000)))
    assert scan_file(many, 1000, lambda: True).total == 1000


@pytest.mark.parametrize(
    ("raw", "code", "custom_id"),
    [
        (b"\xff\xfe{", "invalid_json", None),
        (b'{"a":' * 100_000, "invalid_json", None),
        (b'{"custom_id":"\xff"}', "invalid_json", None),
        (b"null", "invalid_value", None),
        (line("i" * 513).encode(), "invalid_value", None),
        (line("a", method="DELETE").encode(), "invalid_value", "a"),
        (line("a", url="/admin/models").encode(), "invalid_value", "a"),
        (b'{"custom_id":"a","method":"POST","url":"/v1/embeddings"}', "invalid_value", "a"),
    ],
)
def test_a_bad_line_says_what_is_wrong(raw: bytes, code: str, custom_id: str | None) -> None:
    with pytest.raises(BadLine) as caught:
        parse_line(Line(7, 0, raw), "/v1/embeddings", 100)

    assert (caught.value.code, caught.value.custom_id) == (code, custom_id)
    assert "ine 7" in str(caught.value)
