"""What must be right before a load begins: the address, the model, the texts, and one answer."""

import asyncio
import itertools
import random
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct, structs

from router.loadgen.http_client import Connection, Request, Target, models, refusal

_PROSE = """
Before sunrise the harbour is quiet, and only the crane at the north quay is lit. A clerk counts the containers that
came in overnight and writes their numbers into a long list: 4711, 20, 365. Two ships wait outside for the tide; one
carries grain, the other carries machines that nobody ordered. The search for a lost crate begins with a question, and
the question is never quite the words that somebody wrote on the label. Whoever looks for warm coats should find winter
jackets, even though the two have no letter of their names in common. In the afternoon the yard fills with engines.
Small ones shuttle to and fro, large ones come out once a day, and each of them needs a track of its own. When a track
is needed the engine that has rested longest moves aside, unless it is pulling something. The signalman keeps a diary:
weather, arrivals, departures, delays, and what caused them. He says that most delays are decided long before anybody
notices them. On Mondays the price of copper is read out, on Fridays the results of the football league. A letter from
Lisbon took nine days, a telegram took nine minutes, and both said that everything was well. Rain falls on the tin roof
of the workshop where a wheel is being measured; it is too wide by the thickness of a hair, so it will be turned again.
Children watch from the bridge, and when the whistle blows all of them cover their ears and laugh.
"""


_WORDS = tuple(_PROSE.split())


_SEED = 7


def made(num_texts: int, num_words: int) -> list[str]:
    """Stretches of one text about a harbour and a yard, each begun with a number of its own."""
    rng = random.Random(_SEED)
    return [" ".join([f"{index}.", *_stretch(rng, num_words - 1)]) for index in range(1, num_texts + 1)]


def _stretch(rng: random.Random, num_words: int) -> list[str]:
    """Words from some place on, then from another one, until there are enough."""
    words: list[str] = []
    while len(words) < num_words:
        start = rng.randrange(len(_WORDS))
        words += _WORDS[start : start + rng.randint(8, 50)]
    return words[:num_words]


def read(path: Path) -> list[str]:
    """One text a line; empty lines are none.

    Raises:
        ValueError: there is no text in it, or it is not UTF-8.
        OSError: it cannot be read.
    """
    texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [text for text in texts if text]
    if not found:
        raise ValueError("holds no text: one a line is wanted")
    return found


FIRST_TIMEOUT_S = 600.0
"""The first request may wait for a model that is not in memory yet."""


_DIFFERENT = 512
"""Texts in different requests, sent again and again: so many that no two requests under way at once are the same."""


_UNREACHED = "{} cannot be reached ({}): is the server running?"


class CannotMeasure(Exception):
    """Nothing can be measured; the message says why, in the server's own words where it has some."""


class _Item(Struct):
    embedding: str | list[float]


class _Body(Struct):
    data: list[_Item]


def with_model(target: Target) -> Target:
    """A target that names no model gets the first that its server lists.

    Raises:
        CannotMeasure: it has no such address, or its server does not say what it serves.
    """
    parts = urlsplit(target.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CannotMeasure(f"{target.url} is not the address of a server: http://127.0.0.1:6008 would be one")
    if "@" in parts.netloc:
        raise CannotMeasure("a key goes into --api-key, not into the address, which stands in the report")
    if target.model:
        return target
    try:
        served = models(target)
    except OSError as error:
        if error.errno is not None:
            raise CannotMeasure(_UNREACHED.format(target.url, error.strerror)) from None
        raise CannotMeasure(f"{error} (a server that lists no models can be measured with --model)") from None
    if not served:
        raise CannotMeasure(f"{target.url} lists no models: name one with --model")
    return structs.replace(target, model=served[0])


def calls(texts_per_request: int, num_words: int, file: Path | None) -> list[list[str]]:
    """The texts of all requests, from the file where there is one.

    Raises:
        CannotMeasure: the file cannot be used.
    """
    wanted = texts_per_request * max(64, _DIFFERENT // texts_per_request)
    try:
        texts = made(wanted, num_words) if file is None else read(file)
    except (OSError, ValueError) as error:
        raise CannotMeasure(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    enough = list(itertools.islice(itertools.cycle(texts), max(wanted, len(texts))))
    return [enough[start : start + texts_per_request] for start in range(0, len(enough), texts_per_request)]


async def first(target: Target, request: Request) -> int:
    """Ask once, so that the model is in memory; returns the width of its vectors.

    Raises:
        CannotMeasure: there is no server, it will not, or it is none of embeddings.
    """
    try:
        async with asyncio.timeout(FIRST_TIMEOUT_S):
            connection = await Connection.open(target)
            answer = await connection.ask(request)
        connection.close()
    except TimeoutError:
        raise CannotMeasure(f"{target.url} did not answer within {FIRST_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise CannotMeasure(_UNREACHED.format(target.url, error.strerror or error)) from None
    if answer.status != 200:
        raise CannotMeasure(f"{target.url} answered {answer.status}: {refusal(answer.body)[1]}")
    try:
        vector = msgspec.json.decode(answer.body, type=_Body).data[0].embedding
    except (msgspec.DecodeError, IndexError):
        raise CannotMeasure(
            f"{target.url} answered 200, but no embeddings: is it an OpenAI-compatible server?"
        ) from None
    return len(vector) if isinstance(vector, list) else len(vector) * 3 // 16  # base64 of 4 bytes each
