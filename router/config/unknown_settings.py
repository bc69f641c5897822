"""Finds variables that are most likely misspelt settings: an unknown variable is otherwise ignored without a word.

The environment holds the variables of other programs as well, so only a name that is nearly a setting counts there.
`.env` is mostly ours: a name that begins as several settings do counts too. Messages show names, never values.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from difflib import get_close_matches

_NEAR_IN_ENVIRONMENT, _NEAR_IN_FILE = 0.88, 0.84
"""Least `difflib` ratio. `XAI_API_KEY`, which is another program's, has 0.83 to `ADMIN_API_KEY`."""
_MIN_CHARS_IN_ENVIRONMENT, _MIN_CHARS_IN_FILE = 8, 5
"""Shorter names resemble too much: POST is no misspelt PORT, and MODEL may be anybody's."""
_PREFIX = "EMBEDYARD_"
"""What settings of many other servers begin with."""
_MIN_SHARED = 2
"""Settings that begin with the same word, before it counts as ours."""


def warn_unknown(environ: Iterable[str], from_file: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    """Return one sentence for each name that is no setting and is likely meant as one.

    Args:
        environ: names in the environment.
        from_file: names in `.env`.
        known: names of all settings.
    """
    unknown = [name for name in from_file if name not in known]
    found = [_warning(name, _meant_in_file(name, known), is_ours=_begins_as_ours(name, known)) for name in unknown]
    others = [name for name in environ if name not in known and name not in from_file]
    long = [name for name in others if len(name) >= _MIN_CHARS_IN_ENVIRONMENT]
    found += [_warning(name, _nearest(name, known, _NEAR_IN_ENVIRONMENT), is_ours=False) for name in long]
    return tuple(warning for warning in found if warning)


def _warning(name: str, meant: str, *, is_ours: bool) -> str:
    if meant:
        return f"{name} is not a setting, and is ignored: did you mean {meant}?"
    return f"{name} is not a setting, and is ignored: docs/configuration.md lists all settings" if is_ours else ""


def _meant_in_file(name: str, known: Collection[str]) -> str:
    bare = name.upper().removeprefix(_PREFIX)
    if bare in known:
        return bare
    whole = [each for each in known if "_" in bare and each.endswith(f"_{bare}")]
    if len(whole) == 1:  # BATCH_SIZE is MAX_BATCH_SIZE
        return whole[0]
    return _nearest(name, known, _NEAR_IN_FILE) if len(name) >= _MIN_CHARS_IN_FILE else ""


def _nearest(name: str, known: Collection[str], cutoff: float) -> str:
    close = get_close_matches(name.upper(), known, n=1, cutoff=cutoff)
    return close[0] if close else ""


def _begins_as_ours(name: str, known: Iterable[str]) -> bool:
    """Whether the name begins with our prefix, or with the first word of several settings (`MAX_`, `RATE_`, `LOG_`)."""
    firsts = Counter(each.partition("_")[0] for each in known if "_" in each)
    first, separator, _ = name.upper().partition("_")
    return bool(separator) and (name.upper().startswith(_PREFIX) or firsts[first] >= _MIN_SHARED)
