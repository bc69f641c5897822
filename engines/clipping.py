"""How much of a very long text needs tokenising when only its beginning (or its end) is kept: pure string work.

Tokenisers cut texts into words first, and a word's tokens do not depend on what comes behind a space. So a text is
clipped at a space between two words, twice, at different places. Where both clips give the same kept tokens, the
whole text would give them too; where not, the caller looks further, up to `max_chars`.
"""

import re
from unicodedata import combining

# Between two words, or in front of a mark behind a Chinese or Japanese word, tokenisers separate.
_BOUNDARY = re.compile(r"(?<=[^\W_]) (?=[^\W_])|(?<=[぀-ヿ一-鿿])(?=[、。，！？；：])")

_CHARS_PER_TOKEN = 8
"""Of a text longer than twice this for each token that is kept, only a part is tokenised at first."""

_GROWTH = 8
"""By so much each next part is longer."""

_LEAST_CHARS = 1 << 18
_MOST_CHARS = 1 << 21


def first_cap(num_tokens: int) -> int:
    """Characters of the first clips, where so many tokens are to be read."""
    return min(num_tokens * _CHARS_PER_TOKEN, _MOST_CHARS // 2)


def max_chars(num_tokens: int) -> int:
    """The most of one text that is ever tokenised at once: it takes up to a second and 270 bytes for each million
    characters and each character. Never less than the first clips of a text.
    """
    return max(2 * first_cap(num_tokens), _LEAST_CHARS)


def next_cap(cap: int, most_chars: int) -> int | None:
    """Characters of longer clips; None where there are none."""
    return min(cap * _GROWTH, most_chars // 2) if 2 * cap < most_chars else None


def clips(text: str, cap: int, *, keep_end: bool) -> tuple[str, str] | None:
    """Two clips of `cap` to `2 × cap` characters from the kept side of a text; None where only the whole text will do.

    Text without boundaries is clipped anywhere on the right: tokenisers work from left to right.
    """
    if len(text) <= 2 * cap:
        return None
    low, high = (len(text) - 2 * cap, len(text) - cap) if keep_end else (cap, 2 * cap)
    places = [match.start() for match in _BOUNDARY.finditer(text, low, high)]
    if len(places) >= 2:
        return (text[places[-1] :], text[places[0] :]) if keep_end else (text[: places[0]], text[: places[-1]])
    if keep_end:
        return None
    end = _place_before(text, cap + 1)
    return text[: _place_before(text, end - 1)], text[:end]


def _place_before(text: str, place: int) -> int:
    """The last place up to `place` where a cut changes nothing far in front of it.

    Two things reach back from behind a cut as far as a run of characters does: Unicode sorts combining marks by their
    class, and a special token may swallow the white space in front of it (RoBERTa's `<mask>`).
    """
    while place > 0 and combining(text[place]):
        place -= 1
    return len(text[: max(place, 0)].rstrip())
