"""Tests keys and scopes, as units and over a real socket."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException

from router.auth.guards import Keyring, keyring_of
from router.auth.keys import Key, Scope
from router.config.settings import Settings
from tests.testkit.servers import Served, serve

CLIENT, ADMIN = "sk-client-hunter2", "sk-admin-hunter3"
WORLD = "0.0.0.0"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(host=WORLD, api_key=CLIENT, admin_api_key=ADMIN))


def opens(settings: Settings, secret: str | None) -> set[Scope]:
    """Return the scopes that a key has on a server with these settings."""
    found: set[Scope] = set()
    scopes: tuple[Scope, ...] = ("embed", "admin")
    for scope in scopes:
        try:
            keyring_of(settings).admit(f"Bearer {secret}" if secret else None, scope)
        except (NotAuthorizedException, PermissionDeniedException):
            continue
        found.add(scope)
    return found


@pytest.mark.parametrize(
    ("settings", "nobody", "client", "admin"),
    [
        (Settings(), {"embed", "admin"}, {"embed", "admin"}, {"embed", "admin"}),
        (Settings(host=WORLD, allow_anonymous=True), {"embed", "admin"}, {"embed", "admin"}, {"embed", "admin"}),
        (Settings(host=WORLD), set(), set(), set()),
        (Settings(api_key=CLIENT), set(), {"embed", "admin"}, set()),
        (Settings(host=WORLD, api_key=CLIENT, allow_anonymous=True), set(), {"embed", "admin"}, set()),
        (Settings(api_key=CLIENT, admin_api_key=ADMIN), set(), {"embed"}, {"admin"}),
        (Settings(admin_api_key=ADMIN), {"embed"}, {"embed"}, {"embed", "admin"}),
        (Settings(host=WORLD, admin_api_key=ADMIN), set(), set(), {"embed", "admin"}),
    ],
    ids=["open", "open to the world", "closed", "one key", "one key counts", "two keys", "admin key", "only admin key"],
)
def test_a_key_opens_its_scopes(settings: Settings, nobody: set[Scope], client: set[Scope], admin: set[Scope]) -> None:
    assert opens(settings, None) == nobody
    assert opens(settings, CLIENT) == client
    assert opens(settings, ADMIN) == admin
    assert opens(settings, "wrong") == nobody


@pytest.mark.parametrize(
    ("header", "is_admitted"),
    [
        (f"Bearer {CLIENT}", True),
        (f"bearer {CLIENT}", True),
        (f"BEARER  {CLIENT} ", True),
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        (CLIENT, False),
        (f"Basic {CLIENT}", False),
        (f"Bearer {CLIENT[:-1]}", False),
        (f"Bearer {CLIENT}x", False),
        ("Bearer \xff\u4e2d", False),
    ],
)
def test_the_header_is_read_as_browsers_and_sdks_write_it(header: str | None, is_admitted: bool) -> None:
    keyring = Keyring([Key.of("web", CLIENT, "embed")])
    try:
        keyring.admit(header, "embed")
        was_admitted = True
    except NotAuthorizedException:
        was_admitted = False

    assert was_admitted == is_admitted


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "Missing API key: send the header 'Authorization: Bearer KEY'"),
        ("Bearer ", "Missing API key: send the header 'Authorization: Bearer KEY'"),
        (CLIENT, "Authorization without the word Bearer: send the header 'Authorization: Bearer KEY'"),
        (f"Basic {CLIENT}", "Authorization without the word Bearer: send the header 'Authorization: Bearer KEY'"),
        (f"Bearer {CLIENT}x", "Invalid API key: check the header 'Authorization: Bearer KEY'"),
    ],
)
def test_a_refusal_says_what_is_wrong_with_the_header(header: str | None, message: str) -> None:
    with pytest.raises(NotAuthorizedException) as caught:
        Keyring([Key.of("web", CLIENT, "embed")]).admit(header, "embed")

    assert caught.value.detail == message


def test_keys_are_kept_as_digests() -> None:
    assert CLIENT not in repr(Key.of("web", CLIENT, "embed"))
    assert CLIENT not in repr(vars(keyring_of(Settings(api_key=CLIENT))))


CLOSED = [
    ("POST", "/v1/embeddings", "embed"),
    ("GET", "/v1/models", "embed"),
    ("GET", "/v1/models/BAAI/bge-m3", "embed"),
    ("GET", "/v1/models/nothing", "embed"),
    ("GET", "/admin/models", "admin"),
    ("GET", "/admin/models/BAAI/bge-m3", "admin"),
    ("GET", "/admin/models/nothing", "admin"),
    ("POST", "/admin/models/BAAI/bge-m3/preload", "admin"),
    ("POST", "/admin/models/BAAI/bge-m3/evict", "admin"),
    ("GET", "/admin/memory", "admin"),
    ("GET", "/admin/events", "admin"),
    ("GET", "/admin/plan?model=mini", "admin"),
]


@pytest.mark.parametrize(("method", "path", "scope"), CLOSED)
def test_a_guarded_route_tells_nothing_without_a_key_of_its_scope(
    keyed: Served, method: str, path: str, scope: Scope
) -> None:
    nobody = keyed.client.request(method, path, content=b"{")
    wrong = keyed.client.request(method, path, headers={"authorization": "Bearer hunter0"})
    other = ADMIN if scope == "embed" else CLIENT
    misplaced = keyed.client.request(method, path, headers={"authorization": f"Bearer {other}"})

    for answer in (nobody, wrong):
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    granted = "admin" if scope == "embed" else "embed"
    assert misplaced.status_code == 403
    assert misplaced.json()["error"] == {
        "message": f"Insufficient scope: this key has {granted}, this route needs {scope}",
        "type": "permission_error",
        "param": None,
        "code": "insufficient_scope",
    }
    assert "hunter" not in nobody.text + wrong.text + misplaced.text


def test_every_route_needs_a_key_unless_the_contract_says_open(keyed: Served) -> None:
    document = keyed.client.get("/docs/openapi.json").json()
    closed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    closed -= {("GET", "/health"), ("GET", "/ready")}

    assert len(closed) >= 10
    for method, path in closed:
        assert keyed.client.request(method, path).status_code == 401


def test_the_right_key_is_admitted(keyed: Served) -> None:
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=CLIENT, max_retries=0) as client:
        answer = client.embeddings.create(model="mini", input="a")
    admin = httpx.get(f"{keyed.url}/admin/memory", headers={"authorization": f"Bearer {ADMIN}"})

    assert len(answer.data) == 1
    assert admin.status_code == 200


def test_the_openai_client_raises_its_own_errors(keyed: Served) -> None:
    for key, raised in (("wrong", openai.AuthenticationError), (ADMIN, openai.PermissionDeniedError)):
        with (
            openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client,
            pytest.raises(raised),
        ):
            client.embeddings.create(model="mini", input="a")
