"""Records of a trace: which model was asked when, and what each model took to load. No text, no key.

A trace is a file of JSON lines. A server with `REPLAY_TRACE` writes one; `engines/replay.py` replays it.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct


class TraceModel(Struct, frozen=True, kw_only=True, tag_field="kind", tag="model", rename={"model_id": "model"}):
    """What a model took when it was loaded: bytes of its weights and of its largest forward pass, and seconds.

    `wake_s`: how long it took to come back from main memory; None where it never has.
    """

    model_id: str
    weight_bytes: int
    workspace_bytes: int = 0
    load_s: float = 0.0
    wake_s: float | None = None


class TraceRequest(Struct, frozen=True, kw_only=True, tag_field="kind", tag="request", rename={"model_id": "model"}):
    """One request: its Unix time, its model, its tokens, and the seconds from lease to answer."""

    at_s: float
    model_id: str
    tokens: int = 0
    seconds: float = 0.0


class Trace(Struct, frozen=True):
    """The requests of a stretch of time, in order, and the models that they asked for, by id."""

    models: Mapping[str, TraceModel]
    requests: Sequence[TraceRequest]

    @property
    def resident_bytes(self) -> int:
        """Returns the budget with which no model of the trace would ever have left."""
        used = [self.models[model_id] for model_id in {request.model_id for request in self.requests}]
        workspace = max((model.workspace_bytes for model in used), default=0)
        return sum(model.weight_bytes for model in used) + workspace


MAX_LINE_BYTES = 4096
"""No line of a trace is longer."""


def encode_line(record: TraceModel | TraceRequest) -> bytes:
    """Encodes a record as one line of JSON."""
    return msgspec.json.encode(record) + b"\n"


_DECODER = msgspec.json.Decoder(TraceModel | TraceRequest)


def read_trace(lines: Iterable[bytes]) -> Trace:
    """Reads a trace. A model counts as it was loaded last; requests are sorted by time.

    Raises:
        ValueError: a line is no record; the message has its number. A last line without an end is left out: the server
            was stopped while it wrote it.
    """
    models: dict[str, TraceModel] = {}
    requests: list[TraceRequest] = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = _DECODER.decode(line)
        except msgspec.MsgspecError as error:
            raise ValueError(f"line {number} is no record of a trace: {error}") from error
        if isinstance(record, TraceModel):
            models[record.model_id] = record
        else:
            requests.append(record)
    return Trace(models, sorted(requests, key=lambda request: request.at_s))
