"""Tests the decoding of bodies: its limits, and that large bodies decode like small ones."""

import json
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from engines.errors import DimensionsNotSupported, InvalidRequest, InvalidTokenId, InvalidValue
from router.api import decoding as decode
from router.api.decoding import decode_body, embed_call
from router.errors import ClientLeft, InvalidJson, TooManyInputs
from router.schemas.admin import PreloadRequest
from router.schemas.compat import CohereRequest, TeiRequest
from router.schemas.inference import (
    MAX_IDS,
    MAX_IDS_OF_TEXT,
    MAX_INPUTS,
    MAX_NAME_CHARS,
    MAX_QUANTITY_CHARS,
    EmbeddingRequest,
)
from router.schemas.ollama import OllamaRequest
from tests.testkit.servers import serving

PADDING = b'"padding": "' + b"x" * 2**16 + b'", '
"""An unknown field, ignored, that makes a body large."""
LONG_NAME = "x" * (MAX_NAME_CHARS + 1)
LONG_TIME = "1" * (MAX_QUANTITY_CHARS + 1)
ITEMS = [
    '"a"', '""', '["a", "b"]', "[]", "[1, 2]", "[ 1 , 2 ]", "[-1]", "[[1, 2], [3]]", "[[], [1]]",
    '["a", 1]', '[1, "a"]',
    '[[1], "a"]', "[[1], 2]", "[1, [2]]", "[[[1]]]", "[1.5]", "[true]", "[null]", "null", "5", "{}", '[{"text": "a"}]',
    '["\\u00e9\\ud83d\\ude00"]', "[\n\t[1,2]\r ]", "[9223372036854775807]", '["a,b", "[1,2]"]',
]  # fmt: skip


@pytest.mark.parametrize("items", ITEMS)
@pytest.mark.parametrize(
    ("wanted", "field"),
    [(EmbeddingRequest, "input"), (TeiRequest, "inputs"), (CohereRequest, "texts"), (OllamaRequest, "input")],
)
def test_a_large_body_means_what_a_small_one_does(wanted: type[Any], field: str, items: str) -> None:
    rest = b'"model": "m", "%s": %s}' % (field.encode(), items.encode())

    assert _meaning(b"{" + PADDING + rest, wanted, field) == _meaning(b"{" + rest, wanted, field)


@given(st.one_of(st.lists(st.text(), max_size=9), st.lists(st.lists(st.integers(0, 2**40), max_size=9), max_size=9)))
def test_no_item_of_a_large_body_is_changed(items: list[Any]) -> None:
    rest = b'"input": ' + msgspec.json.encode(items) + b"}"

    assert _meaning(b"{" + PADDING + rest, EmbeddingRequest, "input") == _meaning(
        b"{" + rest, EmbeddingRequest, "input"
    )


def _meaning(body: bytes, wanted: type[Any], field: str) -> object:
    """Return the call of a body, or the class and field of its error."""
    try:
        decoded = decode_body(body, wanted)
        given = getattr(decoded, field)
        call = embed_call(EmbeddingRequest(input=given, model=decoded.model), "m", load_timeout_s=1.0)
    except InvalidRequest as error:
        return type(error), error.param and error.param.replace("inputs", "input")
    return call


@pytest.mark.parametrize(
    ("wanted", "field", "items"),
    [
        (EmbeddingRequest, "input", b'"a"'),
        (EmbeddingRequest, "input", b"[1]"),
        (TeiRequest, "inputs", b'"a"'),
        (CohereRequest, "texts", b'"a"'),
        (OllamaRequest, "input", b'"a"'),
    ],
)
def test_the_2049th_item_is_not_decoded(wanted: type[Any], field: str, items: bytes) -> None:
    """Items after the limit are skipped without a check of their type."""
    many = b", ".join([items] * (MAX_INPUTS + 1) + [b'{"no": "item"}'])
    body = b"{" + PADDING + b'"model": "m", "%s": [%s]}' % (field.encode(), many)

    with pytest.raises(TooManyInputs, match=rf"{field} has at least 2049 items \(maximum 2048 per request\)") as found:
        decode_body(body, wanted)
    assert found.value.param == field


@pytest.mark.parametrize("form", [b"[%s]", b"[[%s]]", b"[[1], [%s]]"])
def test_one_text_has_so_many_token_ids_at_most(form: bytes) -> None:
    most, more = (b'{"input": ' + form % b",".join([b"7"] * count) + b"}" for count in _around(MAX_IDS_OF_TEXT))

    assert len(decode_body(most, EmbeddingRequest).input[-1]) == MAX_IDS_OF_TEXT
    with pytest.raises(
        InvalidValue, match=rf"has {MAX_IDS_OF_TEXT + 1} token ids \(maximum {MAX_IDS_OF_TEXT} per text"
    ):
        decode_body(more, EmbeddingRequest)


def test_one_request_has_so_many_token_ids_at_most() -> None:
    row = b"[" + b",".join([b"7"] * MAX_IDS_OF_TEXT) + b"]"
    most, more = (b'{"input": [' + b",".join(rows) + b"]}" for rows in ([row] * 8, [row] * 8 + [b"[7]"]))

    assert sum(map(len, decode_body(most, EmbeddingRequest).input)) == MAX_IDS
    with pytest.raises(
        InvalidValue, match=rf"input has at least {MAX_IDS + 1} token ids \(maximum {MAX_IDS} per request"
    ):
        decode_body(more, EmbeddingRequest)


def _around(limit: int) -> tuple[int, int]:
    return limit, limit + 1


@pytest.mark.parametrize(
    ("wanted", "body", "param"),
    [
        (EmbeddingRequest, {"input": "a", "model": LONG_NAME}, "model"),
        (EmbeddingRequest, {"input": "a", "user": LONG_NAME}, "user"),
        (EmbeddingRequest, {"input": "a", "input_type": LONG_NAME}, "input_type"),
        (EmbeddingRequest, {"input": "a", "keep_alive": LONG_TIME}, "keep_alive"),
        (EmbeddingRequest, {"input": "a", "dimensions": 2**70}, "dimensions"),
        (TeiRequest, {"inputs": "a", "model": LONG_NAME}, "model"),
        (TeiRequest, {"inputs": "a", "prompt_name": LONG_NAME}, "prompt_name"),
        (TeiRequest, {"inputs": "a", "dimensions": 2**70}, "dimensions"),
        (CohereRequest, {"texts": ["a"], "model": LONG_NAME}, "model"),
        (CohereRequest, {"texts": ["a"], "model": "m", "input_type": LONG_NAME}, "input_type"),
        (CohereRequest, {"texts": ["a"], "model": "m", "embedding_types": ["float"] * 17}, "embedding_types"),
        (OllamaRequest, {"input": "a", "model": LONG_NAME}, "model"),
        (OllamaRequest, {"input": "a", "model": "m", "keep_alive": LONG_TIME}, "keep_alive"),
        (PreloadRequest, {"host": LONG_NAME}, "host"),
    ],
)
def test_no_field_is_longer_than_what_it_names(wanted: type[Any], body: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidValue, DimensionsNotSupported)) as found:
        decode_body(json.dumps(body).encode(), wanted)
    assert found.value.param == param
    assert isinstance(found.value, DimensionsNotSupported) == (param == "dimensions")


@pytest.mark.parametrize(
    "digits", [str(2**63), str(2**64), str(2**70), str(-(2**63) - 1), "1" + "0" * 5000], ids=lambda digits: digits[:6]
)
@pytest.mark.parametrize("form", ["[%s]", "[[1], [%s]]"])
@pytest.mark.parametrize("padding", [b"", PADDING], ids=["small", "large"])
def test_a_token_id_of_more_than_64_bits_is_refused(digits: str, form: str, padding: bytes) -> None:
    """Such an id could not be sent to an engine in another process, and crashed it."""
    with pytest.raises(InvalidTokenId, match=r"input\S* is not a token id: it has more than 64 bits") as found:
        decode_body(b"{" + padding + f'"input": {form % digits}}}'.encode(), EmbeddingRequest)
    assert found.value.param == "input"


@pytest.mark.parametrize("text", ["\\ud800", "\\udc00", "\\ud800 and more", "\\ud83d\\ude00\\ude00", "\\udbff\\n"])
@pytest.mark.parametrize("padding", [b"", PADDING], ids=["small", "large"])
def test_a_lone_surrogate_is_named_in_the_error(text: str, padding: bytes) -> None:
    body = b"{" + padding + f'"input": ["{text}"]}}'.encode()

    with pytest.raises(InvalidJson, match=r"lone surrogate .* send both halves"):
        decode_body(body, EmbeddingRequest)


def test_a_path_quoted_by_the_client_is_not_taken_for_the_param() -> None:
    with pytest.raises(InvalidValue) as found:
        decode_body(b'{"input": "a", "truncate": "x - at `$.model`"}', EmbeddingRequest)
    assert found.value.param == "truncate"


@pytest.mark.parametrize("body", [{"input": "a"}, {"input": 5}], ids=["taken", "refused"])
async def test_a_body_is_freed_once_it_is_decoded(app: Litestar, monkeypatch: pytest.MonkeyPatch, body: object) -> None:
    """Requests are in reference cycles, so a body that they keep stays until the next garbage collection."""
    requests: list[decode.StrictRequest] = []
    taken = decode.StrictRequest.body

    async def spy(self: decode.StrictRequest) -> bytes:
        requests.append(self)
        return await taken(self)

    monkeypatch.setattr(decode.StrictRequest, "body", spy)
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/v1/embeddings", json=body)

    assert requests
    assert [each._body for each in requests] == [each._connection_state.body for each in requests]
    assert {each._body for each in requests} == {b""}


def receiving(
    chunks: Sequence[bytes | None], headers: Sequence[tuple[bytes, bytes]] = ()
) -> tuple[decode.StrictRequest, list[Any]]:
    """Returns a request of at most 10 bytes that comes in these chunks (None: the client leaves), and what is left."""
    events: list[Any] = [
        {"type": "http.disconnect"}
        if chunk is None
        else {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks)}
        for index, chunk in enumerate(chunks)
    ]

    async def receive() -> Any:
        return events.pop(0)

    handler = SimpleNamespace(
        resolve_request_max_body_size=lambda: 10, parsed_data_field=SimpleNamespace(is_required=True)
    )
    scope: Any = {"type": "http", "headers": headers, "state": {}, "route_handler": handler}
    return decode.StrictRequest(scope, receive), events


@pytest.mark.parametrize("chunks", [[b"0123456789"], [b"0123", b"", b"456", b"789"], [b"0123456789", b""]])
async def test_a_body_is_its_chunks(chunks: list[bytes]) -> None:
    request, left = receiving(chunks)

    assert [await request.body(), await request.body()] == [b"0123456789"] * 2
    assert not left


@pytest.mark.parametrize(
    ("chunks", "headers", "error", "num_unread"),
    [
        ([b"0123456789a"], [], RequestEntityTooLarge, 0),
        ([b"01234", b"56789", b"a", b"b"], [], RequestEntityTooLarge, 1),
        ([b"0123"], [(b"content-length", b"11")], RequestEntityTooLarge, 1),
        ([b"0123", None], [], ClientLeft, 0),
        ([b""], [], InvalidJson, 0),
    ],
)
async def test_a_body_is_read_no_further_than_it_may_be(
    chunks: list[bytes | None], headers: list[tuple[bytes, bytes]], error: type[Exception], num_unread: int
) -> None:
    request, left = receiving(chunks, headers)

    with pytest.raises(error):
        await request.body()
    assert len(left) == num_unread


async def test_the_loop_only_decodes_what_is_small(app: Litestar, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def decoded(body: bytes, wanted: Any) -> Any:
        threads.append(threading.current_thread())
        return decode_body(body, wanted)

    monkeypatch.setattr(decode, "decode_body", decoded)
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        for size in (1, 2**16, 2**20):
            assert (await client.post("/v1/embeddings", json={"input": "a" * size})).status_code == 200

    assert [thread is threading.current_thread() for thread in threads] == [True, False, False]
    assert threads[2].name.startswith("decode")
