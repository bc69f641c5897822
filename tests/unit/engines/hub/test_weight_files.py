"""Tests the checks of safetensors headers and the byte counts of weights."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import BrokenFiles
from engines.hub.weight_files import TensorEntry, WeightCount, count_weights, read_header, read_range, target_dtype
from tests.testkit.model_folders import plain_model, sharded_model, tensors, write_json, write_weights

FILE = "model.safetensors"


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Builds a file by hand, so that every field can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def check(folder: Path, content: bytes) -> None:
    (folder / FILE).write_bytes(content)
    read_header(FILE, len(content), partial(read_range, folder))


def count(folder: Path, *files: str) -> WeightCount:
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return count_weights(sizes, files, partial(read_range, folder))


def test_a_header_of_the_safetensors_library_is_right(tmp_path: Path) -> None:
    plain_model(tmp_path)

    found = read_header(FILE, (tmp_path / FILE).stat().st_size, partial(read_range, tmp_path))

    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in found} == {
        "encoder.weight": ("F32", (100, 10)),
        "embeddings.position_ids": ("I64", (16,)),
    }


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    many = {f"layer.{index}.with.a.rather.long.name.attention.weight": np.zeros(1, np.float32) for index in range(3000)}
    write_weights(tmp_path / FILE, many)
    reads: list[tuple[int, int]] = []

    def read(file: str, start: int, end: int) -> bytes:
        reads.append((start, end))
        return read_range(tmp_path, file, start, end)

    found = read_header(FILE, (tmp_path / FILE).stat().st_size, read)

    assert len(found) == 3000
    assert len(reads) == 2
    assert reads[1][0] == reads[0][1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02\x03",
        safetensors({}, length=1 << 40),
        safetensors({}, length=3),
        safetensors(b"not json at all!"),
        safetensors(b"[1, 2]"),
        safetensors(b"\xff\xfe{}"),
        safetensors({"a": tensor(0, 8, [2])}),
        safetensors({"a": tensor(0, 8, [2])}, b"\0" * 7),
        safetensors({"a": tensor(0, 8, [2])}, b"\0" * 9),
        safetensors({"a": tensor(0, 8, [3])}, b"\0" * 8),
        safetensors({"a": tensor(4, 8, [1])}, b"\0" * 8),
        safetensors({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, b"\0" * 12),
        safetensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"\0" * 12),
        safetensors({"a": tensor(8, 0, [2])}, b"\0" * 8),
        safetensors({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        safetensors({"a": tensor(0, 8, ["2"])}, b"\0" * 8),  # type: ignore[list-item]  # that is the point
        safetensors({"a": 7}, b"\0" * 8),
    ],
    ids=[
        "empty", "no length field", "header beyond the end", "header cut", "no json", "a list", "no utf-8",
        "data missing", "truncated", "overlong", "shape too large", "gap at the start", "gap between", "overlap",
        "backwards", "no offsets", "text for a number", "a number for a tensor",
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BrokenFiles, match=FILE) as caught:
        check(tmp_path, content)

    assert caught.value.file == FILE
    assert str(tmp_path) not in str(caught.value)


def test_metadata_scalars_and_empty_tensors_are_fine(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "scalar": tensor(0, 4, []), "none": tensor(4, 4, [0, 8])}

    check(tmp_path, safetensors(header, b"\0" * 4))


def test_a_type_newer_than_this_code_is_checked_by_offsets_alone(tmp_path: Path) -> None:
    check(tmp_path, safetensors({"a": tensor(0, 3, [7], "F3_NEW")}, b"\0" * 3))


def test_floats_count_in_the_target_dtype_and_integers_in_their_own(tmp_path: Path) -> None:
    write_weights(tmp_path / FILE, tensors(1000))

    counted = count(tmp_path, FILE)

    assert counted.bytes_in("float32") == 1000 * 4 + 16 * 8
    assert counted.bytes_in("bfloat16") == 1000 * 2 + 16 * 8
    assert counted.bytes_in("float16") == 1000 * 2 + 16 * 8
    assert (
        counted.bytes_in("int8")
        == counted.matrix_int8_bytes + 8 * counted.matrix_rows + 4 * (1000 - counted.matrix_elements) + 16 * 8
    )


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("encoder.layer.0.attention.self.query.weight", 1),
        ("encoder.layer.0.attention.attn.v.weight", 1),
        ("layers.3.self_attn.k_proj.weight", 2),
        ("transformer.layer.1.attention.q_lin.weight", 1),
        ("layers.3.self_attn.o_proj.weight", 1),
        ("layers.3.mlp.down_proj.weight", 1),
        ("encoder.layer.0.attention.self.query.bias", 1),
    ],
)
def test_beside_int8_queries_keys_and_values_of_a_decoder_take_two_bytes(name: str, num_bytes: int) -> None:
    assert TensorEntry(name, "F32", (8, 4), 0, 128).int8_bytes == 32 * num_bytes


def test_half_precision_files_take_twice_their_size_in_float32(tmp_path: Path) -> None:
    write_weights(tmp_path / FILE, {"a": np.zeros((30, 30), np.float16), "b": np.zeros(5, np.float64)})

    assert count(tmp_path, FILE).bytes_in("float32") == 905 * 4


def test_all_shards_and_all_modules_add_up(tmp_path: Path) -> None:
    sharded_model(tmp_path, num_shards=3)
    write_weights(tmp_path / "2_Dense" / FILE, {"linear.weight": np.zeros((4, 10), np.float32)})
    shards = [f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)]

    assert count(tmp_path, *shards, f"2_Dense/{FILE}").bytes_in("float32") == (3 * 100 + 40) * 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"torch_dtype": "float16"}, 2000), ({"dtype": "bfloat16"}, 2000), ({}, 1000), ({"dtype": "fp8"}, 1000)],
)
def test_pickled_weights_are_estimated_from_their_size(tmp_path: Path, config: dict[str, str], expected: int) -> None:
    write_json(tmp_path / "config.json", config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)

    assert count(tmp_path, "pytorch_model.bin").bytes_in("float32") == expected


def test_a_broken_config_does_not_stop_the_estimate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)

    assert count(tmp_path, "pytorch_model.bin").bytes_in("bfloat16") == 500


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda:1", "bfloat16"),
        ("auto", "cuda", "bfloat16"),
        ("float16", "cpu", "float16"),
        ("float32", "cuda:0", "float32"),
    ],
)
def test_auto_means_what_the_device_is_good_at(dtype: str, device: str, expected: str) -> None:
    assert target_dtype(dtype, device) == expected


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [
        ("layers.3.mlp.down_proj.weight", (64, 32), 5),
        ("layers.3.mlp.down_proj.weight", (60, 32), 8),
        ("layers.3.mlp.down_proj.weight", (64, 48), 8),
        ("layers.3.self_attn.k_proj.weight", (64, 32), 8),
        ("encoder.layer.0.attention.self.query.weight", (64, 32), 8),
        ("encoder.layer.0.attention.attn.v.weight", (64, 32), 8),
        ("encoder.layer.0.attention.attn.o.weight", (64, 32), 5),
        ("embeddings.word_embeddings.weight", (64, 32), 8),
    ],
)
def test_int4_takes_five_bits_with_its_scales_and_what_stays_int8_a_byte(
    name: str, shape: tuple[int, int], bits: int
) -> None:
    elements = shape[0] * shape[1]

    assert TensorEntry(name, "F32", shape, 0, 4 * elements).int4_bytes == elements * bits // 8


def test_a_model_in_int4_counts_scales_of_rows_and_what_is_no_matrix_in_float32(tmp_path: Path) -> None:
    write_weights(tmp_path / FILE, tensors(1000))

    counted = count(tmp_path, FILE)

    rest = 4 * (1000 - counted.matrix_elements) + 16 * 8
    assert counted.bytes_in("int4") == counted.matrix_int4_bytes + 8 * counted.matrix_rows + rest
