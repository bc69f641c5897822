"""Values on disk: whole or not at all, and a disk that fails costs a measurement, not the server."""

from pathlib import Path

from structlog.testing import capture_logs

from engines.storage import JsonStore


def opened(path: Path | None) -> JsonStore[int]:
    return JsonStore(path, dict[str, int])


def test_two_writers_keep_each_others_values(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "values.json"
    one, two = opened(path), opened(path)
    one.put("a", 1)
    two.put("b", 2)

    assert (opened(path).get("a"), opened(path).get("b")) == (1, 2)
    assert [file.name for file in path.parent.iterdir()] == ["values.json"]


def test_a_file_that_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text('{"a": "no number"}')

    with capture_logs() as lines:
        kept = opened(path)

    assert kept.get("a") is None
    assert [line["event"] for line in lines] == ["measurements.ignored"]


def test_a_disk_that_cannot_be_written_is_said_and_the_value_is_known_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    kept = opened(tmp_path / "file" / "values.json")

    with capture_logs() as lines:
        kept.put("a", 1)

    assert kept.get("a") == 1
    assert [line["event"] for line in lines] == ["measurements.not_written"]
