"""The check at load where an earlier load proved every form: the canary first, the rest later, and nothing lost."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor

from benchmarks.lib.engine_kit import Kit, answer, assert_same, embed
from benchmarks.lib.workloads import SENTENCES
from engines.batching.engine import EmbeddingEngine
from engines.batching.rest_of_check import CHECK_AFTER_S, LATEST_S, RestOfCheck
from engines.errors import DeviceDown, SelfCheckFailed
from engines.inputs.tokenizer import Ids, Tokenizer, TokenizerLimits
from engines.loading.builders import Knowledge
from engines.loading.loader import LoaderSettings
from engines.loading.recorded_tokenizer import TokenizerRecords
from engines.models import load_records
from engines.models.base import ForwardPath, ForwardPathFailed, PathForm
from engines.models.load_records import LoadRecords, Observation, environment
from engines.models.observation import Observed, observe
from engines.models.self_check import SelfCheck
from engines.models.transformer import TransformerEncoder
from engines.models.verification import Canaries
from tests.testkit.clocks import FakeClock
from tests.testkit.encoders import Letters

TEXTS = list(SENTENCES[:5])
TOKENIZER = Tokenizer(Letters(), TokenizerLimits(max_tokens=64, vocab_size=0x110000))


class Paths:
    """Paths with three forms each. `wrong`: the form, by number, that gives other vectors; or raises `error`."""

    def __init__(self, first: ForwardPath = "fused", wrong: int | None = None, error: Exception | None = None) -> None:
        self.path: ForwardPath = "padded"
        self.window: int | None = None
        self.notes: tuple[str, ...] = ()
        self.dimensions = 2
        self.first, self.wrong, self.error = first, wrong, error
        self.num_forms = self.num_references = 0

    def candidate_paths(self) -> tuple[ForwardPath, ...]:
        return (self.first, "padded")

    def switch_to(self, path: ForwardPath) -> None:
        self.path = path

    def _rows(self, texts: Sequence[Ids]) -> Tensor:
        return torch.tensor(np.array([[ids.mean(), len(ids)] for ids in texts]), dtype=torch.float32)

    def forms(self, texts: Sequence[Ids]) -> Iterator[PathForm]:
        for number in range(3):
            self.num_forms += 1
            is_wrong = self.path == self.first and number == self.wrong
            if is_wrong and self.error is not None:
                raise self.error
            yield PathForm(range(len(texts)), self._rows(texts) * (2 if is_wrong else 1))

    def reference(self, texts: Sequence[Ids]) -> Tensor:
        self.num_references += 1
        return self._rows(texts)


def check_of(folder: Path) -> SelfCheck:
    return SelfCheck(Canaries(folder / "canaries"), LoadRecords(folder), "threads=1")


def run(check: SelfCheck, paths: Paths) -> tuple[str, ...]:
    return check.run(paths, TOKENIZER, "float32", "key", 0.0)


def test_a_later_load_checks_the_canary_and_the_rest_when_it_is_asked(tmp_path: Path) -> None:
    first, later = Paths(), Paths()
    check = check_of(tmp_path)
    run(check, first)
    assert (first.num_forms, check.is_pending) == (3, False)

    check = check_of(tmp_path)
    notes = run(check, later)
    assert (notes, later.path, later.num_forms, later.num_references, check.is_pending) == ((), "fused", 1, 0, True)

    check.finish(later)
    assert (later.num_forms, check.is_pending) == (4, False)


@pytest.mark.parametrize("path", ["prepacked", "graphed", "padded", "unpadded"])
def test_what_every_load_makes_anew_is_checked_by_every_load(tmp_path: Path, path: ForwardPath) -> None:
    for _ in range(2):
        check, paths = check_of(tmp_path), Paths(path)
        run(check, paths)

        assert (paths.num_forms, check.is_pending) == (3, False)


def test_without_a_canary_everything_is_checked() -> None:
    records = LoadRecords(None)
    for _ in range(2):
        check, paths = SelfCheck(Canaries(None), records), Paths()
        run(check, paths)

        assert (paths.num_forms, paths.num_references, check.is_pending) == (3, 1, False)


def test_a_canary_that_is_not_given_again_has_everything_checked(tmp_path: Path) -> None:
    run(check_of(tmp_path), Paths())

    check, paths = check_of(tmp_path), Paths(wrong=0)
    (note,) = run(check, paths)

    assert (paths.path, check.is_pending) == ("padded", False)
    assert note.startswith("padded: the fused path is")
    check, paths = check_of(tmp_path), Paths()
    run(check, paths)
    assert paths.num_forms == 3, "that load has taken the record back"


@pytest.mark.parametrize("error", [None, ValueError("of a kernel")])
def test_a_form_that_is_wrong_later_takes_the_record_back(tmp_path: Path, error: Exception | None) -> None:
    run(check_of(tmp_path), Paths())
    check, paths = check_of(tmp_path), Paths(wrong=2, error=error)
    run(check, paths)

    with pytest.raises(SelfCheckFailed):
        check.finish(paths)
    assert not check.is_pending

    check, paths = check_of(tmp_path), Paths()
    run(check, paths)
    assert (paths.num_forms, check.is_pending) == (3, False)


def test_a_device_without_memory_postpones_the_rest(tmp_path: Path) -> None:
    run(check_of(tmp_path), Paths())
    check, paths = check_of(tmp_path), Paths(wrong=1, error=torch.OutOfMemoryError("none"))
    run(check, paths)

    with pytest.raises(torch.OutOfMemoryError):
        check.finish(paths)

    assert check.is_pending


@pytest.mark.parametrize("change", ["code", "conditions", "path"])
def test_a_record_of_other_code_or_conditions_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    run(check_of(tmp_path), Paths())
    if change == "code":
        monkeypatch.setattr(load_records, "environment", lambda: "another version")
    conditions = "threads=2" if change == "conditions" else "threads=1"
    check = SelfCheck(Canaries(tmp_path / "canaries"), LoadRecords(tmp_path), conditions)
    paths = Paths("packed" if change == "path" else "fused")
    run(check, paths)

    assert (paths.num_forms, check.is_pending) == (3, False)


def test_the_environment_is_this_packages_code_its_libraries_and_the_processor() -> None:
    assert len(environment()) == 40
    assert environment() == environment()


# The rest of the check of an engine.


def test_the_rest_is_due_after_the_first_answer_and_in_time_under_traffic() -> None:
    clock, calls, pending = FakeClock(), list[int](), [True]
    rest = RestOfCheck(lambda: calls.append(1), lambda: pending[0], clock)
    assert rest.due_in_s is None
    assert rest.started() is rest

    assert rest.due_in_s == CHECK_AFTER_S
    assert rest.next_task() is None
    clock.advance(CHECK_AFTER_S)
    assert (rest.due_in_s, rest.is_overdue) == (0.0, False)
    clock.advance(LATEST_S)
    assert rest.is_overdue
    task = rest.next_task()
    assert task is not None
    assert task.is_long
    assert (rest.due_in_s, rest.next_task()) == (None, None), "it runs once at a time"
    task.run()
    pending[0] = False
    assert (calls, rest.due_in_s, rest.is_overdue) == ([1], None, False)


def test_nothing_is_started_where_nothing_is_left() -> None:
    assert RestOfCheck(lambda: None, lambda: False).started() is None


@pytest.mark.parametrize(("error", "wait_s"), [(ForwardPathFailed(), CHECK_AFTER_S), (DeviceDown("gone"), LATEST_S)])
def test_a_check_that_cannot_run_now_runs_later(error: Exception, wait_s: float) -> None:
    clock = FakeClock()

    def fail() -> None:
        raise error

    rest = RestOfCheck(fail, lambda: True, clock)
    rest.started()
    clock.advance(CHECK_AFTER_S)
    task = rest.next_task()
    assert task is not None
    task.run()

    assert rest.due_in_s == wait_s


def settings_of(folder: Path) -> LoaderSettings:
    knowledge = Knowledge(LoadRecords(folder), TokenizerRecords(folder / "tokenizers"))
    return LoaderSettings(canary_folder=folder / "canaries", knowledge=knowledge)


def encoder_of(engine: EmbeddingEngine) -> Any:
    assert engine._parkable is not None
    return engine._parkable._encoder


def run_rest(engine: EmbeddingEngine) -> None:
    assert engine._rest is not None
    engine._rest._due_s = 0.0
    assert engine.ready_in_s() == 0.0
    task = engine.next_task(0)
    assert task is not None
    task.run()


@pytest.fixture
def later(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingEngine]:
    """Yields an engine whose files were loaded before; its scheduler does not run the rest by itself."""
    monkeypatch.setattr("engines.batching.rest_of_check.CHECK_AFTER_S", 3600.0)
    kit.load(kit.recipe_folder("qwen3-last"), settings=settings_of(tmp_path)).close()
    engine = kit.load(kit.recipe_folder("qwen3-last"), settings=settings_of(tmp_path))
    yield engine
    engine.close()


def test_an_engine_says_what_was_checked(kit: Kit, later: EmbeddingEngine) -> None:
    assert (later.info.checked, later.info.path, later.info.notes) == ("canary", "fused", ())
    assert_same(embed(later, TEXTS), embed(kit.engine("qwen3-last"), TEXTS))

    run_rest(later)

    assert (later.info.checked, later.info.path, later.info.is_fallback) == ("all", "fused", False)
    assert kit.engine("qwen3-last").info.checked == "all"


def test_an_engine_leaves_a_path_of_which_a_form_is_wrong_and_its_vectors_stay_right(
    kit: Kit, later: EmbeddingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embed(kit.engine("qwen3-last"), TEXTS)
    forced = TransformerEncoder.encode_forced
    monkeypatch.setattr(TransformerEncoder, "encode_forced", lambda self, *texts: forced(self, *texts) * 1.5)

    run_rest(later)
    found = embed(later, TEXTS)

    assert_same(found, expected)
    assert (later.info.path, later.info.is_fallback, later.info.checked) == ("unpadded", True, "all")
    assert "SelfCheckFailed on the fused path" in later.info.notes[-1]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_vectors_are_cached_once_the_rest_of_the_check_has_passed(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_wrong: bool
) -> None:
    monkeypatch.setattr("engines.batching.rest_of_check.CHECK_AFTER_S", 3600.0)
    folder, options = kit.recipe_folder("qwen3-last"), {"settings": settings_of(tmp_path), "cache_bytes": 100_000}
    kit.load(folder, **options).close()  # type: ignore[arg-type]  # of two kinds
    engine = kit.load(folder, **options)  # type: ignore[arg-type]  # as above
    assert [answer(engine, texts=["a"]).cache_hits for _ in range(2)] == [0, 0]

    if is_wrong:
        forced = TransformerEncoder.encode_forced
        monkeypatch.setattr(TransformerEncoder, "encode_forced", lambda self, *texts: forced(self, *texts) * 1.5)
    run_rest(engine)

    assert [answer(engine, texts=["a"]).cache_hits for _ in range(2)] == [0, 0 if is_wrong else 1]
    engine.close()


def test_other_passes_run_in_their_own_form_beside_a_check(later: EmbeddingEngine) -> None:
    encoder: Any = encoder_of(later)
    probes = [np.array([5, 6, 7]), np.array([5, 6, 7, 8])]
    alone, config, seen = encoder(probes), encoder._config, list[Tensor]()

    def preempt() -> None:
        encoder._config = config
        seen.append(encoder(probes))

    encoder._config = structs.replace(config, preemption_point=preempt)
    forced = encoder.encode_forced(probes)

    assert torch.equal(seen[0], alone)
    assert torch.allclose(forced, alone, atol=1e-5)


# What is known of how a model attends.


def test_an_observation_is_made_once(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kit.recipe_folder("modernbert-cls")
    first = kit.load(folder, settings=settings_of(tmp_path))
    monkeypatch.setattr(load_records, "observe", lambda *_: pytest.fail("observed again"))
    again = kit.load(folder, settings=settings_of(tmp_path))

    assert again.info.path == first.info.path
    assert_same(embed(again, TEXTS), embed(first, TEXTS))


def test_a_pass_that_failed_is_observed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    records = LoadRecords(None)
    calls: list[int] = []

    def fail(*_: Any) -> Observed:
        calls.append(1)
        return Observed()

    monkeypatch.setattr(load_records, "observe", fail)
    for _ in range(2):
        Observation(None, 900, torch.device("cpu"), records, "key").why_not_packed(16)

    assert len(calls) == 2


def test_a_known_observation_is_made_again_for_another_length(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = encoder_of(kit.engine("mistral-last"))
    records = LoadRecords(None)
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return observe(*args)

    monkeypatch.setattr(load_records, "observe", counted)
    for max_tokens, num_calls in ((16, 1), (16, 1), (64, 2), (64, 2), (16, 2)):
        observation = Observation(encoder._model, 900, torch.device("cpu"), records, "key")
        observation.why_not_packed(max_tokens)

        assert len(calls) == num_calls

    assert Observation(encoder._model, 900, torch.device("cpu"), records, "").observed.calls is not None
