"""A job that is killed at any moment and run again has the output of one that was not."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from engines.testing.engine import fake_vector
from router.bulk.records import BulkError
from router.bulk.sources import Columns
from tests.unit.router.bulk.kit import FailingDisk, FakeEmbedder, FastDisk, Killed, job_of, run

COLUMNS = Columns(id="id", kept=("title",))


def write_input(path: Path, lines: int = 60) -> Path:
    rows = [json.dumps({"id": f"d{n}", "text": f"text {n} " * (n % 5 + 1), "title": f"t{n}"}) for n in range(lines)]
    rows[11], rows[20], rows[41] = "{torn", json.dumps({"id": "e", "text": ""}), json.dumps({"id": "l", "text": "long"})
    path.write_text("\n".join(rows) + "\n")
    return path


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["out.jsonl", "out.npy", "out.parquet", "out.arrow"])
def test_a_job_killed_at_random_moments_ends_byte_equal_to_an_undisturbed_one(tmp_path: Path, name: str) -> None:
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    source, whole = write_input(tmp_path / "in.jsonl"), tmp_path / "whole"
    whole.mkdir()
    counter = FailingDisk(-1, random.Random(0))
    run(job_of(source, whole / name, columns=COLUMNS), disk=counter)
    expected = published(whole)
    assert expected.keys() == {name, f"{name}.errors.jsonl"} | ({f"{name}.ids.jsonl"} if name == "out.npy" else set())

    for seed in range(60):
        chance, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        kills = 0
        while not (folder / name).exists() or (folder / f"{name}.journal").exists():
            disk = FailingDisk(chance.randrange(1, counter.count + 1), chance)
            try:
                run(job_of(source, folder / name, columns=COLUMNS), disk=disk if kills < 3 else FastDisk())
            except Killed:
                kills += 1
                # A kill never leaves a torn file under the final name.
                assert not (folder / name).exists() or (folder / name).read_bytes() == expected[name]
        assert published(folder) == expected
        assert kills


def test_every_id_has_its_own_vector_once(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    state = run(job_of(source, out, columns=COLUMNS))
    rows = [json.loads(line) for line in out.read_text().splitlines()]

    assert [row["id"] for row in rows] == [f"d{n}" for n in range(60) if n not in (11, 20, 41)]
    for row in rows:
        number = int(row["id"][1:])
        assert row["title"] == f"t{number}"
        text = f"text {number} " * (number % 5 + 1)
        assert np.array_equal(np.array(row["embedding"], np.float32), fake_vector("fake", text))
    assert (state.rows, state.refused) == (57, 3)


def test_refused_lines_are_listed_with_the_codes_of_the_contract(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    run(job_of(source, out, columns=COLUMNS))
    errors = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]

    assert [(error["line"], error["id"], error["error"]["code"]) for error in errors] == [
        (12, 12, "invalid_json"), (21, "e", "empty_input"), (42, "l", "context_length_exceeded"),
    ]  # fmt: skip


def test_a_job_goes_on_behind_the_last_committed_window(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    first, second = FakeEmbedder(), FakeEmbedder()
    with pytest.raises(Killed):
        run(job_of(source, out, columns=COLUMNS), first, FailingDisk(25, random.Random(0)))
    run(job_of(source, out, columns=COLUMNS), second)

    assert 1 < len(first.windows) < 9
    assert len(first.windows) + len(second.windows) in (9, 10, 11), "one window runs while the one before it is written"
    assert second.windows[-1] == ["text 56 " * 2, "text 57 " * 3, "text 58 " * 4, "text 59 " * 5]


def test_several_lanes_commit_in_order(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl")
    run(job_of(source, tmp_path / "one.jsonl"), FakeEmbedder())
    run(job_of(source, tmp_path / "three.jsonl"), FakeEmbedder(lanes=3))

    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()


def test_an_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(BulkError, match="exists: --overwrite"):
        run(job_of(source, out))
    assert out.read_text() == "precious"
    run(job_of(source, out, overwrite=True))

    assert out.read_text() != "precious"


def test_a_job_goes_on_with_vectors_of_the_same_space_only(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(job_of(source, out), FakeEmbedder(space="s1-a"), FailingDisk(25, random.Random(0)))
    with pytest.raises(BulkError, match="is of another job \\(space was 's1-a', is 's1-b'\\)"):
        run(job_of(source, out), FakeEmbedder(space="s1-b"))
    state = run(job_of(source, out), FakeEmbedder(space=""))  # of a server that does not know it

    assert state.rows == 57


def test_what_another_job_left_is_not_continued(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(job_of(source, out), disk=FailingDisk(25, random.Random(0)))
    with pytest.raises(BulkError, match="is of another job \\(columns was"):
        run(job_of(source, out, columns=COLUMNS))
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    with pytest.raises(BulkError, match="is of another job \\(input was"):
        run(job_of(source, out))
    state = run(job_of(source, out, overwrite=True))

    assert state.rows == len(out.read_text().splitlines()) == 58
