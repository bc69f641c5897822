"""What a host in another process is asked, and what it answers: one message a client request, with bytes in it.

A message is a MessagePack head and a raw body. The body holds vectors and nothing else, as `Embeddings` has them, so
that no float is ever converted on the way. `pack` and `FrameDecoder` make frames of them for a stream of bytes; a
transport that keeps messages apart by itself (Ray) takes heads and bodies as they are.
"""

import struct
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import Struct, structs

from engines.rpc.errors import ErrorRecord
from engines.spec import ModelSpec
from engines.types import Budget, EmbedCall, Embeddings, Event, HostSnapshot, ModelStatus, Plan

_PREFIX = struct.Struct("<II")
"""Bytes of the head, bytes of the body."""


class Embed(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.embed`; answered by `EmbedResult`."""

    call: EmbedCall


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


class PlanRequest(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.plan`, after `Host.size` has had `size_s` seconds; answered by `CommandResult` with a plan."""

    model_id: str
    size_s: float


class Generation(Struct, frozen=True, order=True, array_like=True):
    """Which registry: `counter` grows with every reload, `digest` is of the content. Higher ones replace lower ones."""

    counter: int = 0
    digest: str = ""


class Reload(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.reload`, where `generation` is higher than the host's; answered by `CommandResult`."""

    specs: Mapping[str, ModelSpec]
    budget: Budget | None = None
    generation: Generation = Generation()


class Poll(Struct, frozen=True, kw_only=True, tag=True):
    """Check the device, and tell what has happened since the event `after`; answered by `HostReport`."""

    after: int = 0


class Drain(Struct, frozen=True, kw_only=True, tag=True):
    """`Host.aclose`; answered by `CommandResult`."""

    grace_s: float


class Cancel(Struct, frozen=True, kw_only=True, tag=True):
    """Nobody waits for the request of that number any more; not answered, and the request by `Cancelled`."""

    number: int


class EmbedResult(Struct, frozen=True, kw_only=True, tag=True):
    """The body holds the vectors that are missing here."""

    embeddings: Embeddings


class CommandResult(Struct, frozen=True, kw_only=True, tag=True):
    """What became of an operator's command, and the whole host after it."""

    snapshot: HostSnapshot
    status: ModelStatus | None = None
    plan: Plan | None = None


class HostReport(Struct, frozen=True, kw_only=True, tag=True):
    """A look at a host. `generation`: of the registry that it serves."""

    snapshot: HostSnapshot
    events: tuple[Event, ...] = ()
    fault: str = ""
    generation: Generation = Generation()


class Cancelled(Struct, frozen=True, kw_only=True, tag=True):
    """The request was cancelled, and nothing of it is left."""


Request = Embed | Preload | Evict | PlanRequest | Reload | Poll | Drain | Cancel
Reply = EmbedResult | CommandResult | HostReport | ErrorRecord | Cancelled

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode_request(request: Request) -> bytes:
    """The head; requests have no body."""
    return _encoder.encode(request)


def decode_request(head: bytes) -> Request:
    """The inverse of `encode_request`."""
    return _requests.decode(head)


def encode_reply(reply: Reply) -> tuple[bytes, bytes]:
    """Head and body."""
    if isinstance(reply, EmbedResult):
        bare = structs.replace(reply.embeddings, vectors=b"")
        return _encoder.encode(EmbedResult(embeddings=bare)), reply.embeddings.vectors
    return _encoder.encode(reply), b""


def decode_reply(head: bytes, body: bytes) -> Reply:
    """The inverse of `encode_reply`."""
    reply = _replies.decode(head)
    if isinstance(reply, EmbedResult):
        return EmbedResult(embeddings=structs.replace(reply.embeddings, vectors=body))
    return reply


class Frame(Struct, frozen=True):
    """One message of a stream. `number` joins a reply to its request; 0: nobody asked."""

    number: int
    head: bytes
    body: bytes


def pack(frame: Frame) -> tuple[bytes, bytes]:
    """A frame as it is written: everything but the body, and the body, which is not copied."""
    head = frame.number.to_bytes(8, "little") + frame.head
    return _PREFIX.pack(len(head), len(frame.body)) + head, frame.body


class FrameDecoder:
    """Bytes as they arrive → frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole now."""
        self._buffer += data
        with memoryview(self._buffer) as view:
            frames, taken = _cut(view)
        del self._buffer[:taken]
        return frames


def _cut(view: memoryview) -> tuple[list[Frame], int]:
    frames: list[Frame] = []
    at = 0
    for start, head_bytes, body_bytes in _spans(view):
        middle, at = start + head_bytes, start + head_bytes + body_bytes
        number = int.from_bytes(view[start : start + 8], "little")
        frames.append(Frame(number, bytes(view[start + 8 : middle]), bytes(view[middle:at])))
    return frames, at


def _spans(view: memoryview) -> Iterator[tuple[int, int, int]]:
    """(start of the head, bytes of the head, bytes of the body) of each whole frame."""
    at = 0
    while len(view) - at >= _PREFIX.size:
        head_bytes, body_bytes = _PREFIX.unpack_from(view, at)
        start = at + _PREFIX.size
        at = start + head_bytes + body_bytes
        if at > len(view):
            return
        yield start, head_bytes, body_bytes
