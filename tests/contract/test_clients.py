"""Tests unmodified client libraries against a server on a socket. A client that is not installed is skipped."""

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from engines.testing.fakes import WIDTH, fake_vector
from tests.contract.conftest import KEY

TEXTS = ["the first text", "another one"]


def assert_vectors(found: Sequence[Any], texts: Sequence[str] = TEXTS, model: str = "mini", width: int = WIDTH) -> None:
    expected = np.array([fake_vector(model, text, width) for text in texts])

    assert np.array_equal(np.array(found, np.float32), expected)


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a `cl100k_base` for tiktoken with a token for each byte, as the real one is a download."""
    tiktoken = pytest.importorskip("tiktoken")
    registry = pytest.importorskip("tiktoken.registry")
    made = tiktoken.Encoding(
        "cl100k_base",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setitem(registry.ENCODINGS, "cl100k_base", made)
    return made


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """Yield an HTTP client for libraries that cannot close their own."""
    with httpx.Client() as client:
        yield client


def langchain(url: str, http: httpx.Client, **more: Any) -> Any:
    client = pytest.importorskip("langchain_openai")
    return client.OpenAIEmbeddings(base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http, **more)


def test_langchain_with_texts(url: str, http: httpx.Client) -> None:
    embeddings = langchain(url, http, model="mini", check_embedding_ctx_length=False)

    assert_vectors(embeddings.embed_documents(TEXTS))
    assert_vectors([embeddings.embed_query("a b")], ["a b"])


def test_langchain_in_fewer_dimensions(url: str, http: httpx.Client) -> None:
    embeddings = langchain(url, http, model="mini", check_embedding_ctx_length=False, dimensions=4)

    assert_vectors(embeddings.embed_documents(TEXTS), width=4)


async def test_langchain_from_a_coroutine(url: str, http: httpx.Client) -> None:
    async with httpx.AsyncClient() as client:
        embeddings = langchain(url, http, model="mini", check_embedding_ctx_length=False, http_async_client=client)
        found = await embeddings.aembed_documents(TEXTS)

    assert_vectors(found)


def test_langchains_own_token_ids_are_refused_with_the_cure(
    url: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    tiktoken = pytest.importorskip("tiktoken")
    ids = tiktoken.Encoding(
        "cl100k_base",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([b]): 90_000 + b for b in range(256)},
        special_tokens={},
    )
    monkeypatch.setitem(pytest.importorskip("tiktoken.registry").ENCODINGS, "cl100k_base", ids)

    with pytest.raises(openai.BadRequestError, match="token id") as caught:
        langchain(url, http, model="mini").embed_documents(TEXTS)
    assert (caught.value.code, caught.value.param) == ("invalid_token_id", "input")


@pytest.mark.usefixtures("encoding")
def test_langchains_own_token_ids_are_decoded_where_the_registry_says_so(url: str, http: httpx.Client) -> None:
    assert_vectors(langchain(url, http, model="openais-ids").embed_documents(TEXTS), model="openais-ids")


def test_llama_index(url: str, http: httpx.Client) -> None:
    client = pytest.importorskip("llama_index.embeddings.openai_like")
    embeddings = client.OpenAILikeEmbedding(
        model_name="mini", api_base=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http
    )

    assert_vectors(embeddings.get_text_embedding_batch(TEXTS))
    assert_vectors([embeddings.get_query_embedding("a b")], ["a b"])


def test_haystack(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    haystack = pytest.importorskip("haystack")
    embedders = pytest.importorskip("haystack.components.embedders")
    key = pytest.importorskip("haystack.utils").Secret.from_token(KEY)
    asked = {"api_base_url": f"{url}/v1", "api_key": key, "model": "mini", "max_retries": 0}
    documents = [haystack.Document(content=text) for text in TEXTS]

    for_documents = embedders.OpenAIDocumentEmbedder(**asked, progress_bar=False)
    for_text = embedders.OpenAITextEmbedder(**asked)

    found, query = for_documents.run(documents), for_text.run("a b")
    for_documents.client.close()
    for_text.client.close()

    assert_vectors([document.embedding for document in found["documents"]])
    assert_vectors([query["embedding"]], ["a b"])
    assert query["meta"]["usage"]["prompt_tokens"] == 4


@pytest.fixture
def cohere(url: str, http: httpx.Client) -> Iterator[Any]:
    client = pytest.importorskip("cohere")
    with client.ClientV2(api_key=KEY, base_url=url, httpx_client=http) as cohere:
        yield cohere


def test_cohere(cohere: Any) -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = cohere.embed(texts=TEXTS, model="mini", input_type="search_query", embedding_types=kinds)
    expected = np.array([fake_vector("mini", f"find: {text}") for text in TEXTS])

    assert np.array_equal(np.array(answer.embeddings.float_, np.float32), expected)
    assert np.array_equal(np.packbits(expected > 0, axis=-1), answer.embeddings.ubinary)
    assert answer.texts == TEXTS
    assert answer.meta.billed_units.input_tokens == 6 + 5
    assert answer.response_type == "embeddings_by_type"
    assert np.abs(answer.embeddings.int8).max() <= 128
    assert np.array(answer.embeddings.uint8).max() == 255


def test_cohere_in_fewer_dimensions(cohere: Any) -> None:
    answer = cohere.embed(
        texts=TEXTS, model="mini", input_type="search_document", embedding_types=["float"], output_dimension=4
    )

    assert_vectors(answer.embeddings.float_, [f"keep: {text}" for text in TEXTS], width=4)


def test_coheres_client_raises_its_own_errors(cohere: Any) -> None:
    errors = pytest.importorskip("cohere.errors")
    with pytest.raises(errors.BadRequestError) as bad:
        cohere.embed(texts=TEXTS, model="mini", input_type="poem", embedding_types=["float"])
    with pytest.raises(errors.NotFoundError):
        cohere.embed(texts=TEXTS, model="nothing", input_type="search_query")

    assert bad.value.body["error"]["code"] == "prompt_not_found"


@pytest.fixture
def ollama(url: str) -> Iterator[Any]:
    client = pytest.importorskip("ollama")
    with client.Client(host=url, headers={"Authorization": f"Bearer {KEY}"}) as ollama:
        yield ollama


def test_ollama(ollama: Any) -> None:
    answer = ollama.embed("mini", TEXTS, keep_alive="5m")
    one = ollama.embed("mini:latest", "a b", dimensions=4)
    (running,) = [model for model in ollama.ps().models if model.name == "mini:latest"]
    listed = {model.model for model in ollama.list().models}

    assert_vectors(answer.embeddings)
    assert_vectors(one.embeddings, ["a b"], width=4)
    assert answer.prompt_eval_count == 5 + 4
    assert answer.total_duration > 0
    assert running.context_length == 512
    assert running.size > 0
    assert {"mini:latest", "org/other:latest", "openais-ids:latest"} <= listed


def test_ollamas_client_raises_its_own_errors(ollama: Any) -> None:
    errors = pytest.importorskip("ollama")
    with pytest.raises(errors.ResponseError) as caught:
        ollama.embed("nothing", TEXTS)

    assert caught.value.status_code == 404


def test_the_hubs_client_of_text_embeddings_inference(url: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    with hub.InferenceClient(model=f"{url}/embed", token=KEY) as client:
        texts = client.feature_extraction(TEXTS)
        query = client.feature_extraction("a b", prompt_name="query", truncate=True)

    assert_vectors(texts)
    assert_vectors(query, ["find: a b"])


def test_openais_client_with_the_model_in_the_path(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/m/org/other/v1", api_key=KEY, max_retries=0) as client:
        answer = client.embeddings.create(model="whatever", input=TEXTS)

    assert answer.model == "org/other"
    assert_vectors([item.embedding for item in answer.data], model="org/other")


def test_openais_client_without_v1_in_its_base_url(url: str) -> None:
    openai = pytest.importorskip("openai")
    more = {"organization": "org-1", "project": "proj-1", "max_retries": 0}
    with openai.OpenAI(base_url=url, api_key=KEY, **more) as client:
        answer = client.embeddings.with_raw_response.create(model="org/other", input=TEXTS)
        listed = {model.id for model in client.models.list()}
        shown = client.models.retrieve("org/other")

    assert_vectors([item.embedding for item in answer.parse().data], model="org/other")
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert {"mini", "org/other"} <= listed
    assert shown.id == "org/other"


def test_openais_client_with_vllms_limit_of_tokens(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        answer = client.embeddings.create(model="mini", input=TEXTS, extra_body={"truncate_prompt_tokens": 128})
        with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens"):
            client.embeddings.create(model="mini", input=TEXTS, extra_body={"truncate_prompt_tokens": -2})

    assert_vectors([item.embedding for item in answer.data])


@pytest.mark.parametrize("deployment", [None, "mini"])
def test_azures_client(url: str, deployment: str | None) -> None:
    openai = pytest.importorskip("openai")
    more: dict[str, Any] = {"azure_deployment": deployment, "max_retries": 0}
    with openai.AzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21", **more) as client:
        answer = client.embeddings.create(model="mini", input=TEXTS)
    stranger = openai.AzureOpenAI(azure_endpoint=url, api_key="wrong", api_version="2024-10-21", **more)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.embeddings.create(model="mini", input=TEXTS)

    assert_vectors([item.embedding for item in answer.data])


def test_azures_client_with_a_slash_in_the_deployment(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.AzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21", max_retries=0) as client:
        answer = client.embeddings.create(model="org/other", input=TEXTS)

    assert_vectors([item.embedding for item in answer.data], model="org/other")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the client
def test_coheres_older_client(url: str, http: httpx.Client) -> None:
    client = pytest.importorskip("cohere")
    with client.Client(api_key=KEY, base_url=url, httpx_client=http) as cohere:
        plain = cohere.embed(texts=TEXTS, model="mini", input_type="search_document")
        typed = cohere.embed(texts=TEXTS, model="mini", input_type="search_query", embedding_types=["float"])

    assert_vectors(plain.embeddings, [f"keep: {text}" for text in TEXTS])
    assert_vectors(typed.embeddings.float_, [f"find: {text}" for text in TEXTS])
    assert (plain.response_type, typed.response_type) == ("embeddings_floats", "embeddings_by_type")


def test_cohere_with_inputs_and_with_a_task_that_has_no_prompt(cohere: Any) -> None:
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    answer = cohere.embed(inputs=inputs, model="mini", input_type="clustering", embedding_types=["float"])
    labels = cohere.embed(texts=TEXTS, model="mini", input_type="classification", embedding_types=["float"])

    assert_vectors(answer.embeddings.float_)
    assert_vectors(labels.embeddings.float_)


def test_ollamas_older_call_and_empty_inputs(ollama: Any) -> None:
    assert_vectors([ollama.embeddings("mini:latest", "a b", keep_alive="5m").embedding], ["a b"])
    assert list(ollama.embeddings("mini", "").embedding) == []
    assert list(ollama.embed("mini", []).embeddings) == []
    assert list(ollama.embed("mini", "").embeddings) == []


def test_ollama_shows_lists_and_pulls_models(ollama: Any) -> None:
    steps = [step.status for step in ollama.pull("mini", stream=True)]
    once = ollama.pull("mini:latest")
    shown = ollama.show("mini")
    listed = {model.model: model for model in ollama.list().models}

    assert (steps[0], steps[-1], once.status) == ("pulling manifest", "success", "success")
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo["embedyard.context_length"] == 512
    assert shown.details.format == "safetensors"
    assert listed["mini:latest"].size > 0


def test_ollamas_client_reads_our_messages(ollama: Any) -> None:
    errors = pytest.importorskip("ollama")
    with pytest.raises(errors.ResponseError, match="Model 'nothing' not found") as missing:
        ollama.show("nothing")
    with pytest.raises(errors.ResponseError, match="Model 'nothing' not found") as pulled:
        list(ollama.pull("nothing", stream=True))
    with pytest.raises(errors.ResponseError, match="No route POST /api/chat"):
        ollama.chat("mini", [{"role": "user", "content": "hello"}])

    assert (missing.value.status_code, pulled.value.status_code) == (404, 404)


def test_the_hubs_client_at_the_root_and_its_info(url: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    with hub.InferenceClient(model=url, token=KEY, provider="hf-inference") as client:
        texts = client.feature_extraction(TEXTS)
        info = client.get_endpoint_info()
        error = pytest.importorskip("huggingface_hub.errors").HfHubHTTPError
        with pytest.raises(error, match="empty"):
            client.feature_extraction("")

    assert_vectors(texts)
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == ("mini", 512, 2048)
