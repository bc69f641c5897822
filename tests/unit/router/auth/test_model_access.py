"""Tests keys of `KEYS_FILE` over real sockets: their scopes and models, and that no key is ever shown."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from msgspec import structs
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from engines.errors import ModelNotFound
from router.auth.guards import Keyring, keyring_of
from router.auth.keys import ANONYMOUS, Key
from router.auth.model_access import may_use
from router.config.settings import Settings
from tests.testkit.servers import EMBED, REGISTRY, Limited, bearer, limited, secret_of, write_keys

KEYS = {
    "web": {},
    "ops": {"scopes": ["admin"]},
    "all": {"scopes": ["embed", "admin"]},
    "baai": {"models": ["BAAI/*"]},
    "alias": {"models": ["text-embedding-*"]},
    "mini": {"models": ["mini"], "scopes": ["embed", "admin"]},
    "none": {"models": ["other/*"]},
}
ALL_MODELS = ["mini", "BAAI/bge-m3", "cold"]


@pytest.fixture(scope="module")
def module_keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    path = write_keys(tmp_path_factory.mktemp("keys") / "keys.yaml", KEYS)
    with limited(Settings(keys_file=path, admin_api_key=secret_of("env"))) as server:
        yield server


@pytest.fixture
def keyed(module_keyed: Limited) -> Limited:
    module_keyed.backend.failures.clear()
    return module_keyed


@pytest.mark.parametrize(
    ("key_id", "embed", "admin", "code"),
    [
        ("web", 200, 403, "insufficient_scope"),
        ("ops", 403, 200, "insufficient_scope"),
        ("all", 200, 200, None),
        ("mini", 200, 200, None),
        ("env", 200, 200, None),
        ("stranger", 401, 401, "invalid_api_key"),
        (None, 401, 401, "invalid_api_key"),
    ],
)
def test_a_key_opens_its_scopes(keyed: Limited, key_id: str | None, embed: int, admin: int, code: str | None) -> None:
    headers = bearer(key_id) if key_id else {}
    answers = [
        keyed.client.post(EMBED, json={"input": "a"}, headers=headers),
        keyed.client.get("/v1/models", headers=headers),
        keyed.client.get("/admin/memory", headers=headers),
        keyed.client.get("/admin/models/cold", headers=headers),
    ]
    refused = {answer.json()["error"]["code"] for answer in answers if answer.status_code != 200}

    assert [answer.status_code for answer in answers] == [embed, embed, admin, admin]
    assert refused == ({code} if code else set())


@pytest.mark.parametrize(
    ("key_id", "allowed"),
    [
        ("web", ALL_MODELS),
        ("env", ALL_MODELS),
        ("baai", ["BAAI/bge-m3"]),
        ("alias", ["mini"]),
        ("mini", ["mini"]),
        ("none", []),
    ],
)
def test_a_key_lists_and_uses_its_models_only(keyed: Limited, key_id: str, allowed: list[str]) -> None:
    headers = bearer(key_id)
    listed = keyed.client.get("/v1/models", headers=headers).json()["data"]
    tags = keyed.client.get("/api/tags", headers=headers).json()["models"]
    running = keyed.client.get("/api/ps", headers=headers).json()["models"]

    assert [model["id"] for model in listed] == allowed
    assert {model["name"].removesuffix(":latest") for model in tags} == set(allowed)
    assert {model["name"].removesuffix(":latest") for model in running} <= set(allowed)
    for model in ALL_MODELS:
        embed = keyed.embed(key_id, model=model)
        retrieve = keyed.client.get(f"/v1/models/{model}", headers=headers)
        in_path = keyed.client.post(f"/m/{model}/v1/embeddings", json={"input": "a"}, headers=headers)
        statuses = [embed.status_code, retrieve.status_code, in_path.status_code]
        assert statuses == ([200] * 3 if model in allowed else [403] * 3)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBED, {"input": "a", "model": "org/deep/alias"}),
        (EMBED, {"input": "a", "model": "BAAI/bge-m3"}),
        ("/embeddings", {"input": "a", "model": "BAAI/bge-m3"}),
        ("/v1/embed", {"texts": ["a"], "model": "BAAI/bge-m3"}),
        ("/v2/embed", {"texts": ["a"], "model": "BAAI/bge-m3", "input_type": "search_query"}),
        ("/tokenize", {"inputs": "a", "model": "BAAI/bge-m3"}),
        ("/api/embed", {"input": "a", "model": "BAAI/bge-m3"}),
        ("/api/embed", {"input": "", "model": "BAAI/bge-m3"}),
        ("/api/embeddings", {"prompt": "a", "model": "BAAI/bge-m3"}),
        ("/api/embeddings", {"prompt": "", "model": "BAAI/bge-m3"}),
        ("/api/show", {"model": "BAAI/bge-m3"}),
        ("/openai/deployments/BAAI/bge-m3/embeddings", {"input": "a"}),
        ("/m/BAAI/bge-m3/v1/embeddings", {"input": "a"}),
    ],
)
def test_a_model_that_is_not_allowed_is_refused_on_every_route(keyed: Limited, path: str, body: object) -> None:
    calls = len(keyed.backend.calls)
    answer = keyed.client.post(path, json=body, headers=bearer("alias"))

    assert answer.status_code == 403
    if path.startswith("/api/"):
        assert "may not use the model" in answer.json()["error"]
    else:
        assert answer.json()["error"]["code"] == "model_not_allowed"
        assert answer.json()["error"]["type"] == "permission_error"
        assert "may not use the model" in answer.json()["error"]["message"]
    assert len(keyed.backend.calls) == calls
    assert keyed.backend.tokenize_calls == []


def test_a_default_model_that_is_not_allowed_is_refused_too(keyed: Limited) -> None:
    default = keyed.embed("baai")
    info = keyed.client.get("/info", headers=bearer("baai"))
    tei = keyed.client.post("/embed", json={"inputs": "a"}, headers=bearer("baai"))

    assert [answer.status_code for answer in (default, info, tei)] == [403, 403, 403]
    assert "'mini'" in default.json()["error"]["message"]


def test_an_alias_or_its_target_may_be_allowed(keyed: Limited) -> None:
    assert keyed.embed("alias", model="mini").status_code == 200
    assert keyed.embed("mini", model="text-embedding-3-small").status_code == 200
    assert keyed.embed("baai", model="org/deep/alias").status_code == 200


def test_unknown_names_suggest_only_what_the_key_may_use(keyed: Limited) -> None:
    everything = keyed.embed("web", model="BAAI/bge-m4").json()["error"]
    nothing = keyed.embed("mini", model="BAAI/bge-m4").json()["error"]
    own = keyed.embed("mini", model="mimi").json()["error"]

    assert "BAAI/bge-m3" in everything["message"]
    assert "BAAI/bge-m3" not in nothing["message"]
    assert "did you mean mini" in own["message"]
    assert {error["code"] for error in (everything, nothing, own)} == {"model_not_found"}


def test_operators_manage_models_that_their_key_may_not_embed_with(keyed: Limited) -> None:
    headers = bearer("mini")
    preload = keyed.client.post("/admin/models/BAAI/bge-m3/preload", headers=headers)
    plan = keyed.client.get("/admin/plan?model=cold", headers=headers)

    assert (preload.status_code, plan.status_code) == (200, 200)


def test_the_openai_client_sees_its_own_errors(keyed: Limited) -> None:
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=secret_of("baai"), max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        client.embeddings.create(model="mini", input="a")

    assert caught.value.code == "model_not_allowed"


@pytest.mark.parametrize("open_to_all", [False, True])
def test_a_keys_file_closes_everything_even_without_keys(tmp_path: Path, open_to_all: bool) -> None:
    path = write_keys(tmp_path / "keys.yaml", {})
    with limited(Settings(keys_file=path, allow_anonymous=open_to_all)) as server:
        answers = [server.embed(), server.client.get("/admin/memory"), server.client.get("/health")]

    assert [answer.status_code for answer in answers] == [401, 401, 200]


@pytest.mark.parametrize(
    ("settings", "client", "admin"),
    [
        (Settings(keys_file=Path("k")), set(), set()),
        (Settings(keys_file=Path("k"), api_key="c"), {"embed", "admin"}, set()),
        (Settings(keys_file=Path("k"), api_key="c", admin_api_key="a"), {"embed"}, {"admin"}),
        (Settings(keys_file=Path("k"), admin_api_key="a"), set(), {"embed", "admin"}),
    ],
)
def test_keys_of_the_environment_stay_beside_a_file(settings: Settings, client: set[str], admin: set[str]) -> None:
    keyring = keyring_of(settings, [Key.of("web", "w", "embed")])
    found = {key.id: set(key.scopes) for key in keyring.keys}

    assert found == {"web": {"embed"}} | {
        name: scopes for name, scopes in (("API_KEY", client), ("ADMIN_API_KEY", admin)) if scopes
    }


def test_where_no_key_is_needed_a_known_one_is_still_known() -> None:
    keyring = Keyring([Key.of("web", "w", "embed")], ["embed"])

    assert keyring.admit("Bearer w", "embed").id == "web"
    assert keyring.admit("Bearer wrong", "embed") is ANONYMOUS
    assert keyring.admit(None, "embed") is ANONYMOUS


def test_every_key_is_compared_whatever_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return known == given

    monkeypatch.setattr("router.auth.guards.hmac.compare_digest", compare)
    keys = [Key.of(f"k{index}", f"s{index}", "embed") for index in range(5)]
    found = Keyring(keys).admit("Bearer s1", "embed")

    assert found.id == "k1"
    assert compared == [key.digest for key in keys]


def test_a_model_is_allowed_by_any_of_its_names() -> None:
    def key(*patterns: str) -> Key:
        return Key(id="k", digest=b"d", scopes=frozenset(), models=patterns)

    assert may_use(key("org/deep/*"), REGISTRY, "BAAI/bge-m3")
    assert not may_use(key("org/deep/*"), REGISTRY, "mini")
    assert may_use(ANONYMOUS, REGISTRY, "cold")
    with pytest.raises(ModelNotFound) as caught:
        REGISTRY.resolve("minj", lambda model_id: model_id != "mini")
    assert "did you mean" not in str(caught.value)


# ---- what one key does to another ----

EVICT_NOW = {"input": "a", "keep_alive": 0}


def test_calls_name_their_key_if_several_keys_embed(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.yaml", {"web": {}, "lab": {}})
    with limited(Settings(keys_file=path)) as server:
        for key_id in ("web", "lab"):
            server.embed(key_id)
            server.client.post("/api/embed", json={"input": "a", "model": "mini"}, headers=bearer(key_id))

        assert [call.caller for call in server.backend.calls] == ["web", "web", "lab", "lab"]


@pytest.mark.parametrize(
    ("settings", "key_id"),
    [(Settings(), None), (Settings(api_key=secret_of("env"), admin_api_key=secret_of("ops")), "env")],
)
def test_the_only_caller_is_not_named_and_may_set_keep_alive(settings: Settings, key_id: str | None) -> None:
    with limited(settings) as server:
        assert server.embed(key_id, keep_alive=0).status_code == 200
        assert [(call.caller, call.keep_alive_s) for call in server.backend.calls] == [("", 0.0)]


@pytest.mark.parametrize("path", [EMBED, "/m/mini/v1/embeddings", "/api/embed"])
def test_one_of_several_keys_may_not_set_keep_alive(tmp_path: Path, path: str) -> None:
    keys: dict[str, dict[str, object]] = {
        "web": {}, "ops": {"scopes": ["embed", "admin"]}, "lab": {"keep_alive": True},
    }  # fmt: skip
    keys_file = write_keys(tmp_path / "keys.yaml", keys)
    with limited(Settings(keys_file=keys_file)) as server:
        body = {**EVICT_NOW, "model": "mini"}
        refused = server.client.post(path, json=body, headers=bearer("web"))
        allowed = [server.client.post(path, json=body, headers=bearer(key_id)) for key_id in ("ops", "lab")]
        without = server.client.post(path, json={"input": "a", "model": "mini"}, headers=bearer("web"))

    assert refused.status_code == 403
    error = refused.json()["error"]
    if path == "/api/embed":
        error = {"code": "insufficient_scope", "message": error}
    assert error["code"] == "insufficient_scope"
    assert "may not set keep_alive" in error["message"]
    assert [answer.status_code for answer in (*allowed, without)] == [200, 200, 200]
    assert [call.keep_alive_s for call in server.backend.calls] == [0.0, 0.0, None]


@pytest.mark.parametrize(
    ("keyring", "key", "may"),
    [
        (Keyring([], ["embed", "admin"]), ANONYMOUS, True),
        (Keyring([Key.of("ADMIN_API_KEY", "s", "embed", "admin")], ["embed"]), ANONYMOUS, False),
        (Keyring([Key.of("a", "s", "embed")]), Key.of("a", "s", "embed"), True),
        (Keyring([Key.of("a", "s", "embed"), Key.of("b", "t", "admin")]), Key.of("a", "s", "embed"), True),
        (Keyring([Key.of("a", "s", "embed"), Key.of("b", "t", "embed")]), Key.of("a", "s", "embed"), False),
        (Keyring([]), structs.replace(Key.of("a", "s", "embed"), keep_alive=False), False),
        (Keyring([], ["embed"]), structs.replace(ANONYMOUS, keep_alive=True), True),
    ],
)
def test_which_keys_may_set_keep_alive(keyring: Keyring, key: Key, may: bool) -> None:
    assert keyring.may_keep_alive(key) is may


def test_no_key_ever_shows(keyed: Limited) -> None:
    """Neither logs, answers, reprs nor metrics show a key; the log shows its id."""
    texts: list[str] = []
    with capture_logs(processors=[merge_contextvars]) as lines:
        for name in (*KEYS, "env", "stranger"):
            for body in ({"input": "a"}, {"input": [], "model": secret_of(name)}, {"input": "a", "model": "cold"}):
                answer = keyed.client.post(EMBED, json=body, headers=bearer(name))
                texts.append(answer.headers.get("x-request-id", "") + str(dict(answer.headers)))
                if body.get("model") != secret_of(name):  # an error quotes the model name of the request
                    texts.append(answer.text)
        keyed.backend.failures["mini"] = RuntimeError(f"with {secret_of('web')}")
        texts.append(keyed.embed("web").text)
        texts.append(keyed.client.get("/metrics", headers=bearer("ops")).text)
    server_state, limiter = keyed.app.state.server_state, keyed.app.state.limiter
    texts += [
        repr(thing)
        for thing in (server_state.keyring, vars(server_state.keyring), server_state.settings, limiter, vars(limiter))
    ]
    crashes = [line.pop("exc_info") for line in lines if line["event"] == "request.crashed"]
    texts.append(json.dumps(lines, default=str))

    assert len(crashes) == 1
    assert "hunter" not in "".join(texts)
    named = {line["key"] for line in lines if line["event"] == "request.done" and "key" in line}
    assert named == {*KEYS, "ADMIN_API_KEY"} - {"ops"}  # it lacks the scopes of these routes


def test_a_refusals_line_has_what_the_caller_was_told_and_an_unknown_routes_line_its_path(keyed: Limited) -> None:
    ids = [f"refusal-{number}" for number in range(6)]  # servers of other tests may still write lines
    tagged = iter({"x-request-id": name} for name in ids)
    with capture_logs(processors=[merge_contextvars]) as lines:
        for model in ("mni", "a text of mine", secret_of("web")):
            keyed.client.post(EMBED, json={"input": "a", "model": model}, headers=bearer("web") | next(tagged))
        keyed.client.post(EMBED, json={"input": "a", "dimensions": "x"}, headers=bearer("web") | next(tagged))
        keyed.client.post(EMBED, json={"input": "a"}, headers=next(tagged))
        keyed.client.get("/v2/" + "x" * 1000, headers=bearer("env") | next(tagged))
        keyed.client.get("/health")  # a line is written behind its answer, and before the next request is read
    done = {line.get("request_id"): line for line in lines if line["event"] == "request.done"}
    refused = [done[name] for name in ids]
    named, text, key, invalid, stranger, lost = refused

    assert (named["status"], named["code"]) == (404, "model_not_found")
    assert "'mni' not found" in named["message"]
    assert "'…' not found" in text["message"]
    assert "'…' not found" in key["message"]
    assert (invalid["code"], invalid["param"]) == ("invalid_value", "dimensions")
    assert stranger["message"] == "Missing API key: send the header 'Authorization: Bearer KEY'"
    assert (lost["path"], lost["route"]) == ("/v2/" + "x" * 196, "")
    assert "path" not in named
    assert len(lost["message"]) <= 300
