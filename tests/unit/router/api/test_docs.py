"""Tests that `/docs` needs no internet, and that the OpenAPI document describes what the server does."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from litestar import Litestar

import router
from engines import errors as engine
from router.api.docs import openapi_config
from router.config.settings import Settings
from router.errors import TABLE
from tests.testkit.contract import BAD_BODIES, CODES, EMBED
from tests.testkit.servers import Served, serve

Document = dict[str, Any]
CHINESE = (Path(router.__file__).parent / "dashboard" / "docs" / "chinese.js").read_text(encoding="utf-8")
LEFT_TO_WORDS = {
    "int8 with one input", "an unknown duration", "a negative duration", "prompt and input type",
    "prompt and instruction", "a body too large", "an unknown model", "an empty model", "a path as model",
}  # fmt: skip
"""Invalid bodies that a JSON Schema accepts."""
ROWS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
GOOD_BODIES: list[dict[str, Any]] = [
    {"input": "a"},
    {"input": ["a", "b"], "model": "mini"},
    {"input": [1, 2]},
    {"input": [[1], [2, 3]], "encoding_format": "base64"},
    {"input": "a", "dimensions": 4, "user": "u", "truncate": "end", "normalize": False, "keep_alive": 300},
    {"input": "a", "keep_alive": "10m", "input_type": "query", "instruction": "find", "unknown": 1},
    {"input": ["a", "b"], "output_dtype": "ubinary", "keep_alive": -1},
    {"input": "a", "dimensions": None, "user": None, "model": None, "encoding_format": None, "prompt": "p"},
]
GOOD_CALLS: list[tuple[str, str, str, Any, int]] = [
    ("post", EMBED, EMBED, {"input": ["a", "b"]}, 200),
    ("post", EMBED, EMBED, {"input": "a", "encoding_format": "base64"}, 200),
    ("post", EMBED, EMBED, {"input": "a", "outputs": ["sparse"], "return_tokens": True}, 200),
    ("post", EMBED, EMBED, {"input": "a", "outputs": ["dense", "multi_vector"]}, 200),
    ("post", EMBED, EMBED, {"input": "a", "outputs": ["multi_vector"], "encoding_format": "base64"}, 200),
    ("post", EMBED, EMBED, {"input": []}, 400),
    ("post", EMBED, EMBED, {"input": "a", "model": "nothing"}, 404),
    ("post", "/v1/rerank", "/v1/rerank", {"query": "q", "documents": ["a"], "return_documents": True}, 200),
    ("post", "/v2/rerank", "/v2/rerank", {"query": "q", "documents": []}, 400),
    ("post", "/rerank", "/rerank", {"query": "q", "documents": ["a", {"text": "b"}]}, 200),
    ("post", "/rerank", "/rerank", {"query": "q", "texts": ["a"]}, 400),
    ("post", "/v1/score", "/v1/score", {"text_1": "a", "text_2": ["b", "c"]}, 200),
    ("post", "/v1/classify", "/v1/classify", {"input": "a"}, 400),
    ("post", "/predict", "/predict", {"inputs": "a"}, 400),
    ("post", "/", "/", {"inputs": "a"}, 200),
    ("post", "/embed", "/embed", {"inputs": [[1, 2], [3]]}, 200),
    ("post", "/embed_sparse", "/embed_sparse", {"inputs": ["a", "b"]}, 200),
    ("post", "/embed_all", "/embed_all", {"inputs": "a"}, 200),
    ("post", "/tokenize", "/tokenize", {"inputs": ["a", "b"]}, 200),
    ("post", "/tokenize", "/tokenize", {"inputs": []}, 400),
    ("get", "/info", "/info", None, 200),
    ("post", "/v1/embed", "/v1/embed", {"texts": ["a"]}, 200),
    ("post", "/v1/embed", "/v1/embed", {"texts": ["a"], "embedding_types": ["ubinary"]}, 200),
    ("post", "/v2/embed", "/v2/embed", {"model": "mini"}, 400),
    ("post", "/api/embed", "/api/embed", {"model": "mini", "input": "a"}, 200),
    ("post", "/api/embed", "/api/embed", {"model": "mini", "input": None}, 200),
    ("post", "/api/embed", "/api/embed", {"model": "mini", "input": ["a", ""]}, 400),
    ("post", "/api/embeddings", "/api/embeddings", {"model": "mini", "prompt": "a"}, 200),
    ("post", "/api/embeddings", "/api/embeddings", {"model": "nothing", "prompt": "a"}, 404),
    ("post", "/api/show", "/api/show", {"model": "mini"}, 200),
    ("post", "/api/show", "/api/show", {}, 400),
    ("post", "/api/pull", "/api/pull", {"model": "mini", "stream": False}, 200),
    ("post", "/api/pull", "/api/pull", {"model": "nothing"}, 404),
    ("get", "/api/version", "/api/version", None, 200),
    ("get", "/api/tags", "/api/tags", None, 200),
    ("get", "/api/ps", "/api/ps", None, 200),
    ("post", "/embeddings", "/embeddings", {"input": "a"}, 200),
    ("get", "/models", "/models", None, 200),
    ("get", "/models/{model_id}", "/models/BAAI/bge-m3", None, 200),
    (
        "post",
        "/openai/deployments/{model_id}/embeddings",
        "/openai/deployments/BAAI/bge-m3/embeddings",
        {"input": "a"},
        200,
    ),
    ("get", "/v1/models", "/v1/models", None, 200),
    ("get", "/v1/models/{model_id}", "/v1/models/BAAI/bge-m3", None, 200),
    ("get", "/v1/models/{model_id}", "/v1/models/cold", None, 200),
    ("get", "/v1/models/{model_id}", "/v1/models/no/thing", None, 404),
    ("get", "/admin/models", "/admin/models", None, 200),
    ("get", "/admin/models/{model_id}", "/admin/models/cold", None, 200),
    ("post", "/admin/models/{model_id}/preload", "/admin/models/mini/preload", None, 200),
    ("post", "/admin/models/{model_id}/preload", "/admin/models/mini/preload", {"wait": False}, 202),
    ("post", "/admin/models/{model_id}/preload", "/admin/models/mini/preload", {"wait": 1}, 400),
    ("post", "/admin/models/{model_id}/evict", "/admin/models/BAAI/bge-m3/evict", {"force": True}, 200),
    ("get", "/admin/memory", "/admin/memory", None, 200),
    ("get", "/admin/traffic", "/admin/traffic", None, 200),
    ("get", "/admin/plan", "/admin/plan?model=mini", None, 200),
    ("get", "/admin/plan", "/admin/plan?model=nothing", None, 404),
    ("get", "/v1/files", "/v1/files", None, 404),
    ("post", "/v1/batches", "/v1/batches", {"input_file_id": "f", "endpoint": "/v1/embeddings"}, 404),
    ("get", "/health", "/health", None, 200),
    ("get", "/ready", "/ready", None, 200),
]


@pytest.fixture(scope="module")
def document(module_server: Served) -> Document:
    found: Document = module_server.client.get("/docs/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(host="0.0.0.0", api_key="k"))


def validator(document: Document, schema: Document) -> jsonschema.Draft202012Validator:
    """Return a validator of one schema; its references are resolved in the document."""
    return jsonschema.Draft202012Validator(schema | {"components": document["components"]})


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def test_every_route_is_in_the_document(app: Litestar, document: Document) -> None:
    served = {
        (method.lower(), route.path_format)
        for route in app.routes
        for method in getattr(route, "methods", ())
        if method != "OPTIONS" and not route.path.startswith(("/docs", "/dashboard"))
    }

    assert {(method, path) for method, path, _ in operations(document)} == served - {("get", "/")}
    assert document["openapi"].startswith("3.1")


def test_all_schemas_are_schemas(document: Document) -> None:
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for _, _, operation in operations(document):
        for response in operation["responses"].values():
            for content in response.get("content", {}).values():
                assert all(map(is_described, content["schema"].get("oneOf", [content["schema"]])))


def is_described(schema: Document) -> bool:
    """Whether it is a schema of the document, rows of one, a text, or numbers."""
    return (
        "$ref" in schema
        or schema in ({"type": "string"}, ROWS)
        or ("items" in schema and is_described(schema["items"]))
    )


def test_no_reference_leads_nowhere(document: Document) -> None:
    references = set(re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(document)))

    assert references <= document["components"]["schemas"].keys()
    assert len(references) > 10


def test_every_operation_documents_its_purpose_and_scope(document: Document) -> None:
    for _, path, operation in operations(document):
        assert operation["summary"]
        assert operation["tags"]
        is_open = path in ("/health", "/ready")
        assert ("security" not in operation) == is_open
        assert ("401" not in operation["responses"]) == is_open
    scheme = document["components"]["securitySchemes"]["BearerToken"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


def test_every_failure_is_the_envelope_with_codes_of_the_contract(document: Document) -> None:
    envelope = validator(document, document["components"]["schemas"]["ErrorEnvelope"])
    for _, path, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) < 400:
                continue
            content = response["content"]["application/json"]
            is_ollamas = path.startswith("/api/")
            name = "OllamaError" if is_ollamas else "ErrorEnvelope"
            assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}
            assert content["examples"]
            for example in content["examples"].values():
                if is_ollamas:
                    assert example["summary"] in CODES[int(status)]
                    assert isinstance(example["value"]["error"], str)
                    continue
                envelope.validate(example["value"])
                assert example["value"]["error"]["code"] in CODES[int(status)]
                assert example["value"]["error"]["message"]


def test_the_embeddings_route_names_every_code_it_can_answer(document: Document) -> None:
    responses = document["paths"][EMBED]["post"]["responses"].values()
    described = set(re.findall(r"\w+", " ".join(response["description"] for response in responses)))
    admin_only = {"model_in_use", "model_pinned"}
    of_batches = {"quota_exceeded", "file_in_use", "batch_finished", "storage_unavailable"}
    elsewhere = {"not_found", "method_not_allowed", "client_closed_request"} | of_batches

    for row in TABLE.values():
        assert (row.code in described) == (row.code not in admin_only | elsewhere)


@pytest.mark.parametrize("body", GOOD_BODIES, ids=str)
def test_a_body_that_the_schema_admits_is_served(served: Served, document: Document, body: dict[str, Any]) -> None:
    validator(document, {"$ref": "#/components/schemas/EmbeddingRequest"}).validate(body)

    assert served.client.post(EMBED, json=body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [row[1] for row in BAD_BODIES if not isinstance(row[1], bytes) and row[0] not in LEFT_TO_WORDS],
    ids=[row[0] for row in BAD_BODIES if not isinstance(row[1], bytes) and row[0] not in LEFT_TO_WORDS],
)
def test_a_body_that_is_refused_is_no_instance_of_the_schema(document: Document, body: Any) -> None:
    schema = validator(document, {"$ref": "#/components/schemas/EmbeddingRequest"})

    assert not schema.is_valid(body)


def test_the_example_request_is_one(document: Document) -> None:
    request = document["components"]["schemas"]["EmbeddingRequest"]
    for example in request["examples"]:
        validator(document, request).validate(example)
    body = document["paths"][EMBED]["post"]["requestBody"]

    assert body["required"] is True
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/EmbeddingRequest"}
    assert document["paths"]["/admin/models/{model_id}/evict"]["post"]["requestBody"]["required"] is False


@pytest.mark.parametrize(("method", "template", "path", "body", "status"), GOOD_CALLS)
def test_an_answer_is_what_the_document_says(  # noqa: PLR0913 - one argument a column of the table
    served: Served, document: Document, method: str, template: str, path: str, body: Any, status: int
) -> None:
    answer = served.client.request(method, path, **({} if body is None else {"json": body}))
    described = document["paths"][template][method]["responses"][str(answer.status_code)]

    assert answer.status_code == status
    validator(document, described["content"]["application/json"]["schema"]).validate(answer.json())


@pytest.mark.parametrize(
    ("failure", "path"),
    [
        (engine.QueueFull("x"), EMBED),
        (engine.ModelLoading("x"), EMBED),
        (RuntimeError("x"), EMBED),
        (engine.ModelPinned("x"), "/admin/models/{model_id}/evict"),
        (engine.ModelTooLarge("x"), "/admin/models/{model_id}/preload"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_failure_is_what_the_document_says(served: Served, document: Document, failure: Exception, path: str) -> None:
    served.backend.failures["mini"] = failure
    answer = served.client.post(path.replace("{model_id}", "mini"), json={"input": "a"} if path == EMBED else {})
    described = document["paths"][path]["post"]["responses"][str(answer.status_code)]

    validator(document, described["content"]["application/json"]["schema"]).validate(answer.json())
    assert answer.json()["error"]["code"] in described["description"]


def test_the_page_and_all_it_links_to_come_from_this_server(keyed: Served) -> None:
    page = keyed.client.get("/docs")
    links = set(re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text))

    assert page.headers["content-type"].startswith("text/html")
    assert {"/", "/docs"} <= links
    for link in links - {"/", "/docs"}:
        asset = keyed.client.get(link)
        assert asset.status_code == 200
        assert len(asset.content) > 100
        assert asset.headers["content-type"].partition(";")[0] in ("text/css", "text/javascript", "image/svg+xml")
    assert "://" not in page.text


def test_the_browser_is_told_to_load_nothing_from_elsewhere(keyed: Served) -> None:
    policy = keyed.client.get("/docs").headers["content-security-policy"]
    script = keyed.client.get("/docs/assets/docs.js").text

    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "validatorUrl: null" in script
    assert 'url: "/docs/openapi.json"' in script


def test_the_main_routes_are_described_in_chinese_too(document: Document) -> None:
    """What has no translation stays English, as the page says: the routes of other servers, fields and codes."""
    known = set(re.findall(r'^  "((?:[^"\\]|\\.)+)":', CHINESE, re.MULTILINE))
    main = re.compile(r"/v1/(embeddings|models|rerank|score|classify)\b|/admin/")
    described = [operation for _, path, operation in operations(document) if main.match(path)]

    assert len(described) > 12
    for operation in described:
        assert {operation["summary"], " ".join(operation["description"].split())} <= known


def test_the_document_says_where_it_comes_from() -> None:
    assert openapi_config().version
