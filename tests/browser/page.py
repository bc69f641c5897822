"""Drives the dashboard in a headless Chromium, by methods named after what is on the page."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # else imported when a browser opens: without selenium these tests are skipped
    from selenium import webdriver
    from selenium.webdriver.remote.webelement import WebElement

TIMEOUT_S = 20
Seen = TypeVar("Seen")


class Page:
    """One tab. Methods wait up to `TIMEOUT_S` for the elements that they need."""

    def __init__(self, driver: "webdriver.Chrome", url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, path: str = "/") -> None:
        """Open the page as a new user: no key, no language chosen."""
        self.driver.get(self.url + "/health")
        self.driver.execute_script("sessionStorage.clear(); localStorage.clear()")
        self.take_log()
        self.driver.get(self.url + path)

    def sign_in(self, key: str) -> None:
        self.find("#key").send_keys(key)
        self.find(".signin button").click()

    def wait(self, condition: Callable[[], Seen]) -> Seen:
        """Return the condition's first true value."""
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        waiter = WebDriverWait(self.driver, TIMEOUT_S, 0.05, [NoSuchElementException, StaleElementReferenceException])
        return waiter.until(lambda _: condition())

    def find(self, selector: str) -> "WebElement":
        return self.wait(lambda: self.driver.find_element("css selector", selector))

    def text(self, selector: str) -> str:
        """Return the text of all matching elements, joined; empty without a match."""
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText).join('\\n')"
        found: str = self.driver.execute_script(script, selector)
        return found

    def emulate(self, width: int, *, dark: bool = False) -> None:
        """Emulate a screen of that width, in light or dark mode."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    # ---- models ----

    def state(self, model_id: str) -> str:
        return self.find(f'li[data-model="{model_id}"]').get_attribute("data-state") or ""

    def wait_for_state(self, model_id: str, state: str) -> None:
        self.wait(lambda: self.state(model_id) == state)

    def unfold(self) -> None:
        """Open the line of models that are not on disk."""
        self.wait(lambda: self.find("details.absent summary").is_displayed())
        self.driver.execute_script("document.querySelector('details.absent').open = true")

    def open_plan(self, verb: str, model_id: str) -> str:
        """Press a button of a model's row and return the plan that is shown."""
        self.wait(lambda: self.find(f'li[data-model="{model_id}"] [data-do={verb}]').is_enabled())
        self.find(f'li[data-model="{model_id}"] [data-do={verb}]').click()
        return self.find("dialog.plan").text

    def confirm(self) -> None:
        self.find("dialog.plan [data-do=confirm]").click()

    def do(self, verb: str, model_id: str) -> None:
        self.open_plan(verb, model_id)
        self.confirm()

    def record_states(self, model_id: str) -> None:
        """Start to record every state and progress that the row shows, and its horizontal overflow."""
        self.driver.execute_script(
            """
            const model = arguments[0];
            window.seen = [];
            const note = () => {
                const row = document.querySelector(`li[data-model="${model}"]`); // another one once it is not absent
                window.seen.push([
                    row.dataset.state, row.querySelector(".progress").innerText,
                    document.documentElement.scrollWidth - innerWidth,
                ]);
            };
            const all = {subtree: true, childList: true, attributes: true, characterData: true};
            new MutationObserver(note).observe(document.querySelector("#models-title").closest("section"), all);
            """,
            model_id,
        )

    def recorded(self) -> list[tuple[str, str, int]]:
        return [(state, words, out) for state, words, out in self.driver.execute_script("return window.seen")]

    # ---- console and network ----

    def take_log(self) -> list[str]:
        """Return the errors and warnings on the console since the last call."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]  # untyped in selenium
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requested_urls(self) -> set[str]:
        """Return all URLs requested since the last call of a network method."""
        sent = (params for method, params in self._network() if method == "Network.requestWillBeSent")
        return {params["request"]["url"] for params in sent}

    def received_bytes(self) -> int:
        """Return the bytes received since the last call of a network method, headers included."""
        whole = (params for method, params in self._network() if method == "Network.loadingFinished")
        return sum(int(params["encodedDataLength"]) for params in whole)

    def _network(self) -> list[tuple[str, Any]]:
        entries: list[Any] = self.driver.get_log("performance")  # type: ignore[no-untyped-call]  # as above
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [(message["method"], message["params"]) for message in messages]

    # ---- the keyboard ----

    def press(self, *keys: str) -> None:
        """Send keys to the focused element."""
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver)
        for key in keys:
            chain.send_keys(key)
        chain.perform()

    def focused(self) -> str:
        """Return what a screen reader reads for the focused element: its label, or its text."""
        script = "const e = document.activeElement; return e.getAttribute('aria-label') || e.innerText || e.id"
        found: str = self.driver.execute_script(script)
        return found
