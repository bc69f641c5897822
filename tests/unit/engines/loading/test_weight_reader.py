"""Tests that weights are read once, exactly, and straight into the memory where they stay."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.lib.engine_kit import Kit, embed
from engines.device import huge_pages
from engines.errors import BrokenFiles
from engines.loading import weight_reader
from engines.loading.weight_reader import StoredTensor, WeightReader
from tests.testkit.fake_gpu import GPU
from tests.testkit.refusals import refusal

CPU = torch.device("cpu")
FILE = "model.safetensors"
MANY = torch.arange(-3000.0, 3000.0).reshape(60, 100) / 7


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tensors of a few kilobytes large ones."""
    monkeypatch.setattr(weight_reader, "_BLOCK_BYTES", 5000)
    monkeypatch.setattr(weight_reader, "_PART_BYTES", 700)
    monkeypatch.setattr(huge_pages, "PAGE_BYTES", 4096)
    monkeypatch.setattr(weight_reader, "STAGING_BYTES", 4096)


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the bytes of every read."""
    sizes: list[int] = []
    read = weight_reader._read

    def note(descriptor: int, start: int, memory: memoryview) -> None:
        sizes.append(len(memory))
        read(descriptor, start, memory)

    monkeypatch.setattr(weight_reader, "_read", note)
    return sizes


def saved(folder: Path, tensors: dict[str, Tensor], file: str = FILE) -> Path:
    save_file(tensors, folder / file)
    return folder


KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
         torch.uint8, torch.bool)  # fmt: skip


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_tensors_of_every_dtype_are_read_as_they_are_stored(tmp_path: Path, num_threads: int) -> None:
    tensors = {str(kind): MANY.to(kind) for kind in KINDS}
    others = {"scalar": torch.tensor(7.5), "nothing": torch.zeros(0, 3), "odd": torch.arange(3, dtype=torch.int8)}
    saved(tmp_path, tensors)
    saved(tmp_path, others, "other.safetensors")

    with WeightReader(tmp_path, [FILE, "other.safetensors"], CPU, num_threads) as reader:
        assert reader.can_read_all
        found = {name: stored[...].to() for name, stored in reader.tensors().items()}

    wanted = tensors | others
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_changes_as_torch_changes_it(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensor = MANY.to(stored)
    saved(tmp_path, {"a": tensor})

    with WeightReader(tmp_path, [FILE], CPU) as reader:
        found = reader.tensors()["a"].to(device="cpu", dtype=wanted)

    assert torch.equal(found, tensor.to(wanted))


@pytest.mark.usefixtures("small_parts")
def test_beside_the_weights_only_the_staging_buffers_are_held(tmp_path: Path) -> None:
    saved(tmp_path, {"a": MANY})

    with WeightReader(tmp_path, [FILE], CPU) as reader:
        reader.read("a", torch.bfloat16)

        assert sum(buffer.nbytes for buffer in reader._staging.buffers) <= weight_reader.STAGING_BYTES < MANY.nbytes


def test_memory_that_is_read_into_can_be_freed_by_torch_alone(tmp_path: Path) -> None:
    saved(tmp_path, {"a": MANY})
    with WeightReader(tmp_path, [FILE], CPU) as reader:
        assert reader.read("a").untyped_storage().resizable()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_file_that_is_truncated_while_it_is_read_is_an_error(tmp_path: Path, num_threads: int) -> None:
    path = saved(tmp_path, {"a": MANY}) / FILE

    with WeightReader(tmp_path, [FILE], CPU, num_threads) as reader:
        with path.open("r+b") as opened:
            opened.truncate(path.stat().st_size - 3000)
        with pytest.raises(EOFError):
            reader.read("a")


def test_a_file_that_is_truncated_before_is_refused_by_its_header(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": MANY}) / FILE
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(BrokenFiles, match="truncated"):
        WeightReader(tmp_path, [FILE], CPU)


def test_dtypes_that_torch_has_in_other_ways_are_left_to_transformers(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.zeros(8, dtype=torch.float8_e4m3fn), "b": MANY})
    with WeightReader(tmp_path, [FILE], CPU) as reader:
        assert not reader.can_read_all


def test_a_part_of_a_stored_tensor_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, {"a": MANY})
    with WeightReader(tmp_path, [FILE], CPU) as reader, pytest.raises(IndexError):
        StoredTensor(reader, "a")[0]


def test_pinned_staging_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Pinned:
        def pin(self, buffer: Tensor) -> bool:
            held.append(buffer.nbytes)
            return len(held) < 2  # the second stays pageable

        def unpin(self, buffer: Tensor) -> None:
            held.remove(buffer.nbytes)

    monkeypatch.setattr(weight_reader, "PINNED", Pinned())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    saved(tmp_path, {"a": MANY})

    with WeightReader(tmp_path, [FILE], GPU) as reader:
        assert len(reader._staging.buffers) == 2
        assert len(held) == 2

    assert len(held) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_reads_the_weights_of_a_local_folder_once(kit: Kit, read_bytes: list[int], dtype: str) -> None:
    folder = kit.recipe_folder("bert-cls")
    engine = kit.load(folder, dtype=dtype, min_cosine=0.0)

    assert 0 < sum(read_bytes) <= (folder / FILE).stat().st_size
    engine.close()


@pytest.mark.parametrize("recipe", ["bert-cls", "qwen2-last", "t5-mean-dense", "jamba-mean", "gemma3-bidirectional"])
def test_vectors_are_those_that_transformers_own_reading_gives(
    kit: Kit, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts = kit.recipe_folder(recipe), ["The cat sits outside.", "x"]
    found = embed(kit.load(folder), texts)
    monkeypatch.setattr(WeightReader, "can_read_all", property(lambda _: False))

    wanted = embed(kit.load(folder), texts)

    assert (found == wanted).all()


def test_tensors_of_another_shape_are_refused_as_before(kit: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "bert"))
    tensors = load_file(folder / FILE)
    name = next(name for name in tensors if name.endswith("query.weight"))
    save_file({**tensors, name: tensors[name].repeat(1, 2)}, folder / FILE, {"format": "pt"})

    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert "tensors have other shapes" in str(error)
