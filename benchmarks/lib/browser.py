"""Opens a headless Chromium."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # else imported when a browser opens: selenium is of the group `test`
    from selenium import webdriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
    "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--force-prefers-reduced-motion",
)  # fmt: skip


def open_chromium(profile: Path, *, language: str = "en-US") -> "webdriver.Chrome":
    """Open a browser with an empty profile that logs its console and its requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--lang={language}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(str(DRIVER)))
