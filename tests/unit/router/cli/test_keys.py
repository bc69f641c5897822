"""`embedyard keys`: output, changes of the file, and preserved comments."""

import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from router.auth.key_editor import edit_file, with_key, without_key
from router.auth.key_file import parse_keys, read_keys
from router.auth.keys import Key, digest_of
from router.cli.main import cli
from router.config.settings import VARIABLES
from router.config.yaml_editing import EditError

HASH = "a" * 64
COMMENTED = f"""\
# Who may come in.

- id: web  # the site
  sha256: "{HASH}"
  models:
    - mini
    - "BAAI/*"   # all of them

# The night jobs.
-
  id: jobs
  sha256: "{"b" * 64}"
  requests_per_minute: 5  # slowly
# Ops, on call.
- {{id: ops, sha256: "{"c" * 64}",
   scopes: [admin]}}

# The end.
"""
NEW = Key.of("new", "ey-new", "embed")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path in KEYS_FILE, which does not exist yet; no other settings."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("KEYS_FILE", "keys.yaml")
    return tmp_path / "keys.yaml"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["keys", *arguments], prog_name="embedyard")


def test_a_key_is_printed_once_and_its_hash_is_written(path: Path) -> None:
    result = run("create", "web", "--model", "BAAI/*", "--model", "mini", "--requests-per-minute", "60")
    secret = result.stdout.strip()
    (key,) = read_keys(path)

    assert result.exit_code == 0
    assert re.fullmatch(r"ey-[\w-]{43}", secret)
    assert key == Key(
        id="web",
        digest=digest_of(secret),
        scopes=frozenset(("embed",)),
        models=("BAAI/*", "mini"),
        requests_per_minute=60,
    )
    assert secret not in result.stderr
    assert secret not in path.read_text()
    assert "keys.yaml" in result.stderr


def test_every_option_is_written(path: Path) -> None:
    result = run(
        "create", "ops", "--scope", "admin", "--scope", "embed", "--tokens-per-minute", "9", "--max-concurrent", "3",
        "--no-keep-alive",
    )  # fmt: skip

    assert result.exit_code == 0
    assert read_keys(path) == (
        Key(
            id="ops",
            digest=digest_of(result.stdout.strip()),
            scopes=frozenset(("admin", "embed")),
            tokens_per_minute=9,
            max_concurrent=3,
            keep_alive=False,
        ),
    )


def test_without_a_file_the_entry_is_printed_to_be_pasted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run("create", "web", "--print")
    monkeypatch.delenv("KEYS_FILE")
    unset = run("create", "web")

    for result in (asked, unset):
        entry = result.stderr.partition("\n\n")[2].partition("\n\n")[0]
        assert parse_keys(entry)[0].digest == digest_of(result.stdout.strip())
    assert not path.exists()


def test_a_round_of_create_list_and_revoke(path: Path) -> None:
    for name in ("web", "lab", "123", "no", "1.5"):
        assert run("create", name).exit_code == 0
    listed = run("list")
    revoked = run("revoke", "lab")
    rest = json.loads(run("list", "--json").stdout)

    assert [line.split("\t")[:3] for line in listed.stdout.splitlines()] == [
        [name, "embed", "*"] for name in ("web", "lab", "123", "no", "1.5")
    ]
    assert revoked.exit_code == 0
    assert [key["id"] for key in rest] == ["web", "123", "no", "1.5"]
    assert "digest" not in rest[0]
    assert rest[0]["scopes"] == ["embed"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("create", "API_KEY"), "the setting of this name"),
        (("create", "a b"), "letters, digits"),
        (("create", "web", "--model", "a b"), "a model name"),
        (("create", "web", "--scope", "root"), "embed"),
        (("create", "web", "--requests-per-minute", "0"), "x>=1"),
        (("create", "ops"), "already"),
        (("revoke", "nobody"), "known keys: ops"),
        (("revoke", "ops", "--file", "nowhere.yaml"), "no file nowhere.yaml"),
        (("list", "--file", "nowhere.yaml"), "no file nowhere.yaml"),
        (("create", "web", "--file", "no/where.yaml"), "cannot be written"),
    ],
)
def test_an_impossible_change_is_reported_and_changes_nothing(
    path: Path, arguments: tuple[str, ...], part: str
) -> None:
    run("create", "ops")
    before = path.read_text()
    result = run(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert part in result.stderr
    assert path.read_text() == before


def test_commands_that_need_a_file_say_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYS_FILE")

    for arguments in (("list",), ("revoke", "web")):
        result = run(*arguments)
        assert (result.exit_code, "set KEYS_FILE" in result.stderr) == (2, True)


def test_a_file_with_mistakes_is_not_touched(path: Path) -> None:
    path.write_text("- id: web\n  sha256: ey-secret\n")
    result = run("create", "other")

    assert result.exit_code == 2
    assert "line 2, [0].sha256 (web)" in result.stderr
    assert "ey-secret" not in result.stderr
    assert path.read_text() == "- id: web\n  sha256: ey-secret\n"


def test_comments_and_order_stay_when_a_key_comes() -> None:
    text = with_key(COMMENTED, NEW)

    assert text.startswith(COMMENTED)
    assert [key.id for key in parse_keys(text)] == ["web", "jobs", "ops", "new"]


@pytest.mark.parametrize("name", ["web", "jobs", "ops"])
def test_comments_and_order_stay_when_a_key_goes(name: str) -> None:
    text = without_key(COMMENTED, name)

    assert [key.id for key in parse_keys(text)] == [other for other in ("web", "jobs", "ops") if other != name]
    for comment in ("# Who may come in.", "# The night jobs.", "# Ops, on call.", "# The end."):
        assert comment in text
    assert len(text.splitlines()) < len(COMMENTED.splitlines())


@pytest.mark.parametrize(
    "text",
    ["", "# nobody\n", "[]", "# nobody yet\n[]  # really\n", f"  - id: a\n    sha256: '{HASH}'", "---\n"],
    ids=["empty", "comment", "brackets", "commented brackets", "indented, no newline", "document"],
)
def test_a_list_is_continued_however_it_is_written(text: str) -> None:
    longer = with_key(text, NEW)

    assert [key.id for key in parse_keys(longer)] == [key.id for key in parse_keys(text)] + ["new"]
    assert parse_keys(without_key(longer, "new")) == parse_keys(text)


def test_the_last_key_may_go() -> None:
    text = with_key("# all\n", NEW)

    assert parse_keys(without_key(text, "new")) == ()


def test_what_cannot_be_edited_line_by_line_is_left_alone() -> None:
    one_line = f"[{{id: a, sha256: '{HASH}'}}, {{id: b, sha256: '{'b' * 64}'}}]"
    shared = f"- id: a\n  sha256: '{HASH}'\n  models: &m [mini]\n- id: b\n  sha256: '{'b' * 64}'\n  models: *m\n"

    for text in (one_line, shared):
        with pytest.raises(EditError, match="by hand"):
            without_key(text, "a")
    with pytest.raises(EditError, match="by hand"):
        with_key(one_line, NEW)


def test_a_new_file_is_its_owners_alone_and_an_old_one_keeps_its_rights(path: Path) -> None:
    run("create", "web")
    private = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o640)
    run("create", "lab")

    assert private == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(path: Path) -> None:
    real = path.parent / "real.yaml"
    path.symlink_to(real)
    run("create", "web")

    assert path.is_symlink()
    assert [key.id for key in read_keys(real)] == ["web"]


def test_many_hands_lose_no_key(path: Path) -> None:
    def create(index: int) -> None:
        edit_file(path, lambda text: with_key(text, Key.of(f"k{index}", f"ey-{index}", "embed")), may_make=True)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(create, range(24)))

    assert sorted(key.id for key in read_keys(path)) == sorted(f"k{index}" for index in range(24))


def test_check_reads_the_keys_too(path: Path) -> None:
    (path.parent / "registry.yaml").write_text("version: 1\nmodels: []\n")
    run("create", "web")
    good = CliRunner().invoke(cli, ["check"])
    path.write_text("- id: web\n")
    bad = CliRunner().invoke(cli, ["check"])

    assert (good.exit_code, "1 keys, no mistakes" in good.stdout) == (0, True)
    assert (bad.exit_code, "[0].sha256 (web): missing" in bad.stderr) == (2, True)


def test_serve_refuses_a_bad_file_before_anything_slow(path: Path) -> None:
    (path.parent / "registry.yaml").write_text("version: 1\nmodels: []\n")
    path.write_text("- id: web\n")
    result = CliRunner().invoke(cli, ["serve", "--port", "0"])

    assert result.exit_code == 2
    assert "1 mistake in the keys file" in result.stderr
