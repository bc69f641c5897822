"""Tests that weights are read once, exactly, and straight into the memory where they stay."""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.lib.engine_kit import Kit, assert_same, embed
from engines.device import huge_pages
from engines.errors import BrokenFiles
from engines.loading import builders, weight_reader
from engines.loading.builders import Knowledge
from engines.loading.loader import LoaderSettings
from engines.loading.preflight import check_proportions
from engines.loading.recorded_tokenizer import TokenizerRecords
from engines.loading.weight_reader import StoredTensor, WeightReader
from engines.models.load_records import LoadRecords
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


def test_threads_that_ask_at_once_get_the_tensors_that_they_ask_for(tmp_path: Path) -> None:
    """As transformers does without HF_DEACTIVATE_ASYNC_LOAD: its table came out with rows of other tensors."""
    stored = {f"w{number}": torch.full((300_000,), float(number)) for number in range(16)}
    with WeightReader(saved(tmp_path, stored), [FILE], CPU) as reader, ThreadPoolExecutor(8) as threads:
        read = partial(reader.read, dtype=torch.bfloat16)
        found = dict(zip(stored, threads.map(read, stored), strict=True))

    assert [name for name, tensor in found.items() if not torch.equal(tensor, stored[name].bfloat16())] == []


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


# Reading ahead, and tensors that lie one behind the other.


def layers(num: int, kinds: tuple[str, ...] = ("query", "key", "value")) -> dict[str, Tensor]:
    """Return tensors as a checkpoint names them, each with numbers of its own."""
    tensors = {"embeddings.weight": MANY * 3, "scalar": torch.tensor(2.5), "nothing": torch.zeros(0, 3)}
    for layer in range(num):
        for number, kind in enumerate((*kinds, "dense")):
            tensors[f"layer.{layer}.self.{kind}.weight"] = MANY[: 10 + number] * (layer + number + 1)
            tensors[f"layer.{layer}.self.{kind}.bias"] = MANY[0, : 10 + number] + layer
    return tensors


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize(("call_bytes", "call_tensors"), [(2**30, 1000), (3000, 1000), (2**30, 2), (4, 1)])
def test_tensors_that_are_read_ahead_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, call_bytes: int, call_tensors: int
) -> None:
    monkeypatch.setattr(weight_reader, "_CALL_BYTES", call_bytes)
    monkeypatch.setattr(weight_reader, "_CALL_TENSORS", call_tensors)
    one, other = layers(2), {"other": MANY.double(), "head.weight": MANY}
    saved(tmp_path, one)
    saved(tmp_path, other, "other.safetensors")

    with WeightReader(tmp_path, [FILE, "other.safetensors"], CPU, num_threads) as reader:
        reader.read_ahead([*one, "head.weight", "of another model"], torch.float32)
        found = {name: stored.to(dtype=None) for name, stored in reader.tensors().items()}
        assert reader.names_read == {*one, *other}

    for name, tensor in {**one, **other}.items():
        assert torch.equal(found[name], tensor)


def test_a_tensor_that_is_asked_for_twice_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    saved(tmp_path, layers(1))
    name = "layer.0.self.key.weight"
    for is_ahead in (True, False):
        with WeightReader(tmp_path, [FILE], CPU) as reader:
            reader.read_ahead([name] if is_ahead else [], torch.float32)
            first, again = reader.read(name), reader.read(name)

        assert torch.equal(first, again)
        assert first.data_ptr() != again.data_ptr()


def test_a_tensor_that_is_wanted_in_another_dtype_is_not_the_one_that_was_read_ahead(tmp_path: Path) -> None:
    tensors = saved_layers(tmp_path)
    with WeightReader(tmp_path, [FILE], CPU) as reader:
        reader.read_ahead(tensors, torch.float32)
        found = {name: reader.read(name, torch.bfloat16) for name in tensors}

    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in tensors.items())


def saved_layers(folder: Path) -> dict[str, Tensor]:
    tensors = layers(2)
    saved(folder, tensors)
    return tensors


@pytest.mark.parametrize("why", ["another dtype", "served", "another device"])
def test_nothing_is_read_ahead_where_that_would_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    tensors = saved_layers(tmp_path)
    monkeypatch.setattr(weight_reader, "is_serving", lambda: why == "served")
    with WeightReader(tmp_path, [FILE], CPU) as reader:
        if why == "another device":
            reader._device = torch.device("meta")
        reader.read_ahead(tensors, torch.bfloat16 if why == "another dtype" else torch.float32)

        assert not reader._ahead


def test_a_file_that_ends_early_is_an_error_of_what_is_read_ahead(tmp_path: Path) -> None:
    tensors = saved_layers(tmp_path)
    path = tmp_path / FILE
    with WeightReader(tmp_path, [FILE], CPU) as reader:
        with path.open("r+b") as opened:
            opened.truncate(path.stat().st_size - 30)
        reader.read_ahead(tensors, torch.float32)
        with pytest.raises(EOFError):
            for name in tensors:
                reader.read(name)


def test_a_load_that_ends_early_waits_for_what_is_being_read(tmp_path: Path) -> None:
    tensors = saved_layers(tmp_path)
    with pytest.raises(KeyError), WeightReader(tmp_path, [FILE], CPU) as reader:
        reader.read_ahead(tensors, torch.float32)
        raise KeyError

    assert all(future.done() for ahead in reader._ahead.values() for future in ahead.read_by)


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize(
    "kinds",
    [("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj")],
)
def test_queries_keys_and_values_lie_one_behind_the_other(
    tmp_path: Path, kinds: tuple[str, ...], is_ahead: bool
) -> None:
    tensors = layers(2, kinds)
    saved(tmp_path, tensors)
    with WeightReader(tmp_path, [FILE], CPU) as reader:
        reader.read_ahead(tensors if is_ahead else [], torch.float32)
        found = {name: reader.read(name) for name in sorted(tensors)}

    for layer in range(2):
        for kind in ("weight", "bias"):
            names = [f"layer.{layer}.self.{part}.{kind}" for part in kinds]
            joined = huge_pages.join_rows([found[name] for name in names])
            assert joined.data_ptr() == found[names[0]].data_ptr(), "not copied"
            assert torch.equal(joined, torch.cat([tensors[name] for name in names]))
    dense = found["layer.0.self.dense.weight"]
    assert dense.untyped_storage().nbytes() == dense.nbytes


def test_parts_of_other_shapes_or_dtypes_have_memory_of_their_own(tmp_path: Path) -> None:
    others = {"a.key": MANY.double(), "b.key": MANY[:, :5].clone()}
    alike = ("a.query", "a.value", "b.query", "b.value", "c.query", "c.key")
    tensors = others | {name: MANY + number for number, name in enumerate(alike)}
    saved(tmp_path, tensors)
    with WeightReader(tmp_path, [FILE], CPU) as reader:
        found = {name: reader.read(name) for name in tensors}

    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())


def test_a_later_load_reads_ahead_and_builds_the_model_once(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, counted = LoadRecords(None), list[int]()
    settings = LoaderSettings(knowledge=Knowledge(loads, TokenizerRecords(None)))

    def count(*args: Any, **options: Any) -> None:
        counted.append(1)
        check_proportions(*args, **options)

    monkeypatch.setattr(builders, "check_proportions", count)
    monkeypatch.setattr(weight_reader, "is_serving", lambda: False)  # of an earlier model, the rest of its check
    ahead: list[int] = []
    begin = WeightReader.read_ahead

    def noted(self: WeightReader, names: Iterable[str], dtype: torch.dtype) -> None:
        begin(self, names, dtype)
        ahead.append(len(self._ahead))

    monkeypatch.setattr(WeightReader, "read_ahead", noted)
    folder = kit.recipe_folder("mpnet-mean")
    first, again = (kit.load(folder, settings=settings) for _ in range(2))

    assert counted == [1]
    assert ahead[0] == 0 < ahead[1]
    assert_same(embed(again, ["a text"]), embed(first, ["a text"]))
