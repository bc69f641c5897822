"""Prepares a load: validates the address, chooses the model, generates or reads the texts, and warms up."""

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


def generate_texts(num_texts: int, num_words: int) -> list[str]:
    """Generate texts from passages of `_PROSE`, each prefixed with its number."""
    rng = random.Random(_SEED)
    return [" ".join([f"{index}.", *_words_from_prose(rng, num_words - 1)]) for index in range(1, num_texts + 1)]


def _words_from_prose(rng: random.Random, num_words: int) -> list[str]:
    """Return words of random passages."""
    words: list[str] = []
    while len(words) < num_words:
        start = rng.randrange(len(_WORDS))
        words += _WORDS[start : start + rng.randint(8, 50)]
    return words[:num_words]


def read_texts(path: Path) -> list[str]:
    """Read one text per line; blank lines are skipped.

    Raises:
        ValueError: the file has no text, or is not UTF-8.
        OSError: the file cannot be read.
    """
    texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [text for text in texts if text]
    if not found:
        raise ValueError("holds no text; one per line is expected")
    return found


WARM_UP_TIMEOUT_S = 600.0
"""The first request may wait for a model to be loaded."""

_NUM_DISTINCT = 512
"""Number of distinct texts, which are sent cyclically: enough that no two concurrent requests are the same."""

_KEY = "pass the server's key with --api-key, or set API_KEY for a server on this machine"
_UNREACHABLE = "cannot connect to {} ({}); is the server running?"


class CannotMeasure(Exception):
    """Nothing can be measured; the message has the reason, from the server where it gave one."""


class _Item(Struct):
    embedding: str | list[float] | None = None
    score: float | None = None
    relevance_score: float | None = None


class _Body(Struct):
    data: list[_Item] = []
    results: list[_Item] = []


def resolve_model(target: Target) -> Target:
    """Set the model of a target without one to the first model that its server lists.

    Raises:
        CannotMeasure: the address is invalid, or the server does not list its models.
    """
    parts = urlsplit(target.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CannotMeasure(f"{target.url} is not a server address; expected e.g. http://127.0.0.1:6008")
    if "@" in parts.netloc:
        raise CannotMeasure("pass the key with --api-key, not in the address, which is written to the report")
    if target.model:
        return target
    try:
        served = models(target)
    except OSError as error:
        if error.errno is not None:
            raise CannotMeasure(_UNREACHABLE.format(target.url, error.strerror)) from None
        remedy = _KEY if isinstance(error, PermissionError) else "choose a model with --model"
        raise CannotMeasure(f"{error} ({remedy})") from None
    if not served:
        raise CannotMeasure(f"{target.url} lists no models; choose one with --model")
    return structs.replace(target, model=served[0])


def make_texts(texts_per_request: int, num_words: int, file: Path | None) -> list[list[str]]:
    """Return the texts of all requests, from the file if given.

    Raises:
        CannotMeasure: the file is unusable.
    """
    num_texts = texts_per_request * max(64, _NUM_DISTINCT // texts_per_request)
    try:
        texts = generate_texts(num_texts, num_words) if file is None else read_texts(file)
    except (OSError, ValueError) as error:
        raise CannotMeasure(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    enough = list(itertools.islice(itertools.cycle(texts), max(num_texts, len(texts))))
    return [enough[start : start + texts_per_request] for start in range(0, len(enough), texts_per_request)]


async def warm_up(target: Target, request: Request) -> int | None:
    """Send one request, so that the model is loaded; returns the dimensions of its vectors, None for scores.

    Raises:
        CannotMeasure: no server, an error response, or a response without embeddings or scores.
    """
    try:
        async with asyncio.timeout(WARM_UP_TIMEOUT_S):
            connection = await Connection.open(target)
            response = await connection.ask(request)
        connection.close()
    except TimeoutError:
        raise CannotMeasure(f"{target.url} did not respond within {WARM_UP_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise CannotMeasure(_UNREACHABLE.format(target.url, error.strerror or error)) from None
    if response.status != 200:
        remedy = f" ({_KEY})" if response.status in (401, 403) else ""
        raise CannotMeasure(f"{target.url} answered {response.status}: {refusal(response.body)[1]}{remedy}")
    return _dimensions(target, response.body)


def _dimensions(target: Target, content: bytes) -> int | None:
    """Return the dimensions of the vectors in an answer, None if it has scores."""
    try:
        body = msgspec.json.decode(content, type=_Body)
        item = (body.data or body.results)[0]
    except (msgspec.DecodeError, IndexError):
        item = _Item()
    vector = item.embedding
    if vector is not None:
        return len(vector) if isinstance(vector, list) else len(vector) * 3 // 16  # base64 of 4 bytes each
    if item.score is None and item.relevance_score is None:
        wanted = "embeddings" if target.route == "embeddings" else "scores"
        raise CannotMeasure(f"{target.url} answered 200, but no {wanted}: is it an OpenAI-compatible server?")
    return None
