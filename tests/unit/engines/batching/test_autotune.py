"""Tests `BatchSizeSearch` on a real scheduler: in idle time, preempted by small requests, and stored."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lib.engine_kit import Kit, assert_same, embed
from engines.batching.autotune import BatchSizeSearch, BatchSizeTuner, TunedBatchSize, TuningStore
from engines.device.torch_runtime import device_name, finisher
from engines.inputs.tokenizer import Ids, Tokenizer, TokenizerLimits
from engines.loading.loader import LoaderSettings
from tests.testkit.encoders import Letters, ScriptedEncoder


def make_tuner(encoder: ScriptedEncoder, sizes: tuple[int, ...], kept: list[TunedBatchSize]) -> BatchSizeTuner:
    """Make a tuner whose trials take a second each."""
    seconds = iter(range(1000))
    return BatchSizeTuner(
        encoder,
        Tokenizer(Letters(), TokenizerLimits(max_tokens=64, vocab_size=100)),
        BatchSizeSearch(sizes, 6),
        own_s=lambda: float(next(seconds)),
        finish=lambda: None,
        keep=kept.append,
    )


def test_trials_run_one_by_one_until_the_result_is_used_and_kept() -> None:
    encoder, used, kept = ScriptedEncoder(), list[TunedBatchSize](), list[TunedBatchSize]()
    tuner = make_tuner(encoder, (256,), kept)

    while tuner.is_due:
        tuner.begin()
        assert not tuner.is_due, "one at a time"
        tuner.run(used.append)

    assert [sum(batch) for batch in encoder.batches] == [256, 256]
    assert used == kept == [TunedBatchSize(128, 256.0)]


def test_a_trial_that_fails_ends_the_trials_and_nothing_else() -> None:
    encoder, used, kept = ScriptedEncoder(), list[TunedBatchSize](), list[TunedBatchSize]()

    def crowded(texts: Sequence[Ids]) -> None:
        if len(texts) > 4:
            raise torch.OutOfMemoryError("no room")

    encoder.before = crowded
    tuner = make_tuner(encoder, (256, 512), kept)
    while tuner.is_due:
        tuner.begin()
        tuner.run(used.append)

    assert used == kept == [TunedBatchSize(128, 256.0)]


def test_a_model_finds_its_batch_size_in_idle_time_and_uses_the_stored_one_later(kit: Kit, tmp_path: Path) -> None:
    found = threading.Event()

    class Noticing(TuningStore):
        def put(self, key: str, pace: TunedBatchSize) -> None:
            super().put(key, pace)
            found.set()

    paces = Noticing(tmp_path)
    settings = LoaderSettings(tuning_store=paces)
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=settings)
    assert found.wait(100)
    expected = embed(kit.engine("bert-cls"), ["a text", "another"])
    assert_same(embed(engine, ["a text", "another"]), expected)
    again = kit.load(kit.recipe_folder("bert-cls"), settings=LoaderSettings(tuning_store=TuningStore(tmp_path)))

    (pace,) = TuningStore(tmp_path)._kept._known.values()
    assert again._limit().max_tokens == pace.batch_tokens == engine._limit().max_tokens
    assert again._tuner is None
    for one in (engine, again):
        asyncio.run(asyncio.to_thread(one.close))


def test_a_configured_size_is_not_tried_out(kit: Kit, tmp_path: Path) -> None:
    settings = LoaderSettings(tuning_store=TuningStore(tmp_path), max_batch_tokens=77)
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=settings)

    assert engine._tuner is None
    assert engine._limit().max_tokens == 77
    asyncio.run(asyncio.to_thread(engine.close))


def test_a_cpu_has_done_its_work_when_a_call_returns() -> None:
    finisher(torch.device("cpu"))()

    assert device_name(torch.device("cpu")) == "cpu"
