"""Messages between router and hosts survive encoding, framing and any split of the byte stream."""

import random

import pytest

from engines.errors import QueueFull
from engines.rpc.errors import error_record_of
from engines.rpc.messages import (
    Cancel,
    CommandResult,
    Drain,
    Evict,
    Frame,
    FrameDecoder,
    Generation,
    HostReport,
    PlanRequest,
    Poll,
    Preload,
    Reload,
    Reply,
    Request,
    Run,
    RunResult,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    pack,
)
from engines.spec import Matryoshka, ModelSpec
from engines.types import (
    Batch,
    Budget,
    EmbedCall,
    Embeddings,
    Event,
    HostSnapshot,
    ModelStatus,
    Plan,
    TokenizeCall,
    Tokens,
)

STATUS = ModelStatus(model_id="a", state="ready", host_id="cuda:0", device="cuda:0", source="org/a")
SNAPSHOT = HostSnapshot(
    host_id="cuda:0", device="cuda:0", total_bytes=10, budget_bytes=8, used_bytes=3, workspace_bytes=1, free_bytes=4,
    residents=("a",), models=(STATUS,),
)  # fmt: skip
EVENT = Event(seq=3, time_s=1.5, host_id="cuda:0", model_id="a", kind="state", source="cold", target="waiting_space")
PLAN = Plan(model_id="a", host_id="cuda:0", state="cold", fits=True, need_bytes=1, free_bytes=2, evict=("b",))
SPEC = ModelSpec(
    model_id="a", source="org/a", pooling=("cls", "mean"), matryoshka=Matryoshka(widths=(4,)), prompts={"query": "q: "}
)
VECTORS = Embeddings(
    vectors=b"\x00\x01\x02\x03" * 8, dimensions=4, token_counts=(3, 4), truncated=(1,),
    batches=(Batch(texts=2, tokens=7, computed_tokens=7),),
)  # fmt: skip


@pytest.mark.parametrize(
    "request_",
    [
        Run(call=EmbedCall(model_id="a", texts=("ü\0", "x"), keep_alive_s=0, load_timeout_s=float("inf"))),
        Run(call=EmbedCall(model_id="a", token_ids=((1, 2), (3,)), normalize=False, truncate="start")),
        Run(call=EmbedCall(model_id="a", texts=("x",), caller="web")),
        Run(call=EmbedCall(model_id="a", texts=("x",), max_tokens=5)),
        Run(call=TokenizeCall(model_id="a", texts=("x",), input_type="query", add_special_tokens=False)),
        Preload(model_id="a", pin=True, wait=False),
        Evict(model_id="a", force=True, timeout_s=0.5),
        PlanRequest(model_id="a", size_s=1.0),
        Reload(specs={"a": SPEC}, budget=Budget(fraction=0.5), generation=Generation(2, "ab")),
        Poll(after=7),
        Drain(grace_s=3.0),
        Cancel(number=9),
    ],
)
def test_a_request_comes_out_as_it_went_in(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


@pytest.mark.parametrize(
    "reply",
    [
        RunResult(result=VECTORS),
        RunResult(result=Tokens(places=b"\1\0\0\0" * 6, token_counts=(2,), specials={1: "[CLS]"}, before="q: ")),
        CommandResult(snapshot=SNAPSHOT, status=STATUS, plan=PLAN),
        HostReport(snapshot=SNAPSHOT, events=(EVENT,), fault="hangs", generation=Generation(4, "cd")),
        error_record_of(QueueFull("full", retry_after_s=0.5)),
    ],
    ids=lambda reply: type(getattr(reply, "result", reply)).__name__,
)
def test_a_reply_comes_out_as_it_went_in(reply: Reply) -> None:
    assert decode_reply(*encode_reply(reply)) == reply


def test_vectors_travel_beside_the_head_and_are_not_touched() -> None:
    head, body = encode_reply(RunResult(result=VECTORS))

    assert body is VECTORS.vectors
    assert VECTORS.vectors not in head


@pytest.mark.parametrize("seed", range(5))
def test_frames_come_out_whole_however_the_bytes_arrive(seed: int) -> None:
    chance = random.Random(seed)
    frames = [
        Frame(chance.randrange(2**40), chance.randbytes(chance.randrange(50)), chance.randbytes(chance.randrange(3000)))
        for _ in range(40)
    ]
    stream = b"".join(part for frame in frames for part in pack(frame))
    decoder = FrameDecoder()
    found: list[Frame] = []
    while stream:
        size = chance.choice([1, 7, 8, 9, 100, 5000])
        found += decoder.feed(stream[:size])
        stream = stream[size:]

    assert found == frames
