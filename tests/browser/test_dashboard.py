"""What an operator sees and does on the page, in Chromium, against a real server."""

import json
import re
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from tests.browser.axe import serious_issues
from tests.browser.page import Page, open_chromium
from tests.browser.server import KEY, YardProcess

LARGE, SMALL = "Qwen/Qwen3-Embedding-4B", "m3e-base"
DOWNLOADED, BROKEN = "gte-multilingual-base", "jina-embeddings-v3"


def test_a_wrong_key_is_refused_in_the_servers_words(page: Page) -> None:
    page.open()
    page.sign_in("wrong")
    page.wait(lambda: "not known here" in page.text(".door .error"))
    stored = page.driver.execute_script("return [sessionStorage.length, localStorage.length]")

    assert page.text(".model") == ""
    assert stored == [0, 0]
    assert all("401" in message for message in page.take_log())


def test_the_key_is_kept_for_the_session_and_forgotten_at_its_end(yard: Page) -> None:
    yard.driver.refresh()
    yard.find(".model[data-model]")
    kept = yard.driver.execute_script("return [Object.values(sessionStorage), Object.values(localStorage)]")
    yard.find("#tools button:last-child").click()
    yard.find("#key")

    assert kept == [[KEY], []]
    assert yard.driver.execute_script("return sessionStorage.length") == 0


def test_a_cold_model_is_downloaded_loaded_and_evicted_from_a_phone(yard: Page) -> None:
    yard.emulate(360)
    assert yard.state(DOWNLOADED) == "absent"
    assert "not on disk" in yard.text(f'[data-model="{DOWNLOADED}"] .state')
    plan = yard.ask("preload", DOWNLOADED)
    yard.record_states(DOWNLOADED)
    yard.confirm()
    yard.wait_for_state(DOWNLOADED, "ready")
    seen = yard.recorded()
    yard.wait(lambda: DOWNLOADED in yard.text(".order"))
    memory = yard.text(f'[data-model="{DOWNLOADED}"] .memory')
    farewell = yard.ask("evict", DOWNLOADED)
    yard.confirm()
    yard.wait_for_state(DOWNLOADED, "cold")
    yard.wait(lambda: f"{DOWNLOADED} was evicted by an operator: 610 MB" in yard.text(".feed"))
    yard.wait(lambda: DOWNLOADED not in yard.text(".order"))

    assert "Its files are downloaded first." in plan
    assert list(dict.fromkeys(state for state, _, _ in seen))[-1] == "ready"
    assert {"fetching", "loading"} <= {state for state, _, _ in seen}
    assert any(re.search(r"\d+ MB of 610 MB", words) for state, words, _ in seen if state == "fetching")
    assert any(re.search(r"\d s so far", words) for state, words, _ in seen if state == "loading")
    assert max(out for _, _, out in seen) <= 0
    assert "610 MB" in memory
    assert "frees 610 MB on cuda:0" in farewell


def test_cancelling_a_plan_does_nothing(yard: Page) -> None:
    yard.ask("preload", SMALL)
    yard.find("dialog.plan button").click()
    yard.wait(lambda: not yard.text("dialog.plan"))

    slot = httpx.get(f"{yard.url}/admin/models/{SMALL}", headers={"authorization": f"Bearer {KEY}"}).json()
    assert (slot["state"], slot["loads"]) == ("cold", 0)


def test_who_would_leave_is_shown_before_it_happens_and_told_afterwards(yard: Page) -> None:
    for model_id in (SMALL, "bge-m3"):
        yard.do("preload", model_id)
        yard.wait_for_state(model_id, "ready")
    yard.wait(lambda: "leaves next" in yard.text(".order"))
    plan = yard.ask("preload", LARGE)
    marked = yard.text(".order li:has(.swatch.leaving)")
    yard.confirm()
    yard.wait_for_state(LARGE, "ready")
    yard.wait(lambda: f"bge-m3 left to make room for {LARGE}: 2.3 GB, " in yard.text(".feed"))
    yard.wait(lambda: "bge-m3" not in yard.text(".order"))
    blocks = yard.driver.execute_script(
        "return [...document.querySelectorAll('.device:last-child .block')].map((b) => [b.title, b.offsetWidth])"
    )
    bar_width = yard.driver.execute_script("return document.querySelector('.device:last-child .bar').offsetWidth")
    yard.do("evict", LARGE)
    yard.wait_for_state(LARGE, "cold")

    assert "It needs 9.0 GB on cuda:0" in plan
    assert "bge-m3 · 2.3 GB" in plan
    assert "bge-m3" in marked
    assert "would leave" in marked
    widths = dict(blocks)
    assert widths[f"{LARGE}: 8.0 GB"] / bar_width == pytest.approx(0.804, abs=0.01)
    assert widths["workspace: 1.0 GB"] / bar_width == pytest.approx(0.1, abs=0.01)


def test_a_pinned_model_says_so_and_loses_its_pin_only_when_evicted(yard: Page) -> None:
    yard.do("pin", SMALL)
    yard.wait(lambda: "pinned" in yard.text(f'[data-model="{SMALL}"] .states'))
    yard.wait_for_state(SMALL, "ready")
    plan = yard.ask("evict", SMALL)
    yard.confirm()
    yard.wait_for_state(SMALL, "cold")

    assert "takes the pin away" in plan
    yard.wait(lambda: "pinned" not in yard.text(f'[data-model="{SMALL}"] .states'))


def test_the_playgrounds_numbers_are_the_apis(yard: Page) -> None:
    texts = ["The cat sits outside", "Un café, s'il vous plaît <b>& merci</b>", "猫坐在外面"]
    yard.driver.execute_script(
        "const box = document.querySelector('#play-texts'); box.value = arguments[0]; "
        "box.dispatchEvent(new Event('input', {bubbles: true}))",
        "\n".join(texts),
    )
    yard.find("#play-dimensions").send_keys("64")
    yard.find("#play-run").click()
    yard.find(".vectors summary")
    for summary in yard.driver.find_elements("css selector", ".vectors summary"):
        summary.click()
    yard.wait(lambda: yard.text(".vectors pre").count("]") == len(texts))
    shown = [json.loads(line) for line in yard.text(".vectors pre").splitlines()]
    cells = [float(cell) for cell in yard.text(".heat .warmth").split()]
    body = {"model": "all-MiniLM-L6-v2", "input": texts, "dimensions": 64}
    answer = httpx.post(f"{yard.url}/v1/embeddings", json=body, headers={"authorization": f"Bearer {KEY}"}).json()
    expected = [item["embedding"] for item in answer["data"]]

    assert np.allclose(shown, expected, rtol=0, atol=1e-6), "to rounding: another call may be cut into other batches"
    for i, left in enumerate(expected):
        for j, right in enumerate(expected):
            dot = sum(a * b for a, b in zip(left, right, strict=True))
            assert cells[i * len(texts) + j] == pytest.approx(dot, abs=0.0051)
    assert f"3 vectors of 64, {answer['usage']['prompt_tokens']} tokens" in yard.text(".result")
    assert re.search(r"forward\s+[\d.]+ ms", yard.text(".timing-list"))
    assert '"dimensions":64' in yard.text("#code")
    assert KEY not in yard.text("#code")


def test_the_same_call_can_be_copied_in_three_languages_and_is_kept_by_arrow_keys(yard: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    yard.find("#tab-curl").click()
    seen = [yard.text("#code")]
    for _ in range(2):
        yard.press(Keys.ARROW_RIGHT)
        seen.append(yard.text("#code"))

    assert [code.split()[0] for code in seen] == ["curl", "import", "const"]
    assert yard.focused() == "JavaScript"
    assert all("all-MiniLM-L6-v2" in code and f"{yard.url}/v1" in code for code in seen)
    assert not any(KEY in code for code in seen)
    compile(seen[1], "snippet.py", "exec")


def test_a_refusal_in_the_playground_is_the_servers(yard: Page) -> None:
    yard.driver.execute_script("document.querySelector('#play-dimensions').removeAttribute('max')")
    yard.find("#play-dimensions").send_keys("5000")
    yard.find("#play-run").click()
    yard.wait(lambda: "384" in yard.text(".play .error"))

    assert all("400" in message for message in yard.take_log())


def test_the_last_minute_is_told_at_once_and_as_the_api_tells_it(yard: Page) -> None:
    texts = ["The cat sits outside"] * 3
    post = {"model": "all-MiniLM-L6-v2", "input": texts}
    headers = {"authorization": f"Bearer {KEY}"}
    httpx.post(f"{yard.url}/v1/embeddings", json=post, headers=headers).raise_for_status()
    yard.driver.refresh()
    shown = yard.wait(lambda: re.search(r"([\d.]+) texts/s", yard.text('[data-model="all-MiniLM-L6-v2"] .traffic')))
    (minute,) = httpx.get(f"{yard.url}/admin/traffic", headers=headers).json()["data"]

    assert shown is not None
    assert float(shown[1]) == pytest.approx(minute["texts_per_s"], rel=0.5)
    assert re.search(r"p50 .+ · p95 .+", yard.text('[data-model="all-MiniLM-L6-v2"] .traffic'))
    assert yard.find('[data-model="all-MiniLM-L6-v2"] .spark').get_attribute("aria-label")


def test_everything_can_be_done_by_keyboard(yard: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    button = f'li[data-model="{SMALL}"] [data-do=preload]'
    yard.wait(lambda: yard.find(button).is_enabled())
    yard.driver.execute_script("document.querySelector(arguments[0]).focus()", button)
    yard.press(Keys.ENTER)
    yard.find("dialog.plan")
    first = yard.focused()
    yard.press(Keys.ESCAPE)
    yard.wait(lambda: not yard.text("dialog.plan"))
    back = yard.focused()
    yard.press(Keys.ENTER)
    yard.find("dialog.plan")
    yard.press(Keys.ENTER)
    yard.wait_for_state(SMALL, "ready")
    yard.do("evict", SMALL)
    yard.wait_for_state(SMALL, "cold")

    assert (first, back) == ("Preload", f"Preload {SMALL}")


def test_a_change_of_language_keeps_what_was_written_and_where_the_focus_was(yard: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    yard.find("#play-texts").clear()
    yard.find("#play-texts").send_keys("mine")
    yard.driver.execute_script("document.querySelector('#tools [lang]').focus()")
    yard.press(Keys.ENTER)
    yard.wait(lambda: "模型" in yard.text("#models-title"))

    assert yard.focused() == "English"
    assert yard.find("#play-texts").get_attribute("value") == "mine"


def test_the_page_speaks_chinese_and_remembers_it(yard: Page) -> None:
    yard.find("#tools button").click()
    yard.wait(lambda: "模型" in yard.text("#models-title"))
    yard.driver.refresh()
    yard.wait(lambda: "模型" in yard.text("#models-title"))

    assert yard.driver.execute_script("return document.documentElement.lang") == "zh-CN"
    assert "预载" in yard.text(".actions")


@pytest.mark.parametrize(("width", "dark"), [(360, False), (768, True), (1280, True), (1920, False)])
def test_every_screen_shows_it_whole_and_axe_finds_nothing_serious(
    yard: Page, axe: str, width: int, *, dark: bool
) -> None:
    yard.emulate(width, dark=dark)
    yard.find("#play-run").click()
    yard.find(".heat")
    overflow = yard.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")

    assert overflow <= 0
    assert serious_issues(yard, axe) == []


def test_the_door_and_the_plan_have_no_serious_issue(page: Page, yard: Page, axe: str) -> None:
    yard.ask("preload", SMALL)
    plan = serious_issues(yard, axe)
    page.open()
    page.find("#key")

    assert plan == []
    assert serious_issues(page, axe) == []


def test_the_first_paint_needs_less_than_150_kb(page: Page, yard: Page) -> None:
    page.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    page.received_bytes()
    page.driver.refresh()
    page.find(".model[data-model]")
    received = page.received_bytes()

    assert 10_000 < received < 150_000
    print(f"first paint: {received:,} bytes")  # noqa: T201 - for the README; shown by -rP


def test_the_documentation_wears_the_same_dress_and_knows_who_signed_in(yard: Page) -> None:
    yard.find("#nav a:last-child").click()
    yard.find(".opblock-tag")

    assert yard.text(".top .brand") == "Embedyard"
    yard.find(".authorize.locked")


@pytest.fixture(scope="module")
def quick_yard() -> Iterator[YardProcess]:
    """Two fake GPUs and no key: it starts in a second."""
    yard = YardProcess("--gpus", "2", "--load", "0.2")
    yard.start()
    yield yard
    yard.stop()


@pytest.fixture(scope="module")
def open_page(quick_yard: YardProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    driver = open_chromium(tmp_path_factory.mktemp("open"))
    page = Page(driver, quick_yard.url)
    page.emulate(1280)
    page.open()
    yield page
    assert page.take_log() == []
    driver.quit()


def test_several_devices_stand_side_by_side_each_with_its_own(open_page: Page) -> None:
    for model_id in ("bge-m3", LARGE):  # together too large for one
        open_page.do("preload", model_id)
        open_page.wait_for_state(model_id, "ready")
    open_page.wait(lambda: open_page.text(".order").count("leaves next") == 2)
    cards = [card.text.splitlines()[0] for card in open_page.driver.find_elements("css selector", ".device h3")]
    homes = [open_page.text(f'[data-model="{model_id}"] .states') for model_id in ("bge-m3", LARGE)]
    plan = open_page.ask("evict", LARGE)
    open_page.confirm()
    open_page.wait_for_state(LARGE, "cold")

    assert cards == ["cuda:0", "cuda:1"]
    assert {home.rpartition("on ")[2] for home in homes} == {"cuda:0", "cuda:1"}
    assert f"frees 8.0 GB on {homes[1].rpartition('on ')[2]}" in plan


def test_a_failure_is_told_with_its_cure_even_where_another_device_has_not_tried(open_page: Page, axe: str) -> None:
    open_page.do("preload", BROKEN)
    open_page.wait_for_state(BROKEN, "failed")
    open_page.wait(lambda: f"{BROKEN} failed: config.json names code" in open_page.text(".feed"))

    told = open_page.wait(lambda: open_page.text(f'[data-model="{BROKEN}"] .error'))
    assert told.startswith("config.json names code")
    assert "set `trust_remote_code: true`" in told
    assert re.search(r"next try in \d+ s; Preload tries at once", told)
    assert open_page.find(f'[data-model="{BROKEN}"] [data-do=preload]').is_enabled()
    for dark in (False, True):
        open_page.emulate(1280, dark=dark)
        assert serious_issues(open_page, axe) == []


def test_an_open_server_asks_for_no_key_and_its_page_survives_a_restart(
    quick_yard: YardProcess, open_page: Page
) -> None:
    page = open_page
    page.do("preload", SMALL)
    page.wait_for_state(SMALL, "ready")
    log = page.take_log()
    quick_yard.stop()
    page.wait(lambda: "No connection" in page.text(".live"))
    quick_yard.start()
    page.wait(lambda: page.text(".live") == "Live")
    page.wait_for_state(SMALL, "cold")
    page.do("preload", "bge-m3")
    page.wait_for_state("bge-m3", "ready")
    page.take_log()  # that the server was not there is no fault of the page

    assert log == []
    assert "Connected again" in page.text(".feed")
    assert "bge-m3 is ready" in page.text(".feed")
