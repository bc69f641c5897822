"""Tests `KEYS_FILE`: valid entries, all mistakes at once, and that no message quotes a value."""

from hashlib import sha256
from pathlib import Path

import pytest

from router.auth.key_file import KeysError, parse_keys, read_keys
from router.auth.keys import ANONYMOUS, Key, new_secret

HASH = sha256(b"ey-web").hexdigest()
OTHER = sha256(b"ey-ops").hexdigest()
FULL = f"""
# the keys
- id: web
  sha256: "{HASH}"
  scopes: [embed, admin]
  models: ["BAAI/*", mini]
  requests_per_minute: 60
  tokens_per_minute: 100000
  max_concurrent: 8
  keep_alive: false
- id: ops-2.b_c
  sha256: {OTHER.upper()}
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(KeysError) as caught:
        parse_keys(text)
    return [str(mistake) for mistake in caught.value.mistakes]


def test_a_file_of_keys_is_read_in_its_order() -> None:
    web, ops = parse_keys(FULL)

    assert web == Key(
        id="web",
        digest=sha256(b"ey-web").digest(),
        scopes=frozenset(("embed", "admin")),
        models=("BAAI/*", "mini"),
        requests_per_minute=60,
        tokens_per_minute=100_000,
        max_concurrent=8,
        keep_alive=False,
    )
    assert ops == Key(id="ops-2.b_c", digest=sha256(b"ey-ops").digest(), scopes=frozenset(("embed",)))


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "[]", "---\n"])
def test_a_file_may_hold_no_key(text: str) -> None:
    assert parse_keys(text) == ()


def test_every_mistake_is_reported_with_its_line_and_key() -> None:
    text = f"""\
- id: web
  sha256: "{HASH[:-1]}"
  scopes: [embed, amdin]
  requests_per_minute: 0
  tokens_per_minute: "many"
  max_concurrent: 1.5
- id: web
  sha256: "{OTHER}"
  scope: [embed]
- id: -x
  models: []
  sha256: "{OTHER}"
- id: API_KEY
  models: [5, "a b"]
"""
    found = mistakes(text)

    assert [line.partition(": ")[0] for line in found] == [
        "line 2, [0].sha256 (web)",
        "line 3, [0].scopes[1] (web)",
        "line 4, [0].requests_per_minute (web)",
        "line 5, [0].tokens_per_minute (web)",
        "line 6, [0].max_concurrent (web)",
        "line 7, [1].id (web)",
        "line 9, [1].scope (web)",
        "line 10, [2].id (-x)",
        "line 11, [2].models (-x)",
        "line 12, [2].sha256 (-x)",
        "line 13, [3].id (API_KEY)",
        "line 13, [3].sha256 (API_KEY)",
        "line 14, [3].models[0] (API_KEY)",
        "line 14, [3].models[1] (API_KEY)",
    ]
    assert found[1].endswith("needs one of admin, batch, embed (did you mean admin?)")
    assert "see line 1" in found[5]
    assert "did you mean scopes?" in found[6]
    assert "the same key" in found[9]
    assert found[11].endswith("missing")


SECRET = "ey-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789-_AbCdE"


@pytest.mark.parametrize(
    "text",
    [
        f"- id: web\n  sha256: {SECRET}\n",
        f"- id: {SECRET}{SECRET}\n  sha256: 5\n",
        f"- id: {SECRET}\n  sha256: 5\n",
        f"- {SECRET}\n",
        SECRET,
        f"{SECRET}: 1\n",
        f"- id: web\n  sha256: '{HASH}'\n  {SECRET}: 1\n  {SECRET}: 2\n",
        f"- id: web\n  sha256: *{SECRET}\n",
        f"- id: web\n  sha256: !{SECRET} x\n",
        f"- id: web\n  sha256: '{HASH}'\n  models: ['{SECRET} x']\n  scopes: [{SECRET}]\n",
        f"- id: web\n  sha256: '{HASH}'\n  requests_per_minute: {SECRET}\n",
        f"- id: web\n  sha256: '{SECRET}",
        f"- &{SECRET} {{id: web, sha256: *{SECRET}}}",
    ],
)
def test_no_message_quotes_the_file(text: str) -> None:
    with pytest.raises(KeysError) as caught:
        parse_keys(text)

    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert "line" in str(caught.value)


def test_a_missing_file_is_reported_by_name_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(KeysError) as caught:
        read_keys(tmp_path / "keys.yaml")

    assert "there is no file keys.yaml" in str(caught.value)
    assert "embedyard keys create" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KeysError, match="not UTF-8"):
        read_keys(path)


@pytest.mark.parametrize(
    ("patterns", "name", "is_allowed"),
    [
        (("*",), "any/thing", True),
        (("BAAI/*",), "BAAI/bge-m3", True),
        (("BAAI/*",), "baai/bge-m3", False),
        (("BAAI/*",), "BAAI", False),
        (("mini", "e5-?"), "e5-2", True),
        (("mini",), "mini-2", False),
        (("*-m3",), "BAAI/bge-m3", True),
        (("[ab]x",), "bx", True),
    ],
)
def test_models_are_allowed_by_patterns(patterns: tuple[str, ...], name: str, is_allowed: bool) -> None:
    key = Key(id="k", digest=b"d", scopes=frozenset(), models=patterns)

    assert key.may_use((name,)) == is_allowed
    assert key.may_use(("elsewhere", name)) == is_allowed
    assert key.may_use(()) is False


def test_a_key_is_shown_by_its_name() -> None:
    key = Key.of("web", "ey-web", "embed", "admin")

    assert repr(key) == "Key(web: admin, embed)"
    assert (key.is_anonymous, ANONYMOUS.is_anonymous) == (False, True)


def test_new_keys_are_long_random_and_fit_a_header() -> None:
    made = {new_secret() for _ in range(100)}

    assert len(made) == 100
    assert all(secret.startswith("ey-") and len(secret) == 46 and secret.isascii() for secret in made)
