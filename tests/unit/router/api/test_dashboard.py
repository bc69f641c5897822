"""Tests the files of the dashboard over HTTP; `tests/browser/` tests them in a browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.config.settings import Settings
from router.errors import TABLE
from tests.testkit.servers import Served, serve

PAGE = Path(__file__).parents[4] / "router" / "dashboard" / "page"
MAX_FIRST_PAINT_BYTES = 150_000
IMPORT = re.compile(r'^import .* from "\./([\w.]+)";$', re.MULTILINE)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(api_key="secret"))


def links(text: str) -> set[str]:
    return {link for link in re.findall(r"(?:src|href)=\"([^\"]+)\"", text) if link.startswith("/dashboard/")}


def test_the_page_is_open_and_its_data_is_not(keyed: Served) -> None:
    page = keyed.client.get("/")

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert 'data-admin="key"' in page.text
    assert keyed.client.get("/admin/models").status_code == 401


def test_the_page_gets_the_fact_that_no_key_is_needed(served: Served) -> None:
    assert 'data-admin="open"' in served.client.get("/").text


def test_all_files_of_the_page_are_here_small_and_requested_at_once(keyed: Served) -> None:
    page = keyed.client.get("/")
    wanted, fetched, num_bytes = links(page.text), set[str](), len(page.content)
    named = set(wanted)
    while wanted - fetched:
        name = min(wanted - fetched)
        answer = keyed.client.get(name, headers={"accept-encoding": "identity"})
        assert answer.status_code == 200
        fetched.add(name)
        num_bytes += len(answer.content)
        wanted |= {f"/dashboard/{module}" for module in IMPORT.findall(answer.text)}

    assert {"/dashboard/main.js", "/dashboard/page.css", "/dashboard/words.js"} <= fetched
    assert fetched == named, "a module that the page does not name is asked for one round trip later"
    assert num_bytes < MAX_FIRST_PAINT_BYTES, "even unpacked"


@pytest.mark.parametrize("path", ["/", "/dashboard/main.js"])
def test_the_browser_may_load_nothing_from_elsewhere_and_run_nothing_inline(keyed: Served, path: str) -> None:
    policy = keyed.client.get(path).headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", sorted(PAGE.glob("*.js")), ids=lambda path: path.name)
def test_no_module_makes_markup_from_text_or_names_another_origin(path: Path) -> None:
    source = path.read_text()

    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "https://"):
        assert forbidden not in source
    assert "http://" not in source.replace("http://www.w3.org/2000/svg", "")


def test_an_unchanged_file_is_not_sent_again(keyed: Served) -> None:
    first = keyed.client.get("/dashboard/main.js")
    again = keyed.client.get("/dashboard/main.js", headers={"if-none-match": first.headers["etag"]})

    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["/dashboard/words.js", "/docs/assets/swagger-ui-bundle.js"])
def test_a_file_travels_packed_where_the_browser_can_unpack_it(keyed: Served, name: str) -> None:
    plain = keyed.client.get(name, headers={"accept-encoding": "identity"})
    packed = keyed.client.get(name, headers={"accept-encoding": "br, GZIP;q=0.5"})
    refused = keyed.client.get(name, headers={"accept-encoding": "br, gzip;q=0"})

    assert packed.content == plain.content, "httpx unpacks it"
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    assert all("content-encoding" not in answer.headers for answer in (plain, refused))
    assert plain.headers["vary"] == "accept-encoding"


@pytest.mark.parametrize("known", ["{etag}", 'W/"other", {etag}'])
def test_a_tag_stands_for_both_forms_of_a_file(keyed: Served, known: str) -> None:
    etag = keyed.client.get("/docs/assets/swagger-ui.css", headers={"accept-encoding": "identity"}).headers["etag"]
    headers = {"accept-encoding": "gzip", "if-none-match": known.format(etag=etag)}

    assert keyed.client.get("/docs/assets/swagger-ui.css", headers=headers).status_code == 304


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fdocs%2Findex.html", "%2Fetc%2Fpasswd", "index.html%20for%20all"])
def test_no_other_file_can_be_had(keyed: Served, name: str) -> None:
    answer = keyed.client.get(f"/dashboard/{name}")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_both_languages_have_all_words() -> None:
    source = (PAGE / "words.js").read_text()
    english, chinese = (
        set(re.findall(r'"([a-z]+\.\w+)":', part))
        for part in source.partition("const CHOICE")[0].split("const CHINESE")
    )
    used = {key for path in PAGE.glob("*.js") for key in re.findall(r'\bt\("([a-z]+\.\w+)"', path.read_text())}

    assert english == chinese
    assert used <= english
    assert len(used) > 60


def test_every_error_code_has_chinese_words() -> None:
    source = (PAGE / "words.js").read_text().partition("const ERRORS_IN_CHINESE")[2].partition("};")[0]
    known = set(re.findall(r"\b([a-z_]+): \"", source))

    assert {row.code for row in TABLE.values()} - {"client_closed_request"} <= known  # that one is never sent
