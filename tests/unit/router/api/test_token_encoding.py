"""Tests token ids of another tokenizer: decoded by tiktoken, or refused with a remedy."""

import sys

import pytest

from engines.errors import InvalidTokenId
from router.api.decoding import decode_token_ids

tiktoken = pytest.importorskip("tiktoken")
NAME = "cl100k_base"
REMEDY = "check_embedding_ctx_length=False"


@pytest.fixture(autouse=True)
def encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install an encoding with one token per byte, as the real one is a download."""
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    made = tiktoken.Encoding(NAME, pat_str=r"[\s\S]", mergeable_ranks=bytes_alone, special_tokens={"<|end|>": 256})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, NAME, made)


async def test_ids_become_the_texts_they_were_made_of() -> None:
    rows = [tuple("naïve text".encode()), tuple("二".encode())]

    assert await decode_token_ids(NAME, rows) == ("naïve text", "二")


async def test_half_a_character_is_shown_as_such() -> None:
    assert await decode_token_ids(NAME, [tuple("二".encode()[:2])]) == ("�",)


@pytest.mark.parametrize("token_id", [257, 10**6, 2**32, 10**30, -1])
async def test_an_id_that_the_encoding_lacks_is_refused(token_id: int) -> None:
    with pytest.raises(InvalidTokenId, match=REMEDY) as caught:
        await decode_token_ids(NAME, [(1, 2), (3, token_id)])

    assert "input[1]" in str(caught.value)
    assert caught.value.param == "input"


async def test_without_tiktoken_the_refusal_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)

    with pytest.raises(InvalidTokenId, match=f"tiktoken is not installed.*{REMEDY}"):
        await decode_token_ids(NAME, [(1,)])


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("hash mismatch in /secret/place")])
async def test_an_encoding_that_cannot_be_had_is_a_refusal(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)

    with pytest.raises(InvalidTokenId, match=f"{NAME}.*{REMEDY}") as caught:
        await decode_token_ids(NAME, [(1,)])
    assert "/secret" not in str(caught.value)
