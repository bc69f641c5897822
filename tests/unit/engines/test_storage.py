"""Tests values on disk: written whole or not at all; a failing disk loses a measurement and nothing else."""

import os
from pathlib import Path
from threading import Thread

import pytest
from structlog.testing import capture_logs

from engines import storage
from engines.storage import JsonStore, write_atomically


def opened(path: Path | None) -> JsonStore[int]:
    return JsonStore(path, dict[str, int])


def test_two_writers_keep_each_others_values(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "values.json"
    one, two = opened(path), opened(path)
    one.put("a", 1)
    two.put("b", 2)

    assert (opened(path).get("a"), opened(path).get("b")) == (1, 2)
    assert [file.name for file in path.parent.iterdir()] == ["values.json"]


def test_a_value_that_another_process_has_changed_is_not_brought_back(tmp_path: Path) -> None:
    one, two = opened(tmp_path / "values.json"), opened(tmp_path / "values.json")
    one.put("a", 1)
    two.refresh()
    one.put("a", 0)
    two.put("b", 2)

    assert (two.get("a"), opened(tmp_path / "values.json").get("a")) == (0, 0)


def test_a_value_that_is_written_during_a_write_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = opened(tmp_path / "values.json"), opened(tmp_path / "values.json")
    other = Thread(target=two.put, args=("b", 2))

    def write(path: Path, content: bytes, **options: bool) -> None:
        monkeypatch.setattr(storage, "write_atomically", write_atomically)
        other.start()
        other.join(0.2)  # ends here only if it does not wait for this write
        write_atomically(path, content, **options)

    monkeypatch.setattr(storage, "write_atomically", write)
    one.put("a", 1)
    other.join()

    assert (opened(tmp_path / "values.json").get("a"), opened(tmp_path / "values.json").get("b")) == (1, 2)


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_a_process_that_is_stopped_while_it_writes_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(storage, "_LOCK_WAIT_S", 0.02)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    opened(tmp_path / "values.json").put("a", 1)
    os.close(folder)

    assert opened(tmp_path / "values.json").get("a") == 1


def test_a_value_that_could_not_be_written_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    store, other = opened(tmp_path / "values.json"), opened(tmp_path / "values.json")
    other.put("a", 0)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomically", fail)
        store.put("a", 1)
    store.put("b", 2)

    assert (opened(tmp_path / "values.json").get("a"), opened(tmp_path / "values.json").get("b")) == (1, 2)


def test_values_beyond_the_bound_do_not_come_back_from_what_a_store_remembers(tmp_path: Path) -> None:
    kept: JsonStore[int] = JsonStore(None, dict[str, int], keep=lambda values: dict(list(values.items())[-2:]))
    for number in range(5):
        kept.put(str(number), number)

    assert kept.values() == (3, 4)


@pytest.mark.parametrize(
    "content", [b'{"a": "no number"}', b'{"\xff": 1}', b'{"a": ' + b"[" * 100_000, b"\0" * 64, b"[1]"]
)
def test_a_file_that_cannot_be_read_is_left_out_and_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "values.json"
    path.write_bytes(content)

    with capture_logs() as lines:
        store = opened(path)

    assert store.get("a") is None
    assert [line["event"] for line in lines] == ["measurements.ignored"]


def test_a_disk_that_cannot_be_written_is_said_and_the_value_is_known_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = opened(tmp_path / "file" / "values.json")

    with capture_logs() as lines:
        store.put("a", 1)

    assert store.get("a") == 1
    assert [line["event"] for line in lines] == ["measurements.not_written"]


@pytest.mark.parametrize("is_private", [False, True])
def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_private: bool
) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"after", is_private=is_private)

    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_new_file_has_the_permissions_of_any_other_unless_it_is_private(tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    write_atomically(tmp_path / "open", b"x")
    write_atomically(tmp_path / "private", b"x", is_private=True)

    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["open"] == modes["any"]
    assert modes["private"] == 0o600


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_private_file_that_exists_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(0o640)
    path.chmod(0o640)
    write_atomically(path, b"after", is_private=True)

    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"after", 0o640)


def test_a_link_stays_a_link_and_folders_are_made(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "deep" / "real")
    write_atomically(link, b"content")

    assert link.is_symlink()
    assert (tmp_path / "deep" / "real").read_bytes() == b"content"
