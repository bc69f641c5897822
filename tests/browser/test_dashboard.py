"""Tests operators' views and actions on the page, in Chromium, against a real server."""

import json
import re
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from benchmarks.lib.browser import open_chromium
from tests.browser.axe import serious_issues
from tests.browser.page import Page
from tests.browser.server import KEY, ServerProcess

pytestmark = pytest.mark.slow

LARGE, SMALL = "Qwen/Qwen3-Embedding-4B", "m3e-base"
RERANKER, CLASSIFIER = "bge-reranker-v2-m3", "roberta-sentiment"
MANY_OUTPUTS = "bge-m3"
DOWNLOADED, BROKEN = "gte-multilingual-base", "jina-embeddings-v3"


def test_a_wrong_key_is_said_to_be_wrong(page: Page) -> None:
    page.open()
    page.sign_in("wrong")
    page.wait(lambda: "Wrong key" in page.text(".signin .error"))
    stored = page.driver.execute_script("return [sessionStorage.length, localStorage.length]")

    assert page.text(".model") == ""
    assert stored == [0, 0]
    assert all("401" in message for message in page.take_log())


def test_the_key_is_kept_for_the_session_and_forgotten_at_its_end(dashboard: Page) -> None:
    dashboard.driver.refresh()
    dashboard.find(".model[data-model]")
    kept = dashboard.driver.execute_script("return [Object.values(sessionStorage), Object.values(localStorage)]")
    dashboard.find("#tools button:last-child").click()
    dashboard.find("#key")

    assert kept == [[KEY], []]
    assert dashboard.driver.execute_script("return sessionStorage.length") == 0


def test_a_cold_model_is_downloaded_loaded_and_evicted_from_a_phone(dashboard: Page) -> None:
    dashboard.emulate(360)
    assert dashboard.state(DOWNLOADED) == "absent"
    folded = dashboard.text("details.absent")
    dashboard.unfold()
    assert "not on disk" in dashboard.text(f'[data-model="{DOWNLOADED}"] .state')
    plan = dashboard.open_plan("preload", DOWNLOADED)
    dashboard.record_states(DOWNLOADED)
    dashboard.confirm()
    dashboard.wait_for_state(DOWNLOADED, "ready")
    seen = dashboard.recorded()
    dashboard.wait(lambda: DOWNLOADED in dashboard.text(".order"))
    memory = dashboard.text(f'[data-model="{DOWNLOADED}"] .memory')
    evict_plan = dashboard.open_plan("evict", DOWNLOADED)
    dashboard.confirm()
    dashboard.wait_for_state(DOWNLOADED, "cold")
    dashboard.wait(lambda: f"{DOWNLOADED} was evicted by an operator: 610 MiB" in dashboard.text(".feed"))
    dashboard.wait(lambda: DOWNLOADED not in dashboard.text(".order"))

    assert folded.split() == ["3", "not", "on", "disk", f"{DOWNLOADED},", "Qwen3-Embedding-8B,", "embeddinggemma-300m"]
    assert "Its files are downloaded first." in plan
    assert list(dict.fromkeys(state for state, _, _ in seen))[-1] == "ready"
    assert {"fetching", "loading"} <= {state for state, _, _ in seen}
    assert any(re.search(r"\d+ MiB of 610 MiB", words) for state, words, _ in seen if state == "fetching")
    assert any(re.search(r"\d s so far", words) for state, words, _ in seen if state == "loading")
    assert max(out for _, _, out in seen) <= 0
    assert "610 MiB" in memory
    assert "Frees 610 MiB on cuda:0" in evict_plan


def test_cancelling_a_plan_does_nothing(dashboard: Page) -> None:
    dashboard.open_plan("preload", SMALL)
    dashboard.find("dialog.plan button").click()
    dashboard.wait(lambda: not dashboard.text("dialog.plan"))

    slot = httpx.get(f"{dashboard.url}/admin/models/{SMALL}", headers={"authorization": f"Bearer {KEY}"}).json()
    assert (slot["state"], slot["loads"]) == ("cold", 0)


def test_evictions_are_shown_before_a_load_and_reported_afterwards(dashboard: Page) -> None:
    for model_id in (SMALL, "bge-m3"):
        dashboard.do("preload", model_id)
        dashboard.wait_for_state(model_id, "ready")
    dashboard.wait(lambda: "bge-m3" in dashboard.text(".order"))
    without_pressure = dashboard.text(".order")
    plan = dashboard.open_plan("preload", LARGE)
    marked = dashboard.text(".order li:has(.swatch.leaving)")
    dashboard.confirm()
    dashboard.wait_for_state(LARGE, "ready")
    dashboard.wait(lambda: f"bge-m3 was evicted to make room for {LARGE}: 2.2 GiB, " in dashboard.text(".feed"))
    dashboard.wait(lambda: "bge-m3" not in dashboard.text(".order"))
    dashboard.wait(lambda: dashboard.text(".order li:has(.next) .name") == SMALL)
    blocks = dashboard.driver.execute_script(
        "return [...document.querySelectorAll('.device:last-child .block')].map((b) => [b.title, b.offsetWidth])"
    )
    bar_width = dashboard.driver.execute_script("return document.querySelector('.device:last-child .bar').offsetWidth")
    dashboard.do("evict", LARGE)
    dashboard.wait_for_state(LARGE, "cold")

    assert "next to evict" not in without_pressure
    assert "Needs 8.9 GiB on cuda:0" in plan
    assert "bge-m3 · 2.2 GiB" in plan
    assert "bge-m3" in marked
    assert "would be evicted" in marked
    widths = dict(blocks)
    assert widths[f"{LARGE}: 7.9 GiB"] / bar_width == pytest.approx(0.785, abs=0.01)
    assert widths["workspace: 1.0 GiB"] / bar_width == pytest.approx(0.1, abs=0.01)


def test_a_pinned_model_says_so_and_loses_its_pin_only_when_evicted(dashboard: Page) -> None:
    dashboard.do("pin", SMALL)
    dashboard.wait(lambda: "pinned" in dashboard.text(f'[data-model="{SMALL}"] .states'))
    dashboard.wait_for_state(SMALL, "ready")
    plan = dashboard.open_plan("evict", SMALL)
    dashboard.confirm()
    dashboard.wait_for_state(SMALL, "cold")

    assert "removes the pin" in plan
    dashboard.wait(lambda: "pinned" not in dashboard.text(f'[data-model="{SMALL}"] .states'))


def test_the_playgrounds_numbers_are_the_apis(dashboard: Page) -> None:
    texts = ["The cat sits outside", "Un café, s'il vous plaît <b>& merci</b>", "猫坐在外面"]
    dashboard.driver.execute_script(
        "const box = document.querySelector('#play-texts'); box.value = arguments[0]; "
        "box.dispatchEvent(new Event('input', {bubbles: true}))",
        "\n".join(texts),
    )
    dashboard.find("#play-dimensions").send_keys("64")
    dashboard.find("#play-run").click()
    dashboard.find(".vectors summary")
    for summary in dashboard.driver.find_elements("css selector", ".vectors summary"):
        summary.click()
    dashboard.wait(lambda: dashboard.text(".vectors pre").count("]") == len(texts))
    shown = [json.loads(line) for line in dashboard.text(".vectors pre").splitlines()]
    cells = [float(cell) for cell in dashboard.text(".heat .warmth").split()]
    body = {"model": "all-MiniLM-L6-v2", "input": texts, "dimensions": 64}
    answer = httpx.post(f"{dashboard.url}/v1/embeddings", json=body, headers={"authorization": f"Bearer {KEY}"}).json()
    expected = [item["embedding"] for item in answer["data"]]

    assert np.allclose(shown, expected, rtol=0, atol=1e-6), "to rounding: another call may be cut into other batches"
    for i, left in enumerate(expected):
        for j, right in enumerate(expected):
            dot = sum(a * b for a, b in zip(left, right, strict=True))
            assert cells[i * len(texts) + j] == pytest.approx(dot, abs=0.0051)
    assert f"3 vectors of 64, {answer['usage']['prompt_tokens']} tokens" in dashboard.text(".result")
    assert re.search(r"forward\s+[\d.]+ ms", dashboard.text(".timing-list"))
    assert '"dimensions":64' in dashboard.text("#code")
    assert KEY not in dashboard.text("#code")


def test_the_same_call_can_be_copied_in_three_languages_and_is_kept_by_arrow_keys(dashboard: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    dashboard.find("#tab-curl").click()
    seen = [dashboard.text("#code")]
    for _ in range(2):
        dashboard.press(Keys.ARROW_RIGHT)
        seen.append(dashboard.text("#code"))

    assert [code.split()[0] for code in seen] == ["curl", "import", "const"]
    assert dashboard.focused() == "JavaScript"
    assert all("all-MiniLM-L6-v2" in code and f"{dashboard.url}/v1" in code for code in seen)
    assert not any(KEY in code for code in seen)
    compile(seen[1], "snippet.py", "exec")


def test_a_refusal_in_the_playground_is_the_servers(dashboard: Page) -> None:
    dashboard.driver.execute_script("document.querySelector('#play-dimensions').removeAttribute('max')")
    dashboard.find("#play-dimensions").send_keys("5000")
    dashboard.find("#play-run").click()
    dashboard.wait(lambda: "384" in dashboard.text(".play .error"))

    assert all("400" in message for message in dashboard.take_log())


def test_the_last_minute_is_shown_at_once_with_the_figures_of_the_api(dashboard: Page) -> None:
    texts = ["The cat sits outside"] * 3
    post = {"model": "all-MiniLM-L6-v2", "input": texts}
    headers = {"authorization": f"Bearer {KEY}"}
    httpx.post(f"{dashboard.url}/v1/embeddings", json=post, headers=headers).raise_for_status()
    dashboard.driver.refresh()
    shown = dashboard.wait(
        lambda: re.search(r"([\d.]+) texts/s", dashboard.text('[data-model="all-MiniLM-L6-v2"] .traffic'))
    )
    (minute,) = httpx.get(f"{dashboard.url}/admin/traffic", headers=headers).json()["data"]

    assert shown is not None
    assert float(shown[1]) == pytest.approx(minute["texts_per_s"], rel=0.5)
    assert re.search(r"p50 .+ · p95 .+", dashboard.text('[data-model="all-MiniLM-L6-v2"] .traffic'))
    assert dashboard.find('[data-model="all-MiniLM-L6-v2"] .spark').get_attribute("aria-label")


def test_everything_can_be_done_by_keyboard(dashboard: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    button = f'li[data-model="{SMALL}"] [data-do=preload]'
    dashboard.wait(lambda: dashboard.find(button).is_enabled())
    dashboard.driver.execute_script("document.querySelector(arguments[0]).focus()", button)
    dashboard.press(Keys.ENTER)
    dashboard.find("dialog.plan")
    first = dashboard.focused()
    dashboard.press(Keys.ESCAPE)
    dashboard.wait(lambda: not dashboard.text("dialog.plan"))
    back = dashboard.focused()
    dashboard.press(Keys.ENTER)
    dashboard.find("dialog.plan")
    dashboard.press(Keys.ENTER)
    dashboard.wait_for_state(SMALL, "ready")
    dashboard.do("evict", SMALL)
    dashboard.wait_for_state(SMALL, "cold")

    assert (first, back) == ("Preload", f"Preload {SMALL}")


def test_a_change_of_language_keeps_what_was_written_and_where_the_focus_was(dashboard: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    dashboard.find("#play-texts").clear()
    dashboard.find("#play-texts").send_keys("mine")
    dashboard.driver.execute_script("document.querySelector('#tools [lang]').focus()")
    dashboard.press(Keys.ENTER)
    dashboard.wait(lambda: "模型" in dashboard.text("#models-title"))

    assert dashboard.focused() == "English"
    assert dashboard.find("#play-texts").get_attribute("value") == "mine"


def test_the_page_can_be_chinese_and_stores_the_choice(dashboard: Page) -> None:
    dashboard.find("#tools button").click()
    dashboard.wait(lambda: "模型" in dashboard.text("#models-title"))
    dashboard.driver.refresh()
    dashboard.wait(lambda: "模型" in dashboard.text("#models-title"))

    assert dashboard.driver.execute_script("return document.documentElement.lang") == "zh-CN"
    assert "加载" in dashboard.text(".actions")


@pytest.mark.parametrize(("width", "dark"), [(360, False), (768, True), (1280, True), (1920, False)])
def test_every_screen_shows_it_whole_and_axe_finds_nothing_serious(
    dashboard: Page, axe: str, width: int, *, dark: bool
) -> None:
    dashboard.emulate(width, dark=dark)
    dashboard.find("#play-run").click()
    dashboard.find(".heat")
    overflow = dashboard.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")

    assert overflow <= 0
    assert serious_issues(dashboard, axe) == []


def test_the_sign_in_and_the_plan_have_no_serious_issue(page: Page, dashboard: Page, axe: str) -> None:
    dashboard.open_plan("preload", SMALL)
    plan = serious_issues(dashboard, axe)
    page.open()
    page.find("#key")

    assert plan == []
    assert serious_issues(page, axe) == []


def test_the_first_paint_needs_less_than_150_kb(page: Page, dashboard: Page) -> None:
    page.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    page.received_bytes()
    page.driver.refresh()
    page.find(".model[data-model]")
    received = page.received_bytes()

    assert 10_000 < received < 150_000
    print(f"first paint: {received:,} bytes")  # noqa: T201 - for docs/operations.md; shown by -rP


def write(page: Page, selector: str, value: str) -> None:
    page.driver.execute_script(
        "const box = document.querySelector(arguments[0]); box.value = arguments[1]; "
        "box.dispatchEvent(new Event('input', {bubbles: true}))",
        selector,
        value,
    )


def test_the_playground_is_first_and_a_models_description_is_shown(dashboard: Page) -> None:
    titles = [title.text for title in dashboard.driver.find_elements("css selector", "main h2")]

    assert titles[0] == "Playground"
    assert dashboard.text("#nav a[aria-current]") == "Overview"
    assert "Activity" in dashboard.text(".heads")
    assert dashboard.text('[data-model="all-MiniLM-L6-v2"] .about') == (
        "English; 384 wide, 23 M parameters, 256 tokens. Tiny and fast · Licence: Apache-2.0"
    )


def test_the_space_of_a_loaded_model_is_shown_short_and_copied_whole(dashboard: Page) -> None:
    dashboard.find("#play-run").click()
    dashboard.find(".heat")
    row = '[data-model="all-MiniLM-L6-v2"] .space'
    dashboard.wait(lambda: "s1-" in dashboard.text(f"{row} code:not(.whole)"))
    whole = dashboard.driver.execute_script("return document.querySelector(arguments[0]).textContent", f"{row} .whole")
    short = dashboard.text(f"{row} code:not(.whole)")
    dashboard.find(f"{row} button").click()
    dashboard.wait(lambda: dashboard.text(f"{row} button") == "Copied")

    assert len(whole) == 32
    assert short == f"{whole[:9]}…{whole[-4:]}"


def test_old_results_are_dimmed_while_new_ones_run_and_when_those_fail(dashboard: Page) -> None:
    dashboard.find("#play-run").click()
    dashboard.find(".heat")
    dashboard.wait(lambda: dashboard.find(".result").get_attribute("data-old") is None)
    dashboard.driver.execute_script(
        """
        window.marks = [];
        const result = document.querySelector(".result");
        new MutationObserver(() => marks.push(result.hasAttribute("data-old"))).observe(result, {attributes: true});
        """
    )
    dashboard.find("#play-run").click()
    dashboard.wait(lambda: dashboard.driver.execute_script("return window.marks.at(-1) === false"))
    marks = dashboard.driver.execute_script("return window.marks")
    write(dashboard, "#play-dimensions", "5")
    dashboard.find("#play-run").click()
    dashboard.wait(lambda: dashboard.text(".play .error"))

    assert marks[0] is True
    assert dashboard.find(".result").get_attribute("data-old") is not None
    assert dashboard.find(".result").get_attribute("aria-busy") is None
    dashboard.take_log()


def test_errors_on_the_chinese_page_are_chinese_with_the_servers_words_behind(page: Page) -> None:
    page.open()
    page.find("#tools button").click()
    page.sign_in("wrong")
    page.wait(lambda: page.text(".signin .error") == "密钥错误")
    page.find("#key").clear()
    page.sign_in(KEY)
    page.find(".model[data-model]")
    page.driver.execute_script("document.querySelector('#play-dimensions').removeAttribute('max')")
    page.find("#play-dimensions").send_keys("5000")
    page.find("#play-run").click()
    told = page.wait(lambda: page.text(".play .error"))
    page.take_log()

    assert told.startswith("模型不支持该维度：dimensions is 5000")


def test_the_chinese_examples_are_texts_that_the_default_model_tells_apart(dashboard: Page) -> None:
    dashboard.find("#tools [lang]").click()
    dashboard.wait(lambda: "北京" in (dashboard.find("#play-texts").get_attribute("value") or ""))
    dashboard.find("#play-run").click()
    dashboard.find(".heat")
    cells = [float(cell) for cell in dashboard.text(".heat .warmth").split()]
    pairs = {(i, j): cells[4 * i + j] for i in range(4) for j in range(i)}
    alike = {(1, 0), (3, 2)}

    assert min(pairs[pair] for pair in alike) > 0.1 + max(value for pair, value in pairs.items() if pair not in alike)


def test_the_documentation_switches_its_language_with_the_page(dashboard: Page) -> None:
    dashboard.find("#nav a:last-child").click()
    dashboard.wait(lambda: "Embed texts" in dashboard.text("#swagger-ui"))
    dashboard.find("#language").click()
    dashboard.wait(lambda: "生成向量" in dashboard.text("#swagger-ui"))
    chinese = dashboard.text("#swagger-ui")
    lang = dashboard.driver.execute_script("return document.documentElement.lang")
    dashboard.find("#overview").click()
    dashboard.wait(lambda: "模型" in dashboard.text("#models-title"))

    assert lang == "zh-CN"
    assert "授权" in chinese
    assert "兼容 OpenAI 接口" in chinese
    assert "Embed texts" not in chinese
    assert "List the models" not in chinese
    assert "字段、参数和响应的说明为英文" in chinese


def test_the_documentation_has_the_same_style_and_uses_the_key_of_the_dashboard(dashboard: Page) -> None:
    dashboard.find("#nav a:last-child").click()
    dashboard.find(".opblock-tag")

    assert dashboard.text(".top .brand") == "Embedyard"
    dashboard.find(".authorize.locked")


@pytest.fixture(scope="module")
def quick_server() -> Iterator[ServerProcess]:
    """Start a server with two fake GPUs and no key, which takes a second."""
    dashboard = ServerProcess("--gpus", "2", "--load", "0.2", "--host-gib", "6")
    dashboard.start()
    yield dashboard
    dashboard.stop()


@pytest.fixture(scope="module")
def open_page(quick_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    driver = open_chromium(tmp_path_factory.mktemp("open"))
    page = Page(driver, quick_server.url)
    page.emulate(1280)
    page.open()
    yield page
    assert page.take_log() == []
    driver.quit()


def test_several_devices_stand_side_by_side_each_with_its_own(open_page: Page) -> None:
    for model_id in ("bge-m3", LARGE):  # together too large for one
        open_page.do("preload", model_id)
        open_page.wait_for_state(model_id, "ready")
    open_page.wait(lambda: open_page.text(".device:has(.next) .next ~ .name") == LARGE)  # the other device has room
    cards = [card.text.splitlines()[0] for card in open_page.driver.find_elements("css selector", ".device h3")]
    homes = [open_page.text(f'[data-model="{model_id}"] .states') for model_id in ("bge-m3", LARGE)]
    plan = open_page.open_plan("evict", LARGE)
    open_page.confirm()
    open_page.wait_for_state(LARGE, "cold")

    assert cards == ["cuda:0", "cuda:1"]
    assert {home.rpartition("on ")[2] for home in homes} == {"cuda:0", "cuda:1"}
    assert f"Frees 7.9 GiB on {homes[1].rpartition('on ')[2]}" in plan


def test_parked_models_have_a_bar_and_a_list_of_their_own(open_page: Page, axe: str) -> None:
    open_page.do("preload", "m3e-base")
    open_page.wait_for_state("m3e-base", "ready")
    httpx.post(f"{open_page.url}/admin/models/m3e-base/evict", json={"to": "host"}).raise_for_status()
    open_page.wait_for_state("m3e-base", "parked")
    home = open_page.find(".device:has(.host .name)").text
    label = open_page.find(".device:has(.host .name) .host .bar").get_attribute("aria-label")
    mistakes = serious_issues(open_page, axe)
    open_page.do("evict", "m3e-base")
    open_page.wait_for_state("m3e-base", "cold")

    assert "390 MiB of 6.0 GiB of main memory for parked models" in home
    assert "m3e-base" in home.partition("main memory")[2]
    assert label is not None
    assert label.endswith("m3e-base 390 MiB, free 5.6 GiB")
    assert mistakes == []


@pytest.mark.parametrize("width", [375, 390])
def test_on_a_phone_the_header_is_one_line(open_page: Page, width: int) -> None:
    open_page.emulate(width)
    open_page.wait(lambda: open_page.find('.live[data-live="true"]'))
    middles = (
        "return ['.brand', '#nav', '#tools'].map((name) => document.querySelector(`.top ${name}`)"
        ".getBoundingClientRect()).map((box) => Math.round((box.top + box.bottom) / 2))"
    )
    found = open_page.driver.execute_script(middles)
    open_page.emulate(1280)

    assert max(found) - min(found) <= 1


def test_a_failure_is_shown_with_its_remedy_even_where_another_device_has_not_tried(open_page: Page, axe: str) -> None:
    open_page.do("preload", BROKEN)
    open_page.wait_for_state(BROKEN, "failed")
    open_page.wait(lambda: f"{BROKEN} failed: config.json names code" in open_page.text(".feed"))

    told = open_page.wait(lambda: open_page.text(f'[data-model="{BROKEN}"] .error'))
    assert told.startswith("config.json names code")
    assert "set `trust_remote_code: true`" in told
    assert re.search(r"next try in \d+ s; Preload tries at once", told)
    assert "next attempt after" not in told + open_page.text(".feed")
    assert open_page.find(f'[data-model="{BROKEN}"] [data-do=preload]').is_enabled()
    for dark in (False, True):
        open_page.emulate(1280, dark=dark)
        assert serious_issues(open_page, axe) == []


def test_an_open_server_asks_for_no_key_and_its_page_survives_a_restart(
    quick_server: ServerProcess, open_page: Page
) -> None:
    page = open_page
    page.do("preload", SMALL)
    page.wait_for_state(SMALL, "ready")
    log = page.take_log()
    quick_server.stop()
    page.wait(lambda: "Disconnected" in page.text(".live"))
    quick_server.start()
    page.wait(lambda: page.text(".live") == "Live")
    page.wait_for_state(SMALL, "cold")
    page.do("preload", "bge-m3")
    page.wait_for_state("bge-m3", "ready")
    page.take_log()  # that the server was not there is no fault of the page

    assert log == []
    assert "Connected again" in page.text(".feed")
    assert "bge-m3 is ready" in page.text(".feed")


def choose(page: Page, selector: str, value: str) -> None:
    """Choose an option as a user does."""
    page.wait(lambda: page.driver.find_element("css selector", f'{selector} option[value="{value}"]'))
    page.driver.execute_script(
        "const box = document.querySelector(arguments[0]); box.value = arguments[1]; "
        "box.dispatchEvent(new Event('change', {bubbles: true}))",
        selector,
        value,
    )


def test_the_playground_ranks_documents_with_bars_of_their_scores(dashboard: Page) -> None:
    choose(dashboard, "#play-model", RERANKER)
    dashboard.wait(lambda: dashboard.text("#play-use").strip() == "Rank for a query")
    dashboard.find("#play-run").click()
    dashboard.find(".scores li")
    documents = (dashboard.find("#play-texts").get_attribute("value") or "").splitlines()
    body = {"model": RERANKER, "query": dashboard.find("#play-query").get_attribute("value"), "documents": documents}
    answer = httpx.post(f"{dashboard.url}/v1/rerank", json=body, headers={"authorization": f"Bearer {KEY}"}).json()
    bars = dashboard.driver.execute_script(
        "return [...document.querySelectorAll('.scores li')].map((row) => [row.innerText, "
        "row.querySelector('.fill').offsetWidth / row.querySelector('.track').offsetWidth])"
    )

    dashboard.wait_for_state(RERANKER, "ready")
    assert "reranker" in dashboard.text(f'[data-model="{RERANKER}"] .states')
    assert dashboard.text(f'[data-model="{RERANKER}"] .dimensions .value') == "–"
    assert len(bars) == len(documents) == 4
    for (words, share), result in zip(bars, answer["results"], strict=True):
        assert documents[result["index"]] in words
        assert f"{result['relevance_score']:.4f}" in words
        assert share == pytest.approx(result["relevance_score"], abs=0.02)
    assert "4 documents ranked, " in dashboard.text(".result")
    assert "/v1/rerank" in dashboard.text("#code")
    dashboard.find("#tab-Python").click()
    compile(dashboard.text("#code"), "snippet.py", "exec")


def test_the_playground_ranks_with_an_embedding_model_and_labels_with_a_classifier(dashboard: Page) -> None:
    choose(dashboard, "#play-use", "rerank")
    dashboard.find("#play-run").click()
    dashboard.wait(lambda: "ranked by the cosine of their vectors" in dashboard.text(".result"))
    choose(dashboard, "#play-model", CLASSIFIER)
    dashboard.wait(lambda: dashboard.text("#play-use").strip() == "Label")
    dashboard.find("#play-run").click()
    dashboard.wait(lambda: "4 texts labelled" in dashboard.text(".result"))

    assert set(dashboard.text(".scores .tag").split()) <= {"negative", "neutral", "positive"}
    assert not dashboard.find("#play-query").is_displayed()


def test_the_playground_shows_the_heaviest_terms_once_a_model_is_known_to_have_them(dashboard: Page, axe: str) -> None:
    choose(dashboard, "#play-model", MANY_OUTPUTS)
    assert dashboard.text("#play-use").split("\n") == ["Embed", "Rank for a query"]
    admin = {"authorization": f"Bearer {KEY}"}
    httpx.post(f"{dashboard.url}/admin/models/{MANY_OUTPUTS}/preload", headers=admin)
    choose(dashboard, "#play-use", "sparse")
    dashboard.find("#play-run").click()
    dashboard.find(".terms li")
    texts = (dashboard.find("#play-texts").get_attribute("value") or "").splitlines()
    body = {"model": MANY_OUTPUTS, "input": texts, "outputs": ["sparse"], "sparse_top_k": 12, "return_tokens": True}
    answer = httpx.post(f"{dashboard.url}/v1/embeddings", json=body, headers=admin).json()
    lists = dashboard.driver.execute_script(
        "return [...document.querySelectorAll('.terms')].map((list) => [...list.children].map((row) => "
        "[row.innerText, row.querySelector('.fill').offsetWidth / row.querySelector('.track').offsetWidth]))"
    )

    most = max(max(item["sparse_embedding"]["values"]) for item in answer["data"])
    assert len(lists) == len(texts)
    for rows, item in zip(lists, answer["data"], strict=True):
        terms = item["sparse_embedding"]
        heaviest = sorted(zip(terms["values"], terms["tokens"], strict=True), key=lambda pair: -pair[0])
        assert len(rows) == len(heaviest)
        for (words, share), (weight, token) in zip(rows, heaviest, strict=True):
            assert token in words
            assert f"{weight:.4f}" in words
            assert share == pytest.approx(weight / most, abs=0.03)
    assert '"outputs":["sparse"]' in dashboard.text("#code")
    dashboard.find("#tab-Python").click()
    compile(dashboard.text("#code"), "snippet.py", "exec")
    assert 'extra_body={"outputs": ["sparse"], "sparse_top_k": 12, "return_tokens": True}' in dashboard.text("#code")
    for width, dark in ((390, True), (1280, False)):
        dashboard.emulate(width, dark=dark)
        assert dashboard.driver.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
        assert serious_issues(dashboard, axe) == []
    httpx.post(f"{dashboard.url}/admin/models/{MANY_OUTPUTS}/evict", headers=admin)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, True)])
def test_scores_fit_every_screen(dashboard: Page, axe: str, width: int, *, dark: bool) -> None:
    dashboard.emulate(width, dark=dark)
    choose(dashboard, "#play-model", RERANKER)
    dashboard.find("#play-run").click()
    dashboard.find(".scores li")

    assert dashboard.driver.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    assert serious_issues(dashboard, axe) == []
