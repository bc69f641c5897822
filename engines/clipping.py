"""How much of a very long text needs tokenising when only its beginning (or its end) is kept: pure string work.

Tokenisers cut texts into words first, and a word's tokens do not depend on what comes behind a space. So a text is
clipped at a space between two words, twice, at different places. Where both clips give the same kept tokens, the
whole text would give them too; where not, the caller looks further.
"""

import re

# Between two words, or in front of a mark behind a Chinese or Japanese word, tokenisers separate.
_BOUNDARY = re.compile(r"(?<=[^\W_]) (?=[^\W_])|(?<=[぀-ヿ一-鿿])(?=[、。，！？；：])")

# Text without any boundary is tokenised whole up to here; its tokens may depend on where it begins.
MAX_UNBROKEN_CHARS = 1_000_000


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
    return None if keep_end else (text[:cap], text[: cap + 1])
