"""Files are compared with the sha256 of the registry while a model loads."""

import hashlib
from pathlib import Path

import pytest

from engines.errors import BrokenFiles
from engines.loading.checksums import Checksums

NAME = "model.safetensors"


def test_files_with_the_stated_sha256_pass(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"weights")

    Checksums(tmp_path, {NAME: hashlib.sha256(b"weights").hexdigest()}, "m").check()


def test_another_file_is_refused_with_both_sums(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"other weights")
    found, stated = (hashlib.sha256(text).hexdigest() for text in (b"other weights", b"weights"))

    with pytest.raises(BrokenFiles, match=f"its sha256 is {found}, not {stated}") as raised:
        Checksums(tmp_path, {NAME: stated}, "m").check()
    assert raised.value.file == NAME


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BrokenFiles, match=r"model\.safetensors of m cannot be read: No such file"):
        Checksums(tmp_path, {NAME: "0" * 64}, "m").check()


def test_files_of_an_adapter_have_names_of_their_own(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter-folder"
    adapter.mkdir()
    (tmp_path / NAME).write_bytes(b"weights")
    (adapter / NAME).write_bytes(b"adapter")
    sums = {
        name: hashlib.sha256(text).hexdigest() for name, text in ((NAME, b"weights"), (f"adapter/{NAME}", b"adapter"))
    }

    Checksums(tmp_path, sums, "m", adapter).check()
    with pytest.raises(BrokenFiles, match="its sha256 is"):
        Checksums(tmp_path, {**sums, f"adapter/{NAME}": sums[NAME]}, "m", adapter).check()
