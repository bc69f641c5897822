"""Tests which files of quantised weights are kept, and which make room for others."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from engines.form_cache import HEADER_BYTES, FormCache, read_metadata
from engines.spec import ModelSpec

SPEC = ModelSpec(model_id="a", source="x", dtype="int8")
_Usage = namedtuple("_Usage", "total used free")


@pytest.fixture
def forms(tmp_path: Path) -> FormCache:
    return FormCache(tmp_path, "int8")


def keep(forms: FormCache, spec: ModelSpec, *, size: int = 0, used_s: float = 1e9, revision: str = "r1") -> Path:
    """Writes a file of this size, or with a header that names the model's files."""
    path = forms.path(spec)
    assert path is not None
    header = msgspec.json.encode({"__metadata__": {"identity": forms.identity(spec, revision)}})
    whole = (HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8)
    path.write_bytes(b"x" * size if size else whole)
    os.utime(path, (used_s, used_s))
    return path


def named(model_id: str) -> ModelSpec:
    return structs.replace(SPEC, model_id=model_id)


def with_free_bytes(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(0, 0, free_bytes))


def test_only_quantised_dtypes_of_models_without_code_of_their_own_have_a_place(forms: FormCache) -> None:
    assert forms.path(SPEC) is not None
    assert forms.path(structs.replace(SPEC, dtype="bfloat16")) is None
    assert forms.path(structs.replace(SPEC, trust_remote_code=True)) is None
    assert FormCache(None).path(SPEC) is None


@pytest.mark.parametrize(
    "changes", [{"source": "y"}, {"model_id": "b"}, {"adapter": "z"}], ids=["source", "model", "adapter"]
)
def test_a_form_is_of_one_entry_and_one_revision(forms: FormCache, changes: dict[str, str]) -> None:
    keep(forms, SPEC)

    assert forms.is_kept(SPEC, "r1")
    assert not forms.is_kept(SPEC, "r2")
    assert not forms.is_kept(structs.replace(SPEC, **changes), "r1")


def test_a_form_of_another_cpu_is_not_used(forms: FormCache, tmp_path: Path) -> None:
    keep(forms, SPEC)

    assert not FormCache(tmp_path, "bfloat16 int8").is_kept(SPEC, "r1")


LENGTH = (HEADER_BYTES - 8).to_bytes(8, "little")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"x" * 100, (2**60).to_bytes(8, "little"), b"\xff" * HEADER_BYTES, LENGTH + b'{"\xff": 1}',
        LENGTH + b'{"a": ' + b"[" * 100_000, LENGTH + b'{"__metadata__": {"identity": "\xff"}}',
    ],
)  # fmt: skip
def test_a_foreign_file_says_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)

    assert read_metadata(path) == {}
    assert read_metadata(tmp_path / "missing") == {}


def test_the_files_that_were_not_used_for_longest_make_room(
    forms: FormCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = keep(forms, named("b"), size=400, used_s=1e9), keep(forms, named("c"), size=400, used_s=2e9)
    own = forms.path(SPEC)
    assert own is not None
    with_free_bytes(monkeypatch, 400)  # of 1,500 bytes with the new file's 700, which may be half

    assert forms.make_room(300, keep=own)

    assert (old.exists(), new.exists()) == (False, True)
    forms.mark_used(new)


def test_a_file_that_is_too_large_for_the_disk_removes_no_other(
    forms: FormCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = keep(forms, named("b"), size=100)
    own = forms.path(SPEC)
    assert own is not None
    with_free_bytes(monkeypatch, 100)

    assert not forms.make_room(400, keep=own)
    assert other.exists()


def test_a_file_that_is_replaced_does_not_count(forms: FormCache, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = keep(forms, SPEC, size=300), keep(forms, named("b"), size=100)
    with_free_bytes(monkeypatch, 400)

    assert forms.make_room(300, keep=own)
    assert other.exists()


def test_what_a_process_that_died_has_begun_is_removed(forms: FormCache, tmp_path: Path) -> None:
    begun, running = tmp_path / ".a.safetensors.1", tmp_path / ".a.safetensors.2"
    for path in (begun, running):
        path.touch()
    os.utime(begun, (1e9, 1e9))
    own = forms.path(SPEC)
    assert own is not None

    forms.make_room(1, keep=own)

    assert (begun.exists(), running.exists()) == (False, True)


def test_a_registry_without_a_model_or_its_dtype_removes_its_file(forms: FormCache) -> None:
    listed = structs.replace(named("d"), dtype="float32", smaller_dtypes=("int8",))
    entries = {spec.model_id: spec for spec in (SPEC, named("b"), named("c"), listed)}
    paths = {spec.model_id: keep(forms, structs.replace(spec, dtype="int8")) for spec in entries.values()}
    later = {"a": SPEC, "c": structs.replace(named("c"), dtype="float32"), "d": listed}

    forms.remove_unused(entries, later)

    assert {name for name, path in paths.items() if path.exists()} == {"a", "d"}
