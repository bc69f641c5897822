"""Entries are added to `registry.yaml` as text: comments stay, and what cannot be extended safely is left alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engines.spec import Matryoshka
from router.config.yaml_editing import EditError
from router.registry.editor import add_entry, create_file, with_entry
from router.registry.new_entry import NewEntry
from router.registry.registry import RegistryError, parse_registry, read_registry

ROOT = Path(__file__).parents[4]
ENTRY = NewEntry(name="e5", source="intfloat/e5-small")
TEXT = """\
# ours
version: 1
models:
  # the first
  - name: a
    source: o/a # as it is
    # of a

  - name: b
    source: o/b
    prompts:
      query: |
        two
        lines
    # of b
  # of the list
# of the end
defaults: {pinned: false}
"""


def test_an_entry_stands_behind_the_last_one_and_nothing_else_changes() -> None:
    after = with_entry(TEXT, ENTRY)
    added = "\n  - name: e5\n    source: intfloat/e5-small\n"

    assert after == TEXT.replace("    # of b\n", f"    # of b\n{added}")


def test_every_field_is_written_and_read_again() -> None:
    entry = NewEntry(
        name="full",
        source="./my models/full",
        aliases=("org/full", "full:latest"),
        revision="123456",
        task="rerank",
        prompts={"query": 'say "a: b"\n\\n # ', "no": "é：问"},
        default_prompt="query",
        matryoshka=Matryoshka(widths=(64, 256)),
        assumed_pooling="mean",
        description="no: yes # 1",
        license="MIT",
    )
    hub_entry = structs.replace(entry, source="o/full", prompts={"query": 'say "a: b"\n # ', "no": "é：问"})
    spec = parse_registry(with_entry(TEXT, hub_entry)).models["full"]

    assert (spec.source, spec.revision, spec.task, spec.default_prompt) == ("o/full", "123456", "rerank", "query")
    assert spec.prompts == hub_entry.prompts
    assert (spec.matryoshka, spec.pooling) == (Matryoshka(widths=(64, 256)), ("mean",))
    assert (spec.description, spec.license) == ("no: yes # 1", "MIT")
    assert parse_registry(with_entry(TEXT, hub_entry)).aliases_of("full") == ("org/full", "full:latest")
    with pytest.raises(RegistryError, match="a line break instead of the characters"):
        with_entry(TEXT, structs.replace(entry, revision=None))


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nmodels: []\n",
        "version: 1\nmodels: [] # none yet\ndefaults: {pinned: true}\n",
        "models:\n- name: a\n  source: o/a\nversion: 1",
        "models:\n    - {name: a, source: o/a}\n    - {name: b, source: o/b}\nversion: 1\n",
        "version: 1\nmodels:\n  - name: a\n    source: >-\n      o/a\n\n\n",
    ],
)
def test_usual_forms_of_the_list_are_extended(text: str) -> None:
    before, after = parse_registry(text), parse_registry(with_entry(text, ENTRY))

    assert list(after.models) == [*before.models, "e5"]


def test_the_shipped_registry_is_extended_in_its_own_form() -> None:
    text = (ROOT / "registry.yaml").read_text()

    assert with_entry(text, ENTRY) == text + "\n  - name: e5\n    source: intfloat/e5-small\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nmodels: [{name: a, source: o/a}]\n", "stand in one line"),
        ("version: 1\nmodels: [\n]\n", "empty, over several lines"),
    ],
)
def test_a_form_that_cannot_be_extended_is_left_alone(text: str, words: str) -> None:
    with pytest.raises(EditError, match=words):
        with_entry(text, ENTRY)


def test_a_file_with_mistakes_is_left_alone() -> None:
    with pytest.raises(RegistryError, match="colour"):
        with_entry(TEXT + "colour: red\n", ENTRY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a"}, "'a' is in the registry already: choose another with --name"),
        ({"aliases": ("b",)}, "'b' is in the registry already: use it as 'b'"),
        ({"source": "o/b"}, "o/b is in the registry already, as 'b'"),
    ],
)
def test_a_name_or_source_that_is_known_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(EditError, match=words):
        with_entry(TEXT, structs.replace(ENTRY, **changes))


@given(st.dictionaries(st.sampled_from(["query", "document", "a b", "1", "on"]), st.text(max_size=20), max_size=3))
def test_any_prompt_is_written_as_it_is_or_refused(prompts: dict[str, str]) -> None:
    try:
        after = with_entry(TEXT, structs.replace(ENTRY, prompts=prompts))
    except (EditError, RegistryError):
        return
    assert parse_registry(after).models["e5"].prompts == prompts


# ---- files ----


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(TEXT)
    path.chmod(0o640)
    add_entry(path, ENTRY)

    assert list(read_registry(path).models) == ["a", "b", "e5"]
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_two_that_add_at_once_both_succeed(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(TEXT)
    names = [f"m{index}" for index in range(12)]
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda name: add_entry(path, NewEntry(name=name, source=f"o/{name}")), names))

    assert {"a", "b", *names} == set(read_registry(path).models)


def test_a_file_is_never_overwritten_and_never_written_with_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "registry.yaml"
    with pytest.raises(RegistryError):
        create_file(path, "version: 7\n")
    assert not path.exists()
    create_file(path, TEXT)
    with pytest.raises(EditError, match="exists already"):
        create_file(path, "version: 1\nmodels: []\n")

    assert path.read_text() == TEXT
