"""`EffectRunner`: which download progress it reports, and how often."""

from types import SimpleNamespace

import pytest

from engines.pool.effect_runner import PROGRESS_S, EffectRunner
from engines.pool.estimates import Estimates, Measurements
from engines.pool.messages import DownloadProgressed, PoolEvent, StartFetch
from engines.protocols import Progress
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, InlineWorkers, fake_specs
from engines.types import ModelFiles
from tests.testkit.clocks import FakeClock


class ScriptedProgress(FakeFiles):
    """A download that reports `figures`: (seconds since the last report, bytes done)."""

    def __init__(self, figures: list[tuple[float, int]], clock: FakeClock) -> None:
        super().__init__(on_disk=[])
        self._figures = figures
        self._clock = clock

    def fetch(self, spec: ModelSpec, on_progress: Progress) -> ModelFiles:
        for pause_s, done_bytes in self._figures:
            self._clock.advance(pause_s)
            on_progress(done_bytes, 100)
        return self._files(spec)


async def reported(figures: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    clock = FakeClock(50.0)
    monkeypatch.setattr("engines.pool.effect_runner.time", SimpleNamespace(monotonic=clock))
    files, told = ScriptedProgress(figures, clock), list[PoolEvent]()
    estimates = Estimates(files, Measurements(), "cpu", 10)
    runner = EffectRunner(files, FakeLoader(), estimates, InlineWorkers(), told.append)
    await runner.run(StartFetch(0, fake_specs("a")["a"]))
    return [event.done_bytes for event in told if isinstance(event, DownloadProgressed)]


async def test_progress_of_a_fast_download_is_reported_at_intervals_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = [(0.01, done) for done in range(1, 101)]

    told = await reported(figures, monkeypatch)

    assert (told[0], told[-1]) == (1, 100)
    assert len(told) == 6


async def test_the_last_figure_before_a_pause_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [(0.0, 10), (0.01, 20), *[(PROGRESS_S, 20)] * 5, (PROGRESS_S, 30)]

    assert await reported(figures, monkeypatch) == [10, 20, 30]
