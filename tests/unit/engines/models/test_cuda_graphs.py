"""Recorded passes: CUDA graphs are imitated on a CPU, by replaying traced operations on the same tensors."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from torch import Tensor

from benchmarks.gpu.rig import encoder_of, forget_graphs, has_graphs
from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import RECIPES
from engines.errors import OutOfMemory
from engines.inputs.tokenizer import Ids
from engines.layers import attention
from engines.layers.packing import PackedLayout
from engines.loading import builders
from engines.models import cuda_graphs as graphs
from engines.models import transformer
from engines.models.base import (
    FIRST_WAIT_S,
    EncoderConfig,
    ForwardPathFailed,
    ForwardPaths,
    PathFallback,
    Size,
    weight_bytes,
)
from engines.models.cuda_graphs import SIZES, FixedPackedLayout, capturer_for, timed
from engines.models.transformer import TransformerEncoder
from engines.models.verification import distance
from tests.testkit.clocks import FakeClock
from tests.testkit.encoders import FakeGraphCapturer
from tests.testkit.recorded_passes import record_passes

CPU = torch.device("cpu")
BIASED = ("mpnet-mean", "t5-mean-dense")
"""Models whose attention has a position bias, for which there is no kernel."""
GRAPHED = sorted(name for name, recipe in RECIPES.items() if recipe.attention == "packed" and name != "static")
FEW_SIZES = SIZES[:4]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeGraphCapturer:
    """Makes models that load run as on a GPU, with recorded passes."""
    return record_passes(monkeypatch, len(FEW_SIZES))


def load(kit: Kit, name: str) -> TransformerEncoder:
    return encoder_of(kit.load(kit.recipe_folder(name), **RECIPES[name].spec))


def texts(encoder: TransformerEncoder, *lengths: int) -> list[Ids]:
    """Returns texts of those lengths."""
    random = np.random.default_rng(sum(lengths))
    return [random.integers(5, encoder._model.config.vocab_size, length) for length in lengths]


BATCHES = {
    "one text": (7,),
    "one token": (1,),
    "texts of many lengths": (3, 4, 9, 17, 40),
    "texts of one length": (12, 12, 12),
    "some of one length": (5, 5, 6, 6, 6, 30),
    "exactly a size": (14, 20, 30),
    "exactly a size with as many texts as it holds": (2,) * 16,
    "the largest size": (120, 136),
}


@pytest.mark.parametrize("name", [name for name in GRAPHED if name not in BIASED])
def test_a_replay_gives_what_the_ordinary_pass_gives(kit: Kit, recorder: FakeGraphCapturer, name: str) -> None:
    encoder = load(kit, name)
    assert (encoder.path, encoder.attention, encoder.sizes) == ("graphed", "packed", FEW_SIZES)

    for what, lengths in BATCHES.items():
        batch, before = texts(encoder, *lengths), recorder.num_replayed
        assert distance(encoder(batch), encoder.reference(batch)) < 1e-10, what
        assert recorder.num_replayed == before + 1, what


@pytest.mark.parametrize(
    ("what", "lengths"), [("too many tokens", (128, 129)), ("too many texts for its size", (1,) * 17)]
)
@pytest.mark.parametrize("name", ["bert-cls", "qwen3-last"])
def test_texts_that_fit_no_size_take_the_ordinary_pass(
    kit: Kit, recorder: FakeGraphCapturer, name: str, what: str, lengths: tuple[int, ...]
) -> None:
    encoder = load(kit, name)
    batch = texts(encoder, *lengths)
    num_replayed = recorder.num_replayed

    assert distance(encoder(batch), encoder.reference(batch)) < 1e-10
    assert recorder.num_replayed == num_replayed, what


def test_all_sizes_are_recorded_and_checked(
    kit: Kit, recorder: FakeGraphCapturer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "SIZES", SIZES)

    assert load(kit, "bert-cls").sizes == SIZES
    assert (recorder.num_recorded, recorder.num_replayed) == (len(SIZES), len(SIZES))


def test_a_prompt_that_pooling_leaves_out_takes_the_ordinary_pass(kit: Kit, recorder: FakeGraphCapturer) -> None:
    encoder = load(kit, "bert-instructor")
    batch, num_replayed = texts(encoder, 9, 12), recorder.num_replayed

    assert distance(encoder(batch, [3, 2]), encoder.reference(batch, [3, 2])) < 1e-10
    assert recorder.num_replayed == num_replayed


@pytest.mark.parametrize("name", ["xlm-roberta-cls", "bert-three-legacy", "gemma3-bidirectional"])
def test_a_replay_keeps_no_state_and_its_result_is_not_overwritten(
    kit: Kit, recorder: FakeGraphCapturer, name: str
) -> None:
    encoder = load(kit, name)
    many, few = texts(encoder, 4, 5, 6, 7, 8), texts(encoder, 20)
    first = encoder(few)
    kept = first.clone()

    other = encoder(many)

    assert torch.equal(first, kept)
    assert torch.equal(encoder(few), kept)
    assert torch.equal(encoder(many), other)


def test_one_replay_at_a_time(kit: Kit, recorder: FakeGraphCapturer) -> None:
    """Two threads of a device may have texts for one graph."""
    encoder, held = load(kit, "bert-cls"), list[bool]()
    found = encoder._graphs
    assert found is not None
    graph = found._graphs[FEW_SIZES[0]]
    replay = graph._replay

    def looking() -> Tensor:
        held.append(found._lock.locked())
        return replay()

    graph._replay = looking
    encoder(texts(encoder, 5))

    assert held == [True]
    assert not found._lock.locked()


# Which sizes are kept, and when another path is used.


@pytest.mark.parametrize(
    ("seconds", "num_kept"),
    [
        ((1.0, 2.0), 4),
        ((2.0, 2.0), 0),
        ((2.0, 1.0), 0),
        ((1.0, 2.0) * 8 + (2.0, 1.0) * 8, 2),
        ((9.0, 2.0, 1.0, 2.0, 1.0, 2.0, 9.0, 2.0), 4),
        ((1.0, 2.0, 9.0, 2.0, 1.0, 2.0, 9.0, 2.0), 0),
    ],
    ids=["faster", "as fast", "slower", "slower from the third on", "slow at first and once", "slow twice of three"],
)
def test_sizes_are_kept_up_to_the_first_that_is_not_faster(
    kit: Kit, recorder: FakeGraphCapturer, seconds: tuple[float, ...], num_kept: int
) -> None:
    recorder.__init__(seconds)  # type: ignore[misc]  # the loader has this one
    encoder = load(kit, "bert-cls")
    batch = texts(encoder, 9)

    assert encoder.sizes == FEW_SIZES[:num_kept]
    assert recorder.num_recorded == min(num_kept + 1, len(FEW_SIZES))
    assert distance(encoder(batch), encoder.reference(batch)) < 1e-10


def test_a_size_is_timed_with_the_shortest_row_that_it_takes() -> None:
    for size in SIZES:
        lengths = [len(ids) for ids in graphs._shortest_row(size, 0)]
        assert sum(lengths) == size.tokens // 2 + 1
        assert lengths == sorted(lengths)
        assert len(lengths) <= size.texts
        assert max(lengths) <= 32


def test_a_recording_that_fails_leads_to_the_next_path(kit: Kit, recorder: FakeGraphCapturer) -> None:
    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.before = fail
    engine = kit.load(kit.recipe_folder("bert-cls"))

    assert encoder_of(engine).path == "fused"
    assert engine.info.notes == ("fused: RuntimeError in the forward pass",)
    assert encoder_of(engine).sizes == ()


def test_a_device_without_memory_for_a_recording_is_no_reason_to_fall_back(
    kit: Kit, recorder: FakeGraphCapturer
) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("no memory")

    recorder.before = fail

    with pytest.raises(OutOfMemory):
        kit.load(kit.recipe_folder("bert-cls"))


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_size_that_is_wrong_is_found_by_the_check(kit: Kit, recorder: FakeGraphCapturer, number: int) -> None:
    recorder.changed[number] = lambda vectors: vectors * 1.01
    engine = kit.load(kit.recipe_folder("bert-cls"))

    (note,) = engine.info.notes
    assert note.startswith(f"fused: the graphed path, in a row of {FEW_SIZES[number - 1].tokens} tokens, is")
    assert encoder_of(engine).path == "fused"


@pytest.mark.parametrize(("name", "following"), [("mpnet-mean", "fused"), ("t5-mean-dense", "packed")])
def test_a_position_bias_takes_the_next_path(kit: Kit, recorder: FakeGraphCapturer, name: str, following: str) -> None:
    engine = kit.load(kit.recipe_folder(name))

    assert encoder_of(engine).path == following
    assert engine.info.notes == (
        f"{following}: its attention runs by text length, which differs between the rows of a CUDA graph",
    )


def test_a_model_that_reads_tensor_values_takes_the_next_path(
    kit: Kit, recorder: FakeGraphCapturer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example a mixture of experts, which reads the tokens that each expert gets."""
    right = TransformerEncoder._row

    def reading(self: TransformerEncoder, row: Tensor, layout: PackedLayout) -> Tensor:
        hidden = right(self, row, layout)
        return hidden[hidden.sum(-1).isfinite().nonzero()[:, 0]]

    monkeypatch.setattr(TransformerEncoder, "_row", reading)
    engine = kit.load(kit.recipe_folder("bert-cls"))

    assert encoder_of(engine).path == "fused"
    assert engine.info.notes == (
        "fused: its forward pass reads tensor values on the host (aten.nonzero.default), which no CUDA graph can",
    )


@pytest.mark.parametrize("has_recorder", [True, False])
def test_without_a_kernel_for_whole_rows_nothing_is_recorded(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, recorder: FakeGraphCapturer, has_recorder: bool
) -> None:
    """Float32 on a GPU has a recorder but no kernel, a GPU of another vendor a kernel but no recorder."""
    if has_recorder:
        monkeypatch.setattr(attention, "_VARLEN", set())
    else:
        monkeypatch.setattr(builders, "capturer_for", lambda device: None)
    encoder = load(kit, "bert-cls")

    assert (encoder.candidate_paths()[0], encoder.path, recorder.num_recorded) == ("fused", "fused", 0)


def test_nothing_is_recorded_for_a_model_that_keeps_state(
    kit: Kit, recorder: FakeGraphCapturer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = load(kit, "llama-mean")
    monkeypatch.setattr("engines.models.transformer.LengthAwareRope", lambda model: _StatefulRope())

    assert (
        TransformerEncoder(forgetful._model, forgetful._chain, EncoderConfig(), recorder).candidate_paths()[0]
        == "fused"
    )


class _StatefulRope:
    remembers = True


# What happens around a recording.


@pytest.fixture
def paused(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One item for each preemption point that encoders have passed."""
    paused: list[None] = []
    monkeypatch.setattr(kit.scheduler, "preemption_point", lambda: paused.append(None))
    return paused


def test_nothing_runs_in_the_middle_of_a_recording(kit: Kit, recorder: FakeGraphCapturer, paused: list[None]) -> None:
    encoder = load(kit, "bert-cls")
    encoder.switch_to("packed")
    paused.clear()

    encoder.switch_to("graphed")
    assert paused == []
    encoder(texts(encoder, 150, 150))

    assert len(paused) >= encoder.num_layers
    assert encoder.path == "graphed"


def test_pauses_come_back_after_a_recording_that_failed(
    kit: Kit, recorder: FakeGraphCapturer, paused: list[None]
) -> None:
    encoder = load(kit, "bert-cls")
    encoder.switch_to("packed")
    recorder.before = lambda: (_ for _ in ()).throw(RuntimeError)

    with pytest.raises(RuntimeError):
        encoder.switch_to("graphed")
    encoder.switch_to("packed")
    paused.clear()
    encoder(texts(encoder, 5))

    assert len(paused) == encoder.num_layers


def test_the_reference_needs_no_new_recording(kit: Kit, recorder: FakeGraphCapturer) -> None:
    encoder = load(kit, "qwen3-last")
    batch = texts(encoder, 5, 8)
    num_recorded = recorder.num_recorded

    assert distance(encoder.reference(batch), encoder(batch)) < 1e-10
    assert (encoder.path, recorder.num_recorded) == ("graphed", num_recorded)


def test_no_graph_runs_beside_a_switch_of_the_path_or_before_its_check(
    kit: Kit, recorder: FakeGraphCapturer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(transformer, "PathFallback", partial(PathFallback, clock=clock))
    encoder = load(kit, "bert-cls")
    short, recheck = texts(encoder, 7), encoder._config.recheck
    checked: list[bool] = []

    def recheck_while_another_thread_asks(paths: ForwardPaths) -> None:
        with pytest.raises(ForwardPathFailed):
            encoder(short)
        recheck(paths)
        checked.append(True)

    encoder._config = structs.replace(encoder._config, recheck=recheck_while_another_thread_asks)
    with monkeypatch.context() as failing:
        failing.setattr(encoder, "_packed", lambda *_: (_ for _ in ()).throw(ValueError))
        with pytest.raises(ForwardPathFailed):
            encoder(texts(encoder, 150, 150))
    num_replayed = recorder.num_replayed
    left = encoder(short)
    path = encoder.path
    num_after = recorder.num_replayed
    clock.advance(FIRST_WAIT_S + 1)
    back = encoder(short)

    assert (path, num_after) == ("unpadded", num_replayed)
    assert (encoder.path, checked) == ("graphed", [True])
    assert distance(left, back) < 1e-10


def test_recordings_are_freed_when_another_path_is_used(kit: Kit, recorder: FakeGraphCapturer) -> None:
    encoder = load(kit, "bert-cls")
    found = weakref.ref(encoder._graphs)

    encoder.switch_to("fused")
    gc.collect()

    assert found() is None
    assert (encoder.sizes, encoder.extra_bytes()) == ((), 0)


def test_a_benchmark_can_do_without_recordings(kit: Kit, recorder: FakeGraphCapturer) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"))
    assert has_graphs(engine)

    forget_graphs(engine)

    assert not has_graphs(engine)
    assert encoder_of(engine).path == "fused"


def test_the_recordings_of_an_unloaded_model_are_freed(kit: Kit, recorder: FakeGraphCapturer) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"))
    found = encoder_of(engine)._graphs
    assert found is not None
    parts = [weakref.ref(part) for part in (found, *found._graphs.values())]
    del found

    engine.close()
    asyncio.run(kit.scheduler.call(lambda: None))  # its thread has then ended the check of the model, too
    gc.collect()

    assert [part() for part in parts] == [None] * (1 + len(FEW_SIZES))


def test_the_memory_of_recordings_is_charged_with_the_weights(kit: Kit, recorder: FakeGraphCapturer) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"))
    encoder = encoder_of(engine)
    tokens = sum(size.tokens for size in FEW_SIZES)

    assert encoder.extra_bytes() == tokens * encoder.token_bytes() + 24 * 2**20
    assert engine.weight_bytes == weight_bytes(encoder) + encoder.extra_bytes()


def test_a_recording_that_is_not_kept_counts_as_memory_too(kit: Kit, recorder: FakeGraphCapturer) -> None:
    recorder.__init__((1.0, 2.0) * 8 + (2.0, 1.0) * 8)  # type: ignore[misc]  # the loader has this one
    encoder = load(kit, "bert-cls")

    assert encoder.extra_bytes() == (32 + 64 + 128) * encoder.token_bytes() + 24 * 2**20


def test_only_a_gpu_records() -> None:
    assert capturer_for(CPU) is None


def test_a_time_is_taken_from_an_idle_device_to_an_idle_device() -> None:
    done: list[str] = []
    clock = iter((1.0, 3.5))

    def read() -> float:
        done.append("clock")
        return next(clock)

    assert timed(lambda: done.append("run"), lambda: done.append("finish"), read) == 2.5
    assert done == ["finish", "clock", "run", "finish", "clock"]


# A row of a fixed size.


@given(
    size=st.sampled_from(FEW_SIZES),
    batches=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=16).map(sorted), min_size=1, max_size=3),
)
def test_a_row_of_a_fixed_size_holds_the_last_texts_and_stays_inside_itself(
    size: Size, batches: list[list[int]]
) -> None:
    fixed = FixedPackedLayout(size, 77, CPU)
    address = fixed.ids.data_ptr()
    for lengths in (_cut_to(size, lengths) for lengths in batches):
        plain, num_tokens = PackedLayout(lengths, CPU), sum(lengths)
        fixed.set_texts([np.arange(length, dtype=np.int64) for length in lengths])

        assert fixed.ids.tolist() == [*plain.positions.tolist(), *[77] * (size.tokens - num_tokens)]
        assert fixed.positions.tolist() == [*plain.positions.tolist(), *[0] * (size.tokens - num_tokens)]
        assert fixed.segments.tolist() == [*plain.segments.tolist(), *[size.texts] * (size.tokens - num_tokens)]
        assert fixed.starts[: len(lengths)].equal(plain.starts)
        assert fixed.ends[: len(lengths)].equal(plain.ends)
        _assert_inside(fixed, size)
        assert fixed.offsets[: len(lengths) + 1].equal(plain.offsets)
        assert set(fixed.offsets[len(lengths) :].tolist()) == {num_tokens, size.tokens}
    assert fixed.ids.data_ptr() == address


def _cut_to(size: Size, lengths: Sequence[int]) -> list[int]:
    """Returns as many of the lengths as fit."""
    return [length for place, length in enumerate(lengths) if sum(lengths[: place + 1]) <= size.tokens]


def _assert_inside(fixed: FixedPackedLayout, size: Size) -> None:
    """Asserts that the kernel reads inside of its tensors: a GPU process cannot go on after such an error."""
    assert len(fixed.starts) == len(fixed.ends) == size.texts + 1 == len(fixed.offsets) - 1
    assert fixed.offsets.dtype == torch.int32
    assert 0 <= int(fixed.starts.min()) <= int(fixed.starts.max()) < size.tokens
    assert 0 < int(fixed.ends.min()) <= int(fixed.ends.max()) <= size.tokens
    assert int((fixed.ends - fixed.starts).min()) >= 1
    assert bool((fixed.offsets.diff() >= 0).all())


def test_the_fake_capturer_is_as_strict_as_a_capture() -> None:
    """A pass that reads tensor values cannot be captured; the tests above would not find it otherwise."""
    held = torch.tensor([1.0, 2.0])
    glances: list[Callable[[], Tensor]] = [
        lambda: held * float(held[0]),
        lambda: held[held > 1],
        lambda: held if held.sum() > 1 else -held,
        lambda: held.nonzero(),
        lambda: held.repeat_interleave(held.long()),
        lambda: held * torch.tensor([1.0, 2.0]),
    ]
    for glance in glances:
        with pytest.raises(NotImplementedError):
            FakeGraphCapturer().record(glance)
    doubled = FakeGraphCapturer().record(lambda: held.repeat_interleave(1) * 2)
    held.fill_(5.0)

    assert doubled().tolist() == [10.0, 10.0]
