"""What loads have proved: what one process takes back, another does not bring back."""

from pathlib import Path

from engines.models.load_records import LoadRecords


def test_a_path_that_another_process_proved_since_is_taken_back(tmp_path: Path) -> None:
    one, two = LoadRecords(tmp_path), LoadRecords(tmp_path)
    one.put_path("m", "fused")
    two.put_path("m", "")

    assert LoadRecords(tmp_path).proved_path("m") == ""


def test_a_path_that_was_taken_back_stays_so_whatever_others_prove(tmp_path: Path) -> None:
    one = LoadRecords(tmp_path)
    one.put_path("m", "fused")
    two = LoadRecords(tmp_path)
    one.put_path("m", "")
    two.put_path("another", "packed")

    assert LoadRecords(tmp_path).proved_path("m") == two.proved_path("m") == ""
    assert LoadRecords(tmp_path).proved_path("another") == "packed"


def test_a_path_that_was_taken_back_is_not_believed_by_a_process_that_has_read_it(tmp_path: Path) -> None:
    LoadRecords(tmp_path).put_path("m", "fused")
    records = LoadRecords(tmp_path)
    LoadRecords(tmp_path).put_path("m", "")

    assert records.proved_path("m") == ""
