"""Tests that quantised weights are kept on disk, and that a load from them gives the same vectors bit for bit."""

import gc
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from benchmarks.gpu.rig import encoder_of
from benchmarks.lib.engine_kit import Kit, cosines, embed, encode
from benchmarks.lib.models import RECIPES, wider
from benchmarks.lib.workloads import SENTENCES
from engines.batching.engine import EmbeddingEngine
from engines.errors import SelfCheckFailed, UnsupportedModel
from engines.form_cache import HEADER_BYTES, FormCache, read_metadata
from engines.hub.content_digests import ContentDigests
from engines.layers import packed_linear
from engines.layers.weight_only import Int4Linear, can_multiply_int4
from engines.loading import builders, form_files
from engines.loading.loader import LoaderSettings
from engines.models import weight_forms
from engines.models.verification import Canaries

needs_int4 = pytest.mark.skipif(not can_multiply_int4(), reason="this CPU or torch has no kernel for int4")

WIDE = ("bert-cls", "qwen3-last", "nomic-mean")

TEXTS = [*SENTENCES[:6], " ".join(SENTENCES[:4]), "x"]


class Server:
    """Loads one recipe in int8, as a server with a folder for its state does."""

    def __init__(self, kit: Kit, folder: Path, name: str = "bert-cls", *, has_canaries: bool = True) -> None:
        self._kit, self.name, self.folder = kit, name, folder
        self.forms = FormCache(folder / "forms")
        self._settings = LoaderSettings(
            form_cache=self.forms,
            canary_folder=folder / "canaries" if has_canaries else None,
            content_digests=ContentDigests(folder),
        )

    def load(self, **changes: Any) -> EmbeddingEngine:
        changes = {"folder": self.recipe_folder, "dtype": "int8", **RECIPES[self.name].spec, **changes}
        engine = self._kit.load(settings=self._settings, **changes)
        for thread in threading.enumerate():
            if thread.name.startswith("form-"):
                thread.join()
        return engine

    def vectors(self, **changes: Any) -> np.ndarray[Any, Any]:
        engine = self.load(**changes)
        found = embed(engine, TEXTS)
        engine.close()
        return found

    @property
    def recipe_folder(self) -> Path:
        return self._kit.recipe_folder(self.name)

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.folder / "forms").iterdir() if not path.name.startswith(".")]

    @property
    def file(self) -> Path:
        (found,) = self.files
        return found


@pytest.fixture
def server(kit: Kit, tmp_path: Path) -> Server:
    return Server(kit, tmp_path)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("float weights are read")


def forbid_float_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "read_model", refuse)
    monkeypatch.setattr(packed_linear, "quantize_rows", refuse)
    monkeypatch.setattr(weight_forms, "quantize_groups", refuse)


@pytest.fixture(scope="module")
def wide_kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """Models whose matrices fit int4."""
    kit = Kit(tmp_path_factory.mktemp("wide"))
    with wider(64):
        for name in WIDE:
            kit.recipe_folder(name)
    yield kit
    kit.close()


@needs_int4
@pytest.mark.parametrize("name", WIDE)
def test_int4_is_near_sentence_transformers_and_a_later_load_reads_it_bit_for_bit(
    wide_kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    server = Server(wide_kit, tmp_path, name)
    engine = server.load(dtype="int4")
    first = embed(engine, TEXTS)
    parts = {type(part) for part in encoder_of(engine)._model.modules()}
    engine.close()

    forbid_float_weights(monkeypatch)
    second = server.vectors(dtype="int4")

    assert Int4Linear in parts
    assert cosines(first, encode(wide_kit.reference(name), TEXTS)).min() > 0.8  # random weights: of MiniLM 0.95
    np.testing.assert_array_equal(first, second)


@needs_int4
def test_int4_is_refused_where_no_matrix_fits_it(server: Server) -> None:
    with pytest.raises(UnsupportedModel, match=r"multiple of 64 outputs and of 32 inputs, .* set `dtype: int8`"):
        server.load(dtype="int4")


def test_int4_is_refused_on_a_cpu_without_its_kernel(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_forms, "can_multiply_int4", lambda: False)

    with pytest.raises(UnsupportedModel, match=r"needs a CPU with AVX512-BF16 or AMX .* set `dtype: int8`"):
        server.load(dtype="int4")


@pytest.mark.parametrize("name", ["bert-cls", "mpnet-mean", "distilbert-mean", "nomic-mean", "qwen3-last"])
def test_a_later_load_reads_the_kept_form_only_and_gives_the_same_vectors_bit_for_bit(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    server = Server(kit, tmp_path, name)
    first = server.vectors()

    forbid_float_weights(monkeypatch)
    second = server.vectors()

    np.testing.assert_array_equal(first, second)


def test_the_file_is_a_safetensors_file_that_holds_the_products_in_int8(server: Server) -> None:
    server.load().close()

    with safe_open(server.file, framework="np") as opened:
        first = opened.get_slice("product.0.0")
        assert (first.get_dtype(), first.get_shape()) == ("I8", [144, 48])
        assert opened.get_slice("product.0.1").get_dtype() == "F32"
        assert not any("query" in name and "weight" in name for name in opened.keys())  # noqa: SIM118  # no mapping


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) - 5], "damaged"),
        (
            lambda content: content[:HEADER_BYTES] + bytes([content[HEADER_BYTES] ^ 1]) + content[HEADER_BYTES + 1 :],
            "damaged",
        ),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged"),
        (lambda content: b"x" * len(content), "another"),
        (lambda _: b"", "another"),
    ],
    ids=["cut", "flipped first", "flipped last", "foreign", "empty"],
)
def test_a_damaged_file_is_ignored_with_a_line_and_made_anew(server: Server, damage: Any, reason: str) -> None:
    first = server.vectors()
    whole = server.file.read_bytes()
    server.file.write_bytes(damage(whole))

    with capture_logs() as logs:
        second = server.vectors()

    np.testing.assert_array_equal(first, second)
    assert [reason in line["reason"] for line in logs if line["event"] == "form.ignored"] == [True]
    assert read_metadata(server.file) == read_metadata_of(whole, server.folder)


def read_metadata_of(content: bytes, folder: Path) -> dict[str, str]:
    path = folder / "whole"
    path.write_bytes(content)
    return read_metadata(path)


def test_the_form_of_another_revision_is_made_anew(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.load().close()
    before = read_metadata(server.file)

    server.load(revision="r2").close()
    after = read_metadata(server.file)

    assert before["content"] == after["content"]
    assert before["identity"] != after["identity"]
    forbid_float_weights(monkeypatch)
    server.load(revision="r2").close()


def test_other_content_under_the_same_revision_gives_its_own_vectors(kit: Kit, tmp_path: Path) -> None:
    server = Server(kit, tmp_path, has_canaries=False)
    copied = shutil.copytree(server.recipe_folder, tmp_path / "copy")
    first = server.vectors(folder=copied)
    weights = load_file(copied / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.intermediate.dense.weight"))
    save_file({**weights, name: -weights[name]}, copied / "model.safetensors", metadata={"format": "pt"})

    second = server.vectors(folder=copied)

    assert np.abs(first - second).max() > 0.01


def test_weights_that_are_written_in_place_give_their_own_vectors_although_their_mtime_was_set_back(
    kit: Kit, tmp_path: Path
) -> None:
    server = Server(kit, tmp_path, has_canaries=False)
    copied = shutil.copytree(server.recipe_folder, tmp_path / "copy")
    first, path = server.vectors(folder=copied), copied / "model.safetensors"
    before, weights = path.stat(), load_file(path)
    name = next(name for name in weights if name.endswith("layer.0.intermediate.dense.weight"))
    save_file({**weights, name: -weights[name]}, tmp_path / "other", metadata={"format": "pt"})
    path.write_bytes((tmp_path / "other").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert path.stat().st_size == before.st_size
    assert np.abs(first - server.vectors(folder=copied)).max() > 0.01


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_form_is_not_kept_where_files_were_replaced_while_it_was_made(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    server = Server(kit, tmp_path, has_canaries=False)
    copied = shutil.copytree(server.recipe_folder, tmp_path / "copy")
    server.vectors(folder=copied, dtype="float32")  # which hashes the weights
    read = builders.read_model

    def replaced(*args: Any, **options: Any) -> Any:
        shutil.copy(copied / file, tmp_path / file)
        (tmp_path / file).replace(copied / file)
        return read(*args, **options)

    monkeypatch.setattr(builders, "read_model", replaced)
    server.load(folder=copied).close()

    assert not server.files


def test_a_form_whose_vectors_are_not_those_of_the_canary_is_refused_and_then_made_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = server.vectors()
    right = form_files.FormReader.take

    def wrong(self: form_files.FormReader, weight: torch.Tensor, make: Any) -> tuple[torch.Tensor, ...]:
        rounded, *rest = right(self, weight, make)
        return (-rounded, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(form_files.FormReader, "take", wrong)
        with pytest.raises(SelfCheckFailed, match="moved"):
            server.load()
        assert not server.files

    np.testing.assert_array_equal(server.vectors(), first)


def test_a_model_that_fails_its_check_keeps_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise SelfCheckFailed("wrong")

    monkeypatch.setattr(Canaries, "compare", fail)

    with pytest.raises(SelfCheckFailed):
        server.load()

    gc.collect()
    assert not list((server.folder / "forms").iterdir())


def test_a_form_that_the_disk_has_no_room_for_is_not_kept_and_the_model_serves(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form_files, "FREE_BYTES", 2**60)

    with capture_logs() as logs:
        assert np.isfinite(server.vectors()).all()

    assert "form.not_kept" in {line["event"] for line in logs}
    assert not list((server.folder / "forms").iterdir())


def test_a_model_that_shares_weights_between_its_parts_is_not_kept(kit: Kit, tmp_path: Path) -> None:
    server = Server(kit, tmp_path, "t5-mean-dense")

    server.load().close()

    assert not server.files


def test_float32_keeps_nothing(server: Server) -> None:
    server.load(dtype="float32").close()

    assert not (server.folder / "forms").exists()
