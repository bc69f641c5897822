"""Digests of weights: the same for the same tensors, however they are spread over files, and hashed once."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from engines.errors import BrokenFiles, FilesChanged, ShuttingDown
from engines.hub import content_digests
from engines.hub.content_digests import MAX_RECORDS, ContentDigests, DigestRecord, WeightFile
from tests.testkit.model_folders import Tensors, tensors, write_weights

TENSORS = tensors(200)


def digest(*paths: Path, digests: ContentDigests | None = None) -> str:
    return (digests or ContentDigests(None)).digest([WeightFile.at(path) for path in paths])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_weights(tmp_path / "model.safetensors", TENSORS)
    return tmp_path / "model.safetensors"


def test_the_same_tensors_in_other_files_have_the_same_digest(file: Path, tmp_path: Path) -> None:
    shards = [tmp_path / f"{name}.safetensors" for name in TENSORS]
    for shard, (name, tensor) in zip(shards, TENSORS.items(), strict=True):
        write_weights(shard, {name: tensor})
    write_weights(tmp_path / "again.safetensors", dict(reversed([*TENSORS.items()])))

    assert digest(*shards) == digest(*reversed(shards)) == digest(file) == digest(tmp_path / "again.safetensors")


def test_one_bit_changes_it(file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    (tmp_path / "other.safetensors").write_bytes(content)

    assert digest(tmp_path / "other.safetensors") != digest(file)


def test_names_shapes_and_dtypes_count(file: Path, tmp_path: Path) -> None:
    matrix = TENSORS["encoder.weight"]
    rest = {name: tensor for name, tensor in TENSORS.items() if tensor is not matrix}
    others: list[Tensors] = [
        {"encoder.bias": matrix},
        {"encoder.weight": matrix.T.copy()},
        {"encoder.weight": matrix.view(np.int32)},
    ]
    found = {digest(file)}
    for index, other in enumerate(others):
        write_weights(tmp_path / f"{index}.safetensors", {**rest, **other})
        found.add(digest(tmp_path / f"{index}.safetensors"))

    assert len(found) == 4


def test_two_tensors_that_swap_their_values_are_told_apart(tmp_path: Path) -> None:
    one, two = np.zeros(3, np.float32), np.ones(3, np.float32)
    write_weights(tmp_path / "a.safetensors", {"q": one, "k": two})
    write_weights(tmp_path / "b.safetensors", {"q": two, "k": one})

    assert digest(tmp_path / "a.safetensors") != digest(tmp_path / "b.safetensors")


def test_a_file_is_read_once_also_after_a_restart(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digest(file, digests=ContentDigests(tmp_path / "state"))
    monkeypatch.setattr(content_digests, "_hash_tensors", lambda *_: pytest.fail("read again"))

    assert digest(file, digests=ContentDigests(tmp_path / "state")) == first


def test_a_file_that_was_written_is_read_again(file: Path, tmp_path: Path) -> None:
    digests = ContentDigests(tmp_path / "state")
    first = digest(file, digests=digests)
    write_weights(file, {**TENSORS, "encoder.weight": np.zeros((20, 10), np.float32)})
    os.utime(file, ns=(1, 1))

    assert digest(file, digests=digests) != first


def test_a_file_that_was_written_in_place_is_read_again_although_its_mtime_was_set_back(
    file: Path, tmp_path: Path
) -> None:
    digests = ContentDigests(tmp_path / "state")
    first, before = digest(file, digests=digests), file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([file.read_bytes()[-1] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert digest(file, digests=digests) != first


def test_a_file_that_changed_since_its_model_began_to_load_has_no_digest(file: Path) -> None:
    before = WeightFile.at(file)
    os.utime(file, ns=(1, 1))

    with pytest.raises(FilesChanged, match=r"model\.safetensors was written since"):
        ContentDigests(None).digest([before])


def test_a_pickled_file_is_hashed_whole_and_a_blob_of_the_hub_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"other bytes than the name says")
    (tmp_path / "linked.bin").symlink_to(tmp_path / "blobs" / name)

    assert digest(tmp_path / "pytorch_model.bin") == hashlib.sha256(b"pickle").hexdigest()
    assert digest(tmp_path / "linked.bin") == name


def test_hashing_stops_when_the_model_leaves(file: Path) -> None:
    with pytest.raises(ShuttingDown):
        ContentDigests(None).digest([WeightFile.at(file)], lambda: False)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 9)

    with pytest.raises(BrokenFiles):
        digest(tmp_path / "model.safetensors")


def test_the_records_are_bounded(file: Path) -> None:
    stamp = WeightFile.at(file).stamp
    records = {f"{index}": DigestRecord(stamp, "d", float(index)) for index in range(MAX_RECORDS + 5)}

    kept = content_digests._newest(records)

    assert len(kept) == MAX_RECORDS
    assert "4" not in kept
    assert "5" in kept
