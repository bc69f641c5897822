"""`BatchRun`: runs one batch while its lease is held: answers its lines in order, and publishes the results."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Literal, TypeVar

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from router.batches.journal import BatchJournal, LineResult, encode_failure, encode_response, line_id
from router.batches.leases import LEASE_S, LeaseLost
from router.batches.lines import MAX_LINES, BadLine, Line, LineReader, LineRequest, Scan, parse_line, scan_file
from router.batches.parts import LineAnswer, LineWork, RunParts
from router.batches.records import BatchRecord
from router.schemas.batches import BatchError, BatchStatus
from router.schemas.inference import ErrorEnvelope

log = structlog.get_logger()

End = Literal["completed", "cancelled", "expired", "revoked", "invalid", "released", "lost"]
Value = TypeVar("Value")

RETRY_S = 30.0
"""After an error of the disk or the database, until a server takes the batch again."""
_SAY_EVERY_S = 30.0
_INLINE_BYTES = 2**16
"""Longer lines are parsed on a thread."""
_READ_LINES, _READ_BYTES = 256, 2**20
_RESULT_BYTES = 8192
"""Of the answer to one input: what a line with n inputs may take is not known before."""
_MAX_INPUTS = 2048
_EXPIRED = "This request could not be executed before the completion window expired."
_REVOKED = BatchError(code="invalid_api_key", message="The key of this batch was removed, or may not run batches")


class BatchRun:
    """Runs a batch that this server has claimed."""

    def __init__(self, parts: RunParts, batch: BatchRecord) -> None:
        self.batch = batch
        self._parts = parts
        self._policy = parts.policy
        self._journal = BatchJournal(parts.folder, parts.leases, batch)
        self._results: list[LineResult] = []
        self._num_bytes = 0
        self._flushed_at_s = 0.0
        self._flushing: asyncio.Future[None] | None = None
        self._weight = 0
        self._is_patient = True
        self._said_waiting_s = -_SAY_EVERY_S
        self._truncated = Counter[str]()
        self._end: End | None = None
        self._error = _REVOKED
        self._ended = asyncio.Event()
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Read the batch's status now: it has changed."""
        self._nudged.set()

    def stop(self) -> None:
        """Stop, journal what is done, and give the lease back: the server shuts down."""
        self._stop("released")

    async def run(self) -> None:
        """Run the batch until it ends, or the lease does. An error of the disk or the database delays it."""
        watch = asyncio.create_task(self._watch())
        try:
            await self._close(await self._work_until_stopped())
        except LeaseLost:
            log.warning("batch.lease_lost", batch=self.batch.id)
        except FileNotFoundError:
            reason = "a file of this batch is not in DATA_DIR"
            log.error("batch.stalled", batch=self.batch.id, retry_in_s=RETRY_S, reason=reason)
            await self._delay()
        except Exception:
            log.exception("batch.stalled", batch=self.batch.id, retry_in_s=RETRY_S)
            await self._delay()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._journal.close()
            if self._truncated:
                log.warning("inputs.truncated", batch=self.batch.id, **self._truncated)

    async def _delay(self) -> None:
        with suppress(Exception):  # the database may be what fails; the lease ends by itself then
            await self._io(self._parts.leases.release, self.batch, RETRY_S)

    # ---- why it stops

    def _stop(self, end: End) -> None:
        if self._end is None or end in ("released", "lost"):
            self._end = end
        self._ended.set()

    async def _watch(self) -> None:
        """Keep the lease, and stop the run once the batch is cancelled, expired, or not ours any more."""
        renewed_s = self._parts.leases.now()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._policy.poll_s):
                    await self._nudged.wait()
            self._nudged.clear()
            now_s = self._parts.leases.now()
            is_due = now_s - renewed_s >= LEASE_S / 4
            look = self._parts.leases.renew if is_due else self._parts.leases.read
            try:
                batch = await self._io(look, self.batch)
            except LeaseLost:
                self._stop("lost")
                return
            except (SQLAlchemyError, OSError) as error:
                log.warning("batch.not_renewed", batch=self.batch.id, reason=type(error).__name__)
                continue
            renewed_s = now_s if is_due else renewed_s
            end = self._why_end(batch)
            if end is not None:
                self._stop(end)

    def _why_end(self, batch: BatchRecord) -> End | None:
        if batch.status == "cancelling":
            return "cancelled"
        if batch.status == "finalizing":
            return None
        if self._parts.leases.now() >= batch.expires_at:
            return "expired"
        return None if self._parts.may_run(batch.owner) else "revoked"

    async def _work_until_stopped(self) -> End:
        """Return why the work has ended; what was done of it is journaled."""
        end = self._why_end(self.batch)
        if end is not None:
            return end
        work, stopped = asyncio.create_task(self._work()), asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, stopped):
                task.cancel()
            await asyncio.wait((work, stopped))
            await self._settle()
        if not work.cancelled():
            return work.result()
        assert self._end is not None, "work is cancelled only by a stop"
        return self._end

    async def _close(self, end: End) -> None:
        """End the batch, or the lease."""
        if end == "expired":
            await self._expire_rest()
            end = self._end if self._end in ("released", "lost") else end
        if end == "lost":
            raise LeaseLost(self.batch.id)
        if end == "released":
            await self._io(self._parts.leases.release, self.batch, 0.0)
        elif end == "completed":
            is_whole = await self._io(self._parts.leases.begin_finalizing, self.batch)
            await self._finish("completed" if is_whole else "cancelled")
        elif end in ("revoked", "invalid"):
            await self._finish("failed", [self._error])
        elif end in ("cancelled", "expired"):
            await self._finish(end)

    async def _finish(self, status: BatchStatus, errors: Sequence[BatchError] = ()) -> None:
        expires_at = self._parts.leases.now() + self._policy.retention_s
        await self._io(self._journal.finish, status, expires_at, errors)
        done = self._journal.batch
        seconds = self._parts.leases.now() - done.created_at
        self._parts.on_end(status, seconds)
        log.info(
            "batch.ended", batch=done.id, status=status, completed=done.completed, failed=done.failed,
            seconds=round(seconds, 1),
        )  # fmt: skip

    # ---- the work

    async def _work(self) -> End:
        scan = await self._scan()
        if self._error is not _REVOKED:
            return "invalid"
        await self._io(self._parts.leases.begin, self.batch, scan.total)
        pending: deque[tuple[asyncio.Task[LineResult], int]] = deque()
        with await self._io(self._parts.folder.open, self.batch.input_file_id) as file:
            try:
                await self._answer_all(self._reader(file), scan, pending)
            finally:
                tasks = [task for task, _ in pending]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._settle()
                self._keep_first(tasks)
                await self._flush()
        return "completed"

    async def _scan(self) -> Scan:
        limit = self._policy.max_line_bytes
        path = self._parts.folder.file(self.batch.input_file_id)
        scan = await self._io(scan_file, path, limit, lambda: self._end is not None)
        if self._end is not None:
            await asyncio.Event().wait()  # until this task is cancelled: the scan was given up
        if not scan.is_whole:
            self._error = _invalid("too_many_lines", f"The input file has more than {MAX_LINES} lines: split it")
        elif not scan.total:
            self._error = _invalid("empty_file", "The input file has no lines: send one request per line")
        return scan

    async def _answer_all(
        self, reader: LineReader, scan: Scan, pending: deque[tuple[asyncio.Task[LineResult], int]]
    ) -> None:
        """Answer the lines with several in flight; their results are kept in the order of the file."""
        index = self._journal.batch.completed + self._journal.batch.failed
        lines: deque[Line] = deque()
        while True:
            while len(pending) < self._parts.share() and self._weight < self._policy.window_bytes:
                if not lines:
                    lines.extend(await self._io(reader.read, _READ_LINES, _READ_BYTES))
                if not lines:
                    break
                line = lines.popleft()
                is_repeated = scan.repeated is not None and bool(scan.repeated[index])
                weight = _weight(line)
                pending.append((asyncio.create_task(self._answer(line, is_repeated)), weight))
                self._weight += weight
                index += 1
            if not pending:
                return
            await asyncio.wait((pending[0][0],), timeout=self._policy.flush_s)
            while pending and pending[0][0].done():
                task, weight = pending.popleft()
                self._weight -= weight
                self._keep(task.result())
            if self._is_flush_due():
                await self._flush()

    async def _answer(self, line: Line, is_repeated: bool) -> LineResult:
        batch = self.batch
        request_id = line_id(batch.id, line.number)
        try:
            request = await self._parse(line)
            if is_repeated:
                message = f"Line {line.number} has a custom_id that an earlier line has"
                raise BadLine("duplicate_custom_id", message, request.custom_id)
        except BadLine as bad:
            text = encode_failure(request_id, bad.custom_id, bad.code, str(bad))
            return LineResult(line.number, line.end, text, is_completed=False)
        answer = await self._execute(LineWork(batch.owner, batch.endpoint, bytes(request.body), request_id))
        if answer.num_truncated:
            self._truncated.update(lines=1, truncated=answer.num_truncated)
        text = encode_response(request_id, request.custom_id, answer)
        return LineResult(line.number, line.end, text, is_completed=answer.status == 200)

    async def _parse(self, line: Line) -> LineRequest:
        args = line, self.batch.endpoint, self._policy.max_line_bytes
        if len(line.raw or b"") <= _INLINE_BYTES:
            return parse_line(*args)
        return await self._io(parse_line, *args)

    async def _execute(self, work: LineWork) -> LineAnswer:
        """Answer one line; again while the server has no room, and for a while if it cannot serve."""
        attempts, waited_s = 0, 0.0
        while True:
            answer = await self._parts.execute(work)
            if answer.retry_after_s is None:
                return answer
            attempts += 1
            is_long = waited_s >= self._policy.outage_s or not self._is_patient
            if answer.status != 429 and attempts >= self._policy.max_attempts and is_long:
                self._is_patient = False
                return answer
            pause_s = min(30.0, max(answer.retry_after_s, 0.1 * 2 ** min(attempts, 9)))
            waited_s += pause_s
            self._say_waiting(answer)
            await self._parts.sleep(pause_s)

    def _say_waiting(self, answer: LineAnswer) -> None:
        """Log that lines wait, twice a minute at most; a batch waits for a quarter of an hour, and longer for room."""
        now_s = self._parts.leases.now()
        if answer.status == 429 or now_s - self._said_waiting_s < _SAY_EVERY_S:
            return
        self._said_waiting_s = now_s
        retry_in_s = round(answer.retry_after_s or 0.0, 1)
        log.warning("batch.waiting", batch=self.batch.id, retry_in_s=retry_in_s, reason=_message_of(answer))

    async def _expire_rest(self) -> None:
        """Write the lines that were not answered in time to the error file."""
        try:
            file = await self._io(self._parts.folder.open, self.batch.input_file_id)
        except FileNotFoundError:
            return
        try:
            reader = self._reader(file)
            while lines := await self._io(reader.read, _READ_LINES, _READ_BYTES):
                await self._io(self._expire, lines)
                if self._end in ("released", "lost"):
                    return
        finally:
            file.close()

    def _expire(self, lines: Sequence[Line]) -> None:
        results = []
        for line in lines:
            try:
                custom_id = parse_line(line, self.batch.endpoint, self._policy.max_line_bytes).custom_id
            except BadLine as bad:
                custom_id = bad.custom_id or ""
            text = encode_failure(line_id(self.batch.id, line.number), custom_id or None, "batch_expired", _EXPIRED)
            results.append(LineResult(line.number, line.end, text, is_completed=False))
        self._journal.append(results)

    # ---- results

    def _keep(self, result: LineResult) -> None:
        self._results.append(result)
        self._num_bytes += len(result.text)

    def _keep_first(self, tasks: Sequence[asyncio.Task[LineResult]]) -> None:
        """Keep the results up to the first line without one."""
        for task in tasks:
            if task.cancelled() or task.exception() is not None:
                return
            self._keep(task.result())

    def _is_flush_due(self) -> bool:
        is_late = asyncio.get_running_loop().time() - self._flushed_at_s >= self._policy.flush_s
        return bool(self._results) and (is_late or self._num_bytes >= self._policy.flush_bytes)

    async def _flush(self) -> None:
        """Journal the results. It goes on if this task is cancelled, and is awaited before anything else is written."""
        results, self._results, self._num_bytes = self._results, [], 0
        if not results:
            return
        self._flushed_at_s = asyncio.get_running_loop().time()
        self._flushing = asyncio.ensure_future(self._io(self._journal.append, results))
        await asyncio.shield(self._flushing)
        completed = sum(result.is_completed for result in results)
        self._parts.on_line("completed", completed)
        self._parts.on_line("failed", len(results) - completed)

    async def _settle(self) -> None:
        """Wait for the write under way, and raise what it raised: nothing may be written behind it."""
        if self._flushing is not None:
            await asyncio.wait((self._flushing,))
            self._flushing.result()

    def _reader(self, file: BinaryIO) -> LineReader:
        done = self._journal.batch
        return LineReader(file, done.input_offset, done.next_line, self._policy.max_line_bytes)

    async def _io(self, function: Callable[..., Value], *args: Any) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._parts.executor, function, *args)


def _invalid(code: str, message: str) -> BatchError:
    return BatchError(code=code, message=message, param="input_file_id")


def _message_of(answer: LineAnswer) -> str:
    """Return the message of an error that was answered."""
    try:
        return msgspec.json.decode(answer.body, type=ErrorEnvelope).error.message
    except msgspec.DecodeError:
        return f"status {answer.status}"


def _weight(line: Line) -> int:
    """Estimate the bytes of a line and its answer: there are at most as many inputs as commas and one."""
    raw = line.raw or b""
    return len(raw) + _RESULT_BYTES * min(raw.count(b",") + 1, _MAX_INPUTS)
