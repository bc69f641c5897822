"""Shows how far a bulk job is: a line that changes on a terminal, a line a minute elsewhere."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from router.bulk.journal import JobState
from router.bulk.records import Cursor
from router.bulk.sources import STDIN, Source

_EVERY_S = 60.0


class Meter:
    """Computes rates and the time that is left; knows no terminal.

    Args:
        sources: the input, whose size tells how much is left.
        clock: seconds.
    """

    def __init__(self, sources: Sequence[Source], clock: Callable[[], float] = time.monotonic) -> None:
        self._sizes = [source.num_bytes for source in sources]
        self._rows = [_num_rows(source) for source in sources]
        self._is_known = all(source.path != STDIN for source in sources) and sum(self._sizes) > 0
        self._clock = clock
        self._first = JobState()
        self._begun_s = clock()

    def begin(self, state: JobState) -> None:
        """Measure from here on: what an earlier run has done took none of this one's time."""
        self._first, self._begun_s = state, self._clock()

    def line(self, state: JobState) -> str:
        """Format counts, rates, and the time that is left."""
        spent_s = max(self._clock() - self._begun_s, 1e-9)
        texts_per_s = (state.rows - self._first.rows) / spent_s
        tokens_per_s = (state.tokens - self._first.tokens) / spent_s
        refused = f", {state.refused} refused" if state.refused else ""
        rates = f"{texts_per_s:.1f} texts/s, {tokens_per_s:.0f} tokens/s"
        return f"{self._share(state.cursor)}{state.rows} texts{refused}: {rates}{self._left(state, spent_s)}"

    def _share(self, cursor: Cursor) -> str:
        return f"{self.fraction(cursor):.1%}, " if self._is_known else ""

    def _left(self, state: JobState, spent_s: float) -> str:
        done, before = self.fraction(state.cursor), self.fraction(self._first.cursor)
        if not self._is_known or done <= before:
            return ""
        seconds = round((1.0 - done) * spent_s / (done - before))
        return f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def fraction(self, cursor: Cursor) -> float:
        """Return the share of the input's bytes before a place, from 0 to 1."""
        total = sum(self._sizes)
        if not total:
            return 0.0
        size, rows = self._sizes[cursor.source], self._rows[cursor.source]
        own = cursor.offset if rows is None else size * cursor.offset / max(rows, 1)
        return (sum(self._sizes[: cursor.source]) + own) / total


def _num_rows(source: Source) -> int | None:
    """Return the rows of a Parquet file, whose places are counted in rows."""
    if source.format != "parquet":
        return None
    from router.bulk.arrow_files import open_parquet  # late: pyarrow is optional

    with open_parquet(source.path) as file:
        return int(file.metadata.num_rows)


class LineProgress:
    """Prints a line now and then (`Observer`).

    Args:
        meter: formats them.
        write: prints one.
        every_s: 0 prints each; a terminal's line is written over.
        clock: seconds.
    """

    def __init__(
        self,
        meter: Meter,
        write: Callable[[str], None],
        every_s: float = _EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter, self._write, self._every_s, self._clock = meter, write, every_s, clock
        self._last_s = clock()

    def begin(self, state: JobState) -> None:
        """See `Observer`."""
        self._meter.begin(state)
        if state.cursor.number:
            self._write(f"goes on behind record {state.cursor.number}")

    def advance(self, state: JobState) -> None:
        """See `Observer`."""
        if self._clock() - self._last_s >= self._every_s:
            self._last_s = self._clock()
            self._write(self._meter.line(state))


def describe_end(out: Path, state: JobState) -> str:
    """Format the last line of a job that is done."""
    refused = f", {state.refused} refused: {out.name}.errors.jsonl" if state.refused else ""
    return f"{out}: {state.rows} texts, {state.tokens} tokens{refused}"
