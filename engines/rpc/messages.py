"""Defines the messages between a router and a host in another process: one message each way for a client request.

A message is a MessagePack head and a raw body. The body is what the result's own kind splits off
(`BaseResult.split_body`; for `Embeddings` the vectors), so that no float is ever converted on the way. `pack` and
`FrameDecoder` make frames of them for a stream of bytes; a transport that keeps messages apart by itself (Ray) takes
heads and bodies as they are.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from engines.rpc.errors import ErrorRecord
from engines.spec import ModelSpec
from engines.types import (
    BaseCall,
    BaseResult,
    Budget,
    Call,
    Event,
    HostBudget,
    HostSnapshot,
    ModelStatus,
    Plan,
    Result,
    Tier,
)

_PREFIX = struct.Struct("<II")
"""The prefix of a frame: bytes of the head, bytes of the body."""

CallKind = TypeVar("CallKind", bound=BaseCall)
ResultKind = TypeVar("ResultKind", bound=BaseResult)


class Run(Struct, Generic[CallKind], frozen=True, kw_only=True, tag=True):
    """`Host.run`; answered by `RunResult`."""

    call: CallKind


class Preload(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.preload`; answered by `CommandResult` with a status."""

    model_id: str
    pin: bool = False
    wait: bool = True
    may_move: bool = False


class Evict(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.evict`; answered by `CommandResult` with a status."""

    model_id: str
    force: bool = False
    timeout_s: float = 30.0
    to: Tier = "disk"


class PlanRequest(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.plan`, after at most `size_s` seconds of `Host.estimate_size`; answered by `CommandResult` with a plan."""

    model_id: str
    size_s: float


class Generation(Struct, frozen=True, order=True, array_like=True):
    """The version of a registry; higher versions win.

    `counter` grows with every reload, `digest` hashes the content.
    """

    counter: int = 0
    digest: str = ""


class Reload(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.reload`, unless `generation` is not higher than the host's; answered by `CommandResult`."""

    specs: Mapping[str, ModelSpec]
    budget: Budget | None = None
    host_budget: HostBudget | None = None
    generation: Generation = Generation()


class Poll(Struct, frozen=True, kw_only=True, tag=True):
    """Checks the device and asks for the events after `after`; answered by `HostReport`."""

    after: int = 0


class Drain(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.aclose`; answered by `CommandResult`."""

    grace_s: float


class Cancel(Struct, frozen=True, kw_only=True, tag=True):
    """Cancels the request of that number, which is answered by `Cancelled`; itself it has no reply."""

    number: int


class RunResult(Struct, Generic[ResultKind], frozen=True, kw_only=True, tag=True):
    """What the call was answered with; the message's body holds what `BaseResult.split_body` took out."""

    result: ResultKind


class CommandResult(Struct, frozen=True, kw_only=True, tag=True):
    """The result of an operator's command, with the snapshot of the host after it."""

    snapshot: HostSnapshot
    status: ModelStatus | None = None
    plan: Plan | None = None


class HostReport(Struct, frozen=True, kw_only=True, tag=True):
    """The reply to `Poll`. `generation`: the version of the registry that the host serves."""

    snapshot: HostSnapshot
    events: tuple[Event, ...] = ()
    fault: str = ""
    generation: Generation = Generation()


class Cancelled(Struct, frozen=True, kw_only=True, tag=True):
    """The request was cancelled and has released everything."""


Request = Run[Call] | Preload | Evict | PlanRequest | Reload | Poll | Drain | Cancel
Reply = RunResult[Result] | CommandResult | HostReport | ErrorRecord | Cancelled


class MessageCodec:
    """Encodes and decodes messages. Thread-safe.

    Args:
        request: the union of all requests.
        reply: the union of all replies.
    """

    def __init__(self, request: Any, reply: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(request)
        self._replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(reply)

    def encode_request(self, request: Request) -> bytes:
        """Returns the head; requests have no body."""
        return self._encoder.encode(request)

    def decode_request(self, head: bytes) -> Request:
        """Inverts `encode_request`."""
        return self._requests.decode(head)

    def encode_reply(self, reply: Reply) -> tuple[bytes, bytes]:
        """Returns head and body."""
        if isinstance(reply, RunResult):
            bare, body = reply.result.split_body()
            return self._encoder.encode(RunResult(result=bare)), body
        return self._encoder.encode(reply), b""

    def decode_reply(self, head: bytes, body: bytes) -> Reply:
        """Inverts `encode_reply`."""
        reply = self._replies.decode(head)
        return RunResult(result=reply.result.with_body(body)) if isinstance(reply, RunResult) else reply


_codec = MessageCodec(Request, Reply)
encode_request, decode_request = _codec.encode_request, _codec.decode_request
encode_reply, decode_reply = _codec.encode_reply, _codec.decode_reply


class Frame(Struct, frozen=True):
    """One message of a stream. `number` matches a reply to its request; 0: unsolicited."""

    number: int
    head: bytes
    body: bytes


def pack(frame: Frame) -> tuple[bytes, bytes]:
    """Encodes a frame to (prefix, number and head; body). The body is not copied."""
    head = frame.number.to_bytes(8, "little") + frame.head
    return _PREFIX.pack(len(head), len(frame.body)) + head, frame.body


class FrameDecoder:
    """Splits a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Adds bytes; returns the frames that are now complete."""
        self._buffer += data
        with memoryview(self._buffer) as view:
            frames, taken = _split_frames(view)
        del self._buffer[:taken]
        return frames


def _split_frames(view: memoryview) -> tuple[list[Frame], int]:
    frames: list[Frame] = []
    at = 0
    for start, head_bytes, body_bytes in _frame_spans(view):
        middle, at = start + head_bytes, start + head_bytes + body_bytes
        number = int.from_bytes(view[start : start + 8], "little")
        frames.append(Frame(number, bytes(view[start + 8 : middle]), bytes(view[middle:at])))
    return frames, at


def _frame_spans(view: memoryview) -> Iterator[tuple[int, int, int]]:
    """Yields (start of the head, bytes of the head, bytes of the body) of each complete frame."""
    at = 0
    while len(view) - at >= _PREFIX.size:
        head_bytes, body_bytes = _PREFIX.unpack_from(view, at)
        start = at + _PREFIX.size
        at = start + head_bytes + body_bytes
        if at > len(view):
            return
        yield start, head_bytes, body_bytes
