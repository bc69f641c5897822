"""Runs parts one after the other, each in its own process and within its own time, and keeps what they tell.

A part that hangs, runs out of memory or poisons the device's context costs itself and no other: its process group is
killed, and the records that it had sent stay. Knows neither torch nor what the parts measure.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from msgspec import Struct

from benchmarks.gpu.results import PartResult, Record, ResultFile, now

EXIT_S = 2.0
"""What a part that has said its last word may take to end: a CUDA context takes a while."""

KILL_AFTER_S = 5.0
"""Between asking a part to end and killing it."""

LEAST_S = 3.0
"""With less time left than this no part is begun."""


class Part(Struct, frozen=True, kw_only=True):
    """One part of the measurement.

    `entry`: `module:function`, called with a `PartContext` in a process of its own. `expected_s`, `limit_s`: on an
    H200; `cpu_limit_s`: the limit of the small sizes on a CPU, 0 for a part that needs CUDA.
    """

    name: str
    question: str
    entry: str
    expected_s: float
    limit_s: float
    cpu_limit_s: float = 0.0

    def limit_on(self, kind: str) -> float:
        """Its limit on a kind of device, 0 where it cannot run."""
        return self.limit_s if kind == "cuda" else self.cpu_limit_s


class PartContext:
    """What a part is given.

    Args:
        device: `cuda:0` or `cpu`.
        settings: of the whole run.
        send: hands a record to the parent, which keeps it at once.
        limit_s: seconds that the part has.

    Attributes:
        device, settings: as given.
    """

    def __init__(
        self, device: str, settings: Mapping[str, Any], send: Callable[[Record], None], limit_s: float
    ) -> None:
        self.device, self.settings = device, settings
        self._send = send
        self._ends_at_s = time.monotonic() + limit_s

    @property
    def is_cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.startswith("cuda")

    @property
    def left_s(self) -> float:
        """Seconds until the part is killed; a part with many steps may leave some out."""
        return self._ends_at_s - time.monotonic()

    def record(self, **finding: Any) -> None:
        """Keep a finding: whatever happens to the part later, it is in the file."""
        self._send(finding)


class Launcher(Protocol):
    """Starts a process; a multiprocessing context is one."""

    def Pipe(self, duplex: bool = ...) -> Any:  # noqa: N802  # multiprocessing's name
        """See `multiprocessing.Pipe`."""

    @property
    def Process(self) -> Any:  # noqa: N802  # multiprocessing's name
        """See `multiprocessing.Process`."""


def launcher(preload: Sequence[str] = (), *, spawns: bool = False) -> Launcher:
    """Return what starts the parts: a server that has imported these modules once, and forks for each part.

    Importing torch and transformers takes some seconds, which else every part would pay. The server has no CUDA
    context: a forked process could not use one.

    Args:
        spawns: starts every part anew instead, where a module asks CUDA when it is imported.
    """
    if spawns:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


class Runner:
    """Runs the parts of one device.

    Args:
        file: where results are kept.
        device: as torch names it.
        launcher: starts the processes.
        sources, commit: of the code.
        tell: prints a line for people.
        clock: seconds.
    """

    def __init__(  # noqa: PLR0913  # its surroundings, which tests replace
        self,
        file: ResultFile,
        device: str,
        launcher: Launcher,
        *,
        sources: str = "",
        commit: str = "",
        tell: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._device, self._launcher = file, device, launcher
        self._sources, self._commit = sources, commit
        self._tell, self._clock = tell, clock

    def run(self, parts: Sequence[Part], budget_s: float, only: Sequence[str] = ()) -> bool:
        """Run what is not in the file yet, within the time for all; return whether every part that ran is done.

        Args:
            only: these parts, also where the file has them; all others stay as they are.
        """
        ends_at_s = self._clock() + budget_s
        wanted = [part for part in parts if not only or part.name in only]
        self._file.save()
        for number, part in enumerate(wanted, 1):
            left_s = ends_at_s - self._clock()
            head = f"part {number} of {len(wanted)}, {part.name}"
            used = f"{budget_s - left_s:.0f} s used, {max(0.0, left_s):.0f} s left"
            if not only and self._is_known(part):
                self._tell(f"{head}: done before ({used})")
                continue
            limit_s = min(part.limit_on(self._file.result.device.kind), left_s)
            self._tell(f"{head}: {part.question} (about {part.expected_s:.0f} s on an H200; {used})")
            result = self._one(part, limit_s, left_s)
            self._tell(f"  {result.state}{f': {result.reason}' if result.reason else ''}, {result.seconds:.1f} s")
        results = [self._file.result.parts[part.name] for part in wanted]
        return all(result.state in ("done", "skipped") for result in results)

    def _is_known(self, part: Part) -> bool:
        kept = self._file.result.parts.get(part.name)
        return kept is not None and kept.state == "done" and kept.sources == self._sources

    def _one(self, part: Part, limit_s: float, left_s: float) -> PartResult:
        result = PartResult(measured_at=now(), commit=self._commit, sources=self._sources)
        if part.limit_on(self._file.result.device.kind) == 0:
            result.state, result.reason = "skipped", "needs CUDA"
        elif left_s < LEAST_S:
            result.reason = "no time left in this run"
            kept = self._file.result.parts.get(part.name)
            if kept is not None and kept.state == "done":
                return kept  # an older measurement says more than none
        self._file.result.parts[part.name] = result
        if not result.reason:
            self._run_within(part, limit_s, result)
        self._file.save()
        return result

    def _run_within(self, part: Part, limit_s: float, result: PartResult) -> None:
        settings = dict(self._file.result.settings)
        self._file.save()
        ask(self._launcher, part, self._device, limit_s, settings, into=result, keep=self._file.save, clock=self._clock)


def ask(  # noqa: PLR0913  # a part, where it runs, and what its records go into
    launcher: Launcher,
    part: Part,
    device: str,
    limit_s: float,
    settings: Mapping[str, Any] | None = None,
    *,
    into: PartResult | None = None,
    keep: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> PartResult:
    """Run one part in a process, and take in what it sends until it ends or its time is over.

    Args:
        into: what is filled in; a new result where None is given.
        keep: called after each record.
    """
    result = into if into is not None else PartResult()
    ours, theirs = launcher.Pipe(duplex=False)
    process = launcher.Process(target=_child, args=(theirs, part.entry, device, dict(settings or {}), limit_s))
    began_s = clock()
    result.state = "running"
    process.start()
    theirs.close()
    try:
        _take_in(ours, limit_s, result, keep, clock)
    finally:
        if result.state == "running":
            result.state, result.reason = "failed", "the run was interrupted"
        _end(process, EXIT_S if result.state in ("done", "skipped") else 0.0)
        ours.close()
        result.seconds = round(clock() - began_s, 2)
    if result.state == "failed" and not result.reason:
        result.reason = f"its process ended with {process.exitcode}"
    return result


def _take_in(
    ours: Connection, limit_s: float, result: PartResult, keep: Callable[[], None], clock: Callable[[], float]
) -> None:
    ends_at_s = clock() + limit_s
    while ours.poll(max(0.0, ends_at_s - clock())):
        try:
            kind, message = ours.recv()
        except (EOFError, OSError):
            result.state = "failed"  # it has ended without a word
            return
        if kind != "record":
            result.state, result.reason = kind, message
            return
        result.records.append(message)
        keep()
    result.state, result.reason = "timed out", f"longer than {limit_s:.0f} s"


def _child(theirs: Connection, entry: str, device: str, settings: Mapping[str, Any], limit_s: float) -> None:
    """Run a part, in a process group of its own: servers that it starts are ended with it."""
    with contextlib.suppress(OSError):
        os.setsid()
    module, _, function = entry.partition(":")
    context = PartContext(device, settings, lambda record: theirs.send(("record", record)), limit_s)
    try:
        outcome = getattr(importlib.import_module(module), function)(context)
        theirs.send(("skipped", outcome) if isinstance(outcome, str) else ("done", ""))
    except SystemExit as end:
        theirs.send(("failed", str(end)))
    except BaseException as error:  # noqa: BLE001  # whatever it is, the other parts go on
        traceback.print_exc()
        theirs.send(("failed", f"{type(error).__name__}: {error}"[:2000]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        theirs.close()


def _end(process: Any, patience_s: float) -> None:
    """End a part's process group, softly first: a process killed in a kernel may leave memory behind for a while."""
    process.join(patience_s)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        process.join(KILL_AFTER_S if process.is_alive() else 0.0)
    if process.is_alive():  # it never came to have a group of its own
        process.kill()
        process.join(KILL_AFTER_S)
