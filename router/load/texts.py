"""Texts to send when nobody has better ones: always the same, no two alike, of about so many words. Knows no model."""

import random
from pathlib import Path

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
